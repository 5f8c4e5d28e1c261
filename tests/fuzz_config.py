"""Configurations and disks that fail: `python tests/fuzz_config.py --n 200 --seed 0`.

Two hundred times a value or two of a model's config.json are replaced by something absurd, and the
model is loaded, and spoken with if it loads, in a process of its own under a limit of memory. And
every command that writes is run once with each of `write`, `rename`, `link` and `mkdir` failing
from some moment on. A command may do its work, or end with one line and a typed error; a traceback,
a half-written file, or a result that was there and is gone are counted as failures, and the exit
status is 1."""

import argparse
import copy
import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from itertools import chain, product
from pathlib import Path
import numpy as np
import torch
from faces2voices import FacesToVoices, cli
from faces2voices.errors import F2VError
from faces2voices.synthesis import silent_clip

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "faces2voices" / "weights" / "talkers"
SAMPLES = sorted((ROOT / "data_samples").glob("*.mp4"))
MEMORY, WALL_SECONDS = 2 * 2**30, 120  # above what the parent has; for one case

# --- configurations

ABSURD = [
    0,
    -1,
    1,
    2,
    3,
    4,
    7,
    10**3,
    10**6,
    10**9,
    10**30,
    0.5,
    -0.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "slim",
    "eagle",
    None,
    True,
    [],
    [0],
    [1, 2, 3],
    [[1]],
    [[1, 3], [5]],
    {},
    {"a": 1},
    ["a", "a"],
    [10**9],
    "x" * 10_000,
]


def edited(config: dict, rng) -> tuple:
    "A configuration with one or two absurd values, and what was done to it."
    config, done = copy.deepcopy(config), []
    for _ in range(rng.integers(1, 3)):
        name, value = rng.choice(sorted(config["preset"])), ABSURD[rng.integers(len(ABSURD))]
        old = config["preset"][name]
        if isinstance(old, (int, float)) and not isinstance(old, bool) and rng.random() < 0.3:
            value = type(old)(old * [2, 3, 0.5, 100, -1][rng.integers(5)])
        config["preset"][name] = value
        done.append(f"{name}={str(value)[:40]}")
    return config, ", ".join(done)


def use(folder):
    "Load a model, and speak a quarter of a second of nothing with it."
    model = FacesToVoices.from_pretrained(folder, device="cpu")
    expression = torch.zeros(10, model.preset.expression_dim)
    clip = silent_clip(
        "nothing",
        torch.zeros(10, 96, 96, dtype=torch.uint8),
        torch.zeros(112, 112, 3),
        expression,
        torch.zeros(model.preset.identity_dim),
    )
    assert model.synthesize_clip(clip, steps=1).wav.isfinite().all()


def try_config(folder) -> tuple:
    try:
        use(folder)
    except F2VError as e:
        return "typed error", str(e)
    return "ok", ""


# --- file systems

COMMANDS = {
    "synthesize": lambda out: [
        "synthesize",
        SAMPLES[0],
        SAMPLES[1],
        "-o",
        out / "speech",
        "--steps",
        1,
    ],
    "prepare": lambda out: [
        "prepare",
        out / "films",
        out / "prepared",
        "--backend",
        "locator",
        "--workers",
        1,
    ],
    "marks": lambda out: [
        "listen",
        "marks",
        out / "test",
        out / "marks.csv",
        "-o",
        out / "scores.json",
    ],
    "page": lambda out: ["listen", "page", out / "new", out / "films", out / "films"],
    "adapt": lambda out: ["adapt", out / "prepared-before", "-o", out / "run", "--steps", 1],
}
CALLS = dict(write=None, rename=("replace", "rename"), link=("link",), mkdir=("mkdir",))


def fail(call: str, after: int, kilobytes: int):
    """Let a call of the system fail after it went well some times.

    Writing fails after so many kilobytes of any one file."""
    if call == "write":
        return resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes,) * 2)
    left = [after]
    for name in CALLS[call]:

        def broken(*args, real=getattr(os, name), **kw):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            return real(*args, **kw)

        setattr(os, name, broken)


def prepare_ground(out):
    "What the commands need, and something of the user's that must stay."
    (out / "films").mkdir()
    for path in SAMPLES[:2]:
        shutil.copy(path, out / "films")
    (out / "mine.txt").write_text("mine")
    if GROUND:
        shutil.copytree(GROUND, out / "prepared-before")


GROUND = None  # prepared clips of the split train


def state_of(out) -> dict:
    "Every file, and what is in it."
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def whole(path: Path) -> bool:
    "Does a result read well?"
    from faces2voices.soundfiles import load_audio
    from faces2voices.corpora import load_clip

    readers = {".wav": load_audio, ".npz": load_clip, ".json": lambda p: json.loads(p.read_text())}
    try:
        readers.get(path.suffix, lambda p: p.stat().st_size or 1 / 0)(path)
    except Exception:
        return False
    return True


def try_disk(case) -> tuple:
    "Run a command on a failing disk: outcome and words."
    name, call, after, kilobytes, out = case
    before = state_of(out)
    sys.argv, said = ["faces2voices", *map(str, COMMANDS[name](out))], io.StringIO()
    fail(call, after, kilobytes)
    cli.error_console.file, cli.console.file = said, io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cli.main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    after_ = state_of(out)
    lost = [k for k in before if after_.get(k) != before[k]]
    half = [
        k
        for k in after_
        if k not in before
        and (".part-" in k or k.endswith((".wav", ".npz", ".json", ".mp4")) and not whole(out / k))
    ]
    words = said.getvalue().strip()
    if lost or half:
        return "crash", f"lost {lost}, half written {half}: {words}"
    if code and not words:
        return "crash", f"ended with {code} without a word"
    return ("typed error" if code else "ok"), words


# --- judging


def attempt(task, case, pipe):
    "One case in this process; sends outcome and words."
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if task is try_config:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    torch.set_num_threads(1)
    try:
        came = task(case)
    except MemoryError as e:
        came = "memory", repr(e)
    except BaseException as e:
        came = "crash", "".join(traceback.format_exception(e))[-900:]
    pipe.send(came)


def judge(task, case) -> tuple:
    "Outcome and words of one case, tried in a process of its own."
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=attempt, args=(task, case, there))
    child.start()
    there.close()
    try:
        if here.poll(WALL_SECONDS):
            return here.recv()
        return "hang", f"longer than {WALL_SECONDS} s"
    except EOFError:
        return "crash", "died"
    finally:
        child.kill()
        child.join()


def fuzz_configs(n: int, seed: int, say=lambda *a: None) -> tuple:  # Counter of outcomes, failures
    "Edit, load and use `n` configurations."
    config, count, failures = json.loads((MODEL / "config.json").read_text()), Counter(), []
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d) / "model"
        folder.mkdir()
        shutil.copy(MODEL / "model.safetensors", folder)
        for k in range(n):
            new, done = edited(config, np.random.default_rng([seed, k]))
            (folder / "config.json").write_text(json.dumps(new))
            came, words = judge(try_config, folder)
            count[came] += 1
            say(f"{k:4d} {came:12s} {done}: {words}")
            if came not in ("ok", "typed error"):
                failures.append(f"{done}: {came}: {words}")
    return count, failures


def cases(seed: int) -> list:  # of (command, call, after, kilobytes)
    "Every command with every failing call, from a random moment on."
    rng = np.random.default_rng(seed)
    pairs = product(COMMANDS, CALLS)
    return [(*pair, int(rng.integers(0, 4)), int(rng.integers(0, 60))) for pair in pairs]


def fuzz_disks(chosen: list, say=lambda *a: None) -> tuple:  # Counter of outcomes, failures
    "Try commands on failing disks."
    count, failures = Counter(), []
    for case in chosen:
        with tempfile.TemporaryDirectory() as d:
            prepare_ground(Path(d))
            came, words = judge(try_disk, (*case, Path(d)))
        count[came] += 1
        say(f"{case} {came}: {words}")
        if came not in ("ok", "typed error"):
            failures.append(f"{case}: {came}: {words}")
    return count, failures


def make_ground(folder):
    "Two prepared clips to train on."
    global GROUND
    from faces2voices.manifests import read_manifest
    from faces2voices.preparing import prepare

    entries = read_manifest(ROOT / "data_samples" / "manifest.jsonl")[:2]
    entries = [e._replace(split="train") for e in entries]
    eyes = FacesToVoices.from_pretrained("talkers", device="cpu").face_backend
    prepare(entries, folder, eyes, progress=False)
    GROUND = folder


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rounds", type=int, default=2, help="of all commands with all failing calls")
    p.add_argument("-v", action="store_true", help="say what became of each case")
    args = p.parse_args()
    torch.set_num_threads(1)
    say = print if args.v else lambda *a: None
    with tempfile.TemporaryDirectory() as d:
        make_ground(Path(d) / "prepared")
        configs, wrong = fuzz_configs(args.n, args.seed, say)
        rounds = [cases(args.seed + r) for r in range(args.rounds)]
        disks, broken = fuzz_disks(list(chain.from_iterable(rounds)), say)
    print("configurations", dict(configs))
    print("disks", dict(disks))
    print(*wrong, *broken, sep="\n")
    sys.exit(bool(wrong or broken))


if __name__ == "__main__":
    main()
