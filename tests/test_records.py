"Recorded results and printed commands: what stands beside a number runs as it stands."

from itertools import chain
import json
import re
import shlex
import subprocess
from pathlib import Path
import pytest
import typer
from typer.testing import CliRunner
from faces2voices import cli, records, shell
from faces2voices.errors import CorpusError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "nbs" / "results").glob("*.json"))
CARDS = sorted((ROOT / "faces2voices" / "weights").glob("*/README.md"))
CONFIGS = sorted((ROOT / "faces2voices" / "weights").glob("*/config.json"))
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
TEXTS = "README.md", "CONTRIBUTING.md", "data_samples/DATASHEET.md"
PAGES = [*CARDS, *NOTEBOOKS, *(ROOT / text for text in TEXTS)]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Options that refuse a file that is there look around: let them see nothing."
    monkeypatch.chdir(tmp_path)


def parse(line: str):
    "Read a command with the command line's own parser, or find its script; nothing is run."
    program, *words = shlex.split(line, comments=True)
    if program == "python":
        assert re.match("tests/", words[0]) and (ROOT / words[0]).is_file(), line
        return None
    assert program == "faces2voices", line
    command, label = typer.main.get_command(cli.app), program
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{label} has no command {words[:1]}: {line}"
        label, *words = words
        command = command.commands[label]
    return command.make_context(label, words)


def commands_in(record: dict) -> list:
    "The command of a record, those of its data, and that of its model."
    made = chain.from_iterable(of["commands"] for of in record["data"].values())
    return [record["command"], *made, *([record["info"]["command"]] if "info" in record else [])]


def defined(line: str) -> bool:
    "Does it name real folders, and not PREPARED or GRID?"
    return not re.search(r"(?<![\w/.])[A-Z_]{3,}(?![\w/.])", line)


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_a_record_says_all_that_it_depends_on(path):
    found = json.loads(path.read_text())
    assert isinstance(found, dict), "one file, one command"
    for key in ("command", "seed", "commit", "machine", "versions", "data"):
        assert key in found, f"no {key}"
    seeds = found["seed"] if isinstance(found["seed"], list) else [found["seed"]]
    assert seeds and all(isinstance(s, int) for s in seeds)
    assert re.fullmatch(r"[0-9a-f]{7,}|version \S+", found["commit"]), "code had been changed since"
    assert found["machine"]
    assert {"python", "torch", "torchaudio", "numpy"} <= found["versions"].keys()


@pytest.mark.parametrize("path", RESULTS, ids=name)
def test_a_record_can_be_made_again(path):
    found = json.loads(path.read_text())
    for line in commands_in(found):
        parse(line)
        assert defined(line), f"nobody knows what this is: {line}"
    read = {p for p in shlex.split(found["command"]) if p.startswith("prepared/")}
    known = {p for p in found["data"] if p.startswith("prepared/")}
    assert read == known, "each folder that the command reads says how it was made"
    assert all(found["data"][folder]["commands"] for folder in known)


def test_no_two_records_have_the_same_command():
    made = [json.loads(path.read_text())["command"] for path in RESULTS]
    assert sorted(made) == sorted(set(made))


def test_the_commands_of_models_can_be_given_again():
    for path in CONFIGS:
        line = json.loads(path.read_text())["info"]["command"]
        parse(line)
        assert defined(line), line
        assert line in path.with_name("README.md").read_text()


def texts(path) -> list:
    "What a page shows: its text, or the prose, code and outputs of a notebook."
    if path.suffix != ".ipynb":
        return [path.read_text()]
    said = []
    for cell in json.loads(path.read_text())["cells"]:
        said.append("".join(cell["source"]))
        for out in cell.get("outputs", ()):
            shown = out.get("data", {}).get("text/markdown") or out.get("text", "")
            said.append("".join(shown))
    return said


def printed(text: str) -> list:
    """Commands in backticks, and on lines of their own (in code fences and indented blocks).

    A pipe of a shell, and what leaves something out (…, {value}), are no commands to type."""
    ticked = re.findall(r"`(faces2voices [a-z][^`\n]*)`", text)
    alone = re.findall(r"^ *(?:\$ |\.venv/bin/)?(faces2voices (?:[a-z-]+ )+.*)$", text, flags=re.M)
    found = ticked + [line for line in alone if "`" not in line]
    return [line for line in found if not re.search(r"…|\{|\|", line)]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_printed_commands_can_be_typed(path):
    for text in texts(path):
        for line in printed(text):
            words = shlex.split(line, comments=True)[1:]
            group = typer.main.get_command(cli.app)
            while words and words[0] in getattr(group, "commands", {}):
                group, words = group.commands[words[0]], words[1:]
            if not words and (hasattr(group, "commands") or line.count(" ") < 3):
                continue  # the name of a command, in a sentence
            try:
                parse(line)
            except typer.Exit:  # --help
                pass


def test_the_rule_finds_commands():
    text = """Say `faces2voices evaluate X --split ` or `faces2voices …`:

    faces2voices train prepared/grid --preset grid

and `faces2voices {x}`"""
    expected = [
        "faces2voices evaluate X --split ",
        "faces2voices train prepared/grid --preset grid",
    ]
    assert printed(text) == expected


WRONG = "evaluate X --split  --limit 16", "teach X", "study nothing X", "evaluate X --model"


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_typed_is_refused(words):
    with pytest.raises(Exception) as refused:
        parse(f"faces2voices {words}")
    assert not isinstance(refused.value, SystemExit)


CALLS = """evaluate 'my clips' --model runs/slim/model --split all --limit 5 --guidance 1.5
bench flow --processor --repeats 7
study copy a b --limit 3
study link
train --preset slim -o runs/x
synthesize a.mp4 b.mp4 --no-dub""".splitlines()


@pytest.mark.parametrize("words", CALLS)
def test_a_command_writes_down_what_it_was_called_with(words):
    line = f"faces2voices {words}"
    again = shell.command_line(parse_under_root(line))
    assert parse_under_root(again).params == parse_under_root(line).params
    assert shell.command_line(parse_under_root(again)) == again


def parse_under_root(line: str):
    "As `parse`, with the contexts of the groups above."
    _, *words = shlex.split(line)
    command, above = typer.main.get_command(cli.app), None
    above = command.context_class(command, info_name="faces2voices")
    while hasattr(command, "commands"):
        label, *words = words
        command = command.commands[label]
        if hasattr(command, "commands"):
            above = command.context_class(command, info_name=label, parent=above)
    return command.make_context(label, words, parent=above)


def test_the_file_of_a_result_is_not_in_its_command():
    ctx = parse_under_root("faces2voices evaluate prepared --limit 2 -o card.json")
    assert shell.command_line(ctx) == "faces2voices evaluate prepared --limit 2"


def test_a_folder_keeps_the_commands_that_made_it(tmp_path):
    records.note_making(tmp_path / "clips", "faces2voices talkers clips")
    manifest = tmp_path / "clips" / "manifest.jsonl"
    manifest.touch()
    records.note_making(tmp_path / "prepared", "faces2voices prepare clips prepared", manifest)
    records.note_making(
        tmp_path / "prepared", "faces2voices prepare more prepared", tmp_path / "more"
    )
    expected = ["talkers clips", "prepare clips prepared", "prepare more prepared"]
    found = records.commands_of(tmp_path / "prepared")
    assert found == [f"faces2voices {words}" for words in expected]
    (tmp_path / "prepared" / records.COMMANDS_FILE).write_text("[]")
    with pytest.raises(CorpusError, match="made.json"):
        records.commands_of(tmp_path / "prepared")


def test_the_command_line_leaves_the_note(tmp_path):
    clips = sorted((ROOT / "data_samples").glob("*.mp4"))[:1]
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / clips[0].name).write_bytes(clips[0].read_bytes())
    line = "prepare films prepared --backend locator --workers 1"
    assert CliRunner().invoke(cli.app, line.split()).exit_code == 0
    assert records.data_of("prepared")["prepared"] == dict(
        clips=1, commands=["faces2voices " + line]
    )


def test_a_commit_that_does_not_tell_all_says_so(tmp_path, monkeypatch):
    def git(*words):
        call = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(records.faces2voices, "__file__", str(package / "__init__.py"))
    (package / "__init__.py").write_text("")
    git("init", "-q")
    git("commit", "-qm", "somebody else's", "--allow-empty")
    inside_of_another = records.commit()
    assert inside_of_another == f"version {records.faces2voices.__version__}"
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "--short", "HEAD")
    (tmp_path / "elsewhere.json").write_text("a result")
    assert records.commit() == head
    (package / "__init__.py").write_text("changed = True")
    assert records.commit() == head + "+"
