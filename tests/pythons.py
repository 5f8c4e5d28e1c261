"""Try the package in every Python that it promises, each freshly installed (`make test-pythons`).

    python3 tests/pythons.py [3.10 3.12 …]

installs what `pip install` would, imports every module, speaks a sample clip, runs the fast tests,
says what came of it, and removes the environment (.venv-3.10 …, about 5 GB, ten minutes each).
A Python that is not found is named.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMISED = "3.10", "3.11", "3.12", "3.13"
FAST = """core audio video units content timbre prosody flow solvers decoder vocoder cli
    results""".split()
IMPORT_ALL = """
import importlib, pkgutil, faces2voices
for module in pkgutil.iter_modules(faces2voices.__path__):
    importlib.import_module(f"faces2voices.{module.name}")
"""


def find(version: str) -> str | None:  # path of its interpreter
    "Where a Python is. PYENV_VERSION lets pyenv find its own; others pass it over."
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    try:
        said = subprocess.run(
            [f"python{version}", "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | dict(PYENV_VERSION=version),
        )
    except FileNotFoundError:
        return None
    found, _, path = said.stdout.strip().partition(" ")
    return path if found == version else None


def steps(python: Path, speech: str) -> dict:  # name → command
    "What is done in the environment, in this order."
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "-c", "constraints.txt"]
    f2v, clip = python.with_name("faces2voices"), "data_samples/t0000_000.mp4"
    return {
        "install": [*pip, "-e", ".", "pytest", "pytest-timeout"],
        "import": [python, "-c", IMPORT_ALL],
        "synthesize": [f2v, "synthesize", clip, "-o", speech],
        "fast tests": [python, "-m", "pytest", "-q", "-rs", *(f"tests/test_{n}.py" for n in FAST)],
    }


def passes(version: str) -> bool:
    "Make the environment, take every step in it, and remove it; stop at the first step that fails."
    interpreter = find(version)
    if not interpreter:
        print(f"Python {version}: not found here, not tried", flush=True)
        return True
    folder = ROOT / f".venv-{version}"
    subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
    try:
        with tempfile.TemporaryDirectory() as speech:
            for name, command in steps(folder / "bin" / "python", speech).items():
                print(f"Python {version}: {name}", flush=True)
                if subprocess.run(command, cwd=ROOT).returncode:
                    print(f"Python {version}: {name} FAILED", flush=True)
                    return False
    finally:
        shutil.rmtree(folder)
    print(f"Python {version}: passed", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(not all([passes(version) for version in sys.argv[1:] or PROMISED]))
