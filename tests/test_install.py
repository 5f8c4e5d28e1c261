"What an install promises: versions that fit, declared imports, old Pythons, a whole wheel."

import ast
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from itertools import chain
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pythons import PROMISED, find
from test_project import ROOT, tracked

PACKAGE = sorted((ROOT / "faces2voices").glob("*.py"))
OPTIONAL_BY_HAND = {"matcha-tts"}  # lesson 18 says how it is installed


def settings() -> dict:
    "settings.ini, as setup.py reads it."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def required(*keys) -> list:
    "Requirements of the package, or of these entries of settings.ini."
    found = settings()
    keys = keys or [k for k in found if k == "requirements" or k.endswith("_requirements")]
    return [Requirement(text) for text in " ".join(found[k] for k in keys).split()]


def run(*command, **options) -> subprocess.CompletedProcess:
    "Run a command; where it fails, show what it said."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# --- versions


def newest(requirement: Requirement) -> Version:
    "The release that pip takes if nothing else holds it back. (A dry run would download it first.)"
    pip = [sys.executable, "-m", "pip", "index", "versions", requirement.name]
    asked = subprocess.run(pip, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"no package registry answers here: {asked.stderr.strip().splitlines()[-1:]}")
    offered = re.search(r"Available versions: (.*)", asked.stdout)[1].split(", ")
    return max(map(Version, requirement.specifier.filter(offered)))


def test_pip_takes_torch_and_torchaudio_of_one_release():
    "torchaudio names no torch, so pip takes the newest of each that the requirements allow."
    pair = [newest(r) for r in required("requirements") if r.name in ("torch", "torchaudio")]
    assert len(pair) == 2 and len({version.release[:2] for version in pair}) == 1, pair


EXTRAS = "dev talkers metrics judges whisper mos cluster nbgrader".split()
TESTED = ["requirements", *(f"{name}_requirements" for name in EXTRAS)]


@pytest.mark.parametrize("version", PROMISED)
def test_every_requirement_has_a_known_version(version):
    "constraints.txt pins what is named in settings.ini, for each Python that is promised."
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    known = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {"python_version": version, "python_full_version": f"{version}.0"}

    def applies(requirement):
        return requirement.marker is None or requirement.marker.evaluate(here)

    pinned = {canonicalize_name(r.name) for r in known if applies(r) and r.specifier}
    asked = {canonicalize_name(r.name) for r in required(*TESTED) if applies(r)}
    assert not asked - pinned


def test_the_oldest_python_is_the_one_that_is_promised():
    assert settings()["min_python"] == PROMISED[0]


# --- the language


def test_the_package_uses_nothing_newer_than_the_oldest_python():
    pytest.importorskip("vermin", reason="vermin is not installed (extra `dev`)")
    vermin = [sys.executable, "-c", "import vermin; vermin.main()", f"-t={PROMISED[0]}-"]
    options = "--violations", "--no-tips", "--eval-annotations", "--backport", "typing"
    run(*vermin, *options, *PACKAGE, ROOT / "setup.py")


def test_the_oldest_python_compiles_every_file():
    python = find(PROMISED[0])
    if not python:
        pytest.skip(f"no Python {PROMISED[0]} here")
    code = "import ast, sys; [ast.parse(open(f, 'rb').read(), f) for f in sys.argv[1:]]"
    run(python, "-c", code, *(file for file in tracked() if file.suffix == ".py"))


# --- imports


def imported(path) -> set:
    "The foreign modules that a file imports, at its top or inside functions."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_tool":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"faces2voices"}


def test_every_import_is_declared():
    "In the requirements or in an extra, by the name under which the registry knows it."
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(r.name) for r in required()} | OPTIONAL_BY_HAND
    missing = {}
    for path in PACKAGE:
        for name in imported(path):
            names = {canonicalize_name(d) for d in distributions.get(name, [name])}
            if not names & declared:
                missing.setdefault(name, []).append(path.name)
    assert not missing


# --- the wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    "A copy of what is under version control: a build leaves files behind."
    folder = tmp_path_factory.mktemp("checkout")
    for file in tracked():
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return folder


def build(what: str, source: Path, out: Path) -> Path:
    "What a build front-end would call for, without an environment of its own: the file it makes."
    code = f"import setuptools.build_meta as b, sys; b.build_{what}(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def site(checkout, tmp_path_factory) -> Path:
    "Where the wheel is installed that was built from the sdist that was built from the checkout."
    sdist = build("sdist", checkout, tmp_path_factory.mktemp("sdist"))
    unpacked, site = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("site")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    (source,) = unpacked.iterdir()
    wheel = build("wheel", source, tmp_path_factory.mktemp("wheel"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--target", site, wheel)
    return site


def elsewhere(site, folder, *command) -> str:
    "What Python says outside of the repository, with the installed package on its path."
    env = os.environ | dict(PYTHONPATH=str(site))
    return run(sys.executable, *command, cwd=folder, env=env).stdout


def test_the_wheel_holds_the_package_and_nothing_else(site):
    tops = {p.name for p in site.iterdir()} - {"bin"}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"faces2voices"}
    ours = {f.relative_to(ROOT) for f in tracked() if f.is_relative_to(ROOT / "faces2voices")}
    assert not [f for f in ours if not (site / f).is_file()]
    results = {f.name for f in (site / "faces2voices" / "results").iterdir()}
    assert results == {f.name for f in (ROOT / "nbs" / "results").glob("*.json")}


def test_the_wheel_tells_the_recorded_numbers(site, tmp_path):
    from faces2voices.experiments import ledger, model_card
    from faces2voices.storage import packaged_models

    models = [m for m in packaged_models() if (ROOT / "nbs" / "results" / f"{m}.json").is_file()]
    code = (
        "import json, faces2voices.experiments as e; "
        f"print(json.dumps([e.__file__, e.ledger(), [e.model_card(m) for m in {models!r}]]))"
    )
    file, rows, cards = json.loads(elsewhere(site, tmp_path, "-c", code))
    assert Path(file).is_relative_to(site)
    assert rows == [list(row) for row in ledger()] and any(row[3] for row in rows)
    assert cards == [model_card(m) for m in models] and len(cards) >= 2


def test_the_wheel_speaks(site, tmp_path):
    clip = sorted((ROOT / "data_samples").glob("*.mp4"))[0]
    elsewhere(site, tmp_path, "-m", "faces2voices.cli", "synthesize", clip, "-o", "spoken")
    assert (tmp_path / "spoken" / f"{clip.stem}.wav").stat().st_size > 10_000


def test_without_the_results_the_error_is_typed(monkeypatch, tmp_path):
    from faces2voices import experiments
    from faces2voices.errors import CheckpointError

    monkeypatch.setattr("faces2voices.records.RESULTS", tmp_path)
    with pytest.raises(CheckpointError, match="grid.json: no metric card is recorded"):
        experiments.model_card("grid")
    monkeypatch.setattr("faces2voices.records.RESULTS", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="the recorded results are not there"):
        experiments.model_card("grid")
    with pytest.raises(CheckpointError, match="the recorded results are not there"):
        experiments.ledger()


# --- the root

NAMED_BY_DESIGN = set(
    """settings.ini _quarto.yml nbs faces2voices data_samples tests README.md
    pyproject.toml constraints.txt Makefile LICENSE CITATION.cff CONTRIBUTING.md .ci""".split()
)
NEEDED_BESIDES = {
    "setup.py",  # hands settings.ini to setuptools
    "MANIFEST.in",  # what the sdist needs besides the package
    ".binder",  # a lesson in a browser, with nothing installed
    ".devcontainer",  # the same, in Codespaces
    "nbdev.yml",  # settings of the site that nbdev writes and _quarto.yml reads
    ".gitignore",
    ".gitattributes",
}


def test_the_root_holds_what_the_design_names_and_no_output():
    assert {f.relative_to(ROOT).parts[0] for f in tracked()} <= NAMED_BY_DESIGN | NEEDED_BESIDES


def commands(command) -> list:
    "A command of the command line, or all those that it gathers."
    below = getattr(command, "commands", {}).values()
    return list(chain.from_iterable(map(commands, below))) or [command]


def test_git_ignores_what_the_commands_write():
    from typer.main import get_command
    from faces2voices.cli import app

    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("not a git checkout")
    options = chain.from_iterable(command.params for command in commands(get_command(app)))
    outs = {str(o.default) for o in options if o.name == "out" and o.default and not o.required}
    assert {"speech", "runs/tiny"} <= outs
    said = run("git", "check-ignore", *(f"{out}/x" for out in {"demo", *outs}), cwd=ROOT)
    assert {line.removesuffix("/x") for line in said.stdout.split()} == {"demo", *outs}
