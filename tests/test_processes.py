"""Several processes, one model: what `torch.distributed.run` starts, on one machine, without a GPU.

Process r of R draws batch step · R + r, and what is random in a loss is drawn from the number of
the batch, so two processes are compared with one that accumulates two batches in a step.
"""

import json
import os
import subprocess
import sys
import pytest
import torch
from safetensors.torch import load_file
from faces2voices.core import test_same as same


def launch(script, *args, processes=2, check=True):
    "Run a script in some processes that find each other on a free port."
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        str(script),
        *map(str, args),
    ]
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


FIT = """
import os, sys, torch
from torch import nn
from accelerate import Accelerator
from faces2voices.training import fit
accelerator, folder = Accelerator(), sys.argv[1]
assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
torch.manual_seed(accelerator.process_index)  # every process starts from other weights
m = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 2))
def batch(step): return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
def loss(x): return (m(x) - x.sum(1, keepdim=True)).pow(2).mean()
n, rank = accelerator.num_processes, accelerator.process_index
more = dict(name="m", run_dir=folder, warmup=2, log_every=2, accumulate=2//n)
losses = [line["total"] for line in fit(loss, m, batch, 8, 1e-2, **more)]
torch.save(dict(weights=m.state_dict(), losses=losses), f"{folder}/{rank}.pt")
"""


def test_two_processes_equal_one_with_both_batches(tmp_path):
    (tmp_path / "fit.py").write_text(FIT)
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        launch(tmp_path / "fit.py", tmp_path / str(n), processes=n)
    files = [tmp_path / p for p in ("1/0.pt", "2/0.pt", "2/1.pt")]
    one, first, second = (torch.load(f, weights_only=True) for f in files)
    for k in first["weights"]:
        same(first["weights"][k], second["weights"][k])
    for k in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"):
        same(one["weights"][k], first["weights"][k], atol=1e-6)
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-5)


TRAIN = """
import os, sys, torch
from dataclasses import replace
from functools import partial
from faces2voices import cli, core, training
PARTS = "locator", "units", "speaker", "hierarchy", "decoder", "vocoder"
n, (folder, data) = int(os.environ["WORLD_SIZE"]), sys.argv[1:3]
assert training.make_accelerator().num_processes == n
core.PRESETS["tiny"] = replace(core.TINY, face_backend="cascade", lip_width=4, dim=32, n_units=8,
    n_blocks=1, decoder_channels=(32, 32), decoder_mid=1, vocoder_channels=16, vocoder_blocks=1,
    steps=dict.fromkeys(PARTS, 2), batch=dict.fromkeys(PARTS, 2))
training.fit = partial(training.fit, accumulate=2//n)
made, assemble = [], training.assemble
def noted(model, *args):
    made.append(1)
    return assemble(model, *args)
training.assemble = noted
start = training.build_seeded
def kept(*args):
    global model
    model, first = start(*args)
    return model, first
training.build_seeded = kept
if __name__ == "__main__":  # not in a process that it starts
    sys.argv[1:] = ["train", data, "-o", folder, "--seed", "3"]
    cli.app(standalone_mode=False)
    result = dict(weights=model.state_dict(), made=len(made))
    torch.save(result, f"{folder}/rank{os.environ['RANK']}.pt")
"""


def test_train_gives_one_model_in_two_processes(prepared, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    for n in (1, 2):
        launch(tmp_path / "train.py", tmp_path / str(n), prepared, processes=n)
    files = [tmp_path / p for p in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt")]
    one, first, second = (torch.load(f, weights_only=True) for f in files)
    assert (one["made"], first["made"], second["made"]) == (1, 1, 0), "who writes"
    for k in first["weights"]:
        same(first["weights"][k], second["weights"][k])
    for part in ("units", "speaker"):
        a, b = (load_file(tmp_path / n / f"{part}.safetensors") for n in "12")
        for k in a:
            same(a[k], b[k])

    def total(n, name):
        last = (tmp_path / n / f"{name}.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["total"]

    for name in ("hierarchy", "vocoder-plain", "vocoder-critics"):  # but for the order of sums
        assert total("1", name) == pytest.approx(total("2", name), rel=1e-4)
    # μ, which the decoder reads, comes from batch norm's averages: each process's count other clips
    assert total("1", "decoder") == pytest.approx(total("2", "decoder"), rel=0.02)


FAIL = """
import os, sys, time
from faces2voices.errors import CorpusError
from faces2voices.training import on_main
rank, work = os.environ["RANK"], sys.argv[2]
def broken():
    if work == "ours": raise CorpusError("clips", "are gone", "Look for them")
    raise ZeroDivisionError("of somebody else")
try: on_main(broken)
except Exception as e:
    open(f"{sys.argv[1]}/{rank}-{work}", "w").write(f"{type(e).__name__}: {e}")
time.sleep(3)  # before the launcher ends the others
sys.exit(1)
"""

OURS, ANOTHER = "CorpusError: clips: are gone. Look for them", "ZeroDivisionError: of somebody else"
TOLD = "RuntimeError: the main process failed: ZeroDivisionError('of somebody else')"


@pytest.mark.parametrize("work,first,second", [("ours", OURS, OURS), ("another", ANOTHER, TOLD)])
def test_nobody_waits_for_a_main_process_that_failed(work, first, second, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    assert launch(tmp_path / "fail.py", tmp_path, work, check=False).returncode != 0
    assert [(tmp_path / f"{rank}-{work}").read_text() for rank in (0, 1)] == [first, second]
