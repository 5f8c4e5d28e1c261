"""Any file, any folder, any user.

Nothing is lost, nothing is claimed that is not so, and what cannot be is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from faces2voices import (
    FacesToVoices,
    cli,
    core,
    corpora,
    draws,
    evaluation,
    files,
    judges,
    listening,
    locator,
    report,
    storage,
    studies,
    sweeps,
    synthesis as S,
    timbre,
    training,
)
from faces2voices.soundfiles import load_audio, save_wav
from faces2voices.audio import pitch
from faces2voices.doubts import turned_away
from faces2voices.errors import (
    CheckpointError,
    CorpusError,
    F2VError,
    MediaError,
    NoFaceError,
    ToolMissingError,
    atomic_path,
)
from faces2voices.core import (
    EIGENLIPS,
    GRID,
    TINY,
    pick_device,
    seed_everything,
    test_same as same,
    whole_seed,
)
from faces2voices.eigenlips import Eigenlips
from faces2voices.manifests import read_manifest, write_manifest
from faces2voices.corpora import load_clip, save_clip
from faces2voices.preparing import prepare
from faces2voices.runs import claim, load_or_train
from faces2voices.tracking import make_backend
from faces2voices.media import write_video
from faces2voices.video import read_video

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = sorted((ROOT / "data_samples").glob("*.mp4"))
linux = pytest.mark.skipif(
    sys.platform != "linux", reason="names of bytes and signals as Linux has them"
)


@pytest.fixture()
def told(monkeypatch, capsys):
    "Call the console script: its exit code, and what it said on both channels."

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["faces2voices", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out + err

    return call


def run(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


# --- two at once, and stopped ones


def test_a_name_that_is_taken_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(F2VError, match="already exists"):
        with atomic_path(tmp_path / "a.txt") as tmp:
            tmp.write_text("ours")
            (tmp_path / "a.txt").write_text("theirs")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (
        tmp_path / "a.txt"
    ).read_text() == "theirs"


@pytest.mark.parametrize("taken", [False, True])
def test_names_are_exclusive_without_hard_links_too(tmp_path, monkeypatch, taken):
    def no_links(*a, **k):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)

    def write():
        with atomic_path(tmp_path / "a.txt") as tmp:
            tmp.write_text("ours")
            if taken:
                (tmp_path / "a.txt").write_text("theirs")

    if taken:
        with pytest.raises(F2VError, match="already exists"):
            write()
    else:
        write()
    assert (tmp_path / "a.txt").read_text() == ("theirs" if taken else "ours") and len(
        list(tmp_path.iterdir())
    ) == 1


def test_two_runs_with_one_folder_keep_what_the_first_reported(f2v, tmp_path, monkeypatch):
    "The other run writes its wav while ours speaks: ours says so, and removes nothing."
    speak = f2v.stream

    def parts(path, **kw):
        yield from speak(path, **kw)
        save_wav(tmp_path / f"{SAMPLES[0].stem}.wav", torch.full((640,), 0.5))

    monkeypatch.setattr(f2v, "stream", parts)
    done = files.synthesize_file(f2v, SAMPLES[0], tmp_path, steps=1)
    assert "already exists" in done.error and not done.written
    assert [p.name for p in tmp_path.iterdir()] == [f"{SAMPLES[0].stem}.wav"]
    assert len(load_audio(tmp_path / f"{SAMPLES[0].stem}.wav")) == 640


def test_a_report_whose_name_is_taken_meanwhile_gets_another(tmp_path, monkeypatch):
    write = report.write_report

    def beaten(path, *args):
        if path.name == "report.html":
            path.write_text("theirs")
        return write(path, *args)

    monkeypatch.setattr(report, "write_report", beaten)
    mine = [report.ReportSection("mine", "", [], [], [])]
    assert cli._write_page(tmp_path / "report.html", mine, "m") == tmp_path / "report-2.html"
    assert (tmp_path / "report.html").read_text() == "theirs" and "mine" in (
        tmp_path / "report-2.html"
    ).read_text()


SLOW = '''
import sys, time, torch
from faces2voices import cli, synthesis as S
def parts(self, path, **kw):
    yield S.Speech(torch.zeros(640), *[None]*6, entropy=torch.zeros(2))
    print("speaking", flush=True)
    time.sleep(60)
S.FacesToVoices.stream = parts
sys.argv = ["faces2voices", "synthesize", *sys.argv[1:]]
cli.main()
'''


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_unfinished(tmp_path, number):
    command = [sys.executable, "-c", SLOW, str(SAMPLES[0]), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        for line in child.stdout:
            if "speaking" in line:
                break
        assert list((tmp_path / "out").glob(".part-*"))
        child.send_signal(number)
        assert child.wait(30) == 128 + number
    assert not list((tmp_path / "out").iterdir())


@linux
def test_scraps_of_the_living_stay_and_those_of_the_dead_go(prepared, tmp_path):
    "Another process writes a clip into the folder of `prepare`; then it is killed."
    code = (
        "import sys, time; from faces2voices.errors import atomic_path\n"
        "with atomic_path(sys.argv[1]) as tmp: print(tmp.name, flush=True); time.sleep(60)"
    )
    entries = [e for e in read_manifest(prepared / "manifest.jsonl")][:1]
    shutil.copy(prepared / f"{entries[0].name}.npz", tmp_path)
    backend = SimpleNamespace(name=str(np.load(tmp_path / f"{entries[0].name}.npz")["backend"]))
    command = [sys.executable, "-c", code, str(tmp_path / "theirs.npz")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        theirs = tmp_path / child.stdout.readline().strip()
        (tmp_path / ".part-folder").mkdir()
        prepare(entries, tmp_path, backend, progress=False)
        there = theirs.exists()
        child.kill()
    assert there and theirs.exists()
    prepare(entries, tmp_path, backend, progress=False)
    assert not theirs.exists() and (tmp_path / ".part-folder").exists()


LEARN = """
import sys, torch
from torch import nn
from faces2voices import cli, training
def batch(step):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
def train_system(*args, **kw):
    m = nn.Linear(3, 1)
    def say(line, _):
        if line["step"] == 20:
            print("learning", flush=True)
    training.fit(lambda x: m(x).square().mean(), m, batch, 10**6, 1e-2, name="m",
        run_dir=sys.argv[3], workers=2, log_every=20, callback=say)
training.train_system = train_system
cli.main()
"""


@linux
@pytest.mark.parametrize(
    "number,everybody", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True)]
)
def test_a_signal_leaves_a_checkpoint(tmp_path, number, everybody):
    command = [sys.executable, "-c", LEARN, "train", "-o", str(tmp_path)]
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, cwd=ROOT, **kw) as child:
        assert "learning" in child.stdout.readline()
        (os.killpg if everybody else os.kill)(child.pid, number)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 128 + number and "Traceback" not in said, said[-1500:]
    assert torch.load(tmp_path / "m.ckpt", weights_only=True)["step"] >= 20
    assert {p.name for p in tmp_path.iterdir()} == {"m.ckpt", "m.jsonl"}


@linux
def test_workers_that_hear_a_signal_first_do_not_hide_it(tmp_path):
    command = [sys.executable, "-c", LEARN, "train", "-o", str(tmp_path)]
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, cwd=ROOT, **kw) as child:
        assert "learning" in child.stdout.readline()
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(workers) >= 2
        for worker in workers:
            os.kill(int(worker), signal.SIGHUP)
        time.sleep(0.1)
        os.kill(child.pid, signal.SIGHUP)
        said = child.communicate(timeout=60)[1]
    assert child.returncode == 128 + signal.SIGHUP and "Traceback" not in said, said[-1500:]


@linux
def test_a_child_that_dies_in_the_same_moment_leaves_no_traceback():
    "Both signals wait; Python takes the one that stops us first."
    code = (
        "import os, signal\nfrom faces2voices import cli\n"
        "both = [signal.SIGTERM, signal.SIGCHLD]\n"
        "signal.signal(signal.SIGCHLD, lambda *_: 1 / 0)\n"
        "signal.signal(signal.SIGTERM, cli._stop)\n"
        "try:\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        "    for number in both: os.kill(os.getpid(), number)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\n"
        "except cli.StopSignal as e: print(e.code)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (said.stdout, said.stderr) == ("143\n", "")


@linux
def test_nohup_has_its_way():
    code = (
        "import signal, sys\nfrom faces2voices import cli\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "sys.argv = ['faces2voices', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        .stdout.strip()
        .endswith("True")
    )


# --- whose folder


def test_a_run_folder_belongs_to_its_configuration(tmp_path):
    ours = dict(preset=TINY.to_json(), seed=0, data=None)
    claim(tmp_path, **ours)
    claim(tmp_path, **ours)
    for other, named in (
        (dict(seed=1), "seed 0, not 1"),
        (dict(preset=TINY.to_json() | dict(dim=64)), "preset.dim 128, not 64"),
    ):
        with pytest.raises(CheckpointError, match=named):
            claim(tmp_path, **ours | other)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        claim(tmp_path, **ours)


def test_parts_of_nobody_are_not_taken_over(tmp_path):
    save_file(dict(a=torch.zeros(1)), tmp_path / "units.safetensors")
    with pytest.raises(CheckpointError, match="left no run.json"):
        claim(tmp_path, seed=0)


@pytest.fixture(scope="module")
def prepared(f2v, tmp_path_factory):
    "Two prepared clips of the split train."
    from faces2voices.manifests import read_manifest
    from faces2voices.preparing import prepare

    folder = tmp_path_factory.mktemp("prepared")
    entries = [
        e._replace(split="train")
        for e in read_manifest(ROOT / "data_samples" / "manifest.jsonl")[:2]
    ]
    prepare(entries, folder, f2v.face_backend, progress=False)
    return folder


def test_adapting_into_the_folder_of_another_run_is_refused(prepared, tmp_path):
    from faces2voices.training import adapt

    card = adapt("talkers", prepared, tmp_path / "run", steps=1) / "README.md"
    written = card.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    lines = (
        (other / "manifest.jsonl")
        .read_text()
        .replace('"split": "train", ', '"split": "train", "note": 1, ')
    )
    (other / "manifest.jsonl").write_text(lines)
    for data, kw, named in (
        (other, {}, "data.name"),
        (prepared, dict(seed=3), "seed 0, not 3"),
        (prepared, dict(steps=2), "preset.steps"),
    ):
        with pytest.raises(CheckpointError, match=named):
            adapt("talkers", data, tmp_path / "run", **dict(steps=1) | kw)
    assert card.read_bytes() == written
    shutil.copytree(prepared, tmp_path / "elsewhere" / prepared.name)
    adapt(
        "talkers", tmp_path / "elsewhere" / prepared.name, tmp_path / "run", steps=1
    )  # the same clips, moved


@pytest.mark.parametrize("spoil", ["cut", "other", "nan"])
def test_a_damaged_part_is_one_line(tmp_path, spoil):
    module = torch.nn.Linear(3, 2)
    load_or_train(tmp_path, "units", module, lambda: None)
    path = tmp_path / "units.safetensors"
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:40])
    if spoil == "other":
        save_file(dict(weight=torch.zeros(5, 5), bias=torch.zeros(2)), path)
    if spoil == "nan":
        save_file(load_file(path) | dict(bias=torch.tensor([1.0, float("nan")])), path)
    with pytest.raises(CheckpointError, match="units.safetensors"):
        load_or_train(tmp_path, "units", module, lambda: None)


# --- faces


@pytest.fixture()
def bare(monkeypatch, tmp_path):
    "A user who has no face models and has named none."
    for name in ("F2V_INSIGHTFACE", "F2V_MEDIAPIPE", "F2V_MOBILEFACENET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_what_the_user_names_must_serve(bare, monkeypatch, tmp_path, told):
    assert make_backend("auto").name == "cascade"
    pytest.importorskip("insightface")
    with pytest.raises(ToolMissingError, match="nowhere"):
        make_backend("auto", tmp_path / "nowhere")
    with pytest.raises(ToolMissingError, match="nowhere"):
        FacesToVoices.from_pretrained("talkers", "cpu", faces=tmp_path / "nowhere")
    for model in ("grid", "talkers"):
        code, said = told(
            "synthesize",
            SAMPLES[0],
            "-o",
            tmp_path / "out",
            "--model",
            model,
            "--faces",
            tmp_path / "nowhere",
        )
        assert code == 1 and "nowhere" in said and "holds no face models" in said
    monkeypatch.setenv("F2V_INSIGHTFACE", str(tmp_path / "empty"))
    with pytest.raises(ToolMissingError, match="empty"):
        make_backend("auto")
    monkeypatch.delenv("F2V_INSIGHTFACE")
    monkeypatch.setenv("F2V_MEDIAPIPE", str(tmp_path / "no.task"))
    with pytest.raises(ToolMissingError):
        make_backend("auto")


def test_a_coarse_finder_and_a_mean_voice_are_said(bare):
    model = FacesToVoices(EIGENLIPS.to_json())
    coarse, mean = model.backend_notes()
    assert "cascade" in coarse and "mean voice" in mean
    assert model.backend_notes(reference="a.wav") == [coarse]  # a voice that is given is no mean
    assert FacesToVoices.from_pretrained("talkers", device="cpu").backend_notes() == []


def test_a_model_of_the_mesh_names_the_way_to_it(bare):
    "Nothing coarser stands in for the mesh that a model was trained on."
    model = FacesToVoices(replace(GRID, expression_dim=52).to_json())
    with pytest.raises(ToolMissingError, match="(?s)mediapipe.*(faces2voices download faces|pip)"):
        model.face_backend


def test_an_identity_of_another_model_is_no_identity(monkeypatch):
    "Numbers of a foreign recogniser are not read as this model's: the mean voice speaks."
    from faces2voices.tracking import FaceBackend

    class Foreign(FaceBackend):
        name = "foreign"

        def identity(self, face):
            return np.ones(512, np.float32)

    grid = FacesToVoices.from_pretrained("grid", device="cpu")
    grid.face_backend = Foreign()
    (note,) = grid.backend_notes()
    assert "512 numbers" in note and "128" in note and "mean voice" in note
    assert "faces2voices download faces" in note
    face = np.zeros((112, 112, 3), np.uint8)
    same(
        grid.predict_speaker(face, Foreign().identity(face)),
        grid.predict_speaker(face, np.zeros(0, np.float32)),
    )


def test_who_finds_no_face_names_the_model_that_may(f2v, tmp_path):
    write_video(tmp_path / "blank.mp4", np.full((30, 120, 160, 3), 127, np.uint8))
    with pytest.raises(NoFaceError, match="--model grid"):
        f2v(tmp_path / "blank.mp4")


def test_drawn_talkers_are_prepared_with_the_locator(tmp_path):
    from faces2voices.manifests import Entry, read_manifest
    from faces2voices.training_commands import _finder

    drawn = read_manifest(ROOT / "data_samples" / "manifest.jsonl")
    assert _finder("auto", drawn) == "locator" and _finder("cascade", drawn) == "cascade"
    assert _finder("auto", [*drawn, Entry("a", Path("a.mp4"))]) == "auto"
    assert _finder("auto", []) == "auto"


def test_the_next_step_after_talkers_works_as_printed(monkeypatch, tmp_path):
    from faces2voices import talkers

    monkeypatch.setattr(talkers, "make_corpus", lambda *a, **k: None)
    assert f"prepare {tmp_path} PREPARED --backend locator" in run("talkers", tmp_path).output


def test_data_without_a_split_say_what_to_do(prepared, told, tmp_path):
    code, said = told("evaluate", prepared)
    assert (
        code == 1
        and "has no clip of split 'test'" in said
        and "'train'" in said
        and "manifest.jsonl" in said
    )
    code, said = told("ablate", prepared, "-o", tmp_path / "runs")
    assert code == 1 and "split is `val`" in said and "manifest.jsonl" in said


@pytest.mark.parametrize("field", ["expression", "identity", "log_f0", "energy"])
def test_a_prepared_clip_of_no_numbers_is_one_line(prepared, told, tmp_path, field):
    entry = read_manifest(prepared / "manifest.jsonl")[0]
    clip = load_clip(prepared / f"{entry.name}.npz")
    wrong = torch.full_like(torch.cat([getattr(clip, field).flatten(), torch.zeros(1)]), torch.nan)
    wrong = wrong[:-1].view_as(getattr(clip, field)) if len(wrong) > 1 else wrong
    save_clip(clip._replace(**{field: wrong}), tmp_path / f"{entry.name}.npz", "locator")
    with pytest.raises(CorpusError, match=f"{entry.name}.npz.*{field} is not all numbers"):
        load_clip(tmp_path / f"{entry.name}.npz")
    write_manifest([entry], tmp_path / "manifest.jsonl")
    code, said = told("evaluate", tmp_path, "--split", entry.split or "all")
    assert code == 1 and f"{entry.name}.npz" in said


@linux
def test_a_folder_whose_names_are_no_text_is_prepared(prepared, told, tmp_path):
    films = tmp_path / os.fsdecode(b"some \xff one")
    films.mkdir()
    shutil.copy(SAMPLES[0], films / os.fsdecode(b"clip \xfe.mp4"))
    code, said = told("prepare", tmp_path, tmp_path / "out", "--backend", "locator", "--workers", 1)
    assert code == 0, said
    (entry,) = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert entry.path == films / os.fsdecode(b"clip \xfe.mp4") and entry.speaker_id == films.name
    assert load_clip(tmp_path / "out" / f"{entry.name}.npz").speaker_id == films.name


def test_a_few_frames_give_no_eigenlips():
    lips = torch.rand(1, 1, 8, 22, 22, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 8, dtype=torch.bool)
    Eigenlips(7, 22).fit(lips, mask)
    for n in (8, 9, 30):
        with pytest.raises(CorpusError, match=f"8 frames are too few for {n} eigenlips"):
            Eigenlips(n, 22).fit(lips, mask)


@pytest.mark.parametrize(
    ("args", "backend"),
    [
        (["adapt", "--model", "grid"], "mediapipe+mobilefacenet"),
        (["train", "--preset", "slim", "--init", "talkers"], "insightface"),
    ],
)
def test_clips_of_another_face_backend_train_nothing(prepared, told, tmp_path, args, backend):
    code, said = told(*args, prepared, "-o", tmp_path / "run")
    assert code == 1 and "0 numbers of identity" in said and f"--backend {backend}" in said
    assert not (tmp_path / "run" / "run.json").exists()


# --- what is asked of a disk, a console, a machine


@pytest.mark.parametrize(
    "args",
    [
        ("synthesize", SAMPLES[0], "-o"),
        ("talkers",),
        ("prepare", ROOT / "data_samples"),
        ("train", "data", "-o"),
        ("adapt", "data", "-o"),
        ("ablate", "data", "-o"),
        ("download", "grid"),
    ],
    ids=lambda a: a[0],
)
@pytest.mark.parametrize("where", ["mine", "mine/below"])
def test_a_file_where_a_folder_is_wanted_is_one_line(told, tmp_path, args, where):
    (tmp_path / "mine").write_text("a file")
    code, said = told(*args, tmp_path / where)
    assert (
        code == 1
        and said.count("\n") == 1
        and str(tmp_path / where) in said
        and (tmp_path / "mine").read_text() == "a file"
    )


def test_a_name_that_is_too_long_costs_nothing_else(tmp_path):
    long = tmp_path / f"{'x' * 246}.mp4"
    shutil.copy(SAMPLES[0], long)
    result = run(
        "synthesize", long, "y" * 300 + ".mp4", SAMPLES[1], "-o", tmp_path / "out", "--steps", 1
    )
    assert result.exit_code == 1 and "too long" in result.output and "1 of 3" in result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{SAMPLES[1].stem}.wav",
        f"{SAMPLES[1].stem}.dubbed.mp4",
        "report.html",
    }


def test_an_error_that_nobody_foresaw_costs_nothing_else(f2v, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "crops_figure", lambda looked: 1 / 0)
    done = files.synthesize_file(f2v, SAMPLES[0], tmp_path, False, [], steps=1)
    assert (
        len(done.written) == 1
        and Path(done.written[0]).exists()
        and "ZeroDivisionError" in done.error
    )


@linux
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    "The system refuses every byte above 30 kB of a file."
    code = (
        "import resource, sys\nfrom faces2voices import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,)*2)\n"
        "sys.argv = ['faces2voices', 'synthesize', *sys.argv[1:]]; cli.main()"
    )
    command = [sys.executable, "-c", code, SAMPLES[0], "-o", tmp_path / "out", "--steps", "1"]
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 1 and "Traceback" not in out.stderr and "cannot" in out.stderr
    assert not list((tmp_path / "out").iterdir())


@linux
@pytest.mark.parametrize("save", ["save_file(x, tmp)", "torch.save(x, tmp)"])
def test_weights_on_a_full_disk_are_one_line(tmp_path, save):
    "Neither safetensors nor torch say it with an OSError."
    code = (
        "import resource, sys, torch\nfrom safetensors.torch import save_file\n"
        "from faces2voices.errors import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,)*2); x = dict(a=torch.zeros(100_000))\n"
        f"try:\n with atomic_path(sys.argv[1]) as tmp: {save}\n"
        "except F2VError as e: print(e)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.pt")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "w.pt: cannot be written" in out.stdout, out.stderr
    assert not list(tmp_path.iterdir())


@linux
def test_a_name_that_is_no_text(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/clip \xff\xfe.mp4")
    shutil.copy(SAMPLES[0], path)
    code = "import sys; from faces2voices import cli; cli.main()"
    command = [
        sys.executable,
        "-c",
        code,
        "synthesize",
        path,
        str(SAMPLES[1]),
        "-o",
        str(tmp_path / "out"),
        "--steps",
        "1",
    ]
    out = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert b"Traceback" not in out.stderr, out.stderr
    wavs = {p.name for p in (tmp_path / "out").glob("*.wav")}
    assert f"{SAMPLES[1].stem}.wav" in wavs and (tmp_path / "out" / "report.html").exists()
    assert out.returncode == (0 if len(wavs) == 2 else 1)


CONSOLES = dict(
    cp1252=dict(PYTHONIOENCODING="cp1252"),
    C=dict(PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0"),
)


@pytest.mark.parametrize("env", CONSOLES.values(), ids=CONSOLES)
@pytest.mark.parametrize(
    "words",
    [["synthesize", "--help"], ["evaluate", "no – μ", "--split", "σ"]],
    ids=["help", "error"],
)
def test_a_console_that_knows_few_letters(env, words):
    code = "from faces2voices import cli; cli.main()"
    out = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, env=os.environ | env, cwd=ROOT
    )
    assert out.returncode == (words[0] == "evaluate") and b"Traceback" not in out.stderr, (
        out.stderr[-500:]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(told, tmp_path):
    code, said = told("synthesize", SAMPLES[0], "-o", tmp_path, "--device", "cuda")
    assert code == 1 and said.count("\n") == 1 and "cuda" in said
    for name in ("cuda:3", "abacus"):
        with pytest.raises(F2VError, match=name):
            pick_device(name)


@pytest.mark.parametrize("args", [("--seed", -1), ("--seed", 2**32), ("--seed", "x")])
def test_seeds_out_of_range_are_wrong_calls(args, tmp_path):
    assert run("synthesize", SAMPLES[0], "-o", tmp_path, *args).exit_code == 2
    assert run("train", "data", "-o", tmp_path, *args).exit_code == 2


def test_seeds_of_any_library(f2v, clip):
    assert type(whole_seed(np.int64(7))) is int and whole_seed(torch.tensor(7)) == 7
    same(
        f2v.synthesize_clip(clip, seed=np.int64(7), steps=1).wav,
        f2v.synthesize_clip(clip, seed=7, steps=1).wav,
    )
    seed_everything(np.int64(3))
    a = np.random.rand()
    seed_everything(3)
    assert a == np.random.rand()
    for bad in (-1, 2**32, 1.5, "7", None):
        with pytest.raises(F2VError, match="seed"):
            f2v.synthesize_clip(clip, seed=bad)


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_leave_no_clip(prepared, limit):
    from faces2voices.cards import test_clips

    assert run("evaluate", prepared, "--limit", limit).exit_code == 2
    with pytest.raises(CorpusError, match=f"{limit} clips"):
        test_clips(prepared, "train", limit)


@pytest.mark.parametrize("bad", [-1, 2**32, "x"])
def test_seeds_are_asked_for_wherever_they_enter(f2v, bad, tmp_path):
    enter = [
        lambda s: evaluation.metric_card(f2v, tmp_path, seed=s),
        lambda s: listening.listening_test({"a": {"b": torch.zeros(640)}}, tmp_path / "t", s),
        lambda s: judges.train_recogniser(tmp_path, tmp_path, seed=s),
        lambda s: sweeps.sweep_study("talkers", tmp_path, seed=s),
        lambda s: studies.adaptation_study(tmp_path, tmp_path, seed=s),
        lambda s: draws.draw_study("talkers", tmp_path, tmp_path, seed=s),
        lambda s: studies.masked_ce_study(f2v, tmp_path, seeds=(s,)),
        lambda s: training.shuffled(3, 2, s),
        lambda s: corpora.BucketSampler([1], 1, s),
        lambda s: core.seeded(s, list),
        lambda s: timbre.train_loop([], None, 1, 1.0, s),
        lambda s: f2v.decoder.sample(torch.zeros(1, 80, 8), seed=s),
        lambda s: f2v.units.fit([], seed=s),
        lambda s: locator.train_locator(1, seed=s),
    ]
    for take in enter:
        with pytest.raises(F2VError, match="not a whole number from 0"):
            take(bad)


def test_seeds_of_any_library_serve_in_parts(f2v):
    mu, seven = torch.zeros(2, 80, 8), np.int64(7)
    sample = f2v.decoder.sample
    same(sample(mu, seed=seven, steps=1), sample(mu, seed=7, steps=1))
    same(sample(mu, seed=np.array([7, 8]), steps=1), sample(mu, seed=[7, 8], steps=1))
    assert training.shuffled(9, 4, seven)(5) == training.shuffled(9, 4, 7)(5)
    assert list(corpora.BucketSampler(range(9), 2, seven)) == list(
        corpora.BucketSampler(range(9), 2, 7)
    )
    assert core.seeded(seven, lambda: torch.rand(1)) == core.seeded(7, lambda: torch.rand(1))


# --- folders that are no model

CONFIGS = {
    "lip_scale": 0,
    "decoder_channels": [],
    "mask_kernel": 4,
    "mask_size": 15,
    "n_blocks": 10**9,
    "dim": 10**6,
    "words": 3,
    "lip_encoder": "eagle",
    "dropout": float("nan"),
    "vocoder_kernels": [3],
    "vocoder_channels": -1,
    "sigma_min": "small",
    "flow_target": "mu",
    "flow_times": 1,
    "face_backend": "eyes",
    "speaker_dim": 255,
    "n_units": True,
    "steps": [1],
    "vocoder_dilations": [[10**9]],
    "identity_dim": 1.5,
    "unit_features": None,
    "eigenlips": 0,
}


@pytest.fixture()
def folder(tmp_path):
    "A copy of the packaged model of drawn faces."
    shutil.copytree(ROOT / "faces2voices" / "weights" / "talkers", tmp_path / "model")
    return tmp_path / "model"


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["preset"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_makes_no_model(folder, name):
    change(folder, **{name: CONFIGS[name]})
    with pytest.raises(CheckpointError, match="model"):
        FacesToVoices.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"preset": 3}', "[" * 20_000, '{"preset": {"dim": 1e999}}', "\xff"],
)
def test_a_configuration_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="config.json"):
        FacesToVoices.from_pretrained(folder, device="cpu")


@linux
def test_sizes_are_not_believed(folder):
    "Widths that would fill 60 GB, compared with the file of weights before anything is built."
    change(folder, dim=8192, n_units=65536, decoder_channels=[4096, 4096])
    code = (
        "import resource, sys\nfrom faces2voices import FacesToVoices\n"
        "from faces2voices.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6*2**30,)*2)\n"
        "try: FacesToVoices.from_pretrained(sys.argv[1], device='cpu')\n"
        "except CheckpointError as e: print('refused', e)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert out.stdout.startswith("refused"), out.stderr[-800:]


def test_weights_of_another_model_and_of_no_numbers(folder):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    name = next(k for k, v in state.items() if v.is_floating_point() and v.numel() > 3)
    spoilt = state[name].clone()
    spoilt.view(-1)[0] = float("nan")
    save_file(state | {name: spoilt}, weights)
    with pytest.raises(CheckpointError, match="not numbers"):
        FacesToVoices.from_pretrained(folder, device="cpu")
    shutil.copy(ROOT / "faces2voices" / "weights" / "grid" / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match="other weights"):
        FacesToVoices.from_pretrained(folder, device="cpu")


# --- a call evaluates


def test_a_call_in_training_mode_changes_nothing(clip):
    model = FacesToVoices.from_pretrained("talkers", device="cpu")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wav = model.synthesize_clip(clip, steps=1).wav
    model.train()
    model.decoder.eval()
    same(model.synthesize_clip(clip, steps=1).wav, wav)
    model(SAMPLES[0], steps=1)
    model.embed_reference(SAMPLES[0])
    for k, v in model.state_dict().items():
        same(v, before[k])
    assert model.hierarchy.training and not model.decoder.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_a_call_changes_nothing(f2v, clip, dtype):
    wav = f2v.synthesize_clip(clip, steps=1).wav
    with torch.autocast("cpu", dtype):
        same(f2v.synthesize_clip(clip, steps=1).wav, wav)


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_weights_of_another_precision_are_one_line(clip, cast):
    model = getattr(FacesToVoices.from_pretrained("talkers", device="cpu"), cast)()
    with pytest.raises(CheckpointError, match="float32"):
        model.synthesize_clip(clip)
    model.float().synthesize_clip(clip, steps=1)


@pytest.mark.parametrize("what", ["expression", "face"])
def test_a_clip_of_no_numbers_is_one_line(f2v, clip, what):
    spoilt = getattr(clip, what).float().clone()
    spoilt.view(-1)[5] = float("nan")
    with pytest.raises(MediaError, match="not numbers"):
        f2v.synthesize_clip(clip._replace(**{what: spoilt}), steps=1)


# --- what is written and read


def test_a_wav_is_not_written_under_another_name(f2v, clip, tmp_path):
    speech = f2v.synthesize_clip(clip, steps=1)
    for name in ("a.mp3", "a", "a.mp4"):
        with pytest.raises(F2VError, match="wav"):
            speech.save(tmp_path / name)
    speech.save(tmp_path / "a.WAV")
    assert [p.name for p in tmp_path.iterdir()] == ["a.WAV"]


def test_a_dub_replaces_only_when_told(f2v, tmp_path):
    speech, path = f2v(SAMPLES[0], steps=1), tmp_path / "a.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(F2VError, match="already exists"):
        speech.dub(path)
    assert path.read_bytes() == b"mine"
    speech.dub(path, overwrite=True)
    assert len(read_video(path).frames) == len(read_video(SAMPLES[0]).frames)


@pytest.mark.parametrize(
    "mode, white", [("uint16", 65535), ("float32", 1.0), ("float32", 255.0), ("int32", 65535)]
)
def test_grey_pictures_of_any_depth(tmp_path, mode, white):
    from PIL import Image

    grey = np.asarray(Image.fromarray(read_video(SAMPLES[4]).frames[20]).convert("L"))
    Image.fromarray(grey).save(tmp_path / "eight.png")
    deep = tmp_path / ("deep.png" if mode == "uint16" else "deep.tif")
    Image.fromarray((grey.astype(np.float64) * white / 255).astype(mode)).save(deep)
    eight, other = (storage.read_picture(p).astype(int) for p in (tmp_path / "eight.png", deep))
    assert eight.shape == other.shape and abs(eight - other).max() <= 2 and eight.std() > 20


# --- a voice given by sound


def hz_of(wav):
    log_f0, voiced = pitch(wav[: len(wav) // 640 * 640])
    return log_f0[voiced > 0].mean().exp().item()


def test_loudness_and_pauses_are_no_trait_of_a_voice(f2v, tmp_path):
    voices = []
    for i in (4, 13, 20):
        wav, pause = load_audio(SAMPLES[i]), torch.zeros(35 * 16000 if i == 13 else 16000)
        variants = dict(
            plain=wav, quiet=wav / 10, loud=wav * 3, late=torch.cat([pause, wav, pause])
        )
        for name, sound in variants.items():
            save_wav(tmp_path / f"{name}{i}.wav", sound)
        voices.append(
            torch.stack([f2v.embed_reference(tmp_path / f"{name}{i}.wav") for name in variants])
        )
    voices = torch.stack(voices)  # (3 people, 4 ways, 256)
    own = torch.einsum("pad,pbd->pab", voices, voices).min()
    others = max((voices[a] @ voices[b].T).max() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert own > 0.95 and own > others


@pytest.mark.parametrize("i", [4, 14, 20])
def test_a_reference_is_spoken_at_its_pitch(f2v, clip, tmp_path, i):
    wav = load_audio(SAMPLES[i])
    save_wav(tmp_path / "quiet.wav", wav / 10)
    take = f2v.synthesize_clip(clip, speaker=f2v.voice_like(reference=tmp_path / "quiet.wav"))
    assert hz_of(take.wav) == pytest.approx(hz_of(wav), rel=0.1)


def test_a_reference_without_speech_is_one_line(f2v, tmp_path):
    click = torch.zeros(32000)
    click[8000:8100] = 0.5
    save_wav(tmp_path / "click.wav", click)
    with pytest.raises(MediaError, match="of speech"):
        f2v.embed_reference(tmp_path / "click.wav")


# --- doubts


@pytest.fixture(scope="module")
def seen(f2v):
    return f2v.preprocess(SAMPLES[2])


def doubts_of(f2v, frames, tmp_path):
    write_video(tmp_path / "clip.mp4", frames)
    return " ".join(f2v(tmp_path / "clip.mp4").notes)


def test_ordinary_clips_raise_no_doubt(f2v):
    for path in SAMPLES[::5]:
        assert f2v(path).notes == [], path


def test_a_mouth_that_stands_still_is_said(f2v, tmp_path):
    frames = read_video(SAMPLES[2]).frames
    said = doubts_of(f2v, np.repeat(frames[:1], 60, 0), tmp_path)
    assert "stands still" in said and "unsure" in said


def test_speech_that_is_nearly_silent_is_said(f2v, seen):
    _, looked = seen
    assert f2v.quality_notes(looked, -20.0, 0.2) == []
    [said] = f2v.quality_notes(looked, -40.0, 0.2)
    assert "nearly silent (-40 dB" in said


def test_a_hidden_mouth_is_said(f2v, tmp_path):
    "Blurred beyond reading, where the face is found all the same."
    from scipy import ndimage

    frames = read_video(SAMPLES[2]).frames.copy()
    (x, y) = f2v.preprocess(SAMPLES[2])[1].track.points[0, 3:].mean(0).astype(int)
    part = slice(None), slice(y - 16, y + 20), slice(x - 30, x + 30)
    frames[part] = ndimage.uniform_filter(frames[part], (0, 15, 15, 0))
    assert "unsure" in doubts_of(f2v, frames, tmp_path)


def test_a_face_that_looks_aside_is_said(seen, f2v):
    looked = seen[1]
    points = looked.track.points
    assert not turned_away(points)
    profile = points.copy()
    profile[:, 2, 0] += 0.4 * (points[:, 1, 0] - points[:, 0, 0])  # the nose, towards one eye
    narrow = points * [0.5, 1.0]
    rolled = (points @ [1, 1j]) * np.exp(1j * 0.7)
    rolled = np.stack([rolled.real, rolled.imag], -1)
    for turned in (profile, narrow, rolled):
        assert turned_away(turned)
    said = f2v.quality_notes(
        looked._replace(track=looked.track._replace(points=profile)), -20.0, 0.0
    )
    assert len(said) == 1 and "turned aside" in said[0]


def test_doubts_stand_on_the_command_line_and_in_the_report(tmp_path):
    write_video(tmp_path / "still.mp4", np.repeat(read_video(SAMPLES[2]).frames[:1], 60, 0))
    result = run(
        "synthesize", tmp_path / "still.mp4", "-o", tmp_path / "out", "--no-dub", "--steps", 1
    )
    assert result.exit_code == 0 and "stands still" in result.output
    assert "class=note" in (tmp_path / "out" / "report.html").read_text()


# --- README


def test_the_code_of_the_readme_runs_as_a_script_in_the_top_folder():
    import re

    code = "\n".join(
        re.findall(
            r"^```python\n(.*?)^```",
            (ROOT / "README.md").read_text(encoding="utf-8"),
            flags=re.M | re.S,
        )
    )
    assert "f2v(" in code and "plot()" in code
    before = set(ROOT.iterdir())
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-800:]
    assert set(ROOT.iterdir()) == before
