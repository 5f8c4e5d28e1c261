"""Metrics against closed forms and identities; the tables.

A model without training goes through the whole card."""

import itertools
import json
import math
import sys
import types
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from faces2voices import (
    bench as be,
    cards as ca,
    evaluation as ev,
    experiments as ex,
    judges as ju,
    listening as li,
    measures as me,
    studies as st,
)
from faces2voices.audio import MEL, energy, pitch, vowel
from faces2voices.errors import CheckpointError, CorpusError, F2VError, ToolMissingError
from faces2voices.statistics import ratio
from faces2voices.core import TINY, test_same as same
from faces2voices.manifests import Entry, write_manifest
from faces2voices.sentences import best_sentence, collapse
from faces2voices.corpora import Clip


@pytest.fixture(scope="module")
def voice():
    "Two seconds of a vowel whose pitch and loudness move."
    t = torch.arange(32000) / 16000
    return (
        vowel(130 * torch.exp(0.15 * torch.sin(3 * t))) * (0.6 + 0.4 * torch.sin(9 * t))
    ).float() * 0.3


def noisy(wav, db):
    noise = torch.randn(len(wav), generator=torch.Generator().manual_seed(0))
    return wav + noise * wav.std() * 10 ** (-db / 20)


def test_a_perfect_sound_scores_best_and_noise_makes_it_worse(voice):
    pytest.importorskip("pystoi")
    sounds = [voice, noisy(voice, 20), noisy(voice, 10), noisy(voice, 0)]
    estoi = [ev.stoi(s, voice, extended=True) for s in sounds]
    mcd = [ev.mcd(MEL(s), MEL(voice), energy(voice)) for s in sounds]
    assert abs(estoi[0] - 1) < 1e-3 and estoi == sorted(estoi, reverse=True)
    assert mcd[0] < 1e-5 and mcd == sorted(mcd)


@pytest.mark.parametrize("d", (1, 7, 24))
def test_mcd_of_one_cosine_is_its_closed_form(d):
    mel = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    ripple = 0.2 * torch.cos(torch.pi * d * (torch.arange(80) + 0.5) / 80)[:, None]
    assert math.isclose(
        ev.mcd(mel + ripple, mel, torch.zeros(6)), 10 / math.log(10) * 2**0.5 * 0.2, rel_tol=1e-4
    )


def test_mcd_forgets_loudness_and_what_is_finer_than_24_cosines():
    mel = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    ripple = torch.cos(torch.pi * 25 * (torch.arange(80) + 0.5) / 80)[:, None]
    assert (
        ev.mcd(mel + 3, mel, torch.zeros(6)) < 1e-4
        and ev.mcd(mel + ripple, mel, torch.zeros(6)) < 1e-4
    )


def test_mcd_looks_at_speech_alone():
    e, mel = torch.tensor([0.0, -9.0, 0.0]), torch.zeros(80, 6)
    other = mel.clone()
    other[:40, 2:4] = 5.0
    assert ev.mcd(other, mel, e) == 0 and ev.mcd(other, mel, torch.zeros(3)) > 1


def test_pitch_scores():
    f0 = 5 + 0.2 * torch.sin(torch.arange(60) / 7.0)
    a, b = (f0, torch.ones(60)), (f0 + math.log(2) / 12, (torch.arange(60) < 40).float())
    assert math.isclose(ev.f0_error(b, a), 100, rel_tol=1e-3)
    assert len(me.both_voiced(a, b)[0]) == 40 and me.correlation(*me.both_voiced(a, b)) > 0.9999
    assert math.isclose(me.mean_f0(b), (b[0][:40]).mean().item(), rel_tol=1e-6)
    assert math.isnan(me.mean_f0((f0, torch.zeros(60))))


def low_pass(wav, hz):
    once = torchaudio.functional.lowpass_biquad(wav, 16000, hz)
    return torchaudio.functional.lowpass_biquad(once, 16000, hz)


def delay(wav, n):
    return F.pad(wav, (n, 0))[: len(wav)]


DAMAGE = dict(
    noise=(noisy, (20, 10, 0)),
    low_pass=(low_pass, (4000, 2000, 800)),
    delay=(delay, (160, 640, 2560)),
)
# metric → the damages under which it must get worse step by step;
# a perfect copy must have the best score there is
HEARS = dict(
    STOI=("noise", "delay"),
    ESTOI=("noise", "low_pass", "delay"),
    PESQ=("noise", "low_pass", "delay"),
    WER=("noise",),
    **{
        "units heard in speech": ("noise", "low_pass", "delay"),
        "MCD, dB": ("noise", "low_pass", "delay"),
        "voice similarity, Resemblyzer": ("noise", "low_pass"),
        "F0 error, cents": ("noise", "delay"),
        "F0 contour, r": ("noise", "delay"),
        "energy, r": ("noise", "low_pass", "delay"),
    },
)
PERFECT = dict(PESQ=4.644, WER=0) | {"MCD, dB": 0, "F0 error, cents": 0}  # the others: 1


@pytest.fixture(scope="module")
def spoken():
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed (extra `talkers`)")
    from faces2voices.speaking import speak

    text = "william painted eight quiet houses"
    wav = torch.from_numpy(speak(text, f0=120).wav)
    return text, wav[: len(wav) // 640 * 640]


@pytest.fixture(scope="module")
def damaged(spoken):
    return {
        name: [ev.Sound(spoken[1]), *(ev.Sound(damage(spoken[1], x)) for x in degrees)]
        for name, (damage, degrees) in DAMAGE.items()
    }


@pytest.mark.parametrize("metric", HEARS)
def test_perfect_is_best_and_known_damage_is_heard_step_by_step(metric, spoken, damaged, model):
    m = next(m for m in ca.METRICS if m.name == metric)
    if m.needs:
        pytest.importorskip(m.needs)
    text = spoken[0]
    recognisers = {}
    if metric == "WER":
        recognisers["WER"] = ju.pocketsphinx_recogniser("talkers")
    if metric == "units heard in speech":
        model.units.fit([spoken[1]], n_units=20, seed=0)

    def score(sound, truth):
        x = ev.MetricInput(sound, truth, text, model, recognisers)
        return float(np.ravel(ev.MEASURES[metric](x))[0])

    def scores(sounds):
        return [score(sound, sounds[0]) for sound in sounds]

    for damage in HEARS[metric]:
        found = scores(damaged[damage])
        assert math.isclose(found[0], PERFECT.get(metric, 1), abs_tol=2e-3), found
        assert found == sorted(found, reverse=m.better == "↑") and found[0] != found[-1], (
            damage,
            found,
        )


def test_dnsmos_hears_noise(damaged):
    pytest.importorskip("speechmos")
    clean, *_, buried = damaged["noise"]
    assert all(clean.dnsmos[k] > buried.dnsmos[k] for k in ("ovrl_mos", "sig_mos", "bak_mos"))


def test_correlation_agrees_with_its_definition():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    y = y + x
    want = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    assert math.isclose(me.correlation(x, y), want, rel_tol=1e-9) and math.isclose(
        me.correlation(x, -2 * x), -1, rel_tol=1e-9
    )
    assert math.isnan(me.correlation(x, 0 * x)) and math.isnan(me.correlation([1, 2], [1, 2]))


def test_energy_ignores_gain_and_silence(voice):
    e = energy(torch.cat([voice, torch.zeros(16000)]))
    assert ev.energy_correlation(e, e) > 0.9999 and ev.energy_correlation(e, e - 0.5) > 0.99
    hiss = torch.where(e < -9, e + 2, e)
    assert ev.energy_correlation(hiss, e) > 0.9999


def test_word_errors_and_the_micro_average():
    pytest.importorskip("jiwer")
    assert ju.word_errors("a b c", "a b c") == (0, 3) and ju.word_errors("a b c", "") == (3, 3)
    assert ju.word_errors("a b c", "a x c d") == (2, 3)
    assert ratio(np.array([[0, 1], [5, 9]])) == 0.5  # not the mean of 0 and 5/9


def test_shuffled_texts_score_like_guesses():
    pytest.importorskip("jiwer")
    from faces2voices.talkers import make_sentence

    rng = np.random.default_rng(0)
    texts = [make_sentence(rng) for _ in range(400)]
    v = np.array([ju.word_errors(a, b) for a, b in zip(texts, texts[1:] + texts[:1])])
    assert abs(ratio(v) - ju.guess_wer("talkers")) < 0.03


def test_the_texts_choose_their_grammar():
    assert (
        ju.grammar_of(["anna found many green boats"]) == "talkers"
        and ju.grammar_of(["lay white by z zero please"]) == "grid"
    )
    assert ju.grammar_of(["anna found many green boats", "hello"]) == "" and ju.grammar_of([]) == ""
    assert math.isclose(ju.guess_wer("talkers"), 10 / 11) and 0.8 < ju.guess_wer("grid") < 0.82


def test_pocketsphinx_hears_the_world_and_remembers_nothing():
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("espeakng_loader")
    from faces2voices.speaking import speak

    texts = ["lucy likes seven heavy rings", "kevin sells nine blue apples"]
    a, b = (speak(t, f0=120).wav for t in texts)
    listen = ju.pocketsphinx_recogniser("talkers")
    heard = [listen(a), listen(b), listen(a)]
    assert heard[0] == heard[2] and heard[:2] == texts
    assert isinstance(listen(torch.zeros(16000)), str)


def test_the_error_of_a_mean_on_a_card_is_its_standard_error():
    v = np.random.default_rng(1).normal(size=(400, 1))
    rows, errors, intervals = ca.pool_values(
        {
            ("original", "STOI"): dict(enumerate(v)),
            ("original", "ESTOI"): {"c": np.array([0.5])},
            ("original", "MCD, dB"): {"c": np.array([np.nan])},
        }
    )
    assert rows["original"] == {"STOI": round(v.mean(), 5), "ESTOI": 0.5, "MCD, dB": None}
    assert (
        abs(errors["original"]["STOI"] - 0.05) < 0.005
        and errors["original"]["ESTOI"] is errors["original"]["MCD, dB"] is None
    )
    low, high = intervals["original"]["STOI"]
    assert abs(high - low - 2 * 1.96 * 0.05) < 0.025 and low < v.mean() < high
    assert intervals["original"]["ESTOI"] is intervals["original"]["MCD, dB"] is None


@pytest.mark.parametrize("seed", range(4))
def test_viterbi_finds_the_best_of_all_paths(seed):
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    paths = [
        p
        for p in itertools.product(range(6), repeat=5)
        if len(c := collapse(p)) == 2 and c[0] in (1, 2) and c[1] in (3, 4, 5)
    ]
    best = max(paths, key=lambda p: sum(scores[t, s] for t, s in enumerate(p)))
    assert best_sentence(scores, [2, 3]) == collapse(best)
    assert best_sentence(scores[:1], [2, 3]) == []


def test_collapse():
    assert (
        collapse([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2]
        and collapse([0, 0]) == []
        and collapse([3]) == [3]
    )


def test_the_recogniser_hears_eight_tenths_of_a_second():
    mel = torch.randn(1, 80, 400, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ju.Recogniser().eval()(mel, torch.ones(1, 100, dtype=torch.bool))[0, 25].sum().backward()
    assert 60 <= mel.grad[0].abs().sum(0).count_nonzero() <= 80


def test_augmented_mels_keep_their_shape_and_differ():
    torch.manual_seed(0)
    mel = torch.randn(3, 80, 120)
    once, again = ju.augment_speech_mel(mel), ju.augment_speech_mel(mel)
    assert once.shape == mel.shape and once.isfinite().all() and not torch.equal(once, again)
    twice = mel[:1].expand(2, -1, -1)
    assert not torch.equal(ju.augment_speech_mel(twice)[0], ju.augment_speech_mel(twice)[1])


def test_the_flat_start_cuts_the_loud_part_into_equal_words():
    mel = torch.full((1, 80, 192), -2.0)
    mel[..., 48:144] = 1.0
    same(
        ju.flat_start_alignment(mel, torch.tensor([[7, 8, 9, 10, 11, 12]])),
        torch.tensor([[0] * 6 + [7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12] + [0] * 6]),
    )


def tones(text):
    "Each word a quarter of a second of its own pitch, with silence before and after."
    t = torch.arange(4000) / 16000
    return F.pad(
        torch.cat(
            [
                0.3 * torch.sin(2 * torch.pi * (150 + 120 * ju.GRID_WORDS.index(w)) * t)
                for w in text.split()
            ]
        ),
        (6400, 6400 + 640 - 24000 % 640),
    )[:36480]


def test_the_recogniser_learns_two_sentences(tmp_path, monkeypatch):
    "Twelve tones for twelve words: learned in a few steps, written, and never written over."
    pytest.importorskip("jiwer")
    texts = ["bin blue at f two now", "lay white by z zero please"]
    clips = [
        Clip(
            f"g{i}",
            "s1",
            t,
            torch.zeros(57, 1),
            None,
            None,
            None,
            tones(t),
            None,
            None,
            None,
            mel=MEL.normalize(MEL(tones(t))),
        )
        for i, t in enumerate(texts)
    ]
    monkeypatch.setattr(ju, "ClipDataset", lambda data, split: clips if split != "unseen" else [])
    monkeypatch.setattr(ju, "augment_speech_mel", lambda mel: mel)
    model = ju.train_recogniser(
        "data",
        tmp_path / "asr",
        steps=150,
        batch=2,
        command="faces2voices study recogniser data --steps 150",
    )
    assert [ju.ctc_recogniser(model)(c.wav) for c in clips] == texts and ju.ctc_recogniser(model)(
        torch.zeros(100)
    ) == ""
    card = (tmp_path / "asr" / "README.md").read_text()
    assert (
        "| test | 2 | 1 | 0.0 % | 0.0 % |" in card
        and "CC BY 4.0" in card
        and "of speakers s1 (2) " in card
        and "    faces2voices study recogniser data --steps 150\n" in card
    )
    with pytest.raises(CheckpointError, match="stands already"):
        ju.train_recogniser("data", tmp_path / "asr", steps=1)


def test_a_recogniser_that_is_absent_or_broken_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ju, "WEIGHTS_DIR", tmp_path)
    ju.grid_recogniser.cache_clear()
    with pytest.raises(ToolMissingError, match="train_recogniser"):
        ju.grid_recogniser()
    (tmp_path / "grid_asr").mkdir()
    (tmp_path / "grid_asr" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="grid_asr"):
        ju.grid_recogniser()


def test_the_packaged_recogniser_hears_grid(shared):
    pytest.importorskip("jiwer")
    from faces2voices.soundfiles import load_audio
    from faces2voices.manifests import grid_text

    ju.grid_recogniser.cache_clear()
    recognise = ju.grid_recogniser()
    names = (shared / "grid" / "splits" / "s1_test.txt").read_text().split()[:12]
    names = [name.split("_")[-1].split(".")[0] for name in names]
    texts = [grid_text(name) for name in names]
    wavs = [load_audio(shared / "grid" / "s1" / f"{name}.mp4") for name in names]

    def rate(texts, wavs):
        heard = zip(texts, map(recognise, wavs))
        return ratio(np.array([ju.word_errors(text, words) for text, words in heard]))

    clean = rate(texts, wavs)
    assert clean < 0.1
    assert clean <= rate(texts, [noisy(w, 10) for w in wavs])
    assert rate(texts, [noisy(w, 10) for w in wavs]) <= rate(texts, [noisy(w, -10) for w in wavs])
    assert rate(texts, wavs[1:]) > 0.5  # it listens: another sound is not this text


def test_an_absent_package_says_how_to_get_it():
    with pytest.raises(ToolMissingError, match="pip install"):
        ju.import_tool("no_such_metric")


def test_what_has_no_package_says_where_it_comes_from(monkeypatch):
    monkeypatch.delenv("F2V_UTMOS", raising=False)
    ju._utmos_model.cache_clear()
    with pytest.raises(ToolMissingError, match="F2V_UTMOS"):
        ju.utmos(torch.zeros(16000))
    with pytest.raises(ToolMissingError, match="coloured face crops"):
        ju.no_syncnet(None)


def test_a_clone_named_like_the_package_of_dnsmos_leaves_it_alone(tmp_path, monkeypatch):
    ju._utmos_model.cache_clear()
    (tmp_path / "speechmos" / "utmos22").mkdir(parents=True)
    (tmp_path / "speechmos" / "__init__.py").touch()
    (tmp_path / "speechmos" / "utmos22" / "__init__.py").write_text(
        "import torch\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, wav, sr):\n"
        "        assert sr == 16000 and wav.ndim == 2\n"
        "        return wav.mean(1)\n"
    )
    (tmp_path / "hubconf.py").write_text(
        "from speechmos.utmos22 import M\ndef utmos22_strong(): return M()\n"
    )
    monkeypatch.setitem(sys.modules, "speechmos", theirs := types.ModuleType("speechmos"))
    monkeypatch.setenv("F2V_UTMOS", str(tmp_path))
    assert (
        ju.utmos(torch.full((16000,), 0.25)) == 0.25
        and sys.modules["speechmos"] is theirs
        and "speechmos.utmos22" not in sys.modules
    )
    ju._utmos_model.cache_clear()
    monkeypatch.setenv("F2V_UTMOS", str(tmp_path / "speechmos"))
    with pytest.raises(ToolMissingError, match="gave no UTMOS"):
        ju.utmos(torch.zeros(16000))


def entry(name, speaker, text, split):
    return Entry(name, name, speaker, text, split)


def test_clips_that_were_trained_on_are_left_out():
    entries = [
        entry("a", "s1", "x", "train"),
        entry("b", "s1", "y", "test"),
        entry("c", "s2", "x", "test"),
        entry("d", "s2", "z", "test"),
    ]
    kept, out = ca.unseen_clips(entries)
    assert [e.name for e in kept] == ["d"] and (
        out["sentence_trained_on"],
        out["face_trained_on"],
        out["faces_are_new"],
    ) == (1, 1, True)
    kept, out = ca.unseen_clips(entries[:2])  # one speaker: the face cannot be new
    assert [e.name for e in kept] == ["b"] and not out["faces_are_new"]
    assert len(ca.unseen_clips(entries, "train")[0]) == 1
    assert (
        ca.unseen_clips(entries[2:])[1]["faces_are_new"] is None
    )  # a manifest without training clips cannot tell


def made_clip(i, voice, text):
    "A clip whose picture is noise and whose sound is a vowel."
    g = torch.Generator().manual_seed(i)
    wav = (voice if i % 2 else voice.flip(0))[: 640 * (24 + i)]

    def picture(*shape):
        return torch.randint(256, shape, generator=g, dtype=torch.uint8)

    T = len(wav) // 640
    return Clip(
        f"c{i}",
        f"s{i // 2}",
        text,
        picture(T, 96, 96),
        picture(112, 112, 3),
        torch.rand(T, 1152, generator=g),
        torch.zeros(0),
        wav,
        *pitch(wav),
        energy(wav),
        mouth=torch.rand(T, 9, 2, generator=g),
    )


TEXTS = [
    "anna found many green boats",
    "kevin sells nine blue apples",
    "lucy likes seven heavy rings",
    "henry wants three small chairs",
]


@pytest.fixture(scope="module")
def clips(voice):
    return [made_clip(i, voice, t) for i, t in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model():
    from faces2voices.synthesis import FacesToVoices

    torch.manual_seed(0)
    return FacesToVoices(TINY.to_json())


def test_borrowed_faces_and_lips(clips):
    assert (
        ev.wrong_face(clips[0], clips).name == "c2" and ev.wrong_face(clips[3], clips).name == "c0"
    )
    assert ev.wrong_face(clips[0], clips[:2]) is None
    assert (
        ev.wrong_lips(clips[0], clips).name == "c1" and ev.wrong_lips(clips[0], clips[:1]) is None
    )
    longer, shorter = ev.with_lips(clips[3], clips[0]), ev.with_lips(clips[0], clips[3])
    assert len(longer.lips) == len(clips[3].lips) and len(shorter.lips) == len(clips[0].lips)
    same(longer.lips[-1], clips[0].lips[-1])
    same(shorter.lips, clips[3].lips[:24])
    same(shorter.mouth, clips[3].mouth[:24])  # who reads points must not see the clip's own
    same(longer.mouth[:24], clips[0].mouth)
    same(shorter.expression, clips[0].expression)


def test_the_rows_of_a_score(clips, model, monkeypatch):
    """Without the slow or optional judges.

    `original` is perfect, and absent tools are blanks with a reason."""
    pytest.importorskip("pystoi")
    quick = "", "librosa", "pesq", "pystoi"
    monkeypatch.setattr(ca, "METRICS", [m for m in ca.METRICS if m.needs in quick])
    monkeypatch.setattr(ca, "pocketsphinx_recogniser", lambda grammar: lambda wav: "")
    monkeypatch.setitem(sys.modules, "pesq", None)
    rows, errors, reasons = ev.score(model, clips[1:3], steps=1, guidance=1.0, seed=0)
    assert (
        tuple(rows) == ca.CONDITIONS
        and "pip install pesq" in reasons["PESQ"]
        and "PESQ" not in rows["original"]
    )
    first = rows["original"]
    assert (
        first["MCD, dB"] == 0
        and first["units heard in speech"] == 1
        and first["voice similarity"] > 0.999
        and first["energy, r"] > 0.999
    )
    assert "unit accuracy" in rows["synthesised"] and "unit accuracy" not in rows["vocoder"]
    assert [r for r in rows if "voice similarity to the borrowed face" in rows[r]] == [
        "original",
        "wrong face",
    ]
    assert "2 speakers" in reasons["mean F0, r"] and "mean F0, r" not in first
    late = rows["original, shifted 20 ms"]
    assert late["MCD, dB"] > 2 * late["MCD, dB, aligned"] and late["shift, ms"] == 20
    assert first["shift, ms"] == 0 and first["F0 error, cents, aligned"] == 0
    assert first["sex of the voice right"] == 1 and first["median pitch error, cents"] == 0
    card = dict(
        rows=rows,
        errors=errors,
        reasons=reasons,
        clips=2,
        speakers=2,
        seconds_of_speech=3.0,
        left_out=dict(of_split=3, sentence_trained_on=0, faces_are_new=True),
        wer_protocol="",
        command="faces2voices evaluate DATA",
        seconds=1.0,
        machine="here",
        commit="abc1234",
        data={},
    )
    shown = ca.show_card(json.loads(json.dumps(card)))
    assert (
        len({line.count("|") for line in shown.splitlines() if line.startswith("|")}) == 1
        and "pip install pesq" in shown
    )
    assert "95 %" not in shown.split("\n- ")[0]  # a card of before the intervals
    limits = {"synthesised": {"MCD, dB": [1.25, 2.5]}}
    assert "| 1.25 to 2.50 " in ca.show_card(card | dict(intervals=limits))


def test_each_metric_that_is_described_is_measured_and_the_other_way_round():
    assert [m.name for m in ca.METRICS] == list(dict.fromkeys(m.name for m in ca.METRICS))
    assert ev.MEASURES.keys() == {m.name for m in ca.METRICS}


def test_each_metric_stands_in_one_table_of_the_card():
    assert sorted(itertools.chain.from_iterable(ca.TABLES.values())) == sorted(
        m.name for m in ca.METRICS
    )


def test_beginnings_that_were_trained_on_are_told_apart():
    texts = ["bin blue at f two now", "bin blue at f nine soon", "set red by k one again"]
    clips = [Clip(f"c{i}", "s", t, *[None] * 8) for i, t in enumerate(texts)]
    values = {
        ("original", "WER"): {
            "c0": np.array([1, 6]),
            "c1": np.array([2, 6]),
            "c2": np.array([6, 6]),
        },
        ("original", "ESTOI"): {"c0": np.array([1.0])},
    }
    found = ca.by_beginning(values, clips, {"bin blue at f"})
    assert (
        found["trained on"]["clips"] == 2
        and found["new"]["clips"] == 1
        and "ESTOI" not in found["new"]
    )
    rate, low, high = found["trained on"]["WER"]["original"]
    assert (
        math.isclose(rate, 3 / 12)
        and math.isclose(low, 1 / 6, abs_tol=1e-4)
        and math.isclose(high, 2 / 6, abs_tol=1e-4)
        and found["new"]["WER"]["original"] == [1, None, None]
    )
    lines = ca.beginnings_text(dict(by_beginning=json.loads(json.dumps(found))))
    assert (
        "the 2 clips" in lines[0]
        and "original 25.0 % [16.7, 33.3]" in lines[0]
        and "the 1 clips" not in lines[0]
    )
    assert "original 100.0 %" in lines[1] and "[" not in lines[1]  # one clip has no interval
    assert (
        ca.beginnings_text({}) == []
        and ca.beginnings_text(dict(by_beginning=ca.by_beginning(values, clips, set()))) == []
    )


def test_every_speaker_gets_numbers_and_from_ten_clips_on_their_errors():
    people = dict(many=10, few=3, one=1)
    clips = []
    for who, n in people.items():
        clips += [Clip(f"{who}{i}", who, "bin blue at f two now", *[None] * 8) for i in range(n)]
    values = {
        ("synthesised", "WER"): {c.name: np.array([i % 4, 6]) for i, c in enumerate(clips)},
        ("original", "ESTOI"): {"few2": np.array([1.0])},
    }
    found = json.loads(json.dumps(ca.by_speaker(values, clips)))
    assert {who: of["clips"] for who, of in found.items()} == people
    assert found["many"]["rows"] == {"synthesised": {"WER": round(13 / 60, 5)}}
    low, high = found["many"]["intervals"]["synthesised"]["WER"]
    assert low < 13 / 60 < high and found["many"]["errors"]["synthesised"]["WER"] > 0
    assert all(found[who]["errors"] == found[who]["intervals"] == {} for who in ("few", "one"))
    lines = ca.speakers_table(dict(by_speaker=found)).strip().splitlines()
    assert "WER ↓" in lines[0] and "ESTOI" not in lines[0] and len(lines) == 2 + len(people)
    of = {line.split("|")[1].strip(): line for line in lines}
    assert "21.7 ± " in of["many"] and "±" not in of["few"] + of["one"] and "| 3 " in of["few"]
    assert (
        ca.by_speaker(values, clips[:10]) == {}
        and ca.speakers_table({}) == ca.speakers_table(dict(by_speaker={})) == ""
    )


def test_cards_of_before_are_still_shown():
    card = ex.stored_record("grid")
    if card is None:
        pytest.skip("no card of GRID is stored")
    del card["reasons"], card["errors"]
    card.pop("by_beginning", None)
    shown = ca.show_card(
        card | dict(reasons={"LSE-C": "no SyncNet", "LSE-D": "no SyncNet"}, errors={})
    )
    assert "blank: LSE-C, LSE-D, because no SyncNet" in shown and any(
        line.startswith("| LSE-C ↑") for line in shown.splitlines()
    )


SYSTEMS = {"ours": 3.5, "original": 4.5, "griffin": 2.0}


@pytest.fixture()
def asked(tmp_path, voice):
    "A listening test of three systems and four clips."
    page = li.listening_test(
        {
            system: {f"clip {i}": voice[: 16000 + 640 * i] * (i + 1) / 4 for i in range(4)}
            for system in SYSTEMS
        },
        tmp_path / "test",
        seed=1,
    )
    return page, json.loads((tmp_path / "test" / "key.json").read_text())


def write_marks(path, key, who, mark, check=None):
    "The CSV that the page of listener `who` would save."
    rows = [(n, mark(system, clip)) for n, (system, clip) in key["items"].items()] + [
        (n, c if check is None else check) for n, c in key["attention"].items()
    ]
    path.write_text(
        "test,listener,position,item,rating\n"
        + "".join(f"{key['test']},{who},{i},{n},{r}\n" for i, (n, r) in enumerate(rows, 1))
    )
    return path


def test_a_listening_test_is_blind_and_level(asked, tmp_path, voice):
    page, key = asked
    text, sounds = page.read_text(), sorted(page.parent.glob("*.flac"))
    assert len(sounds) == 13 and len(key["items"]) == 12 and len(key["attention"]) == 1
    expected = itertools.product(SYSTEMS, (f"clip {i}" for i in range(4)))
    assert {tuple(v) for v in key["items"].values()} == set(expected)
    assert (
        not any(system in text for system in SYSTEMS)
        and "key" not in [p.stem for p in page.parent.iterdir()]
        and "http" not in text
    )

    assert max(abs(soundfile.read(path)[0].std() - 0.05) for path in sounds) < 0.005
    assert all(f'"{path.stem}"' in text for path in sounds) and ".flac" in text
    order = [s for s, _ in key["items"].values()]
    assert order != sorted(order)
    again = li.listening_test(
        {system: {f"clip {i}": voice[: 16000 + 640 * i] for i in range(4)} for system in SYSTEMS},
        tmp_path / "again",
        seed=1,
    )
    assert json.loads((tmp_path / "again" / "key.json").read_text()) == key and again != page
    with pytest.raises(F2VError, match="already exists"):
        li.listening_test({"a": {"c": voice}}, tmp_path / "test")
    with pytest.raises(CorpusError, match="same clips"):
        li.listening_test({"a": {"c": voice}, "b": {"d": voice}}, tmp_path / "other")


def test_marks_of_known_mean_come_back(asked, tmp_path):
    _, key = asked
    rng = np.random.default_rng(0)

    def exact(system, clip):  # means 3.5, 4.5 and 2
        above = SYSTEMS[system] % 1 > 0 and int(clip[-1]) % 2
        return int(SYSTEMS[system]) + above

    paths = [write_marks(tmp_path / f"{i}.csv", key, f"l{i}", exact) for i in range(5)] + [
        write_marks(tmp_path / "a.csv", key, "asleep", lambda *_: 3, check=1)
    ]
    found, asleep = li.mean_opinion_scores(paths, tmp_path / "test" / "key.json")
    assert asleep == ["asleep"] and {s: o.estimate for s, o in found.items()} == SYSTEMS
    assert (
        found["griffin"] == (2.0, 2.0, 2.0, 0.0, 20)
        and found["ours"].low < 3.5 < found["ours"].high
    )
    with pytest.raises(CorpusError, match="passed the attention check"):
        li.mean_opinion_scores(paths[-1:], tmp_path / "test" / "key.json")
    with pytest.raises(CorpusError, match="second file of listener"):
        li.mean_opinion_scores([paths[0], paths[0]], tmp_path / "test" / "key.json")


def test_a_table_of_opinions_names_who_was_left_out():
    shown = li.show_mos(
        dict(
            clips=4,
            listeners=5,
            left_out=["ann"],
            systems=dict(b=dict(mos=2.0, low=1.5, high=2.5), a=dict(mos=3.25, low=3.0, high=3.5)),
        )
    )
    assert (
        shown.index("3.25") < shown.index("2.00")
        and "3.00 to 3.50" in shown
        and "5 listeners, 4 clips" in shown
        and "ann" in shown
    )


def test_sounds_in_a_folder(tmp_path, voice):
    from faces2voices.soundfiles import save_wav

    with pytest.raises(CorpusError, match="holds no .wav"):
        li.read_sounds(tmp_path)
    save_wav(tmp_path / "a b.wav", voice)
    (tmp_path / "c.mp4").write_bytes(b"a film that is not looked at beside a wav")
    found = li.read_sounds(tmp_path)
    assert list(found) == ["a b"]
    same(found["a b"], voice, atol=2**-14)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"test": "x", "items": [], "attention": {}}'])
def test_a_key_that_is_none_is_refused_by_name(tmp_path, text):
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(CorpusError, match="key.json: is not the key of a listening test"):
        li.read_key(tmp_path / "key.json")


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda t: t.replace("item,", "thing,"), "KeyError"),
        (lambda t: t.replace(",3\n", ",9\n"), "between 1 and 5"),
        (lambda t: t.replace(",3\n", ",good\n"), "invalid literal"),
        (lambda t: "\n".join(t.splitlines()[:-2]), "missing"),
        (lambda t: t + t.splitlines()[1] + "\n", "doubled"),
        (lambda t: t.replace("l0", "l1", 1), "several"),
        (lambda t: t[:40], "not a whole set"),
        (lambda t: "", "not of this test"),
        (lambda t: "\x00\xff" * 40, "CorpusError|not a whole"),
        (lambda t: t + "#" * 1_000_001, "over 1 MB"),
    ],
)
def test_spoilt_marks_are_refused_by_name(asked, tmp_path, spoil, why):
    path = write_marks(tmp_path / "m.csv", asked[1], "l0", lambda *_: 3)
    assert li.read_ratings(path, asked[1])[0] == "l0"
    path.write_text(spoil(path.read_text()), encoding="latin-1")
    with pytest.raises(CorpusError, match=why) as e:
        li.read_ratings(path, asked[1])
    assert "m.csv" in str(e.value)


@pytest.mark.parametrize("n", (-960, -880, -320, 0, 80, 400, 960))
def test_a_shift_of_a_known_time_is_found_and_undone(spoken, n):
    pytest.importorskip("pystoi")
    wav = F.pad(spoken[1], (1600, 1600))  # nothing is lost by moving it
    assert ev.best_shift(ev.shift_sound(wav, n), wav) == -n
    x = ev.MetricInput(ev.Sound(ev.shift_sound(wav, n)), ev.Sound(wav), "", None, {})
    assert x.shift == -n
    same(x.aligned.wav, wav)
    assert (x.aligned is x.sound) == (n == 0)


def test_a_shift_out_of_reach_is_not_found(spoken):
    pytest.importorskip("pystoi")
    wav = F.pad(spoken[1], (3200, 3200))
    for n in (1600, -1600):
        found = ev.best_shift(ev.shift_sound(wav, n), wav)
        assert abs(found) <= 960 and found * n < 0  # as near as the search may go


def test_the_search_gives_little_to_a_sound_that_has_nothing_to_do_with_the_original(spoken):
    pytest.importorskip("pystoi")
    wav = spoken[1]
    noise = 0.05 * torch.randn(len(wav), generator=torch.Generator().manual_seed(1))
    plain = ev.stoi(noise, wav, True)
    aligned = ev.stoi(ev.shift_sound(noise, ev.best_shift(noise, wav)), wav, True)
    assert plain <= aligned < plain + 0.1


def test_what_is_shifted_keeps_its_length_and_loses_its_end():
    wav = torch.arange(1.0, 6.0)
    assert ev.shift_sound(wav, 2).tolist() == [0, 0, 1, 2, 3]
    assert ev.shift_sound(wav, -2).tolist() == [3, 4, 5, 0, 0]
    assert ev.shift_sound(wav.numpy(), 0).tolist() == wav.tolist()


def test_the_aligned_measures_are_the_plain_ones_of_the_moved_sound(spoken):
    "One shift for all of them: none chooses its own."
    pytest.importorskip("pystoi")
    pytest.importorskip("librosa")
    wav = spoken[1]
    known = {m.name: m for m in ca.METRICS}
    timed = [known[name] for name in ca.TIMED if name != "PESQ"]
    late = ev.MetricInput(
        ev.Sound(noisy(ev.shift_sound(wav, 240), 15)), ev.Sound(wav), "", None, {}
    )
    moved = ev.MetricInput(
        ev.Sound(ev.shift_sound(late.sound.wav, late.shift)), ev.Sound(wav), "", None, {}
    )
    assert late.shift == -240
    for m in timed:
        aligned = known[f"{m.name}, aligned"]
        plain, of_aligned = ev.MEASURES[m.name], ev.MEASURES[aligned.name]
        assert math.isclose(of_aligned(late), plain(moved), rel_tol=1e-9)
        assert (aligned.better, aligned.pool) == (m.better, m.pool)
        sign = 1 if m.better == "↑" else -1
        assert sign * (plain(moved) - plain(late)) > 0
    assert ev.MEASURES["shift, ms"](late) == 15


def test_time_alone_costs_estoi_and_no_words(spoken):
    pytest.importorskip("pystoi")
    pytest.importorskip("librosa")
    text, wav = spoken
    values = ev.measure_shifts({"a": (wav, text)}, lambda wav: text, (0, 10, 40))
    rows = ca.pool_values(values).rows
    assert list(rows) == [0, 10, 40] and all(r["WER"] == 0 for r in rows.values())
    assert rows[0]["ESTOI"] > 0.999 > rows[10]["ESTOI"] > rows[40]["ESTOI"]
    assert rows[0]["MCD, dB"] < rows[10]["MCD, dB"] < rows[40]["MCD, dB"]


def test_a_study_of_shifts_takes_the_clips_of_a_split(tmp_path, clips, monkeypatch):
    pytest.importorskip("pystoi")
    pytest.importorskip("librosa")
    from faces2voices.corpora import save_clip

    monkeypatch.setattr(st, "pocketsphinx_recogniser", lambda grammar: lambda wav: grammar)
    monkeypatch.setattr(ev, "word_errors", lambda text, words: (words != "talkers", 1))
    entries = []
    for c, split in zip(clips, ("test", "train", "test", "test")):
        save_clip(c, tmp_path / f"{c.name}.npz")
        more = dict(frames=len(c.lips), sound=True)
        path = tmp_path / f"{c.name}.mp4"
        entries.append(Entry(c.name, path, c.speaker_id, c.text, split, extra=more))
    write_manifest(entries, tmp_path / "manifest.jsonl")
    found = json.loads(json.dumps(st.shift_study(tmp_path, limit=2, milliseconds=(0, 20))))
    assert found["clips"] == 2 and found["speakers"] == ["s0", "s1"]
    assert found["rows"]["0"]["WER"] == 0 and found["rows"]["0"]["ESTOI"] > 0.99
    assert found["rows"]["20"]["ESTOI, aligned"] > found["rows"]["20"]["ESTOI"]
    assert len(found["intervals"]["20"]["ESTOI"]) == 2
    with pytest.raises(CorpusError, match="of the split val"):
        st.shift_study(tmp_path, "val")


def tune(hz, voiced=20):
    "A steady pitch in some of twenty frames, with an octave slip in one of them."
    log_f0 = torch.full((20,), math.log(hz))
    log_f0[0] += math.log(2)
    return log_f0, (torch.arange(20) < voiced).float()


def test_the_sex_of_a_voice_is_the_originals_side_of_the_boundary():
    man, deep, woman, high = (tune(hz) for hz in (110.0, 90.0, 180.0, 260.0))
    silent = tune(110.0, voiced=0)
    right = me.same_sex_of_voice
    assert right(man, deep) == right(woman, high) == right(high, woman) == 1
    assert right(man, woman) == right(high, deep) == 0
    assert right(silent, man) == right(silent, woman) == 0  # no pitch is no right pitch
    assert right(man, silent) is right(silent, silent) is None


def test_the_pitch_level_is_a_median_and_its_error_is_in_cents():
    assert math.isclose(me.median_f0(tune(110.0)), 110, rel_tol=1e-5)
    up = 110 * 2 ** (300 / 1200)
    for a, b in ((110.0, up), (up, 110.0)):
        assert math.isclose(me.pitch_level_error(tune(a), tune(b)), 300, rel_tol=1e-4)
    assert me.pitch_level_error(tune(110.0), tune(110.0)) == 0
    for a, b in ((tune(110.0, 0), tune(110.0)), (tune(110.0), tune(110.0, 0))):
        assert math.isnan(me.pitch_level_error(a, b))


def test_silence_gains_nothing_on_the_card():
    "A clip without pitch has no error of its level, and counts as the wrong sex."
    values = {
        ("synthesised", "sex of the voice right"): {
            c: np.array([x]) for c, x in zip("abcd", (1.0, 1.0, 1.0, 0.0))
        },
        ("synthesised", "median pitch error, cents"): {
            c: np.array([x]) for c, x in zip("abcd", (100.0, 200.0, 900.0, np.nan))
        },
    }
    pooled = ca.pool_values(values)
    card = dict(rows=pooled.rows, errors={}, intervals=pooled.intervals)
    assert ca.score_text(card, "synthesised", "sex of the voice right") == "75.0 %"
    assert ca.score_text(card, "synthesised", "median pitch error, cents") == "200"
    assert ca.interval_text(card, "synthesised", "median pitch error, cents") == "100 to 900"
    assert ca.interval_text(card, "synthesised", "sex of the voice right").endswith("100.0 %")
    assert (
        ca.interval_text(card, "original", "WER") == ca.interval_text({}, "original", "WER") == ""
    )


def test_people_who_are_all_new_are_judged_on_all_that_is_new():
    "As in splits/many.tsv: people of the test split were trained on, those of `unseen` never."
    entries = [
        *(entry(f"a{i}", who, f"x{i}", "train") for i, who in enumerate(["s1", "s1", "s2"])),
        entry("b", "s1", "y", "test"),
        entry("c", "s2", "x0", "test"),
        entry("d", "s10", "z", "unseen"),
        entry("e", "s11", "x1", "unseen"),
        entry("f", "s11", "w", "unseen"),
    ]
    kept, out = ca.unseen_clips(entries, "unseen")
    assert [e.name for e in kept] == ["d", "f"] and out["faces_are_new"] is True
    assert (out["of_split"], out["sentence_trained_on"], out["face_trained_on"]) == (3, 1, 0)
    kept, out = ca.unseen_clips(entries, "test")
    assert [e.name for e in kept] == ["b"] and out["faces_are_new"] is False


def test_of_the_people_of_many_tsv_no_clip_is_left_out(shared):
    from faces2voices.manifests import grid_text

    entries = []
    for line in (shared / "grid" / "splits" / "many.tsv").read_text().splitlines()[1:]:
        who, name, split, _ = line.split("\t")
        entries.append(entry(f"{who}_{name}", who, grid_text(name), split))
    for split, n, new in (("test", 63, False), ("unseen", 34, True)):
        kept, out = ca.unseen_clips(entries, split)
        assert len(kept) == out["of_split"] == n and out["faces_are_new"] is new
        assert out["sentence_trained_on"] == 0


def test_distillmos_is_a_column_that_says_why_it_is_blank(clips, model, monkeypatch):
    def absent(wav):
        raise ToolMissingError("distillmos", "is not installed", "pip install distillmos")

    mos = next(m for m in ca.METRICS if m.name == "DistillMOS")
    monkeypatch.setattr(ca, "METRICS", [mos])
    monkeypatch.setattr(ca, "pocketsphinx_recogniser", lambda grammar: lambda wav: "")
    monkeypatch.setattr(ev, "distillmos", absent)
    rows, _, reasons = ev.score(model, clips[:2], steps=1, guidance=1.0, seed=0)
    assert rows == {} and "pip install distillmos" in reasons["DistillMOS"]
    monkeypatch.setattr(ev, "distillmos", lambda wav: 3.5)
    rows, _, reasons = ev.score(model, clips[:2], steps=1, guidance=1.0, seed=0)
    assert {row: r["DistillMOS"] for row, r in rows.items()} == dict.fromkeys(
        ("original", "vocoder", "synthesised"), 3.5
    )


def test_claims_are_paired_over_the_clips():
    "Clips differ far more than the rows do: the pairs see what the means alone cannot."
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 1, 30)
    better = easy + 0.02 + 0.01 * rng.normal(size=30)
    clip = [f"c{i}" for i in range(30)]

    def values(a, b):
        column = {c: np.array([x]) for c, x in zip(clip, a)}
        other = {c: np.array([x]) for c, x in zip(clip[:-1], b)}  # one clip has no pair
        name = "voice similarity"
        return {("synthesised", name): column, ("wrong face", name): other}

    claim = "with another face, the voice is less the clip's own"

    def holds(v):
        pooled = ca.pool_values(v)
        card = dict(rows=pooled.rows, errors=pooled.errors)
        paired = dict(claims=json.loads(json.dumps(ev.paired_claims(v))))
        return [dict((c, h) for c, h, _ in ca.claims(x))[claim] for x in (card, card | paired)]

    assert holds(values(better, easy)) == [False, True]
    assert holds(values(easy, better)) == [False, False]
    found = ev.paired_claims(values(better, easy))
    assert list(found) == [claim] and found[claim]["clips"] == 29
    assert found[claim]["low"] < found[claim]["difference"] < found[claim]["high"]
    assert math.isclose(found[claim]["difference"], (better - easy)[:-1].mean(), abs_tol=1e-4)


def test_a_paired_claim_pools_rates_before_it_compares_them():
    "Lower is better, and long sentences weigh more."
    face = {"a": np.array([1, 2]), "b": np.array([0, 8]), "c": np.array([1, 2])}
    lips = {"a": np.array([2, 2]), "b": np.array([8, 8]), "c": np.array([1, 2])}
    found = ev.paired_claims({("wrong face", "WER"): face, ("wrong lips", "WER"): lips})
    claim = "another face costs fewer words than other lips"
    assert math.isclose(found[claim]["difference"], 11 / 12 - 2 / 12, abs_tol=1e-4)


def test_claims_need_two_standard_errors():
    def card(borrowed, error):
        rows = {"mean F0 of the borrowed face, r": borrowed, "mean F0, r": 0.1}
        errors = {"mean F0 of the borrowed face, r": error}
        return dict(rows={"wrong face": rows}, errors={"wrong face": errors})

    def verdict(*numbers):
        return {claim: holds for claim, holds, _ in ca.claims(card(*numbers))}

    name = "with another face, mean pitch follows the borrowed face"
    assert (
        verdict(0.9, 0.1)[name] is True
        and verdict(0.9, 0.5)[name] is False
        and verdict(0.05, 0.0)[name] is False
    )
    assert sum(v is not None for v in verdict(0.9, 0.1).values()) == 1
    lips = dict(
        rows={"wrong lips": {"WER of the borrowed lips": 0.1, "WER": 0.9}}, errors={}
    )  # lower is better
    assert ca.claims(lips)[0][1] is True


def test_a_corpus_of_known_sentences_is_an_error(tmp_path):
    entries = [entry("a", "s", "x", "train"), entry("b", "s", "x", "test")]
    write_manifest(entries, tmp_path / "manifest.jsonl")
    with pytest.raises(CorpusError, match="not trained on"):
        ca.test_clips(tmp_path)


def test_a_perfect_mu_is_judged_perfect(clips, model):
    from faces2voices.corpora import with_targets
    from faces2voices.hierarchy import Mu

    clip = with_targets(clips[0], None, model.speaker_encoder)

    def perfect(*_):
        return Mu(clip.mel[None], torch.zeros(1, 256), None, None)

    perfect.inputs = model.hierarchy.inputs
    row = st.evaluate_mu(perfect, clip, model.speaker_encoder)
    assert row["error, dB"] == 0 and row["voice similarity"] > 0.999 and row["energy, r"] > 0.999
    assert math.isclose(row["prior loss"], 0.5 * math.log(2 * math.pi), rel_tol=1e-5)


def test_interleaved_takes_turns():
    order = []
    times = be.interleave_runs(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2
    )
    assert order == list("ababab") and set(times) == {"a", "b"}


def test_bench_prints_ratios(model):
    text = be.bench_vocoder(model, 0.4, 1, steps=1)
    assert "times as fast as Griffin-Lim" in text and "1 interleaved rounds" in text


def test_ledger_leaves_blank_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("faces2voices.records.RESULTS", tmp_path)
    rows = {r[0]: r for r in ex.ledger()}
    assert rows["MOS naturalness"][1].startswith("4.49") and all(
        r[3] == r[4] == r[5] == "" for r in rows.values()
    )
    card = dict(
        rows=dict(synthesised={"WER": 0.25, "ESTOI": 0.5}, original={"WER": 0.1}),
        errors={},
        command="faces2voices evaluate X",
        data={"X": dict(clips=2, commands=["faces2voices prepare Y X"])},
        clips=2,
        wer_protocol="p",
    )
    (tmp_path / "grid.json").write_text(json.dumps(card))
    rows = {r[0]: r for r in ex.ledger()}
    assert (
        rows["WER"][3:] == ("", "25.0 % (original 10.0 %)", "")
        and rows["ESTOI"][4] == "0.500"
        and rows["UTMOS"][4] == ""
    )
    (tmp_path / "grid-unseen.json").write_text(json.dumps(card))
    assert {r[0]: r for r in ex.ledger()}["ESTOI"][3:] == ("", "0.500", "0.500")
    assert all(
        f"`faces2voices {line}`" in ex.ledger_markdown() for line in ("evaluate X", "prepare Y X")
    )


def test_an_independent_judge_hears_who_speaks(shared):
    pytest.importorskip("resemblyzer", reason="resemblyzer is not installed (extra `judges`)")
    from faces2voices.soundfiles import load_audio

    one, other = (sorted((shared / "grid" / speaker).glob("*.mp4")) for speaker in ("s1", "s4"))
    a, b, c = (ev.Sound(load_audio(path)).voice for path in (one[0], one[1], other[0]))
    same(torch.tensor(float(a @ a)), torch.tensor(1.0), atol=1e-4)
    assert a @ b > a @ c


def test_all_splits_leave_out_what_was_trained_on(tmp_path):
    kept, left_out = ca.unseen_clips(
        [
            entry("a", "s", "x", "train"),
            entry("b", "t", "y", ""),
            entry("c", "t", "x", "val"),
            entry("d", "s", "z", "test"),
        ],
        None,
    )
    assert (
        [e.name for e in kept] == ["b"]
        and left_out["faces_are_new"]
        and left_out["sentence_trained_on"] == 2
    )
    kept, left_out = ca.unseen_clips([entry("a", "s", "x", ""), entry("b", "t", "y", "")], None)
    assert [e.name for e in kept] == ["a", "b"] and left_out["faces_are_new"] is None
