"""The command line.

Every page of help teaches, codes say what happened, and a listening test comes back."""

import json
import shutil
import sys
from pathlib import Path
import pytest
import typer
from typer.testing import CliRunner
from faces2voices import cli
from faces2voices.soundfiles import load_audio, save_wav
from faces2voices.errors import CorpusError, F2VError

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "data_samples"


def run(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def all_commands(group=None, path=()):
    "(words, command) of everything that can be called."
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(all_commands())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_each_of_its_words_is_explained(words):
    command = COMMANDS[words]
    assert len((command.help or "").strip()) > 40, "say what it does"
    assert not [p.name for p in command.params if not getattr(p, "help", None)], (
        "an argument or option without a word of help"
    )
    assert run(*words, "--help").exit_code == 0


def test_groups_of_commands_are_explained():
    assert {words[0] for words in COMMANDS if len(words) > 1} == {"course", "listen", "study"}
    shown = run("listen", "--help").output
    assert all(word in shown for word in ("page", "marks", "marks-*.csv", "1 to 5", "interval"))


@pytest.mark.parametrize(
    "args",
    [
        ("synthesize",),
        ("listen",),
        ("listen", "page"),
        ("listen", "marks", "x"),
        ("synthesize", "x.mp4", "--steps", "-1"),
        ("bench", "nothing"),
        ("bench", "loader"),
        ("ablate", "x", "--seeds", "a,b"),
        ("ablate", "x", "--shares", "1,0"),
        ("ablate", "x", "--shares", "half"),
        ("listen", "page", "t", "a", "b", "--model", "talkers"),
    ],
)
def test_wrong_calls_end_with_2(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args).exit_code == 2 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ("evaluate", "no-data"),
        ("sweep", "no-data"),
        ("bench", "flow"),
        ("study", "link"),
        ("study", "teacher", "no-data"),
        ("listen", "marks", "key", "a.csv"),
    ],
    ids=" ".join,
)
def test_a_result_that_is_there_is_refused_before_the_work(args, tmp_path):
    (tmp_path / "card.json").write_text("mine")
    result = run(*args, "-o", tmp_path / "card.json")
    assert result.exit_code == 2 and "exists already" in result.output
    assert (tmp_path / "card.json").read_text() == "mine"


def test_an_error_of_the_input_is_one_line_and_1(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["faces2voices", "listen", "marks", "nowhere", "marks-a.csv"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1
    assert "nowhere/key.json" in said and "listen page" in said


@pytest.fixture()
def folders(tmp_path):
    "Two systems with the same three clips: wavs, and mp4s beside something else."
    clips = sorted(SAMPLES.glob("*.mp4"))[:3]
    for clip in clips:
        (tmp_path / "films").mkdir(exist_ok=True)
        shutil.copy(clip, tmp_path / "films")
        save_wav(tmp_path / "ours" / f"{clip.stem}.wav", load_audio(clip) / 3)
    (tmp_path / "ours" / f"{clips[0].stem}.dubbed.mp4").write_bytes(b"not looked at")
    return tmp_path / "films", tmp_path / "ours"


def marks_of(key, who, mark, path, beeps=None):
    "The file that the page of a listener would save."
    rows = [(n, mark(system)) for n, (system, _) in key["items"].items()]
    rows += [(n, beeps or count) for n, count in key["attention"].items()]
    lines = [f"{key['test']},{who},{i},{n},{r}\n" for i, (n, r) in enumerate(rows, 1)]
    path.write_text("test,listener,position,item,rating\n" + "".join(lines))
    return path


def test_a_listening_test_goes_out_and_comes_back(folders, tmp_path):
    films, ours = folders
    made = run(
        "listen", "page", tmp_path / "test", films, ours, "--question", "Is it <you>?", "--seed", 3
    )
    key = json.loads((tmp_path / "test" / "key.json").read_text())
    page = (tmp_path / "test" / "page" / "index.html").read_text()
    assert made.exit_code == 0 and "7 sounds" in made.output
    assert len(list((tmp_path / "test" / "page").glob("*.flac"))) == 7
    assert "Is it &lt;you&gt;?" in page and "films" not in page
    assert {s for s, _ in key["items"].values()} == {str(films), str(ours)}
    files = []
    for i in range(4):
        path = tmp_path / f"marks-l{i}.csv"
        files.append(marks_of(key, f"l{i}", lambda s: 4 + (s == str(films)) - i % 2, path))
    wrong = next(iter(key["attention"].values())) % 5 + 1
    path = tmp_path / "marks-zzz.csv"
    files.append(marks_of(key, "zzz", lambda s: 1, path, beeps=wrong))
    back = run("listen", "marks", tmp_path / "test", *files, "-o", tmp_path / "mos.json")
    lines = [line for line in back.output.splitlines() if line.startswith("|")]
    table = [[x.strip() for x in line.split("|")[1:-1]] for line in lines]
    assert back.exit_code == 0
    assert [row[:2] for row in table[2:]] == [[str(films), "4.50"], [str(ours), "3.50"]]
    assert "4 listeners, 3 clips" in back.output and "zzz" in back.output
    card = json.loads((tmp_path / "mos.json").read_text())
    found = card["systems"][str(films)]
    assert found["mos"] == 4.5 and found["low"] < 4 < 5 < found["high"]
    assert card["left_out"] == ["zzz"]


def test_a_listening_test_is_refused_by_name(folders, tmp_path):
    films, ours = folders
    next(ours.glob("*.wav")).unlink()
    (tmp_path / "empty").mkdir()
    for args, kind, why in [
        ((tmp_path / "new", films, ours), CorpusError, "same clips"),
        ((tmp_path / "new", films, tmp_path / "empty"), CorpusError, "holds no .wav"),
    ]:
        refused = run("listen", "page", *args)
        assert refused.exit_code == 1 and isinstance(refused.exception, kind)
        assert why in str(refused.exception) and not (tmp_path / "new").exists()
    assert run("listen", "page", tmp_path / "one", films).exit_code == 0
    again = run("listen", "page", tmp_path / "one", films)
    assert isinstance(again.exception, F2VError) and "already" in str(again.exception)
    for text in ("", "[]", '{"test": 1, "items": {}, "attention": {}}', '{"test": "x"}'):
        (tmp_path / "one" / "key.json").write_text(text)
        assert isinstance(run("listen", "marks", tmp_path / "one", "x.csv").exception, CorpusError)


def test_a_model_is_asked_about_between_its_bounds(tmp_path):
    from faces2voices import FacesToVoices
    from faces2voices.manifests import read_manifest
    from faces2voices.preparing import prepare

    f2v = FacesToVoices.from_pretrained("talkers", device="cpu")
    entries = [e for e in read_manifest(SAMPLES / "manifest.jsonl") if e.split == "test"]
    prepare(entries[:2], tmp_path / "prepared", f2v.face_backend, 1)
    options = ["--model", "talkers", "--limit", 1, "--steps", 1]
    made = run("listen", "page", tmp_path / "test", tmp_path / "prepared", *options)
    assert made.exit_code == 0, made.output
    key = json.loads((tmp_path / "test" / "key.json").read_text())
    systems = sorted(system for system, _ in key["items"].values())
    assert systems == ["original", "synthesised", "vocoder"] and "4 sounds" in made.output


def test_adapt_reads_ahead_with_as_many_processes_as_are_asked_for(tmp_path, monkeypatch):
    from faces2voices import training

    asked = {}

    def adapted(*args, **kw):
        asked.update(kw)
        return tmp_path

    monkeypatch.setattr(training, "adapt", adapted)
    ran = run("adapt", tmp_path, "-o", tmp_path / "run", "--workers", 0)
    assert ran.exit_code == 0 and asked["workers"] == 0, ran.output


def test_talkers_of_other_numbers_are_other_people_of_the_same_world(tmp_path):
    "A world may be drawn in parts: the second part is what the whole would have held there."
    for out, options in (("whole", ["--speakers", 2]), ("second", ["--speakers", 1, "--first", 1])):
        found = run("talkers", tmp_path / out, *options, "--clips", 1, "--workers", 1)
        assert found.exit_code == 0, found.output
    whole, second = (
        (tmp_path / out / "manifest.jsonl").read_text().splitlines() for out in ("whole", "second")
    )
    assert second == whole[1:]
    clip = "t0001_000.mp4"
    assert (tmp_path / "second" / clip).read_bytes() == (tmp_path / "whole" / clip).read_bytes()
