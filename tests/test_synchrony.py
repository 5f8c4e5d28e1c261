"""Sound and lips in step.

An offset that was made is found, stored and mended; where speech is judged nothing is mended."""

import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from faces2voices import synchrony
from faces2voices.audio import energy, vowel
from faces2voices.core import GRID_WORDS, TINY, seeded, test_same
from faces2voices.corpora import Clip, ClipDataset, collate, move_sound, save_clip, with_targets
from faces2voices.errors import CorpusError, F2VError
from faces2voices.lipreading import LipReader
from faces2voices.manifests import Entry, Word, read_manifest, write_manifest
from faces2voices.mouths import prepared_mouths
from faces2voices.preparing import write_targets
from faces2voices.runs import clips_identity, training_clips
from faces2voices.statistics import shrink_values
from faces2voices.synchrony import Offset, agreement, best_offset, clip_offset, store_offsets

SAID = "lay white in z four please".split()
EDGES = [0.6, 0.87, 1.13, 1.21, 1.42, 1.66, 2.04]


def sentence(start=0.0, speed=1.0):
    "Word times of a sentence."
    edges = [start + speed * edge for edge in EDGES]
    return tuple(Word(*edges[i : i + 2], word) for i, word in enumerate(SAID))


def beliefs(words, late, T=75, noise=0.0, seed=0):
    "What a reader believes that sees each word as late as it is told to, frame by frame."
    times = np.arange(40 * T) / 1000 + 0.0005  # milliseconds
    label = np.zeros(40 * T, int)
    for start, end, word in words:
        label[(times >= start + late) & (times < end + late)] = 1 + GRID_WORDS.index(word)
    share = torch.nn.functional.one_hot(torch.from_numpy(label), 52).float()
    share = share.unflatten(0, (T, 40)).mean(1)
    rng = torch.Generator().manual_seed(seed)
    scores = (0.9 * share + 0.1 / 52).log()
    return (scores + noise * torch.randn(T, 52, generator=rng)).log_softmax(-1)


def made_clip(name, speaker_id="ann", T=20, f0=150.0):
    "A vowel that comes and goes, random pictures, and a mouth that moves."
    g = torch.Generator().manual_seed(len(name) + ord(name[-1]))
    loud = torch.hann_window(640 * T) + 0.01 * torch.rand(640 * T, generator=g)
    wav = 0.3 * loud * vowel(torch.full((640 * T,), f0)).float()
    return Clip(
        name,
        speaker_id,
        "ah",
        torch.randint(256, (T, 96, 96), generator=g).byte(),
        torch.randint(256, (112, 112, 3), generator=g).byte(),
        torch.rand(T, 6, generator=g),
        torch.ones(4) / 2,
        wav,
        torch.linspace(4.8, 5.2, 2 * T),
        (torch.arange(2 * T) % 10 < 7).float(),
        energy(wav),
        mouth=torch.randn(T, 9, 2, generator=g),
    )


@pytest.fixture()
def folder(tmp_path):
    "Prepared clips of two people, all with word times but one."
    entries = []
    for i, split in enumerate(["train"] * 4 + ["val"] + ["test"] * 3):
        name = f"c{i}"
        save_clip(made_clip(name, "ab"[i % 2], f0=110.0 + 20 * i), tmp_path / f"{name}.npz")
        extra = dict(frames=20, sound=True, note=f"kept {i}")
        if name != "c3":
            extra["words"] = [[0.2, 0.4, "bin"], [0.4, 0.6, "blue"]]
        entries.append(Entry(name, tmp_path / f"{name}.mp4", "ab"[i % 2], "ah", split, extra))
    write_manifest(entries, tmp_path / "manifest.jsonl")
    return tmp_path


def tell(folder, offsets: dict):
    "Store offsets, each with an error of a millisecond."
    store_offsets(folder, {name: Offset(x, 0.001) for name, x in offsets.items()})


# offsets


@pytest.mark.parametrize("late", [-0.13, -0.052, -0.02, -0.007, 0.0, 0.011, 0.034, 0.06, 0.127])
@pytest.mark.parametrize("start", [0.0, 0.013])
def test_a_known_offset_is_found_with_its_sign(late, start):
    words = sentence(start, 0.97)
    found = clip_offset(beliefs(words, late), words)
    assert found.seconds == pytest.approx(late, abs=0.004)
    assert found.error < 0.006


def test_noise_has_no_offset():
    found = [clip_offset(torch.randn(75, 52).log_softmax(-1), sentence()) for _ in range(30)]
    assert np.median([x.error for x in found]) > 0.05


def test_the_error_that_is_told_is_the_error_that_is_made():
    words = sentence()
    found = [clip_offset(beliefs(words, 0.02, noise=3.0, seed=i), words) for i in range(120)]
    made = np.std([x.seconds for x in found])
    told = np.mean([x.error**2 for x in found]) ** 0.5
    assert 0.002 < made < 0.02 and 0.6 < told / made < 1.7


def test_an_unknown_word_tells_nothing():
    words = sentence()
    odd = tuple(w._replace(text="mauve") if w.text == "white" else w for w in words)
    assert clip_offset(beliefs(words, 0.04), odd).seconds == pytest.approx(0.04, abs=0.005)


def test_a_best_shift_at_the_end_of_the_range_is_none():
    words = sentence()
    assert clip_offset(beliefs(words, 0.4), words).error == pytest.approx(0.16)
    assert best_offset(torch.arange(33.0)[None]).error == pytest.approx(0.16)


def test_readers_that_agree_and_readers_that_do_not():
    rng = np.random.default_rng(0)
    a = {str(i): Offset(x, 0.01) for i, x in enumerate(rng.normal(0, 0.02, 200))}
    same = {k: Offset(x.seconds + 0.01, 0.01) for k, x in a.items()}
    assert agreement(a, same)[1:] == pytest.approx((1, 0, 0.01), abs=1e-6)
    other = {k: Offset(x, 0.01) for k, x in zip(a, rng.normal(0, 0.02, 200))}
    assert abs(agreement(a, other).r) < 0.2
    assert agreement(a, other).sd == pytest.approx(0.0283, rel=0.2)
    assert np.isnan(agreement(a, {}).r)


# what is stored


def test_offsets_are_stored_beside_what_stood_there(folder):
    before = read_manifest(folder / "manifest.jsonl")
    tell(folder, dict(c0=0.02, c1=-0.01))
    tell(folder, dict(c0=0.031))
    after = read_manifest(folder / "manifest.jsonl")
    assert after[0].extra.pop("offset") == [0.031, 0.001]
    assert after == before  # and the offset of c1 is gone


def test_offsets_that_cannot_be_written_leave_the_manifest_whole(folder):
    tell(folder, dict(c0=0.02))
    before = (folder / "manifest.jsonl").read_bytes()
    with pytest.raises(TypeError):
        store_offsets(folder, dict(c1=Offset(None, 0.0)))
    assert (folder / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("offset", [3, [0.1], ["a", "b"], [9.0, 0.1], [0.1, -1], [float("nan"), 1]])
def test_an_offset_that_is_none_is_named(folder, offset):
    entries = read_manifest(folder / "manifest.jsonl")
    entries[1] = entries[1]._replace(extra=entries[1].extra | dict(offset=offset))
    write_manifest(entries, folder / "manifest.jsonl", overwrite=True)
    with pytest.raises(CorpusError, match="offset of c1"):
        ClipDataset(folder, synchronised=True)
    assert len(ClipDataset(folder)) == 8


def test_offsets_belong_to_the_data_only_where_they_are_used(folder):
    plain, used = clips_identity(folder), clips_identity(folder, offsets=True)
    assert plain == used
    tell(folder, dict(c0=0.02, c1=0.01))
    assert clips_identity(folder) == plain
    assert clips_identity(folder, offsets=True) != used


# what is mended


@pytest.mark.parametrize("steps", [3, -2])
def test_everything_that_is_heard_moves_alike(steps):
    clip = made_clip("a")._replace(word_times=(Word(0.2, 0.4, "bin"),))
    moved = move_sound(clip, steps / 50)
    a, b = slice(max(steps, 0), 40 + min(steps, 0)), slice(max(-steps, 0), 40 - max(steps, 0))
    test_same(moved.wav.unflatten(0, (40, 320))[a], clip.wav.unflatten(0, (40, 320))[b])
    test_same(moved.log_f0[a], clip.log_f0[b], atol=1e-6)
    test_same(moved.voiced[a], clip.voiced[b])
    test_same(moved.energy[a][1:-1], clip.energy[b][1:-1], atol=1e-5)
    assert moved.word_times[0][:2] == pytest.approx((0.2 + steps / 50, 0.4 + steps / 50))
    assert moved.wav.abs().min() < moved.wav.abs().max() and len(moved.wav) == len(clip.wav)
    assert all(x is y for x, y in zip(moved[3:7], clip[3:7])) and moved.mouth is clip.mouth


def test_part_of_a_step_lies_between_two_steps():
    clip = made_clip("a")
    moved = move_sound(clip, 0.005)
    test_same(moved.wav[80:], clip.wav[:-80])
    between = 0.75 * clip.log_f0[1:] + 0.25 * clip.log_f0[:-1]
    test_same(moved.log_f0[1:], between, atol=1e-6)
    test_same(moved.voiced, clip.voiced)


def test_no_silence_comes_in():
    wav = torch.ones(12800)
    moved = move_sound(made_clip("a")._replace(wav=wav), 0.02)
    test_same(moved.wav, wav)


def test_after_mending_the_words_fit_the_lips():
    "Lips that are 60 ms late say at frame t what the moved words say there."
    clip = made_clip("a")._replace(word_times=(Word(0.2, 0.4, "bin"), Word(0.4, 0.6, "blue")))
    late = tuple(Word(s + 0.06, e + 0.06, w) for s, e, w in clip.word_times)
    of_lips = with_targets(clip._replace(word_times=late), words=GRID_WORDS).words
    test_same(with_targets(move_sound(clip, 0.06), words=GRID_WORDS).words, of_lips)


def test_what_is_known_badly_is_moved_little(folder):
    sure = dict(c0=Offset(0.03, 0.001), c1=Offset(-0.03, 0.001), c2=Offset(0.03, 0.001))
    store_offsets(folder, sure | dict(c4=Offset(-0.03, 0.001), c5=Offset(0.15, 0.16)))
    shifts = ClipDataset(folder, synchronised=True).shifts
    assert shifts["c0"] - shifts["c1"] == pytest.approx(0.06, abs=0.001)
    assert abs(shifts["c5"]) < 0.02 and "c3" not in shifts


def test_what_all_clips_have_in_common_stays(folder):
    tell(folder, dict(c0=0.13, c1=0.07, c2=0.1, c4=0.1))
    shifts = ClipDataset(folder, synchronised=True).shifts
    assert shifts == pytest.approx(dict(c0=0.03, c1=-0.03, c2=0, c4=0), abs=0.001)


def test_shrinking_by_hand():
    # the values' variance is 2, that of their errors 1: half of each is believed
    values = np.array([-1.0, 1.0]) * 2**0.5
    found = shrink_values(np.tile(values, 50), np.ones(100))
    assert found.sd == pytest.approx(1, abs=1e-6) and found.mean == pytest.approx(0, abs=1e-9)
    assert found.values == pytest.approx(np.tile(values / 2, 50))


def test_a_data_set_moves_sounds_only_when_it_is_asked(folder):
    tell(folder, dict(c0=0.02, c1=-0.02))
    plain, moved = ClipDataset(folder), ClipDataset(folder, synchronised=True)
    raw = ClipDataset(folder).load("c0")
    test_same(plain[0].wav, raw.wav)
    assert plain.shifts == {} and not torch.equal(moved[0].wav, raw.wav)
    test_same(moved[0].wav, move_sound(raw, moved.shifts["c0"]).wav)
    test_same(moved.sound(0).wav, moved[0].wav)
    test_same(moved.sound(0).mel, moved[0].mel)
    assert moved[0].word_times[0].start > plain[0].word_times[0].start
    test_same(moved[3].wav, plain[3].wav)  # nothing is known of it


def test_nothing_to_mend_with_is_an_error(folder):
    with pytest.raises(CorpusError, match="faces2voices sync"):
        training_clips(folder, synchronised=True)
    tell(folder, dict(c0=0.02, c1=0.0))
    assert training_clips(folder, synchronised=True).shifts
    assert not training_clips(folder).shifts


def test_the_sound_of_a_clip_knows_its_words(folder):
    assert ClipDataset(folder).sound(0).word_times[0].text == "bin"
    clips = {clip.name: clip for clip in prepared_mouths(folder)}
    bin_, blue = (1 + GRID_WORDS.index(word) for word in ("bin", "blue"))
    assert clips["c0"].words.tolist() == [0] * 5 + [bin_] * 5 + [blue] * 5 + [0] * 5
    assert (clips["c3"].words == -100).all()


class Units(torch.nn.Module):
    "A quantizer of a kind: is it loud?"

    def forward(self, wav):
        return (energy(wav) > -4).long()


class Voice(torch.nn.Module):
    "A speaker encoder of a kind: the mean mel."

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, mel, mask):
        return torch.nn.functional.normalize(self.gain * mel.mean(-1), dim=-1)


def test_targets_of_moved_sounds_are_not_taken_for_those_of_others(folder):
    def stored():
        return write_targets(ClipDataset(folder), Units(), Voice(), progress=False)

    def moved():
        dataset = ClipDataset(folder, synchronised=True)
        return write_targets(dataset, Units(), Voice(), progress=False)

    before = stored()
    tell(folder, dict(c0=0.04, c1=-0.04))
    first = moved()
    assert stored().store.folders == before.store.folders
    again = moved()
    assert again.store.folders == first.store.folders != before.store.folders
    for dataset in (before, first):
        exact = ClipDataset(folder, synchronised=dataset is first).add(Units(), Voice())
        assert dataset.store.find("c0")
        test_same(dataset[0].mel, exact[0].mel, atol=0.01)
        test_same(dataset[0].units, exact[0].units)
    tell(folder, dict(c0=0.02, c1=-0.02))
    assert moved().store.folders != first.store.folders


# by sound and lips alone


def test_lips_and_sound_alone_tell_the_offset():
    rng = torch.Generator().manual_seed(1)

    def talking(late, T=60):
        bell = torch.hann_window(21, periodic=False)[None, None]
        noise = torch.randn(1, 1, 4 * T + 140, generator=rng)
        curve = torch.nn.functional.conv1d(noise, bell)[0, 0]
        mel = curve[60 : 60 + 4 * T] + 0.1 * torch.randn(80, 4 * T, generator=rng)
        at = 61.5 + 4 * np.arange(T) - 100 * late
        mouth = torch.zeros(T, 9, 2)
        mouth[:, 1, 0] = 30
        mouth[:, 3, 1] = torch.from_numpy(3 * np.interp(at, np.arange(len(curve)), curve)).float()
        return synchrony.HeardMouth(mouth + 0.1 * torch.randn(T, 9, 2, generator=rng), mel)

    net, losses = synchrony.train_synchroniser([talking(0.0) for _ in range(40)], 50)
    assert losses[-1] < losses[0]
    late = [-0.07, 0.0, 0.045, 0.09]
    found = [synchrony.sound_offset(net, talking(x)).seconds for x in late]
    assert found == pytest.approx(late, abs=0.015)


def test_a_synchroniser_without_clips_says_so(folder):
    with pytest.raises(CorpusError, match="mesh of the mouth"):
        synchrony.heard_mouths(folder, "nowhere")


# the commands


@pytest.fixture()
def readers(tmp_path):
    "Two readers that were never trained."
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"reader{seed}.safetensors")
        save_file({k: v.contiguous() for k, v in LipReader(8).state_dict().items()}, paths[-1])
    return paths


def test_the_command_stores_prints_and_names(folder, readers):
    from typer.testing import CliRunner
    from faces2voices.cli import app

    one, two = map(str, readers)
    done = CliRunner().invoke(app, ["sync", str(folder), "--reader", one, "--second", two])
    assert done.exit_code == 0, done.output
    entries = read_manifest(folder / "manifest.jsonl")
    assert [e.name for e in entries if "offset" not in e.extra] == ["c3"]
    assert all(e.extra["note"] == f"kept {i}" for i, e in enumerate(entries))
    assert "c3: no word times" in done.output and "beyond 20 ms" in done.output
    assert "two readers" in done.output
    assert json.loads((folder / "made.json").read_text())["commands"][-1].endswith(
        f"--second {two}"
    )
    assert training_clips(folder, synchronised=True).shifts


def test_a_reader_of_other_words_is_an_error(folder):
    with pytest.raises(F2VError, match="reads 3 words"):
        synchrony.corpus_offsets(LipReader(8, 3).eval(), folder, progress=False)


def test_two_witnesses_of_an_offset_are_compared(folder, readers):
    from faces2voices.studies import show_synchroniser, synchroniser_study

    # a reader that was never trained and a network of one step: numbers, though no agreement
    found = synchroniser_study(folder, readers[0], steps=1)
    assert found["training"] == 4 and all(row["clips"] > 2 for row in found["rows"])
    assert "trained on 4 clips, 1 steps" in show_synchroniser(found)


@pytest.fixture()
def small(monkeypatch):
    "Studies of tiny hierarchies."
    from faces2voices import studies

    sizes = dict(dim=16, n_blocks=1, lip_width=4, n_units=8, expression_dim=6, identity_dim=4)
    steps = TINY.steps | dict(speaker=1)
    batch = TINY.batch | dict(hierarchy=2, speaker=2)
    preset = replace(TINY, **sizes, words=GRID_WORDS, steps=steps, batch=batch)
    monkeypatch.setattr(studies, "preset_for", lambda clip: preset)
    return preset


def test_the_study_compares_both_kinds_of_pairs(folder, small, tmp_path, monkeypatch):
    from faces2voices import studies

    monkeypatch.setattr(studies, "grid_recogniser", lambda: lambda wav: "ah")
    monkeypatch.setattr(studies, "stoi", lambda a, b, extended: float((a * b).mean()))
    options = dict(steps=1, seeds=(0, 1), split="test", model="talkers")
    with pytest.raises(CorpusError, match="knows no offsets"):
        studies.sync_study(folder, tmp_path / "run", **options)
    tell(folder, dict(c0=0.04, c1=-0.04, c2=0.02, c5=0.03, c6=-0.03))
    found = studies.sync_study(folder, tmp_path / "run", **options)
    assert found["clips"] == dict(training=3, judged=2)
    kinds = {(row["synchronised"], row["seed"], row["truth"]) for row in found["rows"]}
    assert len(kinds) == len(found["rows"]) == 8
    assert all(set(map(len, row["of_clips"].values())) == {2} for row in found["rows"])
    one = [row["of_clips"] for row in found["rows"] if row["seed"] == 0]
    assert one[0]["mel error"] != one[1]["mel error"] != one[2]["mel error"]
    assert one[0]["words wrong, CTC"] == [0.0, 0.0]
    assert studies.sync_study(folder, tmp_path / "run", **options) == found  # goes on at its end
    plain, moved, change = studies.compare_pairs(found, "as it is", "mel error")
    assert change.estimate == pytest.approx(moved - plain)
    assert "synchronised pairs" in studies.show_sync(found)


def test_a_stranger_is_judged_with_the_guessed_and_with_the_true_voice(small):
    from faces2voices.hierarchy import Hierarchy
    from faces2voices.studies import score_stranger

    clip = with_targets(made_clip("c0"))._replace(units=torch.zeros(40).long())
    clip = clip._replace(voice=torch.eye(256)[0])
    hierarchy = seeded(0, lambda: Hierarchy(small)).eval()
    torch.nn.init.normal_(hierarchy.film.to_film.weight)
    batch = collate([clip])
    seen = hierarchy(*hierarchy.inputs(batch)).speaker[0]
    right = score_stranger(hierarchy, clip._replace(voice=seen.detach()))
    assert right["voice similarity"] == pytest.approx(1)
    assert right["envelope match"] == right["envelope match, true voice"]
    wrong = score_stranger(hierarchy, clip._replace(voice=-seen.detach()))
    assert wrong["voice similarity"] == pytest.approx(-1)
    assert wrong["envelope match"] == right["envelope match"]
    assert wrong["envelope match, true voice"] != right["envelope match, true voice"]


def test_the_study_of_strangers_trains_with_and_without_moved_voices(
    folder, readers, small, tmp_path
):
    from faces2voices import studies

    run = tmp_path / "run"
    options = dict(reader=readers[0], steps=1, seeds=(0, 1), split="test")
    found = studies.stranger_study(folder, run, **options)
    kinds = [(row["speaker_noise"], row["seed"]) for row in found["rows"]]
    assert kinds == [(0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)]
    assert found["clips"] == dict(training=4, judged=3)
    first, other = found["rows"][0]["of_clips"], found["rows"][2]["of_clips"]
    assert all(len(values) == 3 for values in first.values()) and first != other
    assert studies.stranger_study(folder, run, **options) == found  # goes on at its end
    assert "moved voices" in studies.show_strangers(found)
