"A few edited configurations and failing disks. `python tests/fuzz_config.py` tries many more."

import sys
import pytest
import torch
import fuzz_config
from fuzz_config import fuzz_configs, fuzz_disks, judge
from faces2voices.errors import CheckpointError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of memory for a process need Linux"
)


def test_no_configuration_crashes_hangs_or_fills_memory():
    count, failures = fuzz_configs(24, seed=1)
    assert not failures, "\n".join(failures)
    assert count["typed error"] > 12


def test_no_failing_disk_loses_or_halves_anything():
    chosen = [
        ("synthesize", "write", 0, 20),
        ("synthesize", "link", 1, 0),
        ("synthesize", "mkdir", 0, 0),
        ("page", "rename", 0, 0),
        ("page", "mkdir", 1, 0),
    ]
    count, failures = fuzz_disks(chosen)
    assert not failures, "\n".join(failures)
    assert count["typed error"] >= 3


def refuse(case):
    raise CheckpointError("a", "is refused")


def fill(case):
    return [torch.ones(2**28) for _ in range(9)]


def lose(out):
    (out / "mine.txt").unlink()
    raise SystemExit(1)


def halve(out):
    (out / "a.json").write_text("{")
    raise SystemExit(1)


@pytest.mark.parametrize(
    "task, came",
    [
        (lambda folder: None, "ok"),
        (refuse, "typed error"),
        (lambda folder: 1 / 0, "crash"),
        (fill, "memory"),
    ],
    ids=["ok", "typed", "crash", "memory"],
)
def test_the_judge_sees_what_a_model_does(monkeypatch, task, came):
    monkeypatch.setattr(fuzz_config, "use", task)
    outcome, words = judge(fuzz_config.try_config, "a")
    assert outcome == came or came == "memory" and "allocate" in words


@pytest.mark.parametrize("task", [lose, halve])
def test_the_judge_sees_what_a_command_destroys(monkeypatch, tmp_path, task):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(fuzz_config, "COMMANDS", dict(bad=lambda out: ["x"]))
    monkeypatch.setattr(fuzz_config.cli, "main", lambda: task(tmp_path))
    assert judge(fuzz_config.try_disk, ("bad", "mkdir", 9, 0, tmp_path))[0] == "crash"
