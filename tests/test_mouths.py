"Mouth points: landmarks, prepared clips, gaps, variation, and what a reader is trained on."

import pickle
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from faces2voices.core import GRID_WORDS, test_same
from faces2voices.corpora import Clip, save_clip
from faces2voices.errors import CheckpointError, CorpusError
from faces2voices.lipreading import load_reader
from faces2voices.manifests import Entry, Word, write_manifest
from faces2voices.mouths import (
    MouthClip,
    hold_gaps,
    imagine_silence,
    mirror_mouth,
    mouth_batches,
    mouth_width,
    pad_mouths,
    prepared_mouths,
    read_landmarks,
    reader_sources,
    vary_view,
    warp_time,
)
from faces2voices.readers import choose_clips, reader_runs, reader_study
from faces2voices.parts import reader_errors
from faces2voices.training import pretrain_reader, reader_corpora

REST = [[-20, 0], [20, 0], [0, -3], [0, 3], [0, 30], [8, -2], [-8, -2], [8, 2], [-8, 2]]
WORDS = "bin", "blue", "at", "f", "two", "now"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moving(B=2, T=40, seed=0):
    "Mouths 40 px wide whose points move, without gaps."
    steps = torch.randn(B, T, 9, 2, generator=generator(seed))
    return torch.tensor(REST).float() + steps.cumsum(1) / 5


def landmarks(folder, person="s9", names=("bbaf2n",), **other):
    "A file of landmarks, some arrays of which may be others."
    n = len(names)
    points = np.random.default_rng(0).integers(-2000, 2000, (n, 30, 9, 2)).astype(np.int16)
    words = np.tile(np.repeat(np.arange(10), 3), (n, 1)).astype(np.int8)
    arrays = dict(names=np.array(names), points=points, words=words) | other
    np.savez(folder / f"{person}.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder / f"{person}.npz"


def prepared(folder, clips):
    "A prepared folder of clips (name, split), each of 30 frames; the name begins with the speaker."
    folder.mkdir()
    words = [Word(0.1 * i, 0.1 * i + 0.1, word) for i, word in enumerate(WORDS)]
    pictures = torch.zeros(30, 96, 96).byte(), torch.zeros(112, 112, 3).byte()
    sound = torch.zeros(30 * 640), *[torch.zeros(60)] * 3
    entries = []
    for i, (name, split) in enumerate(clips):
        person, text = name.split("_")[0], " ".join(WORDS)
        clip = Clip(name, person, text, *pictures, torch.zeros(30, 52), torch.zeros(0), *sound)
        save_clip(clip._replace(mouth=moving(1, 30, i)[0]), folder / f"{name}.npz")
        extra = dict(frames=30, sound=True, words=words)
        entries.append(Entry(name, folder / f"{name}.mp4", person, text, split, extra))
    write_manifest(entries, folder / "manifest.jsonl")
    return folder


# --- files of landmarks


def test_landmarks_are_read_in_pixels_with_their_words(tmp_path):
    points = np.full((1, 30, 9, 2), -32768, np.int16)
    points[0, 1:] = 96
    (clip,) = read_landmarks(landmarks(tmp_path, points=points))
    assert clip[:3] == ("s9_bbaf2n", "s9", "bin blue at f two now")
    assert clip.mouth[0].isnan().all() and (clip.mouth[1:] == 1.5).all()
    said = [GRID_WORDS[w - 1] for w in clip.words[3::3].tolist()]
    assert said == "bin lay place set blue green red white at".split()


def test_a_digit_is_not_mistaken_for_a_letter(tmp_path):
    "The file counts digits before adverbs and letters; the vocabulary of the package does not."
    order = (
        "bin lay place set blue green red white at by in with zero one two three four five six "
        "seven eight nine again now please soon a b c d e f g h i j k l m n o p q r s t u v x y z"
    ).split()
    words = np.tile(np.arange(1, 52, dtype=np.int8), (1, 1))
    points = np.zeros((1, 51, 9, 2), np.int16)
    (clip,) = read_landmarks(landmarks(tmp_path, words=words, points=points))
    assert [GRID_WORDS[w - 1] for w in clip.words.tolist()] == order


class Trap:
    "Whoever unpickles it is caught."

    def __reduce__(self):
        return pytest.fail, ("a file was unpickled",)


WRONG = dict(
    no_words=dict(words=None),
    words_of_other_frames=dict(words=np.zeros((1, 29), np.int8)),
    a_word_too_many=dict(words=np.full((1, 30), 52, np.int8)),
    a_negative_word=dict(words=np.full((1, 30), -1, np.int8)),
    words_that_are_no_numbers=dict(words=np.full((1, 30), np.nan)),
    eight_points=dict(points=np.zeros((1, 30, 8, 2), np.int16)),
    points_in_float=dict(points=np.zeros((1, 30, 9, 2), np.float32)),
    two_names=dict(
        names=np.array(["bbaf2n", "bbaf3n"]),
        points=np.zeros((1, 30, 9, 2), np.int16),
        words=np.zeros((1, 30), np.int8),
    ),
    a_name_of_no_sentence=dict(names=np.array(["??????"])),
    objects=dict(names=np.array([Trap()], object)),
    no_clips=dict(
        names=np.array([], "<U6"),
        points=np.zeros((0, 30, 9, 2), np.int16),
        words=np.zeros((0, 30), np.int8),
    ),
)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_file_that_holds_no_landmarks_is_named(tmp_path, wrong):
    with pytest.raises(CorpusError, match="s9.npz"):
        read_landmarks(landmarks(tmp_path, **wrong))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", pickle.dumps(Trap())])
def test_a_file_that_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "s9.npz").write_bytes(content)
    with pytest.raises(CorpusError, match="s9.npz"):
        read_landmarks(tmp_path / "s9.npz")


def test_the_landmarks_of_the_shared_corpus_are_read(shared):
    files = sorted((shared / "grid" / "landmarks").glob("*.npz"))
    if not files:
        pytest.skip("no landmarks among the test data")
    clips = read_landmarks(files[0])
    width = mouth_width(torch.stack([clip.mouth for clip in clips[:50]])).flatten()
    assert len(clips) > 800 and (15 < width).all() and (width < 80).all()
    for clip in clips[:50]:
        said = [GRID_WORDS[w - 1] for w in clip.words.unique_consecutive().tolist() if w > 0]
        assert said == clip.text.split()


# --- prepared clips


def test_prepared_clips_know_their_words(tmp_path):
    (clip,) = prepared_mouths(prepared(tmp_path / "p", [("s1_a", "train")]))
    test_same(clip.mouth, moving(1, 30, 0)[0])
    said = [GRID_WORDS[w - 1] for w in clip.words.unique_consecutive().tolist() if w > 0]
    assert said == list(WORDS)


def test_what_is_given_is_sorted(tmp_path):
    file = landmarks(tmp_path)
    folder = prepared(tmp_path / "p", [("s1_a", "train")])
    found = reader_sources([folder, tmp_path, file, tmp_path / "p/../s9.npz", folder])
    assert [[p.resolve() for p in paths] for paths in found] == [[file], [folder]]
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere.npz"):
        with pytest.raises(CorpusError, match=wrong):
            reader_sources([file, tmp_path / wrong])


KEPT = [
    ("s1_bbaf1n", "train"),
    ("s1_bbaf2n", "val"),
    ("s1_bbaf3n", "test"),
    ("s9_bbaf1n", "unseen"),
]


def test_clips_that_are_kept_for_later_are_left_out_of_the_landmarks_too(tmp_path):
    names = "bbaf1n", "bbaf2n", "bbaf3n", "bbaf4n"
    files = [landmarks(tmp_path, person, names) for person in ("s1", "s9")]
    others, own = reader_corpora(files, [prepared(tmp_path / "p", KEPT)])
    assert [clip.name for clip in own] == ["s1_bbaf1n"]
    assert [clip.name for clip in others] == [
        *("s1_bbaf1n", "s1_bbaf4n"),
        *("s9_bbaf2n", "s9_bbaf3n", "s9_bbaf4n"),
    ]


def test_clips_without_words_teach_nothing(tmp_path):
    folder = prepared(tmp_path / "p", KEPT)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"words": [[', '"other": [['))
    with pytest.raises(CorpusError, match="word times"):
        reader_corpora([], [folder])


# --- gaps


def test_a_gap_holds_the_nearest_known_frame():
    mouth = moving(6, 30)
    known = torch.rand(6, 30, generator=generator(1)) < 0.3
    known[0] = False
    known[1] = True
    filled = hold_gaps(mouth.masked_fill(~known[..., None, None], torch.nan))
    assert not filled[0].any()
    for clip in range(1, 6):
        there = known[clip].nonzero().flatten()
        for t in range(30):
            nearest = there[(there - t).abs().argmin()]  # the earlier one of two
            test_same(filled[clip, t], mouth[clip, nearest])


def test_one_unknown_point_makes_a_frame_unknown():
    mouth = moving(1, 5)
    mouth[0, 2, 7, 1] = torch.nan
    test_same(hold_gaps(mouth)[0, 2], mouth[0, 1])


# --- variation


def test_words_move_with_the_mouth():
    T = 60
    clock = torch.arange(T).float()[None, :, None, None].repeat(20, 1, 9, 2)
    words = torch.arange(T).repeat(20, 1)
    mouth, moved = warp_time(clock, words, generator())
    assert (mouth[..., 0, 0] - moved).abs().max() <= 0.5 + 1e-4
    assert (moved[:, 1:] >= moved[:, :-1]).all()
    shift = (mouth[:, T // 2, 0, 0] - T / 2).abs()
    assert 0.5 < shift.max() <= 6 + 1e-4
    same, still = warp_time(clock, words, generator(), frames=0.0, stretch=0.0)
    test_same(same, clock)
    test_same(still, words)


def test_silence_is_imagined_where_nothing_is_known_and_nowhere_else():
    mouth = moving(8, 60)
    gappy = mouth.clone()
    gappy[:, :20] = torch.nan
    gappy[:, 45:] = torch.nan
    gappy[:, 30] = torch.nan
    filled = imagine_silence(gappy, generator())
    inside = [*range(20, 30), *range(31, 45)]
    test_same(filled[:, inside], mouth[:, inside])
    test_same(filled[:, 30], mouth[:, 29])
    assert filled.isfinite().all()
    # far from speech the mouth is as wide as before, closed but for a breath, and does not stand
    opening = (filled[:, :10, 3] - filled[:, :10, 2])[..., 1]
    closed = (mouth[:, 20:45, 3] - mouth[:, 20:45, 2])[..., 1].amin(1)
    assert (opening.median(1).values < closed + 5).all()
    assert (filled[:, 1:10] - filled[:, :9]).flatten(1).std(1).min() > 0.05


def test_variation_is_relative_to_the_width_of_the_mouth():
    mouth = moving(4)
    for vary in (vary_view, imagine_silence):
        gappy = mouth.clone()
        if vary is imagine_silence:
            gappy[:, :8] = torch.nan
        test_same(vary(3 * gappy, generator()), 3 * vary(gappy, generator()), atol=1e-3)


def test_a_mirror_changes_sides_and_twice_is_nothing():
    mouth = moving()
    test_same(mirror_mouth(mirror_mouth(mouth)), mouth)
    even = torch.tensor(REST).float()
    test_same(mirror_mouth(even), even)  # left and right points have changed places
    asymmetric = even.clone()
    asymmetric[[0, 6, 8], 1] += 5  # the left side hangs
    test_same(mirror_mouth(asymmetric)[[1, 5, 7], 1], even[[1, 5, 7], 1] + 5)


def test_views_differ_from_clip_to_clip_and_not_from_run_to_run():
    mouth = moving(1).repeat(2, 1, 1, 1)
    seen = vary_view(mouth, generator())
    assert (seen[0] - seen[1]).abs().max() > 0.5
    test_same(vary_view(mouth, generator()), seen)


# --- batches


def make_clips(person, n, T=30):
    return [
        MouthClip(f"{person}{i}", person, "", moving(1, T, i)[0], torch.ones(T).long())
        for i in range(n)
    ]


def test_padding_is_unknown():
    b = pad_mouths([*make_clips("a", 1, 20), *make_clips("b", 1, 30)])
    assert b.mask.sum(1).tolist() == [20, 30]
    assert b.mouth[0, 20:].isnan().all() and (b.words[0, 20:] == -100).all()


def test_each_corpus_has_its_share_of_a_batch():
    draw = mouth_batches([make_clips("a", 5), make_clips("b", 1)], 8, [0.75, 0.25], seed=1)
    for step in range(3):
        assert [name[0] for name in draw(step).names] == list("aaaaaabb")
    alone = mouth_batches([[], make_clips("b", 1)], 8, [0.0, 1.0])
    assert alone(0).names == ["b0"] * 8


# --- training


def test_a_reader_is_pretrained_and_measured(tmp_path):
    folder = prepared(tmp_path / "p", KEPT)
    files = [landmarks(tmp_path, "s2", ("bbaf1n", "bbaf2n"))]
    path = pretrain_reader(files, [folder], tmp_path / "run", steps=2, batch=4)
    weights = path.read_bytes()
    load_reader(path)
    wrong = reader_errors(path, [folder])
    assert wrong.shape == (1,) and 0 <= wrong.item() <= 1
    assert reader_errors(path, []).shape == (0,)
    again = pretrain_reader(files, [folder], tmp_path / "run", steps=2, batch=4)
    assert again.read_bytes() == weights
    with pytest.raises(CheckpointError, match="another run"):
        pretrain_reader(files, [], tmp_path / "run", steps=2, batch=4)


def test_a_wrong_file_claims_no_folder(tmp_path):
    (tmp_path / "s9.npz").write_text("no landmarks")
    with pytest.raises(CorpusError, match="s9.npz"):
        pretrain_reader([tmp_path / "s9.npz"], [], tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_command_says_what_was_made_and_what_comes_next(tmp_path):
    from faces2voices.cli import app

    folder = prepared(tmp_path / "p", KEPT)
    run = tmp_path / "run"
    words = ["pretrain", str(folder), "-o", str(run), "--steps", "1", "--workers", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    last = done.stdout.strip().splitlines()[-1]
    assert f"reader in {run}/reader.safetensors" in last
    assert "of 1 validation clips wrong" in last
    then = f"train {folder} --preset grid --vocoder talkers --lips {run}/reader.safetensors"
    assert f"faces2voices {then}" in last


# --- the study


def test_runs_of_a_study_take_more_and_more_of_the_same(tmp_path):
    runs = reader_runs((1, 2, 3), (2, 4), (0, 1))
    assert len(runs) == len(set(runs)) == 2 * (3 + 1 + 2)
    corpus = sum((make_clips(person, 4) for person in "abcd"), [])
    for seed in (0, 1):
        taken = [
            {clip.name for clip in choose_clips(corpus, run)}
            for run in runs
            if run.seed == seed and not run.prepared and run.clips == 4
        ]
        assert [len(names) for names in taken] == [4, 8, 12]
        assert taken[0] < taken[1] < taken[2]
    firsts = {choose_clips(corpus, runs[0]._replace(seed=s))[0].name for s in range(9)}
    assert len(firsts) > 1, "the seed does not choose"


def test_a_study_never_learns_from_what_it_asks(tmp_path, monkeypatch):
    from faces2voices import readers

    seen = []

    def watch(corpora, run, *rest):
        for clips in corpora:
            seen.extend(clip.name for clip in clips)
        return fit_reader(corpora, run, *rest)

    fit_reader = readers.fit_reader
    monkeypatch.setattr(readers, "fit_reader", watch)
    names = "bbaf1n", "bbaf2n", "bbaf3n", "bbaf4n"
    files = [landmarks(tmp_path, person, names) for person in ("s1", "s2")]
    folder = prepared(tmp_path / "p", KEPT)
    tiny = dict(people=(1, 2), clips=(1, 4), steps=1, batch=2)
    found = reader_study(files, folder, tmp_path / "runs", **tiny)
    assert {"s1_bbaf1n", "s1_bbaf4n", "s2_bbaf3n"} <= set(seen)
    assert not {"s1_bbaf2n", "s1_bbaf3n", "s9_bbaf1n"} & set(seen)
    assert found["names"] == dict(unseen=["s9_bbaf1n"], s1=["s1_bbaf3n"])
    assert not set(found["landmarks"]["learned"]) & set(found["landmarks"]["people"])
    trained = len(seen)
    assert reader_study(files, folder, tmp_path / "runs", **tiny) == found
    assert len(seen) == trained, "a run that is there is trained again"
    stranger = landmarks(tmp_path, "s9", ("bbaf4n",))
    with pytest.raises(CorpusError, match="unseen: s9"):
        reader_study([*files, stranger], folder, tmp_path / "other", **tiny)
