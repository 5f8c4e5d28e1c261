"""Broken and strange files, a few of each kind: what reads them succeeds or raises a typed error.

`python tests/fuzz_media.py` tries many more."""

import os
import signal
import sys
import numpy as np
import psutil
import pytest
import fuzz_media
from faces2voices.errors import MediaError
from fuzz_media import STRANGE, fuzz

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of memory for a process need Linux"
)

FEW = [
    "zero bytes.mp4",
    "text.mp4",
    "random.mp4",
    "playlist.mp4",
    "no frames.mp4",
    "one frame.mp4",
    "1 x 1.mkv",
    "8000 x 8000.mp4",
    "flat pixels.mkv",
    "sizes.ts",
    "times begin anew.ts",
    "a jump of a month.mkv",
    "before time.mkv",
    "huge times.mkv",
    "one sample.wav",
    "2 GHz.wav",
]


def test_nothing_crashes_hangs_or_fills_memory():
    assert set(FEW) <= set(STRANGE)
    # a forked process begins with the memory of the one that asks
    inherited = psutil.Process().memory_info().rss / 2**20
    table, failures, most = fuzz(len(FEW) + 16, seed=1, names=FEW)
    assert not failures, "\n".join(failures)
    assert (
        sum(table["strange"].values()) == len(FEW) and len(table) == 9
    )  # every way to spoil a file was tried
    assert (
        sum(count["typed error"] for count in table.values()) > 5
    )  # and some files were too bad to read
    assert most - inherited < 700, f"{most - inherited:.0f} MB for one file"


def refuse(path):
    raise MediaError(path, "is not wanted")


def spin(path):
    while True:
        pass


@pytest.mark.parametrize(
    "reader, came",
    [
        (lambda p: None, "ok"),
        (refuse, "typed error"),
        (lambda p: 1 / 0, "crash"),
        (lambda p: os.kill(os.getpid(), signal.SIGTERM), "crash"),
        (lambda p: np.ones(2**30), "memory"),
        (spin, "hang"),
    ],
    ids=["ok", "typed", "exception", "signal", "memory", "hang"],
)
def test_the_judge_sees_what_goes_wrong(tmp_path, monkeypatch, reader, came):
    monkeypatch.setattr(fuzz_media, "READERS", dict(reader=reader))
    monkeypatch.setattr(fuzz_media, "CPU_SECONDS", 1)
    (tmp_path / "file").write_text("something")
    assert fuzz_media.judge(tmp_path / "file")[0] == came
