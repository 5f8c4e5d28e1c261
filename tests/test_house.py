"""The house: where code stands, what it is called, and how it is written.

Imports run from small numbers to large, a public name has one meaning, and a line holds one
statement."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


# --- reading the house


class Notebook(NamedTuple):
    "A lesson or an engine room."

    path: Path
    module: str  # that it exports
    number: int
    room: bool  # is it an engine room?
    exported: list  # syntax trees of the cells


def source(cell) -> str:
    "The code of a cell without the lines that are not Python's."
    return re.sub(r"^([ \t]*)[%!].*$", r"\1pass", "".join(cell["source"]), flags=re.M)


def code_cells(path: Path) -> list:
    "The sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [source(cell) for cell in cells if cell["cell_type"] == "code"]


def read_house(nbs: Path) -> dict:
    "module → Notebook, of all that export one."
    found = {}
    for path in sorted([*nbs.glob("*.ipynb"), *nbs.glob("engine/*.ipynb")]):
        cells = code_cells(path)
        names = re.findall(r"^#\|\s*default_exp (\w+)", "\n".join(cells), flags=re.M)
        if names:
            trees = [
                ast.parse(cell) for cell in cells if re.search(r"^#\|\s*exports?\b", cell, re.M)
            ]
            room = path.parent.name == "engine"
            found[names[0]] = Notebook(path, names[0], int(path.stem[:2]), room, trees)
    return found


def nodes(notebook: Notebook) -> list:
    "All nodes of the exported code."
    return list(chain.from_iterable(map(ast.walk, notebook.exported)))


# --- imports


def module_of(node: ast.ImportFrom) -> str:
    "The module of this package that is imported from; nothing where it is another package's."
    name = node.module or ""
    if node.level:
        return name
    package, _, module = name.partition(".")
    return module if package == "faces2voices" else ""


def from_package(node: ast.ImportFrom) -> bool:
    "Is this `from faces2voices import …` or `from . import …`?"
    return node.module == "faces2voices" if not node.level else not node.module


def imports(notebook: Notebook, house: dict) -> list:  # of (module, names taken from it)
    "What the exported code imports of this package, inside functions too."
    found = []
    for node in nodes(notebook):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if from_package(node):
                found += [(name, []) for name in names if name in house]
            elif module := module_of(node):
                found.append((module, names))
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found += [(p[1], []) for p in parts if p[0] == "faces2voices" and len(p) > 1]
    return found


def may_import(notebook: Notebook, other: Notebook) -> bool:
    "From a smaller number; from a room of the own number too."
    return other.number < notebook.number or (other.number == notebook.number and other.room)


def back_arrows(house: dict) -> list:
    "Imports that do not run from small numbers to large."
    found = []
    for notebook in house.values():
        for module, _ in imports(notebook, house):
            if module == notebook.module:
                continue  # as a function finds itself in another process
            if module not in house:
                found.append(f"{notebook.module} imports {module}, which no notebook exports")
            elif not may_import(notebook, house[module]):
                found.append(f"{notebook.module} imports {module}")
    return found


def circles(house: dict) -> list:
    "Modules that import one another in a circle."
    to = {name: {module for module, _ in imports(nb, house)} - {name} for name, nb in house.items()}
    left = dict(to)
    while free := [name for name, modules in left.items() if not modules & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)  # those of a circle, and those that lead into one


def private_imports(house: dict) -> list:
    "Private names that one module takes from another, by import or as an attribute."
    found = []
    for notebook in house.values():
        for module, names in imports(notebook, house):
            taken = [name for name in names if name.startswith("_")]
            found += [f"{notebook.module} imports {module}.{name}" for name in taken]
        modules = aliases(notebook, house)
        for node in nodes(notebook):
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                if isinstance(node.value, ast.Name) and node.value.id in modules:
                    found.append(f"{notebook.module} uses {node.value.id}.{node.attr}")
    return found


def aliases(notebook: Notebook, house: dict) -> set:
    "Names under which the exported code knows whole modules of this package."
    found = set()
    for node in nodes(notebook):
        if isinstance(node, ast.ImportFrom) and from_package(node):
            found |= {alias.asname or alias.name for alias in node.names if alias.name in house}
        elif isinstance(node, ast.Import):
            ours = [a for a in node.names if a.name.startswith("faces2voices.")]
            found |= {alias.asname for alias in ours if alias.asname}
    return found


# --- names


def bound(node) -> list:
    "Names that a statement of a module's top gives a meaning to."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
        return [] if patched else [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        return [n.id for n in names if isinstance(n.ctx, ast.Store)]
    return []


def shared_names(house: dict) -> dict:  # name → modules
    "Public names that more than one module defines."
    found = defaultdict(set)
    for notebook in house.values():
        for node in chain.from_iterable(tree.body for tree in notebook.exported):
            for name in bound(node):
                if not name.startswith("_"):
                    found[name].add(notebook.module)
    return {name: modules for name, modules in found.items() if len(modules) > 1}


# --- lines


def dense_forms(code: str) -> list:  # of "line: what is wrong"
    "Forms that a reader has to decode."
    tree = ast.parse(code)
    lines = [line.encode() for line in code.splitlines()]
    found = []
    for node in ast.walk(tree):
        wrong = ""
        if isinstance(node, ast.stmt) and lines[node.lineno - 1][: node.col_offset].strip():
            wrong = "a statement that does not begin its line"
        elif len(getattr(node, "generators", [])) > 1:
            wrong = "a comprehension with more than one `for`"
        elif isinstance(node, ast.Assign):
            wrong = dense_assignment(node)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and isinstance(
            node.value, ast.Lambda
        ):
            wrong = "a lambda that has a name"
        if wrong:
            found.append(f"{node.lineno}: {wrong}")
    return found


def dense_assignment(node: ast.Assign) -> str:
    "What is wrong with an assignment; nothing if nothing is."
    if len(node.targets) > 1:
        return "a chain of assignments"
    if isinstance(node.value, ast.Lambda) and isinstance(node.targets[0], ast.Name):
        return "a lambda that has a name"
    if isinstance(node.targets[0], (ast.Tuple, ast.List)):
        several = isinstance(node.value, (ast.Tuple, ast.List))
        if several and node.lineno != node.end_lineno:
            return "a tuple assignment over several lines"
        if several and len(node.targets[0].elts) > 3:
            return "a tuple assignment of more than three"
    return ""


# --- the house as it is

HOUSE = read_house(NBS)
NOTEBOOKS = sorted(NBS.rglob("*.ipynb"))
SCRIPTS = sorted((ROOT / "tests").rglob("*.py"))


def test_imports_run_from_small_numbers_to_large():
    assert not back_arrows(HOUSE)


def test_no_modules_import_one_another_in_a_circle():
    assert not circles(HOUSE)


def test_no_private_name_crosses_a_file():
    assert not private_imports(HOUSE)


def test_a_public_name_has_one_meaning():
    assert not shared_names(HOUSE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_can_be_read_line_by_line(path):
    cells = enumerate(code_cells(path))
    wrong = {i: found for i, cell in cells if (found := dense_forms(cell))}
    assert not wrong, "cell of code, line: " + str(wrong)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_can_be_read_line_by_line(path):
    assert not dense_forms(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", [("format", "--check"), ("check",)], ids=" ".join)
def test_ruff_has_nothing_to_say(words):
    beside_python = Path(sys.executable).parent / "ruff"
    ruff = beside_python if beside_python.exists() else shutil.which("ruff")
    if not ruff:
        pytest.skip("ruff is not installed (extra `dev`)")
    command = [ruff, *words, "--no-cache", "nbs", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the checkers themselves


def build(nbs: Path, **files) -> dict:
    "A made-up house: `a01` is lesson 01 of module a, `room_b02` a room; the text is exported."
    (nbs / "engine").mkdir(parents=True)
    for name, text in files.items():
        module, number = name.removeprefix("room_")[:-2], name[-2:]
        folder = nbs / "engine" if name.startswith("room_") else nbs
        texts = [f"#| default_exp {module}", "#| export\n" + text, "import faces2voices.never"]
        cells = [dict(cell_type="code", source=text.splitlines(True)) for text in texts]
        (folder / f"{number}_{module}.ipynb").write_text(json.dumps(dict(cells=cells)))
    return read_house(nbs)


@pytest.mark.parametrize(
    "files",
    [
        dict(a01="", b02="from faces2voices.a import x"),
        dict(a01="", b02="from .a import x"),
        dict(a01="", b02="def f():\n    from faces2voices import a"),
        dict(room_a02="", b02="from faces2voices.a import x"),
        dict(room_a02="", room_b02="from faces2voices.a import x"),
        dict(a01="", room_b02="from faces2voices.a import x"),
        dict(a01="import numpy\nfrom torch import nn\nfrom . import __version__"),
    ],
)
def test_an_import_that_runs_forward_is_let_through(tmp_path, files):
    house = build(tmp_path / "nbs", **files)
    assert not back_arrows(house) + circles(house) + private_imports(house)


@pytest.mark.parametrize(
    "files",
    [
        dict(a01="from faces2voices.b import x", b02=""),
        dict(a01="from .b import x", b02=""),
        dict(a01="import faces2voices.b as b", b02=""),
        dict(a01="from faces2voices import b", b02=""),
        dict(a01="from . import b", b02=""),
        dict(a01="def f():\n    if x:\n        from faces2voices.b import x", b02=""),
        dict(a01="class A:\n    def f(self):\n        from faces2voices import b", b02=""),
        dict(room_a02="from faces2voices.b import x", b02=""),
        dict(a02="from faces2voices.b import x", b02=""),
        dict(a01="from faces2voices.b import x", room_b02=""),
        dict(a01="from faces2voices.gone import x"),
    ],
)
def test_an_import_that_runs_back_is_found(tmp_path, files):
    assert len(back_arrows(build(tmp_path / "nbs", **files))) == 1


def test_a_circle_is_found(tmp_path):
    house = build(
        tmp_path / "nbs",
        room_a02="def f():\n    from faces2voices.b import x",
        room_b02="from faces2voices.c import x",
        room_c02="from faces2voices.a import x",
        d03="from faces2voices.a import x",
        e01="",
    )
    assert not back_arrows(house) and circles(house) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "text",
    [
        "from faces2voices.a import x, _y",
        "from .a import _y as y",
        "def f():\n    from faces2voices.a import _y",
        "from faces2voices import a\ndef f():\n    return a._y",
        "from faces2voices import a as other\nz = other._y()",
        "import faces2voices.a as a\nz = a._y",
    ],
)
def test_a_private_name_that_crosses_is_found(tmp_path, text):
    assert len(private_imports(build(tmp_path / "nbs", a01="", b02=text))) == 1


def test_a_name_with_two_meanings_is_found(tmp_path):
    house = build(
        tmp_path / "nbs",
        a01="def f():\n    x = 1\nA, B = 1, 2\nclass C:\n    y = 1\n_p = 1\nG: int = 1",
        b02="f = 1\nB = 2\ndef C():\n    pass\n_p = 2\nx = y = 1\nG = 2",
        c03="from faces2voices.a import A\n@patch\ndef f(self: C):\n    pass",
    )
    assert shared_names(house) == {name: {"a", "b"} for name in ("f", "B", "C", "G")}


@pytest.mark.parametrize(
    "code",
    [
        "x = [a for b in c for a in b]",
        "x = {a: b for c in d for a, b in c}",
        "f(a for b in c if b for a in b)",
        "x = y = 1",
        "x = y[0] = z",
        "a, b, c, d = 1, 2, 3, 4",
        "a, b = (\n    1,\n    2,\n)",
        "a, b = f(\n    1\n), 2",
        "def f(x): return x",
        "class A: pass",
        "class A:\n    def f(self): pass",
        "for x in y: print(x)",
        "while x: pass",
        "with x: pass",
        "if x: y()",
        "if x:\n    y()\nelse: z()",
        "try:\n    x()\nexcept E: pass",
        "try:\n    x()\nfinally: pass",
        "a(); b()",
        "é = 'ü'; b()",
        "f = lambda x: x",
        "f: object = lambda x: x",
        "(f := lambda x: x)",
    ],
)
def test_a_form_that_must_be_decoded_is_found(code):
    assert len(dense_forms(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "x = [[a for a in b if a] for b in c]",
        "x, y, z = 1, 2, 3",
        "batch, channels, time, height, width = x.shape",
        "a, b = f(\n    1,\n    2,\n)",
        "a, b = (f(x) for x in y)",
        "f(key=lambda x: x)",
        "x = dict(f=lambda x: x)",
        "@g\ndef f(\n    x,\n    y,\n):\n    return x",
        "if x:\n    y()\nelif z:\n    y()\nelse:\n    z()",
        "x += 1",
    ],
)
def test_a_plain_form_is_let_through(code):
    assert not dense_forms(code)
