"""The course layer.

Editions without answers, marking that no submission can hurt, tables that agree with the code."""

import ast
import csv
import ctypes
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import sys
import time
import zipfile
from itertools import chain, product
from pathlib import Path
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from faces2voices.errors import CorpusError, F2VError, ToolMissingError, check
from faces2voices.core import NOTATION
from faces2voices import course
from faces2voices.grading import Grading, LessonProcess
from faces2voices.notebooks import read_notebook, source
from faces2voices.sandbox import Sandbox, choose_sandbox, confine
from faces2voices.submissions import answers_in, collect
from faces2voices import course_commands, tables
from faces2voices.tables import (
    ERRORS,
    collect_errors,
    errors_markdown,
    read_table,
    rooms_markdown,
    traceability_markdown,
)
from faces2voices.course import (
    exercises,
    grade,
    is_hidden,
    is_solution,
    is_variants,
    leaks,
    lessons,
    drawn_variant,
    write_student_edition,
    strings_in,
    write_teacher_edition,
    teacher_notes,
    varied_cells,
    variants_of,
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
        kept_back = is_solution, is_hidden, is_variants
        places = [i for i, c in enumerate(nb["cells"]) if not any(back(c) for back in kept_back)]
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
    monkeypatch.setattr(course, "student_cells", lambda *args: 1 / 0)
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
        code = {
            c["metadata"]["nbgrader"]["grade_id"]: c for c in new if "nbgrader" in c["metadata"]
        }
        said = "\n".join(source(c) for c in new if "teacher" in c["metadata"].get("tags", []))
        assert len(code) == 2 * len(exercises(cells))
        for e in exercises(cells):
            _, solution, _ = re.split("### (?:BEGIN|END) SOLUTION", source(code[e.name]))
            assert solution.strip() in source(cells[e.solution])
            check = code[f"{e.name}-check"]
            assert source(check).startswith(source(cells[e.check]).rstrip())
            assert ("### BEGIN HIDDEN TESTS" in source(check)) == bool(e.hidden)
            row = notes[name, e.name]
            assert row["mistake"] in said and f"{row['minutes']} minutes" in said
            assert check["metadata"]["nbgrader"]["points"] == float(row["points"])


def test_every_note_belongs_to_an_exercise():
    there = {name: {e.name for e in exercises(cells)} for name, cells in LESSONS.items()}
    notes = teacher_notes(NBS)
    gone = [(lesson, e) for lesson, e in notes if e not in there.get(lesson, ())]
    assert not gone, "the exercise was renamed or taken out"
    assert all(int(r["minutes"]) > 0 and len(r["mistake"]) > 20 for r in notes.values())
    assert all(float(r["points"]) > 0 for r in notes.values())


def test_there_are_enough_exercises():
    assert sum(len(exercises(c)) for c in LESSONS.values()) >= 40
    for name, cells in LESSONS.items():
        names = [e.name for e in exercises(cells)]
        assert len(set(names)) == len(names), f"{name}: two exercises of one name"
        assert len(names) == sum(map(is_solution, cells)), (
            f"{name}: a solution without its stub or check"
        )


# variants

TOY_HEAD = dict(nbformat=4, nbformat_minor=5, metadata={})


def toy_cell(text, kind="code"):
    more = dict(outputs=[], execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, metadata={}, source=text, **more)


EXERCISES = list(chain.from_iterable(product([n], exercises(c)) for n, c in LESSONS.items()))
VARIED = [(name, e) for name, e in EXERCISES if e.variants]
OWN = dict(
    TOY_HEAD,
    cells=[
        toy_cell("from faces2voices.errors import check"),
        toy_cell("**1.** What is 2 times 21?", "markdown"),
        toy_cell("#| eval: false\nproduct = 0  # of 2 and 21"),
        toy_cell('#| code-summary: "Solution"\nproduct = 42'),
        toy_cell("check(product, 2 * 21)"),
        toy_cell(
            '#| code-summary: "Variants"\nvariants = [("2", "42"), ("3", "63"), ("5", "105")]'
        ),
        toy_cell("#| eval: false\ndef half(x): return 0"),
        toy_cell('#| code-summary: "Solution"\ndef half(x): return x / 2'),
        toy_cell("check(half(2), 1)"),
    ],
)


def test_every_exercise_has_hidden_cases_or_variants():
    bare = [(name, e.name) for name, e in EXERCISES if not e.hidden and not e.variants]
    assert not bare, "an answer that fits the one check that everybody sees would pass"


@pytest.mark.parametrize("name, e", VARIED, ids=[f"{name}-{e.name}" for name, e in VARIED])
def test_variants_stand_in_their_exercise(name, e):
    """Everything that is to be exchanged is there, students read some of it, and each row has
    another solution, check and text than the first."""
    cells = LESSONS[name]
    rows = variants_of(cells, e)
    assert len(rows) > 2 and {len(row) for row in rows} == {len(rows[0])}
    assert drawn_variant(rows, name, None) == 0
    seeds = {drawn_variant(rows, name, seed): seed for seed in range(99)}
    assert sorted(seeds) == list(range(1, len(rows))), "every row is drawn, but the published one"
    of = f"{name} {e.name}"
    by_row = {drawn_variant(rows, of, seed): seed for seed in range(99)}
    seen = "\n".join(source(c) for c in cells[e.stub - 1 : e.check + 1] if not is_solution(c))
    text = seen + source(cells[e.solution])
    assert all(word in text for word in rows[0]), "a word that stands nowhere is never exchanged"
    for row, seed in by_row.items():
        new = varied_cells(name, cells, seed)
        assert source(new[e.stub - 1]) != source(cells[e.stub - 1]), "its text says it"
        assert source(new[e.solution]) != source(cells[e.solution])
        assert source(new[e.check]) != source(cells[e.check])
        assert all(
            word in "".join(map(source, new[e.stub - 1 : e.check + 1])) for word in rows[row]
        )


def test_without_a_seed_nothing_changes(tmp_path):
    for name, cells in LESSONS.items():
        assert varied_cells(name, cells, None) == cells
    write_student_edition(NBS, tmp_path / "s")
    for path in (tmp_path / "s" / "nbs").glob("*.ipynb"):
        assert not leaks('"variant":', path.read_text())


def test_a_class_has_numbers_of_its_own(tmp_path):
    "Two classes: other texts, other answers; what one handed in is wrong in the other."
    nbs = tmp_path / "nbs"
    nbs.mkdir()
    (nbs / "01_own.ipynb").write_text(json.dumps(OWN))
    rows = variants_of(OWN["cells"], exercises(OWN["cells"])[0])
    seeds = {drawn_variant(rows, "01_own product", seed): seed for seed in range(20)}
    for row, seed in seeds.items():
        done = run_course("student", tmp_path / f"s{row}", "--lessons", nbs, "--seed", seed)
        assert done.exit_code == 0 and f"--seed {seed}" in done.output
        number, answer = rows[row]
        edition = read_notebook(tmp_path / f"s{row}" / "nbs" / "01_own.ipynb")
        stub = next(c for c in edition["cells"] if c["metadata"].get("exercise") == "product")
        assert source(stub) == f"product = 0  # of {number} and 21"
        assert f"**1.** What is {number} times 21?" in map(source, edition["cells"])
        text = "\n".join(strings_in(edition))
        assert (
            answer not in text and "variants" not in text and str(seed) not in edition["metadata"]
        )
        write_teacher_edition(nbs, tmp_path / f"t{row}", seed)
        teacher = read_notebook(tmp_path / f"t{row}" / "nbs" / "01_own.ipynb")
        assert f"product = {answer}" in "\n".join(map(source, teacher["cells"]))
        assert not any(map(is_variants, teacher["cells"]))
        own = {"product": f"product = {answer}", "half": "def half(x): return x / 2"}
        hand_in(edition, tmp_path / f"in{row}" / "ada", "01_own", own)
        published = own | {"product": "product = 42"}
        hand_in(edition, tmp_path / f"in{row}" / "bob", "01_own", published)
    other = read_notebook(tmp_path / "in2" / "ada" / "01_own.ipynb")
    (tmp_path / "in1" / "cy").mkdir()
    (tmp_path / "in1" / "cy" / "01_own.ipynb").write_text(json.dumps(other))

    def graded(row, *words):
        words = tmp_path / f"in{row}", "-o", tmp_path / f"{row}{len(words)}.csv", *words
        return run_course("grade", *words, "--lessons", nbs)

    assert graded(1, "--seed", seeds[1]).exit_code == 0
    marks = {(r["student"], r["exercise"]): r for r in read_table(tmp_path / "12.csv")}
    passed = {key: r["passed"] == "True" for key, r in marks.items() if key[1] == "product"}
    assert {who: right for (who, _), right in passed.items()} == dict(ada=True, bob=False, cy=False)
    assert all(marks[who, "half"]["passed"] == "True" for who in ("ada", "bob", "cy"))
    assert "variant of another class" in marks["cy", "product"]["message"]
    assert "another class" not in marks["bob", "product"]["message"]
    for words in ((), ("--seed", seeds[1])):
        wrong = graded(2, *words)
        assert "handed out with another seed" in str(wrong.exception), "nobody's answers are judged"


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
    marks = grade(tmp_path / "in", tmp_path / "marks.csv", NBS).marks
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
            "import torch\nfrom faces2voices.errors import check\nbase = 2",
            "#| eval: false\ndef double(x): return 0",
            '#| code-summary: "Solution"\ndef double(x): return base*x',
            "check(double(21), 42, 'add it to itself')",
            '#| code-summary: "Hidden cases"\nx = torch.rand(3)\n'
            "expected = x + x\ncheck(double(x), expected)",
            "#| eval: false\ndef treble(x): return 0",
            '#| code-summary: "Solution"\ndef treble(x): return double(x) + x',
            "check(treble(5), 15)",
        )
    ],
)


# what students may write: tiny, and each bad in its own way
FORGED = dict(
    judge="def check(*a): return 'right'\ndef double(x): return 5",
    code="check.__code__ = (lambda *a, **k: 'right').__code__\ndef double(x): return 5",
    subclass="class Any(float):\n    __eq__ = lambda s, o: True\n"
    "    __abs__ = __sub__ = __rsub__ = lambda *a: 0.0\ndef double(x): return Any(5)",
    frames="import sys\ndef double(x):\n    f, seen = sys._getframe(), []\n    while f:\n"
    "        seen += [v for v in f.f_locals.values() if 'base' + '*x' in repr(v)]\n"
    "        f = f.f_back\n    return 2*x if seen else 5",
    objects="import gc\ndef double(x):\n    held = [o for o in gc.get_objects() if hasattr(o, "
    "'solution') or isinstance(o, dict) and 'solution' in o]\n    return 2*x if held else 5",
    disk="import json\ndef double(x):\n    open('01_toy.ipynb')\n    return 2*x",
    folder="import io\ndef double(x):\n    io.open('NBS/00_core.ipynb')\n    return 2*x",
    descriptors="import os\nfor fd in range(256):\n    try:\n"
    "        os.write(fd, b'\\0\\0\\0\\2\"\"' * 9)\n    except OSError: pass\n"
    "def double(x): return 5",
    sender="from multiprocessing.connection import Connection\nsend = Connection.send_bytes\n"
    "Connection.send_bytes = lambda self, b: send(self, b'\"\"')\ndef double(x): return 5",
    by_name="from multiprocessing.connection import Connection\nsend = Connection.send_bytes\n"
    "def double(x):\n    Connection.send_bytes = lambda self, b: send(self, "
    "b'{\"tuple\": [\"value\", {\"shared\": \"expected\"}]}')\n    return 5",
    pickled="import numpy as np\ndouble = lambda x: np.array([print], object)",
    constant="double = lambda x: 42",
    rows="open('marks.csv', 'a').write('rows,01_toy,double,True,,0')\ndouble = lambda x: 5",
    atexit="import atexit\natexit.register(lambda: None)\ndouble = lambda x: 5",
)
HARMFUL = dict(
    loop="while True: pass",
    sleeps="import time; time.sleep(99)",
    exits="import os; os._exit(0)",
    aborts="import os; os.abort()",
    crash="import ctypes\nctypes.string_at(0)",
    greedy="double = bytearray(10**12)",
    forks="import os; os.fork()",
    shell="import os; os.system('touch OUTSIDE')",
    killer="import os; os.kill(os.getppid(), 9)",
    library="import ctypes, os\nctypes.CDLL(None).kill(os.getppid(), 9)",
    past_python="import cffi, os\nf = cffi.FFI()\nf.cdef('int kill(int, int);')\n"
    "f.dlopen(None).kill(os.getppid(), 9)",
    daemon="import cffi, os, time\nf = cffi.FFI()\nf.cdef('int fork(void); int setsid(void);')\n"
    "c = f.dlopen(None)\nif c.fork() == 0:\n    c.setsid()\n    time.sleep(60)\n"
    "raise ValueError('left one')",
    group="import os; os.killpg(0, 9)",
    closes="import os; os.closerange(3, 99)\nwhile True: pass",
    outside="open('OUTSIDE', 'w').write('x')\ndef double(x): return 2*x",
    removes="import shutil; shutil.rmtree('TMP')",
    memory_of="import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')",
    syntax="def double(x) return",
    renamed="def Double(x): return 2*x",
    empty="",
    recursion="def double(x): return double(x)",
    big="open('big', 'wb').write(bytes(2*10**8))",
    huge="import numpy as np\ndouble = lambda x: np.zeros(10**7)",
    leaves="raise SystemExit",
    mute="class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
    wrong="def double(x): return x**2",
)
GOOD = dict(
    right="def double(x): return base*x",
    inside="open('notes.txt', 'w').write('x')\n"
    "def double(x): return 2*len(open('notes.txt').read())*x",
    redefines="base = 3\ncheck = None\nimport torch\ndef double(x): return torch.add(x, x)",
)
SAYS = dict(
    judge="largest difference is 37",
    code="largest difference is 37",
    subclass="largest difference is 37",
    disk="notebooks may not be read",
    folder="notebooks may not be read",
    pickled="ValueError",
    by_name="what is no value",
    constant="hidden case",
    loop="stopped after 2 seconds",
    exits="exit 0",
    aborts="SIGABRT",
    crash="SIGSEGV",
    greedy="MemoryError",
    forks="os.fork is not allowed",
    shell="os.system is not allowed",
    killer="os.kill is not allowed",
    library="ctypes.dlsym is not allowed",
    past_python="ended the lesson's process",
    daemon="left one",
    outside="working folder alone",
    removes="PermissionError",
    syntax="SyntaxError",
    renamed="does not define `double`",
    empty="does not define",
    recursion="RecursionError",
    big="OSError",
    huge="too large to hand over",
    leaves="SystemExit",
    wrong="largest difference is 399. Hint: add it",
    broken="cannot be read",
    absent="not handed in",
)


@pytest.fixture(scope="module", params=["none", "bwrap"])
def hostile(request, tmp_path_factory):
    "A class of which most are up to something, graded once."
    try:
        sandbox = choose_sandbox(Sandbox(request.param))
    except ToolMissingError as e:
        pytest.skip(str(e))
    tmp_path = tmp_path_factory.mktemp("hostile")
    nb = dict(TOY, cells=course.student_cells(TOY["cells"]))
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "01_toy.ipynb").write_text(json.dumps(TOY))
    places = {"OUTSIDE": str(tmp_path / "outside.txt"), "TMP": str(tmp_path), "NBS": str(NBS)}
    for who, code in (FORGED | HARMFUL | GOOD).items():
        for word, place in places.items():
            code = code.replace(word, place)
        answers = {"double": code, "treble": "def treble(x): return 3*x"}
        hand_in(nb, tmp_path / "in" / who, "01_toy", answers)
    for who, name, text in (
        ("broken", "01_toy", '{"cells": [{"cell_type": "code"'),
        ("absent", "02_other", "{}"),
    ):
        (tmp_path / "in" / who).mkdir()
        (tmp_path / "in" / who / f"{name}.ipynb").write_text(text)
    before = {p for p in (tmp_path / "in").rglob("*")}
    how = Grading(seconds=2, memory=2, sandbox=sandbox, seed=1)
    graded = grade(tmp_path / "in", tmp_path / "marks.csv", tmp_path / "nbs", how)
    assert {p for p in (tmp_path / "in").rglob("*")} == before
    return tmp_path, graded, {(m.student, m.exercise): m for m in graded.marks}


def test_no_submission_gains_a_mark(hostile):
    _, _, marks = hostile
    assert len(FORGED | HARMFUL) >= 30
    passed = {who for who, e in marks if e == "double" and marks[who, e].passed}
    assert passed == set(GOOD), {who: marks[who, "double"].message for who in passed ^ set(GOOD)}


def test_no_submission_harms_another(hostile):
    tmp_path, graded, marks = hostile
    failed = {who for who in FORGED | HARMFUL | GOOD if not marks[who, "treble"].passed}
    assert not failed, "the second exercise of a bad submission is judged by itself"
    assert not (tmp_path / "outside.txt").exists()
    rows = list(csv.DictReader((tmp_path / "marks.csv").open()))
    everybody = {*FORGED, *HARMFUL, *GOOD, "broken", "absent"}
    assert sorted((r["student"], r["exercise"]) for r in rows) == sorted(
        product(everybody, ["double", "treble"])
    )
    assert {r["passed"] for r in rows} == {"True", "False"}
    assert [str(path) for path in graded.handed.unmatched] == ["absent/02_other.ipynb"]
    with pytest.raises(F2VError, match="already exists"):
        grade(tmp_path / "in", tmp_path / "marks.csv", tmp_path / "nbs")


def test_each_submission_is_told_a_word(hostile):
    _, _, marks = hostile
    for who, text in SAYS.items():
        assert text in marks[who, "double"].message, marks[who, "double"]
    assert all(m.passed or m.message for m in marks.values())


def outcome(tmp_path, act) -> int:
    "How a confined process ends that does something: 0 if it may, 7 if that fails, or a signal."
    folder = tmp_path / "own"
    folder.mkdir()
    keep = os.open(os.devnull, os.O_RDONLY)
    if not (pid := os.fork()):
        try:
            confine(str(folder), seconds=0, memory=1, keep=keep)
            act()
            os._exit(0)
        except BaseException:
            os._exit(7)
    os.close(keep)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


LIBC = ctypes.CDLL(None)


def _starts_a_process():
    os.setuid(12345)  # the administrator's processes are not counted
    if (pid := LIBC.fork()) < 0:
        raise BlockingIOError
    elif not pid:
        os._exit(0)


def _computes():
    while time.process_time() < 20:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(
    "act, how",
    [
        (_starts_a_process, {7}),
        (_computes, {-signal.SIGXCPU, -signal.SIGKILL}),
        (lambda: bytearray(10**10), {7}),
        (lambda: open("big", "wb").write(bytes(2 * 10**8)), {7}),
        (lambda: open("small", "wb").write(b"x"), {0}),
    ],
    ids=["processes", "time", "memory", "files", "none"],
)
def test_the_system_holds_the_limits(tmp_path, act, how):
    if act is _starts_a_process and os.getuid():
        pytest.skip("other processes of this user count too")
    LIBC.fork  # looked up before it is forbidden
    assert outcome(tmp_path, act) in how


def test_bubblewrap_is_used_where_it_works_and_only_there(tmp_path, monkeypatch):
    for wanted in (Sandbox.none, Sandbox.bwrap):
        try:
            sandbox = choose_sandbox(wanted)
        except ToolMissingError:
            continue
        with LessonProcess(tmp_path, sandbox) as process:
            said = process.run(0, f"open({str(tmp_path / wanted.value)!r}, 'w').close()")
        assert (wanted == Sandbox.bwrap) == ("OSError" in said and "Read-only" in said), said
        assert (tmp_path / wanted.value).exists() == (wanted == Sandbox.none)
    fake = tmp_path / "bin"
    fake.mkdir()
    monkeypatch.setenv("PATH", str(fake))
    for works in ("absent", 1, 0):
        if works != "absent":
            (fake / "bwrap").write_text(f"#!/bin/sh\nexit {works}\n")
            (fake / "bwrap").chmod(0o755)
        if works == 0:
            assert choose_sandbox(Sandbox.auto) == Sandbox.bwrap
        else:
            assert choose_sandbox(Sandbox.auto) == Sandbox.none
            with pytest.raises(ToolMissingError, match="--sandbox none"):
                choose_sandbox(Sandbox.bwrap)


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
    marks = grade(tmp_path / "in", tmp_path / "marks.csv", tmp_path / "nbs").marks
    assert [(m.passed, "the lesson" in m.message) for m in marks] == [(None, True), (None, True)]


def test_a_mark_that_an_editor_dropped_is_no_loss(tmp_path):
    nb = dict(TOY, cells=[c | dict(metadata={}) for c in course.student_cells(TOY["cells"])])
    nb["cells"][1]["source"] = ["def double(x):\n", "    return 2*x"]
    (tmp_path / "a.ipynb").write_text(json.dumps(nb))
    answers = answers_in(read_notebook(tmp_path / "a.ipynb"), [], {"double": ["double"]})
    assert answers == {"double": ["def double(x):\n    return 2*x"]}


# the whole cycle


def zipped(files: dict) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def toy_lessons(folder):
    "Lessons of which one has exercises, with the teacher's tables."
    folder.mkdir()
    (folder / "01_toy.ipynb").write_text(json.dumps(TOY))
    table = "lesson,exercise,minutes,points,mistake\n"
    table += "01_toy,double,3,2,Squares are right for two alone.\n"
    (folder / "teacher_notes.csv").write_text(table)
    (folder / "rubric.csv").write_text("part,level,points,description\nlab book,whole,10,All\n")


def run_course(*words):
    return CliRunner().invoke(course_commands.course_app, list(map(str, words)))


def test_the_whole_cycle(tmp_path):
    """Edition, submissions as browsers, people and learning platforms leave them, marks, feedback
    and gradebooks."""
    nbs = tmp_path / "nbs"
    toy_lessons(nbs)
    assert run_course("student", tmp_path / "s", "--lessons", nbs).exit_code == 0
    told = (tmp_path / "s" / "README.md").read_text()
    assert "| 01_toy | 0.0 |  | 2 | 3 |" in told and "pip install -c constraints.txt" in told
    size = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert f"This folder has {size / 1e6:.0f} MB" in told
    edition = read_notebook(tmp_path / "s" / "nbs" / "01_toy.ipynb")
    right = {"double": "def double(x): return x + x", "treble": "def treble(x): return 3*x"}
    wrong = right | {"double": "def double(x): return 42"}

    def text(answers, *more):
        hand_in(edition, tmp_path / "desk", "work", answers)
        nb = read_notebook(tmp_path / "desk" / "work.ipynb")
        extra = [dict(cell_type="code", metadata={}, outputs=[], source=s) for s in more]
        return json.dumps(dict(nb, cells=extra + nb["cells"]))

    helped = {"double": "def double(x): return two*x", "treble": right["treble"]}
    files = {
        "ada/01_toy.ipynb": text(helped, "x = 7 / 0", "two = one + one", "one = base / 2"),
        "helper/01_toy.ipynb": text(helped, "one = base / 2", "two = one + one"),
        "cylin_4711_99_01_toy-1.ipynb": text(right),
        "danlee_LATE_4712_98_01_toy (1).ipynb": text(wrong),
        "danlee_4712_97_Untitled.ipynb": text(right | {"treble": "treble = None"}),
        "Eve O'Neil_815_assignsubmission_file_/toy.ipynb": text(wrong),
        "fay.zip": zipped({"work/my toy.ipynb": text(right), "__MACOSX/._x": ""}),
        "gus/essay.docx": "x",
        "hal/01_toy.ipynb": "{",
        "stray.ipynb": text(right),
    }
    for name, content in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    marks_csv = tmp_path / "marks.csv"
    graded = run_course("grade", tmp_path / "in", "-o", marks_csv, "--lessons", nbs, "--seed", 3)
    assert graded.exit_code == 1, graded.output
    assert "gus/essay.docx" in graded.output and "stray.ipynb" in graded.output
    assert "sandbox: " in graded.output and f"course return {marks_csv}" in graded.output
    rows = {(r["student"], r["exercise"]): r for r in read_table(marks_csv)}
    people = {student for student, _ in rows}
    named = {"cylin", "danlee", "Eve O'Neil", "fay", "gus", "hal", "ada", "helper"}
    assert people == named
    failed = {key: row["message"] for key, row in rows.items() if row["passed"] != "True"}
    assert sorted(failed) == [
        ("Eve O'Neil", "double"),
        ("ada", "double"),
        ("gus", "double"),
        ("gus", "treble"),
        ("hal", "double"),
        ("hal", "treble"),
    ]
    assert "hidden case" in failed["Eve O'Neil", "double"]
    assert failed["ada", "double"].startswith("helper, line 1: NameError: name 'one'")
    assert (failed["gus", "double"], failed["hal", "double"]) == (
        "not handed in",
        "its notebook cannot be read",
    )
    levels = tmp_path / "levels.csv"
    levels.write_text("student,part,level\nfay,lab book,whole\n")
    back = tmp_path / "back"
    done = run_course("return", marks_csv, back, "--lessons", nbs, "--levels", levels)
    assert done.exit_code == 0 and "8 students" in done.output
    assert len(list((back / "feedback").glob("*.html"))) == 8
    page = (back / "feedback" / "815 Eve O_Neil.html").read_text()
    assert "1 of 3 points" in page and "hidden case" in page
    totals = {r["student"]: (r["total"], r["of"]) for r in read_table(back / "totals.csv")}
    assert totals["fay"] == ("13.0", "13.0") and totals["danlee"] == ("3.0", "3.0")
    canvas = {r["Student"]: r for r in read_table(back / "canvas.csv")}
    assert (canvas["danlee"]["ID"], canvas["danlee"]["01_toy"]) == ("4712", "3.0")
    moodle = {r["Identifier"]: r for r in read_table(back / "moodle.csv")}
    assert moodle["Participant 815"]["Grade"] == "1.0"
    items = {r["exercise"]: r for r in read_table(back / "items.csv")}
    assert (items["double"]["judged"], items["double"]["share of points"]) == ("8", "0.5")


def test_nothing_to_mark_is_an_error(tmp_path):
    toy_lessons(tmp_path / "nbs")
    (tmp_path / "in" / "ada").mkdir(parents=True)
    (tmp_path / "in" / "ada" / "notes.txt").write_text("x")
    words = "grade", tmp_path / "in", "-o", tmp_path / "marks.csv", "--lessons", tmp_path / "nbs"
    assert "holds no notebook of a lesson" in str(run_course(*words).exception)
    assert not (tmp_path / "marks.csv").exists()


def test_a_zip_cannot_write_or_fill_anything(tmp_path):
    huge = zipped({"01_toy.ipynb": b" " * 40_000_000})
    wicked = zipped({"../../x.ipynb": "{}", "/etc/y.ipynb": "{}", "a/huge.zip": huge})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ada.zip").write_bytes(wicked)
    (tmp_path / "in" / "bob").mkdir()
    (tmp_path / "in" / "bob" / "all.zip").write_bytes(wicked[:99])
    (tmp_path / "in" / "bob" / "01_toy.ipynb").write_text('{"cells": []}')
    before = sorted(tmp_path.rglob("*"))
    found = collect(tmp_path / "in", {"01_toy": ["double"]})
    assert list(found.attempts) == [("bob", "01_toy")]
    assert found.unreadable == [("ada", "01_toy")], "the one that is too large"
    unmatched = [str(path) for path in found.unmatched]
    assert unmatched == ["ada/etc/y.ipynb", "bob/all/broken.zip"]
    assert sorted(tmp_path.rglob("*")) == before


def test_nbgrader_takes_the_editions(tmp_path, monkeypatch):
    "A lesson through nbgrader: release, a right and a wrong submission, marks and feedback."
    pytest.importorskip("nbgrader", reason="nbgrader is not installed (extra: nbgrader)")
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    here = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", here + os.pathsep + os.environ["PATH"])  # it runs alembic
    name = "12_solvers"  # one that reads no file beside it
    write_teacher_edition(NBS, tmp_path / "t")
    write_student_edition(NBS, tmp_path / "s")
    config = Config()
    config.CourseDirectory.root = str(tmp_path / "class")
    source_folder = tmp_path / "class" / "source" / "week1"
    source_folder.mkdir(parents=True)
    shutil.copy(tmp_path / "t" / "nbs" / f"{name}.ipynb", source_folder)
    api = NbGraderAPI(config=config)
    assert api.generate_assignment("week1")["success"]
    released = read_notebook(tmp_path / "class" / "release" / "week1" / f"{name}.ipynb")
    text = "\n".join(strings_in(released))
    cells, todo = LESSONS[name], exercises(LESSONS[name])
    kept_back = {e.solution for e in todo} | set(chain.from_iterable(e.hidden for e in todo))
    seen = chain.from_iterable(
        source(c).splitlines() for i, c in enumerate(cells) if i not in kept_back
    )
    seen = set(seen)
    for i in kept_back:
        telling = set(source(cells[i]).splitlines()) - seen
        assert max(telling, key=len).strip() not in text
    answers = {e.name: source(cells[e.solution]) for e in todo}
    submitted = tmp_path / "class" / "submitted"
    hand_in(released, submitted / "ada" / "week1", name, answers)
    ours = read_notebook(tmp_path / "s" / "nbs" / f"{name}.ipynb")
    wrong = answers | {todo[0].name: source(cells[todo[0].stub])}
    hand_in(ours, submitted / "bob" / "week1", name, wrong)
    worth = {e: float(teacher_notes(NBS)[name, e]["points"]) for e in answers}
    total = sum(worth.values())
    for who, points in (("ada", total), ("bob", total - worth[todo[0].name])):
        done = api.autograde("week1", who)
        assert done["success"], done
        assert api.generate_feedback("week1", who)["success"]
        with api.gradebook as gradebook:
            found = gradebook.find_submission("week1", who)
            assert (found.score, found.max_score) == (points, total), who
    assert (tmp_path / "class" / "feedback" / "bob" / "week1" / f"{name}.html").exists()


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
    assert sorted(entry[:3] for entry in tables._errors_in(block, "m.f")) == [
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
    assert rooms_markdown(NBS) in shown("syllabus"), "run nbs/syllabus.ipynb again"


def test_the_syllabus_names_every_lesson():
    text = "\n".join(source(c) for c in ALL["syllabus"]["cells"] if c["cell_type"] == "markdown")
    assert not [name for name in ALL if name[:2].isdigit() and f"{name}.ipynb" not in text]


# the command


def test_commands(tmp_path):
    for command in ("student", "teacher", "grade", "return"):
        assert run_course(command, "--help").exit_code == 0
    toy_lessons(tmp_path / "nbs")
    done = run_course("student", tmp_path / "s", "--lessons", tmp_path / "nbs")
    assert done.exit_code == 0 and "1 notebooks" in done.stdout and "next: " in done.stdout
    assert not leaks("base*x", read_notebook(tmp_path / "s" / "nbs" / "01_toy.ipynb"))
    assert run_course("teacher", tmp_path / "t", "--lessons", tmp_path / "nbs").exit_code == 0
    again = run_course("student", tmp_path / "s", "--lessons", tmp_path / "nbs")
    assert isinstance(again.exception, F2VError)
    (tmp_path / "marks.csv").write_text("a,b\n1,2\n")
    wrong = run_course(
        "return", tmp_path / "marks.csv", tmp_path / "b", "--lessons", tmp_path / "nbs"
    )
    assert "has no column exercise" in str(wrong.exception)
