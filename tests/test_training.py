"The training loop: resume, averages, the guard, checkpoints, adversaries, two processes."

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from faces2voices.errors import CheckpointError, CorpusError, F2VError, ToolMissingError
from faces2voices.core import PRESETS, test_same as same
from faces2voices import costs, runs, training
from faces2voices.processes import draw_ahead
from faces2voices.runs import open_board, SampleLogger
from faces2voices.training import (
    EMA,
    adapt,
    fit,
    fit_eigenlips,
    decoder_batches,
    precompute_mu,
    schedule,
    shuffled,
    train_model_vocoder,
)
from faces2voices.costs import dry_run
from test_corpora import made_clip


def batch_of(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 3, generator=g)
    return x, x.sum(1, keepdim=True)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)
    )


def loss_of(model):
    return lambda b: (model(b[0]) - b[1]).pow(2).mean()


def train(model, run_dir=None, steps=20, **kw):
    return fit(
        loss_of(model),
        model,
        batch_of,
        steps,
        1e-2,
        name="net",
        run_dir=run_dir,
        log_every=5,
        warmup=5,
        **kw,
    )


def stop_at(step, error=KeyboardInterrupt):
    def callback(line, average):
        if line["step"] == step:
            raise error

    return callback


def test_resume_is_exact(tmp_path):
    a, b = net(0), net(0)
    log = train(a, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(b, tmp_path / "b", callback=stop_at(10))
    c = net(5)
    again = train(c, tmp_path / "b")
    for k, v in a.state_dict().items():
        same(v, c.state_dict()[k])

    def strip(log):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in log]

    assert strip(log) == strip(again)
    lines = (tmp_path / "b" / "net.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]


def test_a_crash_loses_only_the_steps_since_the_last_save(tmp_path):
    a, b, c = net(0), net(0), net(3)
    train(a)
    with pytest.raises(ZeroDivisionError):
        train(b, tmp_path, callback=stop_at(15, ZeroDivisionError), save_every_seconds=0)
    train(c, tmp_path)
    for k, v in a.state_dict().items():
        same(v, c.state_dict()[k])


KILLED = """
import sys, torch
from torch import nn
from faces2voices.training import fit
torch.manual_seed(int(sys.argv[2]))
m = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(.2), nn.Linear(8, 1))
def batch(step): return torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
def loss(x): return (m(x) - x.sum(1, keepdim=True)).pow(2).mean()
def say(line, average): print(line["step"], flush=True)
fit(loss, m, batch, 200, 1e-2, name="m", run_dir=sys.argv[1], log_every=10, save_every_seconds=0,
    callback=say)
"""


def test_killed_without_warning_it_ends_with_the_same_weights(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(KILLED)

    def start(folder, seed):
        command = [sys.executable, str(script), str(tmp_path / folder), str(seed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    victim = start("killed", 0)
    while int(victim.stdout.readline()) < 60:
        pass
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    reached = torch.load(tmp_path / "killed" / "m.ckpt", weights_only=True)["step"]
    assert 50 <= reached < 200, "killed in the middle"
    for folder, seed in (("killed", 99), ("straight", 0)):
        assert start(folder, seed).wait() == 0
    files = [tmp_path / folder / "m.ckpt" for folder in ("killed", "straight")]
    one, two = (torch.load(file, weights_only=True)["learners"][0] for file in files)
    for part in ("module", "ema"):
        for k in one[part]:
            same(one[part][k], two[part][k])


def test_the_average_of_each_quarter_stays(tmp_path):
    model, seen = net(0), {}
    train(
        model,
        tmp_path,
        callback=lambda line, average: seen.update(
            {line["step"]: {k: v.clone() for k, v in average.state_dict().items()}}
        ),
    )
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "net-10.safetensors",
        "net-15.safetensors",
        "net-5.safetensors",
    ]
    for k, v in load_file(tmp_path / "net-10.safetensors").items():
        same(v, seen[10][k])


def sound_of(step):
    "A batch whose sums depend on how many threads add them up."
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 3, generator=g) + torch.randn(100_000, generator=g).sum() / 1e3
    return Named([str(step)], x), os.getpid()


def drawn_by(workers, adversary, run_dir=None, callback=None):
    "The weights after 12 steps of two batches each, and who drew them."
    models, drawers = [net(0), net(1)][: 1 + adversary], set()

    def loss_of(model):
        def loss(batch):
            drawers.add(batch[1])
            return (model(batch[0].x) - 1).pow(2).mean()

        return loss

    losses, modules = loss_of(models[0]), models[0]
    if adversary:
        losses, modules = tuple(map(loss_of, models)), tuple(models)
    fit(
        losses,
        modules,
        sound_of,
        12,
        1e-2,
        name="net",
        run_dir=run_dir,
        warmup=2,
        log_every=3,
        accumulate=2,
        workers=workers,
        callback=callback,
    )
    return nn.ModuleList(models).state_dict(), drawers


@pytest.fixture()
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("adversary", [False, True])
def test_it_does_not_matter_who_draws_the_batches(tmp_path, adversary, two_threads):
    alone, here = drawn_by(0, adversary)
    assert here == {os.getpid()}
    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            drawn_by(workers, adversary, tmp_path / str(workers), stop_at(6))
        resumed, others = drawn_by(workers, adversary, tmp_path / str(workers))
        assert len(others) == workers and os.getpid() not in others
        for k, v in alone.items():
            assert torch.equal(v, resumed[k]), k


def children():
    return psutil.Process().children(recursive=True)


@pytest.mark.parametrize("where", ["callback", "interrupt", "loss", "batches"])
def test_whatever_ends_a_run_ends_its_processes(where):
    before, m = {p.pid for p in children()}, nn.Linear(1, 1)

    def fails(at, error=ZeroDivisionError):
        if where == at:
            raise error(where)

    def batch(step):
        if step == 3:
            fails("batches")
        return torch.ones(1, 1) * step

    def loss(b):
        fails("loss")
        return m(b).sum()

    def callback(line, average):
        fails("callback")
        fails("interrupt", KeyboardInterrupt)

    with pytest.raises(
        (ZeroDivisionError, KeyboardInterrupt), match=where
    ) as held:  # `held` keeps the traceback, and all that it refers to
        fit(loss, m, batch, 10, 1e-2, name="m", log_every=2, workers=2, callback=callback)
    assert not {p.pid for p in children()} - before and held


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with draw_ahead(batch_of, range(4), 1, Accelerator(), 0) as drawn:
        assert len(list(drawn)) == 4
    same(torch.rand(2), expected)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def layer():
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    def both(step):
        pairs = zip(batch_of(2 * step), batch_of(2 * step + 1))
        return tuple(torch.cat(pair) for pair in pairs)

    a, b = layer(), layer()
    halves = fit(loss_of(a), a, batch_of, 10, 1e-2, name="a", accumulate=2)
    whole = fit(loss_of(b), b, both, 10, 1e-2, name="b")
    same(a.weight, b.weight, atol=1e-6)
    assert halves[-1]["total"] == pytest.approx(whole[-1]["total"], rel=1e-4)


def test_watching_leaves_pictures_and_sounds(tmp_path):
    watch = SampleLogger(
        tmp_path, "part", lambda module: torch.zeros(80, 100), torch.ones(80, 100), every=10
    )
    for step in (5, 10, 20):
        watch(dict(step=step, total=1.0), None)
    written = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert written == [f"part-0000{end}" for end in ("10.png", "10.wav", "20.png", "20.wav")]


def test_a_board_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install faces2voices[board]")
    board = open_board(tmp_path)
    SampleLogger(
        tmp_path,
        "part",
        lambda module: torch.zeros(80, 100),
        torch.ones(80, 100),
        every=10,
        board=board,
    )(dict(step=10, total=0.5), None)
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert (
        [(e.step, e.value) for e in events.Scalars("part/total")] == [(10, 0.5)]
        and events.Tags()["images"]
        and events.Tags()["audio"]
    )


def test_a_missing_board_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ToolMissingError, match="tensorboard"):
        open_board(tmp_path)


def test_a_finished_run_is_loaded_not_trained(tmp_path):
    a, b = net(0), net(1)
    train(a, tmp_path)
    fit(
        loss_of(b),
        b,
        lambda step: pytest.fail("drew a batch"),
        20,
        1e-2,
        name="net",
        run_dir=tmp_path,
    )
    for k, v in a.state_dict().items():
        same(v, b.state_dict()[k])


def test_resume_false_starts_again(tmp_path):
    a, b = net(0), net(0)
    train(a, tmp_path)
    log = train(b, tmp_path, resume=False)
    assert len(log) == 4
    for k, v in a.state_dict().items():
        same(v, b.state_dict()[k])


def test_the_seed_decides_the_dropout():
    a, b, c = net(0), net(0), net(0)
    train(a, seed=1)
    train(b, seed=1)
    train(c, seed=2)
    same(a[0].weight, b[0].weight)
    assert (a[0].weight - c[0].weight).abs().max() > 1e-4


def test_ema_closed_form():
    m = nn.Linear(2, 2)
    with torch.no_grad():
        m.weight.fill_(0.0)
    ema = EMA(m, 0.95)
    with torch.no_grad():
        m.weight.fill_(1.0)
    for k in range(300):
        ema.update(m, k)
    left = math.prod(min(0.95, (1 + k) / (10 + k)) for k in range(300))
    same(ema.module.weight, torch.full((2, 2), 1 - left), atol=1e-5)


def test_ema_copies_buffers():
    m = nn.BatchNorm1d(2)
    ema = EMA(m, 0.9)
    m(torch.randn(8, 2) + 5)
    ema.update(m, 0)
    same(ema.module.running_mean, m.running_mean)
    assert int(ema.module.num_batches_tracked) == 1


def test_the_module_ends_with_the_average(tmp_path):
    m, seen = nn.Linear(3, 1), []

    def loss(b):
        seen.append(m.weight.detach().clone())
        return loss_of(m)(b)

    fit(loss, m, batch_of, 30, 1e-1, name="m", ema=0.9, warmup=1, run_dir=tmp_path)
    last = torch.load(tmp_path / "m.ckpt", weights_only=True)["learners"][0]["module"]["weight"]
    average = seen[0]
    for k, w in enumerate(seen[1:] + [last]):
        average = average.lerp(w, 1 - min(0.9, (1 + k) / (10 + k)))
    same(m.weight, average, atol=1e-5)
    assert (average - last).abs().max() > 1e-4 and not m.training


def test_plain_adamw_is_the_reference():
    "One learner, no average, no clipping that bites: the same weights as the textbook loop."
    a, b = nn.Linear(3, 1), nn.Linear(3, 1)
    b.load_state_dict(a.state_dict())
    fit(loss_of(a), a, batch_of, 12, 1e-2, name="a", ema=0.0, warmup=3, clip=1e9)
    opt = torch.optim.AdamW(b.parameters(), 1e-2, betas=(0.9, 0.99))
    for step in range(12):
        for g in opt.param_groups:
            g["lr"] = 1e-2 * schedule(step, 12, 3)
        opt.zero_grad()
        loss_of(b)(batch_of(step)).backward()
        opt.step()
    same(a.weight, b.weight, atol=1e-6)


class Named(NamedTuple):
    names: list
    x: torch.Tensor


def test_nan_guard_names_the_batch(tmp_path):
    m = nn.Linear(1, 1)

    def clip(step):
        return Named([f"clip{step}"], torch.full((2, 1), float("nan") if step == 4 else 1.0))

    with pytest.raises(FloatingPointError, match=r"step 4.*nan.*clip4"):
        fit(
            lambda b: m(b.x).mean(),
            m,
            clip,
            10,
            1e-2,
            name="m",
            run_dir=tmp_path,
            save_every_seconds=0,
        )
    assert m.weight.isfinite().all()
    assert torch.load(tmp_path / "m.ckpt", weights_only=True)["step"] == 4


def test_guard_sees_gradients_too():
    m = nn.Linear(1, 1)

    def loss(b):
        return (m.weight - m.weight.detach()).abs().sqrt().sum()  # value 0, gradient not finite

    with pytest.raises(FloatingPointError):
        fit(loss, m, lambda step: 0, 2, 1e-2, name="m")


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    a = net(0)
    train(a, tmp_path)
    before = (tmp_path / "net.ckpt").read_bytes()

    def half(obj, f):
        f.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(F2VError, match="disk full"):
        train(net(0), tmp_path, resume=False)
    assert (tmp_path / "net.ckpt").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".safetensors") == [
        "net.ckpt",
        "net.jsonl",
    ]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(net(0), tmp_path)
    other = nn.Linear(3, 1)
    with pytest.raises(CheckpointError, match="net.ckpt"):
        train(other, tmp_path)


def test_a_checkpoint_that_is_a_pickle_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    (tmp_path / "net.ckpt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError):
        train(net(0), tmp_path)
    assert not (tmp_path / "owned").exists()


def test_adversaries_are_blind_to_each_other():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    start = b.weight.item()
    log = fit(
        (
            lambda _: (a.weight * b.weight).sum(),
            lambda _: b.weight.sum() * 0 + a.weight.detach().sum(),
        ),
        (a, b),
        lambda step: 0,
        5,
        1e-3,
        name="x",
        log_every=1,
        warmup=1,
    )
    assert abs(b.weight.item() - start * (1 - 5e-5)) < 1e-3  # only weight decay moved it
    assert {"total", "linear_total"} <= set(log[0])


def test_frozen_weights_stay_frozen():
    m = net(0)
    m[0].weight.requires_grad_(False)
    before = m[0].weight.clone()
    train(m, steps=5)
    same(m[0].weight, before)
    assert not m[0].weight.requires_grad and m[4].weight.requires_grad


@pytest.mark.parametrize("n,batch", [(10, 4), (7, 7), (3, 8), (5, 1)])
def test_shuffled_shows_every_example_once_a_pass(n, batch):
    draw = shuffled(n, batch, seed=3)
    seen = sum((draw(step) for step in range(3 * n)), [])
    assert all(len(draw(s)) == batch for s in range(5))
    for p in range(3 * batch):
        assert sorted(seen[p * n : (p + 1) * n]) == list(range(n))


def test_schedule():
    rates = [schedule(k, 100, 10) for k in range(100)]
    assert (
        rates[9] == rates[10] == 1
        and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
        and rates[55] == pytest.approx(0.5)
    )


class Echo(nn.Module):
    "A hierarchy of a kind: μ is how bright the lips are."

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def inputs(self, b):
        return b.lips, b.face, b.identity, b.expression, b.mask

    def forward(self, lips, face, identity, expression, mask):
        mu = self.gain * lips.mean((1, 3, 4)).repeat_interleave(4, 1)[:, None].expand(-1, 80, -1)
        return SimpleNamespace(
            mu=mu,
            speaker=torch.nn.functional.normalize(
                mu.mean((1, 2))[:, None] + torch.arange(256.0), dim=-1
            ),
        )


@pytest.fixture()
def talk(tmp_path):
    "A data set of five clips in a folder."
    from faces2voices.manifests import Entry, write_manifest
    from faces2voices.corpora import Clip, ClipDataset, save_clip

    for i in range(5):
        T, g = 30 + 5 * i, torch.Generator().manual_seed(i)
        lips = torch.randint(0, 256, (T, 96, 96), generator=g, dtype=torch.uint8)
        sound = 0.1 * torch.randn(640 * T, generator=g)
        save_clip(
            Clip(
                str(i),
                "ann",
                "",
                lips,
                torch.zeros(112, 112, 3, dtype=torch.uint8),
                torch.zeros(T, 6),
                torch.zeros(0),
                sound,
                *torch.zeros(3, 2 * T),
            ),
            tmp_path / f"{i}.npz",
        )
    write_manifest(
        [
            Entry(str(i), tmp_path / "x.mp4", extra=dict(frames=30 + 5 * i, sound=True))
            for i in range(5)
        ],
        tmp_path / "manifest.jsonl",
    )
    return ClipDataset(tmp_path)


def stored(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}


def test_scenes_are_written_once_and_read_in_windows(talk, monkeypatch):
    seen = precompute_mu(Echo(), talk, batch=2, vary=0)
    before = stored(talk.folder)
    assert len(seen) == len(before) == 10
    for i, clip in enumerate(talk):
        same(seen[i].x1.float(), clip.mel, atol=2e-3)
        right = (
            ((clip.lips[:, 4:92, 4:92].float() / 255 - 0.421) / 0.165)
            .mean((1, 2))
            .repeat_interleave(4)
            .expand(80, -1)
        )
        same(seen[i].mu.float(), right, atol=2e-3)
    a, b = (decoder_batches(s, 4, seed=3)(5) for s in (seen, list(seen)))
    assert (
        a.names == b.names
        and a.mu.shape == (4, 80, 128)
        and torch.equal(a.mu, b.mu)
        and torch.equal(a.x1, b.x1)
        and a.mu.dtype == torch.float
    )
    lost = next(talk.folder.rglob("3.1.safetensors"))
    lost.unlink()
    precompute_mu(Echo(), talk, batch=2, vary=0)
    assert stored(talk.folder) == before
    monkeypatch.setattr(Echo, "forward", None)  # from now on nothing is computed
    assert torch.equal(precompute_mu(Echo(), talk, batch=2, vary=0)[7].mu, seen[7].mu)


def test_scenes_of_other_weights_are_not_read(talk, tmp_path):
    one = precompute_mu(Echo(), talk, batch=5, views=1)
    two = precompute_mu(Echo(2.0), talk, batch=5, views=1)
    same(two[2].mu.float(), 2 * one[2].mu.float(), atol=4e-3)
    right = one[2].mu.clone()
    (tmp_path / "targets").rename(tmp_path / "old")
    (tmp_path / "targets").write_text("nothing can be written here")
    same(precompute_mu(Echo(), talk, tmp_path / "run", batch=5, views=1)[2].mu, right)
    assert len(stored(tmp_path / "run")) == 5
    with pytest.raises(CorpusError, match="has lost the example 2.0"):
        one[2]


def test_the_paper_size_is_counted_without_memory_for_it():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = {c.part: c for c in dry_run(PRESETS["paper"])}
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    )  # kB; the weights alone would be 1.5 GB
    hierarchy = counted["hierarchy"]
    assert hierarchy.weights - hierarchy.trained == pytest.approx(
        324.6, abs=0.5
    )  # AV-HuBERT Large is frozen (its input for sound left out)
    forward = 2 * hierarchy.weights * 1e6 * 25 / 1e9  # every weight once a frame, at least
    assert hierarchy.gflops > forward


@pytest.mark.parametrize(
    "only, moves",
    [(None, {"hierarchy", "decoder", "vocoder"}), (["decoder"], {"decoder"})],
    ids=["all", "the decoder alone"],
)
def test_adapting_keeps_units_and_voices_and_moves_the_rest(prepared, tmp_path, only, moves):
    from faces2voices.storage import WEIGHTS_DIR

    folder = adapt("talkers", prepared, tmp_path / "run", steps=1, only=only)
    before, after = (load_file(p / "model.safetensors") for p in (WEIGHTS_DIR / "talkers", folder))
    assert {name.split(".")[0] for name in after} >= moves | {"units", "speaker_encoder", "locator"}
    assert {name.split(".")[0] for name in after if (before[name] != after[name]).any()} == moves


@pytest.mark.parametrize(
    "changes",
    [{}, dict(flow_target="residual"), dict(decoder_channels=[32, 64], flow_times="logit-normal")],
    ids=["as it was", "of the residual", "of another size"],
)
def test_a_decoder_that_begins_anew_knows_nothing_and_the_rest_stays(prepared, tmp_path, changes):
    from faces2voices.storage import WEIGHTS_DIR
    from faces2voices.synthesis import FacesToVoices

    asked = dict(steps=1, only=["decoder"], new_decoder=changes, command="go on")
    folder = adapt("talkers", prepared, tmp_path / "run", **asked)
    before, after = (load_file(p / "model.safetensors") for p in (WEIGHTS_DIR / "talkers", folder))
    kept = [name for name in after if not name.startswith("decoder.")]
    assert all((before[name] == after[name]).all() for name in kept)
    # the last layer begins at zero, and one step of the optimiser moves it by the rate at most
    assert after["decoder.out.weight"].abs().max() < 1e-3 < before["decoder.out.weight"].abs().max()
    model = FacesToVoices.from_pretrained(folder)
    first, *_ = model.info["before"]
    card = (folder / "README.md").read_text()
    assert 0 < card.index(first["command"]) < card.index("    go on\n")
    found = json.loads(json.dumps(model.preset.to_json()))
    assert {name: found[name] for name in changes} == changes
    assert found["steps"]["decoder"] == 1
    scale = getattr(model.decoder, "residual_scale", None)
    assert (scale is not None and (scale < 1).all()) == (changes.get("flow_target") == "residual")
    assert model.decoder.sample(torch.zeros(1, 80, 12), steps=1).isfinite().all()


@pytest.mark.parametrize(
    "asked, named",
    [
        (dict(only=["hierarchy"], new_decoder={}), "--new-decoder.*is of the decoder"),
        (dict(only=["decoder"], new_vocoder=True), "--new-vocoder.*is of the vocoder"),
        (dict(only=["decoder"], softening=0.0), "--softening.*is of the vocoder"),
    ],
)
def test_what_is_asked_of_a_part_that_does_not_learn_is_refused(prepared, tmp_path, asked, named):
    with pytest.raises(CheckpointError, match=f"{named}, and --only leaves that out"):
        adapt("talkers", prepared, tmp_path / "run", steps=1, **asked)
    assert not (tmp_path / "run").exists()


def test_a_vocoder_that_begins_anew_is_its_seeds_and_the_rest_stays(prepared, tmp_path):
    from faces2voices.core import seeded
    from faces2voices.storage import WEIGHTS_DIR
    from faces2voices.synthesis import FacesToVoices
    from faces2voices.vocoder import make_vocoder

    asked = dict(steps=1, only=["vocoder"], new_vocoder=True)
    folder = adapt("talkers", prepared, tmp_path / "run", **asked)
    before, after = (load_file(p / "model.safetensors") for p in (WEIGHTS_DIR / "talkers", folder))
    kept = [name for name in after if not name.startswith("vocoder.")]
    assert all((before[name] == after[name]).all() for name in kept)
    preset = FacesToVoices.from_pretrained(folder).preset
    states = seeded(0, lambda: make_vocoder(preset)).state_dict()
    moved = max((after[f"vocoder.{k}"] - v).abs().max() for k, v in states.items())
    # the first step of Adam moves a weight by the rate, and the average keeps most of that
    assert 0.8 < moved.item() / preset.lr["vocoder"] <= 1


def test_the_mels_of_the_critics_alone_are_softened_as_was_asked(prepared, tmp_path, monkeypatch):
    from faces2voices.synthesis import FacesToVoices

    asked, draw = [], training.segment_batches

    def spy(*args, softening=0.0, **options):
        asked.append(softening)
        return draw(*args, softening=softening, **options)

    monkeypatch.setattr(training, "segment_batches", spy)
    how = dict(steps=10, only=["vocoder"])
    folder = adapt("talkers", prepared, tmp_path / "run", softening=0.25, **how)
    assert asked == [0.0, 0.25]  # nine plain steps, then one with critics
    assert FacesToVoices.from_pretrained(folder).preset.vocoder_softening == 0.25


def test_a_new_decoder_begins_from_its_seed_alone(tmp_path):
    "The model that it is put into may have had another: that leaves no trace in it."
    from faces2voices.synthesis import FacesToVoices

    FacesToVoices(shrunk().to_json()).save_pretrained(tmp_path)
    wanted = replace(shrunk(), decoder_channels=(32, 48))
    states = []
    for first, seed in (("talkers", 0), (str(tmp_path), 0), ("talkers", 1)):
        model, _ = training.build_seeded(wanted, first, True, seed, anew=("decoder",))
        states.append(model.decoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize(
    "asked, named",
    [
        ("{flow_target", "no JSON"),
        ("[1]", "no JSON object"),
        ('{"vocoder_blocks": 3}', "vocoder_blocks"),
        ('{"flow_target": "noise"}', "flow_target"),
    ],
)
def test_settings_that_make_no_decoder_are_named_and_train_nothing(
    prepared, tmp_path, asked, named
):
    from typer.testing import CliRunner
    from faces2voices.cli import app

    words = ["adapt", str(prepared), "-o", str(tmp_path / "run"), "--model", "talkers"]
    found = CliRunner().invoke(app, [*words, "--new-decoder", asked])
    assert found.exit_code != 0
    assert named in str(found.exception or found.output)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_folder_where_one_part_adapted_is_not_gone_on_with_for_others(prepared, tmp_path):
    adapt("talkers", prepared, tmp_path / "run", steps=1, only=["decoder"])
    with pytest.raises(CheckpointError, match="adapt"):
        adapt("talkers", prepared, tmp_path / "run", steps=1)


def test_a_decoder_that_adapts_meets_lips_as_they_are_in_use(prepared, tmp_path, monkeypatch):
    "The hierarchy adapts on clips that are varied much, and μ of those is worse than in use."
    varied = []

    def noted(*args, vary, **kw):
        varied.append(vary)
        return made(*args, vary=vary, **kw)

    made = training.precompute_mu
    monkeypatch.setattr(training, "precompute_mu", noted)
    adapt("talkers", prepared, tmp_path / "run", steps=1, only=["decoder"])
    assert varied == [1]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "CLIPS", "-o", "RUN", "--only", "decoder,vocodr"],
        ["adapt", "CLIPS", "--model", "talkers", "-o", "RUN", "--only", "units,vocodr"],
    ],
    ids=lambda words: words[0],
)
def test_a_part_that_is_not_known_is_named_and_trains_nothing(prepared, tmp_path, command):
    from typer.testing import CliRunner
    from faces2voices.cli import app

    places = dict(CLIPS=str(prepared), RUN=str(tmp_path / "run"))
    found = CliRunner().invoke(app, [places.get(word, word) for word in command])
    assert found.exit_code != 0
    assert "vocodr" in str(found.exception or found.output)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_adapting_to_nothing_is_an_error(tmp_path):
    from faces2voices.errors import CorpusError

    with pytest.raises(CorpusError):
        adapt("talkers", tmp_path, tmp_path / "run", steps=1)


def small(**kw):
    from faces2voices.synthesis import FacesToVoices
    from faces2voices.core import TINY

    return FacesToVoices(
        replace(
            TINY,
            lip_width=8,
            dim=32,
            decoder_channels=(32, 32),
            vocoder_channels=16,
            vocoder_blocks=1,
            **kw,
        ).to_json()
    )


def test_a_first_model_hands_on_its_vocoder_as_it_is(tmp_path):
    first, model = small(), small()
    train_model_vocoder(model, [], model.preset, tmp_path, first, 0)
    for a, b in zip(first.vocoder.parameters(), model.vocoder.parameters()):
        same(a, b)


@pytest.mark.parametrize(
    "option,keeps", [("vocoder", {"vocoder"}), ("init", {"speaker", "vocoder"})]
)
def test_a_vocoder_may_be_taken_with_its_speaker_encoder_or_alone(
    monkeypatch, tmp_path, option, keeps
):
    from faces2voices.core import EIGENLIPS
    from faces2voices.synthesis import FacesToVoices

    given = {}

    def train_speaker(model, data, preset, first, seed):
        given["speaker"] = first

    def train_model_vocoder(model, worlds, preset, run, first, *rest):
        given["vocoder"] = first

    monkeypatch.setattr(training, "train_speaker", train_speaker)
    monkeypatch.setattr(training, "train_model_vocoder", train_model_vocoder)
    for name in ("train_units", "train_hierarchy", "train_decoder", "claim_run", "read_targets"):
        monkeypatch.setattr(training, name, lambda *a: SimpleNamespace(add=lambda **kw: None))
    monkeypatch.setattr(training, "load_or_train", lambda run, name, module, step, only: step())
    monkeypatch.setattr(training, "training_clips", lambda *a: [])
    monkeypatch.setattr(training, "assemble", lambda *a: None)
    training.train_system(EIGENLIPS, tmp_path, "DATA", **{option: "talkers"})
    assert {name for name, first in given.items() if first is not None} == keeps
    talkers = FacesToVoices.from_pretrained("talkers", device="cpu")
    for a, b in zip(talkers.vocoder.parameters(), given["vocoder"].vocoder.parameters()):
        same(a, b)


class Clips(list):
    "A data set of a kind."

    folder, sound = "CLIPS", list.__getitem__


def test_the_vocoder_hears_all_worlds_and_their_pitch(tmp_path):
    model = small(steps=dict(vocoder=4), batch=dict(vocoder=2), lr=dict(vocoder=1e-3))

    def clip(hz):
        return SimpleNamespace(
            wav=0.1 * torch.sin(hz * torch.arange(9600.0) / 16000),
            log_f0=torch.full((30,), 5.0),
            voiced=torch.ones(30),
        )

    worlds = Clips([clip(100), clip(200)]), Clips([clip(300)])
    heard = []

    def listen(wavs, generator, preset, **kw):
        heard.extend(zip(wavs, kw["contours"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_vocoder", listen)
        train_model_vocoder(model, worlds, model.preset, tmp_path, None, 0)
    assert len(heard) == 3 and all(c.shape == (2, len(w) // 320) for w, c in heard)
    train_model_vocoder(model, worlds, model.preset, tmp_path, None, 0)
    assert (tmp_path / "vocoder-plain.ckpt").exists() and (
        tmp_path / "vocoder-critics.ckpt"
    ).exists()


@pytest.fixture()
def crowd(tmp_path):
    "A folder of 30 prepared clips of two people."
    from faces2voices.manifests import Entry, write_manifest
    from faces2voices.corpora import save_clip

    entries, folder = [], tmp_path / "crowd"
    for i in range(30):
        clip = made_clip(f"clip{i}", 26 + i, "ab"[i % 2], seed=i)
        save_clip(clip, folder / f"{clip.name}.npz", "eyes")
        facts = dict(frames=26 + i, sound=True, backend="eyes")
        entries.append(
            Entry(clip.name, folder / "x.mp4", clip.speaker_id, extra=facts, split="train")
        )
    write_manifest(entries, folder / "manifest.jsonl")
    return folder


def test_voices_and_vocoder_hold_no_more_than_the_cache(crowd, tmp_path, monkeypatch):
    from faces2voices import corpora

    alive, most = [], 0

    def counted(*args, fill=corpora.with_targets, **kw):
        nonlocal alive, most
        clip = fill(*args, **kw)
        alive = [(wav, mel) for wav, mel in alive if wav() is not None or mel() is not None]
        alive.append((weakref.ref(clip.wav), weakref.ref(clip.mel)))
        most = max(most, len(alive))
        return clip

    monkeypatch.setattr(corpora, "with_targets", counted)
    few = dict(steps=dict.fromkeys(PARTS, 12), batch=dict.fromkeys(PARTS, 4))
    model, dataset = small(**few), corpora.ClipDataset(crowd)
    dataset.cache = corpora.ClipCache(1.2e6)  # six clips
    dataset.sound_cache = dataset.cache
    training.train_speaker(model, dataset, model.preset, None, 0)
    train_model_vocoder(model, [dataset], model.preset, tmp_path / "run", None, 0, workers=0)
    assert len(dataset.sound_cache.clips) < most < 12


def test_clips_that_are_read_one_by_one_give_the_same_weights(crowd, tmp_path):
    from faces2voices.corpora import ClipDataset
    from faces2voices.timbre import train_speaker_encoder
    from faces2voices.training import train_vocoder

    few = dict(steps=dict.fromkeys(PARTS, 4), batch=dict.fromkeys(PARTS, 8))
    a, b, whole = small(**few), small(**few), list(ClipDataset(crowd))
    b.vocoder.load_state_dict(a.vocoder.state_dict())
    training.train_speaker(a, ClipDataset(crowd), a.preset, None, 3)
    voices = [[c.mel for c in whole if c.speaker_id == who] for who in "ab"]
    encoder, _ = train_speaker_encoder(voices, 4, 8, a.preset.lr["speaker"], seed=3)
    train_model_vocoder(a, [ClipDataset(crowd)], a.preset, tmp_path / "a", None, 3, workers=2)
    wavs, tunes = [c.wav for c in whole], [torch.stack([c.log_f0, c.voiced]) for c in whole]
    train_vocoder(wavs, b.vocoder, b.preset, run_dir=tmp_path / "b", contours=tunes, seed=3)
    for one, other in ((a.speaker_encoder, encoder), (a.vocoder, b.vocoder)):
        for x, y in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(x, y)


def test_critics_judge_every_batch_of_a_step():
    "The loss over two batches of a step is the mean of what each gives alone."
    from faces2voices.vocoder import AdversarialLosses, segment_batches, slim_discriminators

    torch.manual_seed(0)
    model = small()
    draw = segment_batches(
        [0.1 * torch.randn(9000)] * 2, 2, model.vocoder.segment, contours=[torch.ones(2, 28)] * 2
    )
    game = AdversarialLosses(model.vocoder, slim_discriminators(), keep_stft=True)
    pair = [draw(0), draw(1)]

    def alone(b):
        game.generator_loss(b)
        return game.discriminator_loss(b).item()

    apart = [alone(b) for b in pair]
    for b in pair:
        game.generator_loss(b)
    assert [game.discriminator_loss(b).item() for b in pair] == pytest.approx(apart) and apart[
        0
    ] != apart[1]
    assert not game.made


def test_a_head_for_words_is_not_trained_on_nothing(tmp_path, monkeypatch):
    from faces2voices.core import EIGENLIPS, GRID_WORDS

    class Wordless(list):
        word_times = {"a": (), "b": ()}

    monkeypatch.setattr(runs, "ClipDataset", lambda data, split, synchronised: Wordless("ab"))
    with pytest.raises(CorpusError, match="no word times"):
        training.train_system(replace(EIGENLIPS, words=GRID_WORDS), tmp_path, "DATA")
    assert training.training_clips("DATA") == ["a", "b"]


def test_eigenlips_are_fitted_once_and_only_where_they_are(monkeypatch):
    from faces2voices.eigenlips import EigenlipEncoder
    from faces2voices.lipreading import SlimLipEncoder

    lips = torch.rand(4, 1, 20, 88, 88, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(
        training,
        "collate",
        lambda clips, **kw: SimpleNamespace(lips=lips, mask=torch.ones(4, 20, dtype=torch.bool)),
    )
    encoder = EigenlipEncoder(8, 32, 16)
    fit_eigenlips(SimpleNamespace(lips=encoder), [0] * 4)
    first = encoder.eigen.basis.clone()
    assert first.any()
    lips = 1 - lips
    fit_eigenlips(SimpleNamespace(lips=encoder), [0] * 4)
    same(encoder.eigen.basis, first)
    fit_eigenlips(
        SimpleNamespace(lips=SlimLipEncoder.__new__(SlimLipEncoder)), [0] * 4
    )  # nothing to fit


PARTS = "locator", "units", "speaker", "hierarchy", "decoder", "vocoder"


def shrunk(**kw):
    "The preset `tiny`, small enough for a few steps, and without a locator to draw faces for."
    from faces2voices.core import TINY

    few = dict(steps=dict.fromkeys(PARTS, 1), batch=dict.fromkeys(PARTS, 2))
    return replace(
        TINY,
        face_backend="cascade",
        lip_width=4,
        dim=32,
        n_units=8,
        n_blocks=1,
        decoder_channels=(32, 32),
        decoder_mid=1,
        vocoder_channels=16,
        vocoder_blocks=1,
        **few | kw,
    )


def test_the_seed_decides_every_weight(prepared, tmp_path):
    for before, (name, seed) in enumerate((("a", 1), ("b", 1), ("c", 2))):
        torch.manual_seed(before)  # whatever was drawn before
        training.train_system(shrunk(), tmp_path / name, prepared, seed=seed)
    runs = [(tmp_path / name).glob("*.safetensors") for name in "abc"]
    a, b, c = ({p.name: p.read_bytes() for p in files} for files in runs)
    assert set(a) == {f"{part}.safetensors" for part in PARTS[1:]}
    assert a == b
    assert all(a[part] != c[part] for part in a)


def test_the_scale_of_the_residual_is_measured_stored_and_kept(prepared, tmp_path):
    "On the training clips before the first step; a decoder that is adapted goes on with its own."
    from faces2voices.synthesis import FacesToVoices

    preset = shrunk(flow_target="residual", flow_times="logit-normal")
    made = training.train_system(preset, tmp_path / "a", prepared, seed=1)
    model = FacesToVoices.from_pretrained(made, device="cpu")
    clips = training.training_clips(prepared)
    examples = training.precompute_mu(model.hierarchy, clips, tmp_path / "a", vary=1, seed=1)
    rests = torch.cat([(e.x1.float() - e.mu.float()) for e in examples], 1)
    same(model.decoder.residual_scale, rests.square().mean(1).sqrt(), atol=0.01)
    adapted = training.adapt(made, prepared, tmp_path / "b", steps=1)
    again = FacesToVoices.from_pretrained(adapted, device="cpu")
    same(again.decoder.residual_scale, model.decoder.residual_scale)


def test_a_study_of_a_saved_model_goes_on_where_it_was(prepared, tmp_path, monkeypatch):
    "What only training needs is random in a model that is read: it must not count."
    from faces2voices import draws

    small().save_pretrained(tmp_path / "model")
    few = dict(split="train", limit=2, draws=2, settings=[draws.DrawSetting(1)])
    study = [tmp_path / "model", prepared, tmp_path / "study"]
    found = draws.draw_study(*study, **few)
    monkeypatch.setattr(draws, "make_draws", lambda *a: pytest.fail("drawn again"))
    assert draws.draw_study(*study, **few) == found
    small(dropout=0.2).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="model"):
        draws.draw_study(tmp_path / "other", *study[1:], **few)


def test_the_seed_decides_what_a_saved_model_does_not_hold(tmp_path):
    "The masked path is not kept in a saved model: adapting starts it afresh."
    small().save_pretrained(tmp_path)
    weights = []
    for before in (1, 2):
        torch.manual_seed(before)
        model, _ = training.build_seeded(shrunk(), str(tmp_path), True, 0)
        weights.append(model.hierarchy.content.masked.state_dict())
    for k in weights[0]:
        same(weights[0][k], weights[1][k])


def test_the_seed_decides_the_critics(tmp_path):
    from faces2voices.training import train_vocoder

    critics = []
    for before in (1, 2):
        model = small(steps=dict(vocoder=1), batch=dict(vocoder=1), lr=dict(vocoder=1e-3))
        torch.manual_seed(before)
        wavs, contours = [0.1 * torch.sin(torch.arange(16000.0) / 20)], [torch.full((2, 50), 1.0)]
        run = tmp_path / str(before)
        train_vocoder(
            wavs, model.vocoder, model.preset, run_dir=run, plain_share=0.0, contours=contours
        )
        saved = torch.load(run / "vocoder-critics.ckpt", weights_only=True)
        critics.append(saved["learners"][1]["module"])
    first = next(k for k in critics[0] if k.endswith("original1"))  # hardly turned by one step
    same(critics[0][first], critics[1][first], atol=0.05)


def test_the_seed_decides_the_eigenlips(monkeypatch):
    from faces2voices.eigenlips import EigenlipEncoder

    lips = torch.rand(4, 1, 20, 88, 88, generator=torch.Generator().manual_seed(0))
    batch = SimpleNamespace(lips=lips, mask=torch.ones(4, 20, dtype=torch.bool))
    monkeypatch.setattr(training, "collate", lambda clips: batch)
    found = []
    for before in (1, 2):
        encoder = EigenlipEncoder(8, 32, 16)
        torch.manual_seed(before)
        fit_eigenlips(SimpleNamespace(lips=encoder), [0] * 4)
        found.append(encoder.eigen.basis.clone())
    same(*found)


def test_a_pass_is_shuffled_once(monkeypatch):
    calls, permute = [], torch.randperm

    def counted(*args, **kw):
        calls.append(args)
        return permute(*args, **kw)

    monkeypatch.setattr(torch, "randperm", counted)
    draw = shuffled(100, 7)
    for step in range(30):
        draw(step)  # 210 draws touch three passes
    assert len(calls) == 3


def test_training_is_timed():
    found = costs.bench_train(shrunk(), "cpu", steps=2)
    assert list(found["parts"]) == ["hierarchy", "decoder", "vocoder-plain", "vocoder-critics"]
    for part in found["parts"].values():
        assert part["steps_per_second"] > 0 and math.isfinite(part["loss"])


def test_the_first_steps_are_not_timed(monkeypatch):
    ticks = iter([100.0, 200.0, 300.0, 300.5, 301.0])  # WARM steps, and two that count
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), time=time.time)
    monkeypatch.setattr(costs, "time", clock)
    model = nn.Linear(3, 1)

    def loss(x):
        return model(x).pow(2).mean()

    assert costs.time_steps(loss, model, torch.ones(2, 3), False, 2)["steps_per_second"] == 2.0


def test_a_device_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(F2VError, match="not on this machine"):
        costs.bench_train(shrunk(), "cuda")


def test_hours_are_measured_or_left_out(tmp_path, monkeypatch):
    from faces2voices.core import TINY

    monkeypatch.setattr(costs, "SPEEDS_DIR", tmp_path)
    preset = replace(TINY, steps=dict(hierarchy=3600, decoder=7200, vocoder=36000))
    counted = [costs.Cost(part, 1.0, 1.0, 1.0, 1.0) for part in ("hierarchy", "decoder", "vocoder")]
    table = costs.show_costs(preset, counted)
    assert "not measured" in table and "| hours" not in table

    def speed(**kw):
        parts = {k.replace("_", "-"): dict(steps_per_second=v) for k, v in kw.items()}
        return dict(
            preset="tiny", device="an abacus", load=0.0, commit="0", command="count", parts=parts
        )

    cpu = speed(hierarchy=2.0, decoder=4.0, vocoder_plain=9.0, vocoder_critics=0.5)
    assert costs.training_hours(preset, cpu) == pytest.approx(
        dict(hierarchy=0.5, decoder=0.5, vocoder=1.0 + 2.0)
    )
    gpu = speed(hierarchy=2.0, decoder=4.0, vocoder_critics=10.0)
    assert costs.training_hours(preset, gpu)["vocoder"] == pytest.approx(1.0)
    (tmp_path / "train-speed.json").write_text(json.dumps(cpu))
    table = costs.show_costs(preset, counted)
    assert "hours, an abacus" in table and "`count`" in table and "| 3 " in table
    assert "not measured" in costs.show_costs(replace(preset, name="grid"), counted)


def test_voices_need_two_people_who_speak_twice(tmp_path):
    from faces2voices.errors import CorpusError

    clips = [SimpleNamespace(speaker_id=s, mel=torch.zeros(80, 200)) for s in "aab"]
    with pytest.raises(CorpusError, match="CLIPS: has no two speakers"):
        training.train_speaker(small(), Clips(clips), shrunk(), None, 0)
