"""What must hold of the repository as a whole.

Notebooks, package, site and README agree, and the lessons keep their budgets."""

import ast
import hashlib
import json
import re
import subprocess
import sys
import venv
from base64 import b64decode
from io import BytesIO
from itertools import chain
from pathlib import Path
import pytest
from PIL import Image
from make_sidebar import configuration

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "nbs").glob("*.ipynb"))
ENGINE_ROOMS = sorted((ROOT / "nbs" / "engine").glob("*.ipynb"))
NOTEBOOKS = [*PAGES, *ENGINE_ROOMS]
LESSONS = [p for p in PAGES if p.name[:2].isdigit()]


def names(path) -> str:
    return path.stem


def tracked() -> list:
    "Files under version control, or where there is none, all that are not ignored by habit."
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if out.returncode == 0:
        return [ROOT / f for f in out.stdout.splitlines() if (ROOT / f).is_file()]
    return [
        p
        for p in ROOT.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
    ]


@pytest.fixture()
def copy(tmp_path) -> Path:
    "A copy of the project's notebooks, package and settings."
    for f in tracked():
        rel = f.relative_to(ROOT)
        source = rel.parts[0] in ("nbs", "faces2voices")
        if len(rel.parts) == 1 or source and f.suffix in (".ipynb", ".py", ".svg", ".png"):
            (tmp_path / rel).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / rel).write_bytes(f.read_bytes())
    return tmp_path


def package(root) -> dict:
    return {p.name: p.read_text() for p in sorted((root / "faces2voices").glob("*.py"))}


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def source(cell) -> str:
    return "".join(cell["source"])


def test_clean_and_export_leave_no_difference(copy):
    before = {p: p.read_text() for p in (copy / "nbs").rglob("*.ipynb")}
    bin = Path(sys.executable).parent
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([bin / command], cwd=copy, check=True, capture_output=True)
    assert package(copy) == package(ROOT)
    assert {p: p.read_text() for p in (copy / "nbs").rglob("*.ipynb")} == before


def test_nbdev_3_exports_the_same_package(copy, tmp_path_factory):
    env = tmp_path_factory.mktemp("nbdev3")
    venv.create(env, with_pip=True)
    install = subprocess.run(
        [env / "bin" / "pip", "install", "-q", "nbdev>=3"], capture_output=True, text=True
    )
    if install.returncode:
        pytest.skip(f"nbdev 3 cannot be installed here: {install.stderr.strip().splitlines()[-1:]}")
    subprocess.run([env / "bin" / "nbdev-export"], cwd=copy, check=True, capture_output=True)

    def body(text):
        head = r"^(#.*|__all__ = \[[^\]]*\]|__version__.*)$"
        return re.sub(head, "", text, flags=re.M).split()

    ours, theirs = package(ROOT), package(copy)
    lessons = [f for f in ours if f not in ("__init__.py", "_modidx.py")]
    assert {f: body(theirs[f]) for f in lessons} == {f: body(ours[f]) for f in lessons}


def statements(text):
    "How many a cell holds, nested ones too: a line that is wrapped is still one."
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse(text)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_budget(path):
    cells = code_cells(path)
    lengths = [statements(source(c)) for c in cells]
    assert path.stat().st_size <= 1_000_000, "over 1 MB with its outputs"
    assert max(lengths, default=0) <= 30, f"a code cell of {max(lengths)} statements"


def pictures(path) -> list:  # of (PNG or JPEG, its pixels an inch; None where it does not say)
    "The raster pictures that a notebook stores."
    found = []
    for cell in code_cells(path):
        for out in cell["outputs"]:
            for kind in {"image/png", "image/jpeg"} & out.get("data", {}).keys():
                data = b64decode("".join(out["data"][kind]))
                found.append((kind, Image.open(BytesIO(data)).info.get("dpi", [None])[0]))
    return found


def first_sight(cells) -> int:
    "Which cell that a reader sees is the first to show a picture or play a sound; 0: none."
    seen = [c for c in cells if not source(c).startswith(("#| hide", "#| default_exp"))]
    kinds = {"image/png", "image/jpeg", "image/svg+xml"}
    for i, cell in enumerate(seen, 1):
        for out in cell.get("outputs", []):
            page = "".join(out.get("data", {}).get("text/html", ""))
            if kinds & out.get("data", {}).keys() or re.search("<(video|audio|svg)", page):
                return i
    return 0


@pytest.mark.parametrize("path", LESSONS, ids=names)
def test_a_lesson_keeps_its_budgets(path):
    cells = json.loads(path.read_text())["cells"]
    seen = [c for c in cells if not source(c).startswith("#| hide")]
    assert len(seen) <= 80, f"{len(seen)} cells: what does not fit is plumbing, or a study"
    assert 1 <= first_sight(cells) <= 5, "no picture or sound by the fifth cell"
    stubs = [c for c in cells if source(c).startswith("#| eval: false")]
    assert 3 <= len(stubs) <= 5, f"{len(stubs)} exercises"
    assert not [dpi for _, dpi in pictures(path) if dpi and dpi < 149], "a picture below 150 dpi"
    outputs = list(chain.from_iterable(c["outputs"] for c in code_cells(path)))
    assert not [out for out in outputs if out.get("name") == "stderr"], "a stored warning"
    said = ["".join(out.get("data", {}).get("text/plain", "")) for out in outputs]
    assert not [text for text in said if re.search(r"\d%\|", text)], "a stored progress bar"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_stored_outputs_are_there_and_whole(path):
    cells = code_cells(path)
    assert any(c["outputs"] for c in cells), "no stored output: the site shows stored outputs"
    outputs = chain.from_iterable(c["outputs"] for c in cells)
    assert not [out for out in outputs if out["output_type"] == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_cells_are_stored_as_lists_of_lines(path):
    assert all(isinstance(c["source"], list) for c in json.loads(path.read_text())["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_no_cell_mixes_imports_with_code(path):
    for c in code_cells(path):
        text = re.sub(r"^\s*[%!].*$", "", source(c), flags=re.M)
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(text).body}
        assert kinds != {True, False}, f"nbdev would run this when it renders the page:\n{text}"


@pytest.mark.parametrize("path", LESSONS, ids=names)
def test_a_lesson_has_its_parts(path):
    nb = json.loads(path.read_text())["cells"]
    text = "\n".join(source(c) for c in nb)
    callout = source(nb[1])
    assert "**You will build**" in callout and "**Time**" in callout, "the second cell"
    if any("#| eval: false" in source(c) for c in nb):
        assert 'code-summary: "Solution"' in text


@pytest.mark.parametrize("path", LESSONS, ids=names)
def test_exercise_stubs_fail_and_solutions_pass(path):
    """Each check cell must refuse the stub.

    That it accepts the solution is seen when the notebook runs."""
    cells = code_cells(path)
    for i, c in enumerate(cells):
        if "#| eval: false" not in source(c) or i + 2 >= len(cells):
            continue
        if "Solution" not in source(cells[i + 1]):
            continue
        stub = ast.parse(source(c))
        defined = {n.name for n in stub.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        stored = [n for n in ast.walk(stub) if isinstance(n, ast.Name)]
        defined |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
        check = source(cells[i + 2])
        used = [name for name in defined if re.search(rf"\b{name}\b", check)]
        assert used, f"the check does not use what the stub defines: {defined}"


def test_readme_is_current():
    sys.path.insert(0, str(ROOT / "tests"))
    from make_readme import readme

    assert (ROOT / "README.md").read_text() == readme(), "run `make readme`"


def test_links_resolve():
    missing = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            inner = r"\]\((?!https?:|#|mailto:|attachment:)([^)#\s]+)"
            for link in re.findall(inner, source(cell)):
                if not (path.parent / link).exists():
                    missing.append(f"{path.name}: {link}")
    assert not missing


def test_site_configuration_names_every_notebook_once():
    text = (ROOT / "_quarto.yml").read_text()
    listed = re.findall(r"nbs/[\w/]+\.ipynb", text.split("sidebar:")[1])
    assert sorted(listed) == sorted(p.relative_to(ROOT).as_posix() for p in NOTEBOOKS)
    rendered = re.findall(r"nbs/[\w/]*\*\.ipynb", text.split("metadata-files:")[0])
    pages = chain.from_iterable(ROOT.glob(glob) for glob in rendered)
    assert sorted(pages) == sorted(NOTEBOOKS)
    assert text == configuration(), "run `python tests/make_sidebar.py`, or `make prepare`"


@pytest.mark.parametrize("path", ENGINE_ROOMS, ids=names)
def test_an_engine_room_is_titled_and_tested(path):
    cells = json.loads(path.read_text())["cells"]
    module = (ROOT / "faces2voices" / f"{path.stem[3:]}.py").read_text()
    exported = re.search(r"^__all__ = \[(.*?)\]", module, re.S | re.M)[1]
    functions = [name for name in re.findall(r"'(\w+)'", exported) if name[0].islower()]
    sources = [source(c) for c in code_cells(path)]
    shown = "\n".join(text for text in sources if "#| export" not in text)
    assert not [name for name in functions if name not in shown], "no example"
    assert re.search(r"\bassert\b|\btest_\w+\(", shown), "no assertion"


def test_no_module_of_the_package_hides_one_of_the_standard_library():
    code = (
        "import statistics, faces2voices.statistics, faces2voices.bench as e; "
        "assert e.statistics is statistics"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_import_is_light_and_asks_no_network():
    code = """
import socket, sys
def refuse(*a):
    raise AssertionError("network")
socket.socket.connect = refuse
import faces2voices
assert "torch" not in sys.modules, "import faces2voices pulls torch in"
import faces2voices.cli
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_repository_speaks_of_the_project_alone():
    tops = "|".join("root work home farm Users".split())
    kinds = {"", *".py .md .ini .toml .yml .txt .cfg .ipynb .json .jsonl .cff".split()}
    said = []
    for f in tracked():
        if f.suffix in kinds and f.stat().st_size <= 2_000_000:
            text = f.read_text(errors="replace")
            paths = set(re.findall(rf"(?<![\w./])/(?:{tops})/[\w./-]+", text))
            said += [f"{f.name}: {path}" for path in paths]
    assert not said


def test_sample_clips_are_whole():
    sums = (ROOT / "data_samples" / "SHA256SUMS").read_text().split("\n")
    for line in filter(None, sums):
        digest, name = line.split(maxsplit=1)
        found = hashlib.sha256((ROOT / "data_samples" / name).read_bytes())
        assert found.hexdigest() == digest, name
    assert sum(p.stat().st_size for p in (ROOT / "data_samples").iterdir()) <= 5_000_000
