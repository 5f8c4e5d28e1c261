"""The course layer.

Editions without answers, marking that no submission can hurt, tables that agree with the code."""

import ast
import csv
import json
import pkgutil
import re
from itertools import chain, product
from pathlib import Path
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from faces2voices.errors import CorpusError, F2VError, check
from faces2voices.core import NOTATION
from faces2voices import course
from faces2voices.course import (
    ERRORS,
    exercises,
    grade,
    is_solution,
    leaks,
    lessons,
    collect_errors,
    read_notebook,
    read_table,
    rooms_markdown,
    source,
    write_student_edition,
    strings_in,
    write_teacher_edition,
    teacher_notes,
    traceability_markdown,
    errors_markdown,
    exercises_markdown,
)

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
# lessons whose last exercise is reached within 12 s of one core; others take up to a minute
CHEAP = ["00_core", "12_solvers"]
ALL = lessons(NBS)
ROOMS = {f"engine/{path.stem}": read_notebook(path) for path in NBS.glob("engine/*.ipynb")}
LESSONS = {name: nb["cells"] for name, nb in ALL.items() if exercises(nb["cells"])}


@pytest.fixture(scope="module")
def handout(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("editions") / "student"
    write_student_edition(NBS, out)
    return out


def hand_in(nb, folder, name, answers):
    "Write the notebook of a student who wrote `answers` into the marked cells."
    nb = json.loads(json.dumps(nb))
    for c in nb["cells"]:
        if (e := c["metadata"].get("exercise")) in answers:
            c["source"] = answers[e]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ipynb").write_text(json.dumps(nb))


# the checker of the check cells


@pytest.mark.parametrize(
    "yours, expected, says",
    [
        ([0, 1, 4, 7], [0, 1, 4, 9.25], "the largest difference is 2.25 at position [3]"),
        (
            torch.ones(2, 3),
            torch.tensor([[1.0, 1, 1], [1, 1.5, 1]]),
            "the largest difference is 0.5 at position [1, 1]",
        ),
        (1.0, 1234.5, "the largest difference is 1.23e+03"),
        (np.zeros((3, 1)), np.zeros(3), "your shape is (3, 1), (3,) is asked for"),
        ([1.0, np.nan], [1.0, 987.0], "NaN at position [1]"),
        (np.inf, 987.0, "the largest difference is inf"),
        (None, 987.0, "a number or an array of them is asked for, this is NoneType"),
        (
            torch.tensor([1 + 2j]),
            torch.tensor([1 - 2j]),
            "the largest difference is 4 at position [0]",
        ),
        ("a", "secret", "not what is asked for"),
        ({1, 2}, {1, 987}, "not what is asked for"),
        ([True, True], [True, False], "the largest difference is 1 at position [1]"),
    ],
)
def test_a_failed_check_says_where_and_not_what(yours, expected, says):
    with pytest.raises(AssertionError) as e:
        check(yours, expected, "think")
    assert str(e.value) == f"{says}. Hint: think"
    assert not re.search("987|1234|secret|9\\.25", str(e.value)), "the answer is given away"
    with pytest.raises(AssertionError, match=f"^{re.escape(says)}$"):
        check(yours, expected)


@pytest.mark.parametrize(
    "yours, expected",
    [
        (3, 3.0),
        ([1, 2], torch.tensor([1.0, 2.0 + 9e-6])),
        ((1, 2), [1, 2]),
        ("a", "a"),
        ({1}, {1}),
        (np.inf, np.inf),
        (np.zeros((0, 3)), torch.zeros(0, 3)),
        (torch.ones(1, requires_grad=True), [1.0]),
    ],
)
def test_a_right_answer_is_called_right(yours, expected):
    assert check(yours, expected) == "right"


# the student edition


def test_no_solution_is_anywhere_in_the_student_edition(handout):
    """Every line of every solution is looked for in every file, decoded.

    Lines that lessons and engine rooms show elsewhere anyway give nothing away."""
    cells = chain.from_iterable(nb["cells"] for nb in [*ALL.values(), *ROOMS.values()])
    shown = "\n".join(source(c) for c in cells if not is_solution(c))
    files = {
        p.name: read_notebook(p) if p.suffix == ".ipynb" else p.read_text(errors="replace")
        for p in handout.rglob("*")
        if p.suffix in {".ipynb", ".csv", ".json", ".jsonl", ".svg", ".md"}
    }
    text = "\n".join(chain.from_iterable(map(strings_in, files.values())))
    looked_for = set()
    for name, cells in LESSONS.items():
        for e in exercises(cells):
            body = [
                line.split("   # ")[0].strip()
                for line in source(cells[e.solution]).splitlines()
                if not line.startswith("#|")
            ]
            for line in (b for b in body if len(b) > 5 and b not in shown):
                looked_for.add((name, e.name))
                assert line not in text, f"{name}: {line}"
    assert len(looked_for) >= 0.95 * sum(len(exercises(c)) for c in LESSONS.values())
    notebooks = [content for content in files.values() if isinstance(content, dict)]
    assert not any(map(is_solution, chain.from_iterable(nb.get("cells", []) for nb in notebooks)))
    assert not (handout / "nbs" / "teacher_notes.csv").exists()


def test_the_student_edition_keeps_all_else(handout):
    for name, nb in ALL.items():
        new = read_notebook(handout / "nbs" / f"{name}.ipynb")["cells"]
        places = [i for i, c in enumerate(nb["cells"]) if not is_solution(c)]
        old = [nb["cells"][i] for i in places]
        todo = exercises(nb["cells"])
        stubs = {e.stub for e in todo}
        checks = {e.check for e in todo}
        assert len(new) == len(old)
        for i, was, now in zip(places, old, new):
            if i in stubs:
                assert source(now) and source(now) in source(was)
                assert "#|" not in source(now) and now["metadata"]["exercise"]
            else:
                assert source(now) == source(was)
            if i in stubs | checks:
                assert now["outputs"] == [] and now["execution_count"] is None
        kept = sum(bool(c.get("outputs")) for c in new)
        assert kept >= sum(bool(c.get("outputs")) for c in old) - 3 * len(todo), (
            "more outputs were dropped than the answers explain"
        )
    for extra in ("images", "traceability.csv"):
        assert (handout / "nbs" / extra).exists()
    for name, nb in ROOMS.items():
        assert read_notebook(handout / "nbs" / f"{name}.ipynb") == nb


def test_a_leak_is_found_wherever_it_hides():
    line = 'return "größe"'
    for place in (
        dict(source=["a", line]),
        dict(outputs=[dict(data={"text/plain": [f"x {line}"]})]),
        dict(metadata={line: 1}),
        dict(attachments={"a.png": {"x": line}}),
        dict(source=list(line)),
    ):
        assert leaks(line, json.loads(json.dumps(dict(cells=[place]))))
    assert not leaks(line, dict(cells=[]))


def test_editions_never_overwrite_and_leave_nothing_half_done(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for out in ("mine", "file"):
        with pytest.raises(F2VError, match="already holds something"):
            write_student_edition(NBS, tmp_path / out)
    with pytest.raises(CorpusError, match="holds no lessons"):
        write_student_edition(tmp_path / "empty", tmp_path / "new")
    monkeypatch.setattr(course, "student_cells", lambda cells: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_student_edition(NBS, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_the_teacher_edition_has_solutions_notes_and_times(tmp_path):
    (tmp_path / "empty").mkdir()
    write_teacher_edition(NBS, tmp_path / "empty")
    notes = teacher_notes(NBS)
    for name, cells in LESSONS.items():
        new = read_notebook(tmp_path / "empty" / "nbs" / f"{name}.ipynb")["cells"]
        assert [source(c) for c in new if is_solution(c)] == [
            source(c) for c in cells if is_solution(c)
        ]
        said = "\n".join(source(c) for c in new if "teacher" in c["metadata"].get("tags", []))
        for e in exercises(cells):
            if row := notes.get((name, e.name)):
                assert row["mistake"] in said and f"{row['minutes']} minutes" in said


def test_every_note_belongs_to_an_exercise():
    there = {name: {e.name for e in exercises(cells)} for name, cells in LESSONS.items()}
    notes = teacher_notes(NBS)
    gone = [(lesson, e) for lesson, e in notes if e not in there.get(lesson, ())]
    assert not gone, "the exercise was renamed or taken out"
    assert all(int(r["minutes"]) > 0 and len(r["mistake"]) > 20 for r in notes.values())


def test_there_are_enough_exercises():
    assert sum(len(exercises(c)) for c in LESSONS.values()) >= 40
    for name, cells in LESSONS.items():
        names = [e.name for e in exercises(cells)]
        assert len(set(names)) == len(names), f"{name}: two exercises of one name"
        assert len(names) == sum(map(is_solution, cells)), (
            f"{name}: a solution without its stub or check"
        )


# marking


def test_solutions_pass_and_stubs_do_not(handout, tmp_path):
    for name in CHEAP:
        nb, cells = read_notebook(handout / "nbs" / f"{name}.ipynb"), LESSONS[name]
        hand_in(
            nb,
            tmp_path / "in" / "solver" / "deep",
            name,
            {e.name: source(cells[e.solution]) for e in exercises(cells)},
        )
        hand_in(nb, tmp_path / "in" / "idle", name, {})
        hand_in(
            nb,
            tmp_path / "in" / "stub",
            name,
            {
                e.name: source(cells[e.stub]) + "\n0   # something was done"
                for e in exercises(cells)
            },
        )
    marks = grade(tmp_path / "in", tmp_path / "marks.csv", NBS)
    wanted = {}
    for student, name in product(("solver", "idle", "stub"), CHEAP):
        for e in exercises(LESSONS[name]):
            wanted[student, name, e.name] = student == "solver"
    assert {m[:3]: m.passed for m in marks} == wanted, [
        m for m in marks if m.passed is None or m.passed != (m.student == "solver")
    ]
    assert {m.message for m in marks if m.student == "idle"} == {"not attempted"}
    assert all(m.message.startswith("check") for m in marks if m.student == "stub")


TOY = dict(
    nbformat=4,
    nbformat_minor=5,
    metadata={},
    cells=[
        dict(cell_type="code", metadata={}, outputs=[], execution_count=None, source=s)
        for s in (
            "from pathlib import Path\nfrom faces2voices.errors import check\nbase = 2",
            "#| eval: false\ndef double(x): return 0",
            '#| code-summary: "Solution"\ndef double(x): return base*x',
            "check(double(21), 42, 'add it to itself')",
            "#| eval: false\ndef treble(x): return 0",
            '#| code-summary: "Solution"\ndef treble(x): return double(x) + x',
            "check(treble(5), 15)",
        )
    ],
)


def test_no_submission_harms_another(tmp_path):
    mark = tmp_path / "outside.txt"
    hostile = dict(
        right="def double(x): return base*x",
        wrong="def double(x): return x**2",
        loop="while True: pass",
        exits="import os; os._exit(0)",
        crash="import ctypes\nctypes.string_at(0)",
        outside=f"open({str(mark)!r}, 'w').write('x')\ndef double(x): return 2*x",
        inside=(
            "open('notes.txt', 'w').write('x')\n"
            "def double(x): return 2*len(open('notes.txt').read())*x"
        ),
        loud="for _ in range(1000): print('x'*10**6)\ndef double(x): return 2*x",
        greedy="double = bytearray(10**12)",
        forks="import os; os.fork()",
        shell=f"import os; os.system('touch {mark}')",
        killer="import os; os.kill(os.getppid(), 9)",
        closes="import os; os.closerange(3, 99)\nwhile True: pass",
        judge="def check(*a): return 'right'\ndef double(x): return 5",
        removes=f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        syntax="def double(x) return",
        renamed="def Double(x): return 2*x",
        empty="",
        recursion="def double(x): return double(x)",
        big="open('big', 'wb').write(bytes(2*10**8))",
        leaves="raise SystemExit",
    )
    nb = dict(TOY, cells=course.student_cells(TOY["cells"]))
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "01_toy.ipynb").write_text(json.dumps(TOY))
    for who, code in hostile.items():
        hand_in(
            nb,
            tmp_path / "in" / who,
            "01_toy",
            {"double": code, "treble": "def treble(x): return 3*x"},
        )
    (tmp_path / "in" / "broken").mkdir()
    (tmp_path / "in" / "broken" / "01_toy.ipynb").write_text('{"cells": [{"cell_type": "code"')
    (tmp_path / "in" / "absent").mkdir()
    (tmp_path / "in" / "absent" / "02_other.ipynb").write_text("{}")
    folders = [tmp_path / name for name in ("in", "marks.csv", "nbs")]
    given = grade(*folders, seconds=3, memory=2)
    marks = {(m.student, m.exercise): m for m in given}
    passed = {
        who for who, exercise in marks if exercise == "double" and marks[who, exercise].passed
    }
    assert passed - {"loud"} == {"right", "inside"}  # a gigabyte may take too long
    failed = {who for who in hostile if not marks[who, "treble"].passed}
    assert not failed, "the second exercise of a bad submission is judged by itself"
    says = dict(
        wrong="largest difference is 399. Hint: add it",
        loop="stopped after 3 seconds",
        exits="exit 0",
        crash="SIGSEGV",
        outside="working folder alone",
        greedy="MemoryError",
        forks="os.fork is not allowed",
        shell="os.system is not allowed",
        killer="os.kill is not allowed",
        judge="largest difference is 37",
        removes="PermissionError",
        syntax="SyntaxError",
        renamed="does not define `double`",
        empty="does not define",
        recursion="RecursionError",
        big="OSError",
        leaves="SystemExit",
        broken="cannot be read",
    )
    for who, text in says.items():
        assert text in marks[who, "double"].message, marks[who, "double"]
    assert not mark.exists() and len(list((tmp_path / "in").iterdir())) == len(hostile) + 2
    rows = list(csv.DictReader((tmp_path / "marks.csv").open()))
    assert len(rows) == 2 * (len(hostile) + 1) and {r["passed"] for r in rows} == {"True", "False"}
    with pytest.raises(F2VError, match="already exists"):
        grade(tmp_path / "in", tmp_path / "marks.csv", tmp_path / "nbs")


def test_a_fault_of_the_lesson_is_nobodys_fault(tmp_path):
    cells = [dict(c) for c in TOY["cells"]]
    cells[2] = cells[2] | dict(source='#| code-summary: "Solution"\ndef double(x): return None')
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "01_toy.ipynb").write_text(json.dumps(dict(TOY, cells=cells)))
    hand_in(
        dict(TOY, cells=course.student_cells(TOY["cells"])),
        tmp_path / "in" / "ada",
        "01_toy",
        {"double": "def double(x): return 2*x"},
    )
    marks = grade(tmp_path / "in", tmp_path / "marks.csv", tmp_path / "nbs")
    assert [(m.passed, "the lesson" in m.message) for m in marks] == [(None, True), (None, True)]


def test_a_mark_that_an_editor_dropped_is_no_loss(tmp_path):
    nb = dict(TOY, cells=[c | dict(metadata={}) for c in course.student_cells(TOY["cells"])])
    nb["cells"][1]["source"] = ["def double(x):\n", "    return 2*x"]
    (tmp_path / "a.ipynb").write_text(json.dumps(nb))
    assert course.answers_of(tmp_path / "a.ipynb")["double"] == "def double(x):\n    return 2*x"


# tables and pages


def shown(page) -> str:
    "The markdown that a notebook shows."
    cells = read_notebook(NBS / f"{page}.ipynb")["cells"]
    outputs = chain.from_iterable(c.get("outputs", []) for c in cells)
    data = [out.get("data", {}) for out in outputs]
    return "\n\n".join("".join(d["text/markdown"]) for d in data if "text/markdown" in d)


def test_the_troubleshooting_page_lists_every_error_of_the_code():
    page = shown("troubleshooting")
    for error in ERRORS:
        assert errors_markdown(error) in page, (
            f"run nbs/troubleshooting.ipynb again: {error} is out of date"
        )
    package = ROOT / "faces2voices"
    call = rf"\b(?:{'|'.join(ERRORS)})\("
    makers = sum(len(re.findall(call, path.read_text())) for path in package.glob("*.py"))
    heads = r"^class \w+\(F2VError\)|^class F2VError\("
    classes = len(re.findall(heads, (package / "errors.py").read_text(), re.M))
    assert classes == len(ERRORS)
    assert len(collect_errors()) >= makers - classes - 3, (
        "an error is made in a way that the parser does not see"
    )


def test_errors_are_found_in_every_form_that_the_code_uses():
    block = ast.parse("""
def f(path, n):
    wrong = lambda why, cure='': MediaError(path, f'line {n} {why}', cure)
    def bad(why):
        return CorpusError(path, f'{why} of {n}')
    cure = 'Play it' if n else 'Stop it'
    if n:
        raise wrong('is short', 'Make it longer')
    elif not n:
        raise bad('end')
    raise NoFaceError(path, 'no face' if n else f'no {n}', cure)
""").body[0]
    assert sorted(entry[:3] for entry in course._errors_in(block, "m.f")) == [
        ("CorpusError", "end of …", ""),
        ("MediaError", "line … is short", "Make it longer"),
        ("NoFaceError", "no face / no …", "Play it / Stop it"),
    ]


def symbols(texts) -> set:
    "The symbols of some lists of symbols."
    return {symbol.strip() for symbol in ",".join(texts).split(",")}


def headings(nb) -> set:
    "The headings of a notebook."
    text = "\n".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")
    return {line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")}


def test_traceability_resolves():
    rows = read_table(NBS / "traceability.csv")
    heads = {name: headings(nb) for name, nb in (ALL | ROOMS).items()}
    for r in rows:
        pkgutil.resolve_name(r["function"])
        assert r["heading"] in heads[r["notebook"]], (
            f"{r['notebook']} has no heading {r['heading']!r}"
        )
    assert len(rows) >= 45 and all(all(r.values()) for r in rows)
    assert symbols(s for s, *_ in NOTATION) <= symbols(r["symbol"] for r in rows)
    assert traceability_markdown(NBS / "traceability.csv") in shown("19_course"), (
        "run nbs/19_course.ipynb again"
    )


def test_the_exercise_map_is_current():
    for page in ("19_course", "syllabus"):
        assert exercises_markdown(NBS) in shown(page), f"run nbs/{page}.ipynb again"


def test_the_list_of_engine_rooms_is_current():
    for page in ("19_course", "syllabus"):
        assert rooms_markdown(NBS) in shown(page), f"run nbs/{page}.ipynb again"


def test_the_syllabus_names_every_lesson():
    text = "\n".join(source(c) for c in ALL["syllabus"]["cells"] if c["cell_type"] == "markdown")
    assert not [name for name in ALL if name[:2].isdigit() and f"{name}.ipynb" not in text]


# the command


def test_commands(tmp_path):
    def run(*words):
        return CliRunner().invoke(course.course_app, list(map(str, words)))

    for command in ("student", "teacher", "grade"):
        assert run(command, "--help").exit_code == 0
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "01_toy.ipynb").write_text(json.dumps(TOY))
    (tmp_path / "nbs" / "teacher_notes.csv").write_text(
        "lesson,exercise,minutes,mistake\n01_toy,double,3,Squares are right for two alone.\n"
    )
    done = run("student", tmp_path / "s", "--lessons", tmp_path / "nbs")
    assert done.exit_code == 0 and "1 notebooks" in done.stdout
    assert not leaks("base*x", read_notebook(tmp_path / "s" / "nbs" / "01_toy.ipynb"))
    assert run("teacher", tmp_path / "t", "--lessons", tmp_path / "nbs").exit_code == 0
    assert isinstance(
        run("student", tmp_path / "s", "--lessons", tmp_path / "nbs").exception, F2VError
    )
