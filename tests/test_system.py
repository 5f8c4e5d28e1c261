"The whole path as a user takes it: files in, files out, by command line, with the shipped model."

import json
import shutil
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from faces2voices import FacesToVoices
from faces2voices.soundfiles import load_audio
from faces2voices.cli import app
from faces2voices.errors import CheckpointError, MediaError, NoFaceError
from faces2voices.core import test_same as same
from faces2voices.media import write_video
from faces2voices.video import read_video

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = sorted((ROOT / "data_samples").glob("*.mp4"))


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def f2v():
    return FacesToVoices.from_pretrained("talkers", device="cpu")


@pytest.fixture(scope="module")
def frames():
    return read_video(SAMPLES[0]).frames


@pytest.fixture()
def silent(tmp_path, frames):
    write_video(tmp_path / "silent.mp4", frames)
    return tmp_path / "silent.mp4"


def test_synthesize_writes_sound_dub_and_report(tmp_path):
    result = run("synthesize", SAMPLES[0], SAMPLES[1], "-o", tmp_path / "out", "--steps", 4)
    assert result.exit_code == 0, result.output
    for clip in SAMPLES[:2]:
        wav = load_audio(tmp_path / "out" / f"{clip.stem}.wav")
        video = read_video(tmp_path / "out" / f"{clip.stem}.dubbed.mp4")
        assert len(wav) == 640 * len(video.frames) and wav.abs().max() > 0.02
        assert np.array_equal(video.frames, read_video(clip).frames), "the frames were touched"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h2>") == 2 and page.count("<audio") == 4 and "synthetic" in page
    assert "real-time factor" in result.output and "report.html" in result.output


def test_outputs_carry_the_tag(tmp_path):
    import av
    import soundfile

    assert run("synthesize", SAMPLES[0], "-o", tmp_path, "--no-report", "--steps", 2).exit_code == 0
    with av.open(str(tmp_path / f"{SAMPLES[0].stem}.dubbed.mp4")) as c:
        assert any("synthetic speech" in v for v in c.metadata.values())
    with soundfile.SoundFile(tmp_path / f"{SAMPLES[0].stem}.wav") as f:
        assert "synthetic speech" in f.copy_metadata()["comment"]
    assert not (tmp_path / "report.html").exists()


def test_a_seed_repeats_and_the_result_does_not_need_the_sound(f2v, silent):
    a = f2v(SAMPLES[0], steps=4, seed=3)
    b = f2v(SAMPLES[0], steps=4, seed=3)
    c = f2v(SAMPLES[0], steps=4, seed=4)
    same(a.wav, b.wav, atol=1e-6)
    assert (a.wav - c.wav).abs().max() > 1e-3
    assert f2v(silent, steps=4).true_mel is None


def test_one_bad_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "notes.mp4").write_text("this is no video")
    result = run(
        "synthesize",
        tmp_path / "notes.mp4",
        SAMPLES[0],
        "-o",
        tmp_path / "out",
        "--no-dub",
        "--steps",
        2,
    )
    assert result.exit_code == 1 and "notes.mp4" in result.output
    assert [p.name for p in sorted((tmp_path / "out").glob("*.wav"))] == [f"{SAMPLES[0].stem}.wav"]


def test_nothing_is_overwritten(tmp_path):
    kept = tmp_path / f"{SAMPLES[0].stem}.wav"
    kept.write_bytes(b"mine")
    result = run("synthesize", SAMPLES[0], "-o", tmp_path, "--steps", 2)
    assert result.exit_code == 1 and "already exists" in result.output
    assert kept.read_bytes() == b"mine" and [p.name for p in tmp_path.iterdir()] == [kept.name]


def test_a_dub_that_fails_keeps_the_sound(tmp_path, f2v, monkeypatch):
    from faces2voices import files

    def broken(*a, **k):
        raise MediaError("x", "disk full")

    monkeypatch.setattr(files, "dub_video", broken)
    done = files.synthesize_file(f2v, SAMPLES[0], tmp_path, True, steps=2)
    assert "disk full" in done.error and [Path(p).name for p in done.written] == [
        f"{SAMPLES[0].stem}.wav"
    ]
    assert [p.name for p in tmp_path.iterdir()] == [f"{SAMPLES[0].stem}.wav"] and len(
        load_audio(done.written[0])
    ) > 16000


BAD = {
    "missing": lambda p: None,
    "text": lambda p: p.write_text("not a video at all\n" * 50),
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(SAMPLES[0].read_bytes()[:3000]),
    "folder": lambda p: p.mkdir(),
    "noface": lambda p: write_video(
        p, np.random.default_rng(0).integers(0, 255, (30, 120, 160, 3)).astype(np.uint8)
    ),
    "blank": lambda p: write_video(p, np.full((30, 120, 160, 3), 127, np.uint8)),
    "sound only": lambda p: shutil.copy(p.with_name("a.wav"), p),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_clear_line(tmp_path, kind):
    from faces2voices.soundfiles import save_wav

    save_wav(tmp_path / "a.wav", torch.zeros(16000))
    path = tmp_path / f"{kind}.mp4"
    BAD[kind](path)
    result = run("synthesize", path, "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output and path.name in result.output
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    "name", ["with space.mp4", "it's \"quoted\" [b].mp4", "Größe – 視頻.mp4", "-dash.mp4"]
)
def test_any_file_name(tmp_path, silent, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    shutil.copy(silent, path)
    result = run("synthesize", "--steps", 2, "-o", tmp_path / "out", "--", path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / f"{path.stem}.wav").exists() and (
        tmp_path / "out" / f"{path.stem}.dubbed.mp4"
    ).exists()


def test_60_frames_a_second(tmp_path, f2v, frames):
    write_video(tmp_path / "fast.mp4", np.repeat(frames, 3, 0)[: 3 * len(frames)], fps=75)
    speech = f2v(tmp_path / "fast.mp4", steps=2)
    assert abs(len(speech.wav) - 640 * len(frames)) <= 1280


def test_odd_sizes(tmp_path, f2v, frames):
    write_video(tmp_path / "odd.mp4", frames[:, :-3, :-5])
    assert len(f2v(tmp_path / "odd.mp4", steps=2).wav) == 640 * len(frames)


def test_two_faces_the_larger_speaks(tmp_path, f2v, frames):
    from skimage.transform import resize

    other = read_video(SAMPLES[-1]).frames
    n = min(len(frames), len(other))
    small = np.stack(
        [(resize(f, (80, 80), anti_aliasing=True) * 255).astype(np.uint8) for f in other[:n]]
    )
    both = np.concatenate(
        [frames[:n], np.pad(small, ((0, 0), (40, 40), (0, 0), (0, 0)), mode="edge")], 2
    )
    write_video(tmp_path / "two.mp4", both)
    try:
        speech = f2v(tmp_path / "two.mp4", steps=2)
    except NoFaceError:
        return  # the locator was trained on one face in view: to say so is right as well
    assert len(speech.wav) == 640 * n


def test_wrong_usage_ends_with_2(tmp_path):
    assert run("synthesize").exit_code == 2
    assert run("synthesize", SAMPLES[0], "--steps", -1).exit_code == 2
    assert run("synthesize", SAMPLES[0], "--device", "abacus").exit_code == 2
    assert run("nonsense").exit_code == 2


def test_checkpoints_are_untrusted(tmp_path):
    import pickle

    folder = tmp_path / "model"
    shutil.copytree(ROOT / "faces2voices" / "weights" / "talkers", folder)
    weights = (folder / "model.safetensors").read_bytes()

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    for bad in (pickle.dumps(Bomb()), weights[:1000], b""):
        (folder / "model.safetensors").write_bytes(bad)
        with pytest.raises(CheckpointError, match="model"):
            FacesToVoices.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{\"preset\": {\"widht\": 3}}")
    with pytest.raises(CheckpointError):
        FacesToVoices.from_pretrained(folder)
    assert not (tmp_path / "boom").exists()


def test_packaged_weights_are_small_and_described():
    for folder in (ROOT / "faces2voices" / "weights").iterdir():
        assert (folder / "model.safetensors").stat().st_size <= 14e6
        if folder.name == "grid_asr":
            continue  # a judge, not a voice: its sizes stand in the code
        assert "## " in (folder / "README.md").read_text()
        info = json.loads((folder / "config.json").read_text())["info"]
        assert info["command"] and info["data"]


GRID_CLIPS = [
    "original/s1/bbaf3s.mpg",
    "original/s1/brwg7s.mpg",
    "others/s10/prwm8n.mp4",
    "others/s14/lrwq7p.mpg",
    "others/s33/bwwy3s.mpg",
]


@pytest.fixture()
def mesh(shared, monkeypatch):
    monkeypatch.setenv("F2V_MEDIAPIPE", str(shared / "mediapipe" / "face_landmarker.task"))


@pytest.mark.parametrize("clip", GRID_CLIPS)
def test_real_clips(tmp_path, shared, mesh, clip):
    result = run(
        "synthesize",
        shared / "grid" / clip,
        "-o",
        tmp_path,
        "--model",
        "grid",
        "--faces",
        shared / "insightface",
        "--steps",
        4,
    )
    assert result.exit_code == 0, result.output
    assert "insightface" in result.output
    wav = load_audio(tmp_path / f"{Path(clip).stem}.wav")
    assert 640 * 74 <= len(wav) <= 640 * 76 and wav.abs().max() > 0.02


def test_real_clip_without_any_face_model(tmp_path, shared, monkeypatch):
    "Nobody named a folder: the way to the models is said, and nothing coarser stands in."
    for name in ("F2V_INSIGHTFACE", "F2V_MEDIAPIPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    clip = shared / "grid" / GRID_CLIPS[0]
    result = run("synthesize", clip, "-o", tmp_path / "out", "--model", "grid")
    assert result.exit_code == 1 and "faces2voices download faces" in str(result.exception)
    assert not list((tmp_path / "out").glob("*.wav"))


def test_a_folder_of_face_models_that_holds_none_ends_it(tmp_path, shared):
    result = run(
        "synthesize",
        shared / "grid" / GRID_CLIPS[0],
        "-o",
        tmp_path / "out",
        "--model",
        "grid",
        "--faces",
        tmp_path / "nowhere",
    )
    assert result.exit_code == 1 and "holds no face models" in str(result.exception)
    assert not list((tmp_path / "out").iterdir())


def test_a_real_face_before_the_model_of_drawn_ones(tmp_path, shared):
    "Whether the locator takes it for a drawn face or not, the model that knows real ones is named."
    for clip in (GRID_CLIPS[0], GRID_CLIPS[2]):
        assert (
            "--model grid"
            in run("synthesize", shared / "grid" / clip, "-o", tmp_path, "--steps", 1).output
        )


def test_ordinary_real_clips_raise_no_doubt(tmp_path, shared, mesh):
    result = run(
        "synthesize",
        *(shared / "grid" / c for c in ("original/s1/brwg7s.mpg", "s1/bbaz7a.mp4")),
        "-o",
        tmp_path,
        "--model",
        "grid",
        "--faces",
        shared / "insightface",
    )
    assert result.exit_code == 0 and "note" not in result.output, result.output


@pytest.mark.parametrize(
    "there, size, trained_with, expected",
    [
        ("insightface", 1152, "insightface", "insightface"),
        ("mediapipe insightface", 1152, "insightface", "insightface"),
        ("mediapipe insightface", 52, "insightface+mediapipe", "insightface+mediapipe"),
        ("insightface", 52, "insightface+mediapipe", "insightface+mediapipe"),
        ("mediapipe", 52, "insightface+mediapipe", "mediapipe"),
        ("mediapipe mobilefacenet insightface", 52, "mediapipe", "mediapipe+mobilefacenet"),
        ("mediapipe insightface", 52, "mediapipe+mobilefacenet", "mediapipe+insightface"),
        ("insightface mediapipe mobilefacenet", 52, "mediapipe", "mediapipe+insightface"),
        ("", 52, "mediapipe+mobilefacenet", "mediapipe"),
        ("mediapipe", 1152, "insightface", "mediapipe+strip"),
        ("", 1152, "insightface", "cascade"),
    ],
)
def test_a_model_sees_the_kind_of_motion_that_it_knows(
    monkeypatch, there, size, trained_with, expected
):
    from faces2voices import films
    from faces2voices.core import EIGENLIPS

    class Named(films.FaceBackend):
        def __init__(self, name, root=None):
            self.name = name
            self.finds_motion = name == "mediapipe"
            if name == "auto":
                self.__init__("mediapipe" if "mediapipe" in there else "cascade")

    monkeypatch.setattr(films, "make_backend", Named)
    monkeypatch.setattr(films, "backends_at_hand", lambda root: there.split())
    preset = replace(EIGENLIPS, expression_dim=size, face_backend=trained_with)
    assert FacesToVoices(preset.to_json()).face_backend.name == expected
