"""The ten variants: one size, what each may see and learn from, pairs, a stop in between."""

import json
import os
import signal
from dataclasses import replace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from faces2voices import ablation as ab
from faces2voices.ears import Ear, make_ear
from faces2voices.core import GRID, GRID_WORDS, TINY, test_same as same
from faces2voices.corpora import Clip, ClipDataset, save_clip, word_labels
from faces2voices.content import Content
from faces2voices.errors import CheckpointError, CorpusError, F2VError
from faces2voices.hierarchy import Hierarchy, HierarchyLoss, Mu
from faces2voices.manifests import Entry, Word, write_manifest
from faces2voices.prosody import Prosody
from faces2voices.statistics import crossed_difference, crossed_interval, holm
from faces2voices.timbre import FiLM, SpeakerEncoder
from faces2voices.toyworld import toy_batch
from faces2voices.variants import (
    ALL_VARIANTS,
    FAIR,
    Flat,
    Cascade,
    FrozenFeatures,
    check_variants,
    count_weights,
    make_variant,
    matched_preset,
    weights_to_mu,
)

SMALL = replace(
    TINY,
    dim=32,
    n_units=8,
    n_blocks=2,
    dropout=0.0,
    teacher_forcing=0.0,
    words=("bin", "blue"),
    batch=TINY.batch | dict(hierarchy=2),
)
LIPS = 24  # size of a feature
CAMERA = "lips", "face", "expression"
FEATURED = replace(SMALL, identity_dim=16)  # all variants can be made as small as the whole of this
AUXILIARY = "ce", "masked_ce", "words", "speaker", "pitch", "voicing", "energy"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def toy_features(preset=SMALL, clips=4):
    made = toy_batch(preset, clips, 6)
    return made._replace(lips=torch.randn(clips, 6, LIPS), words=made.units % 3)


def build(name, preset=SMALL):
    "A variant whose speaker is felt: a new FiLM does not yet modulate."
    model = make_variant(name, preset, LIPS)
    if isinstance(getattr(model, "film", None), FiLM):
        torch.nn.init.normal_(model.film.to_film.weight)
    return model


# --- size


@pytest.mark.parametrize("preset", [replace(GRID, lip_encoder="slim"), TINY], ids=lambda p: p.name)
def test_all_variants_have_one_size(preset):
    def weights(name):
        with torch.device("meta"):
            return count_weights(make_variant(name, matched_preset(name, preset, 256), 256))

    with torch.device("meta"):
        whole = count_weights(Hierarchy(preset, FrozenFeatures(256)))
    for name in ALL_VARIANTS:
        assert abs(weights(name) / whole - 1) < 0.02, name


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_all_variants_can_have_as_many_weights_that_lead_to_mu(name):
    batch = toy_features(FEATURED)
    random = torch.get_rng_state()
    preset = matched_preset(name, FEATURED, LIPS, batch)
    assert torch.equal(torch.get_rng_state(), random)
    whole, variant = (make_variant(k, p, LIPS) for k, p in (("whole", FEATURED), (name, preset)))
    assert weights_to_mu(variant, batch) == pytest.approx(weights_to_mu(whole, batch), rel=0.04)


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_no_weight_is_dead(name):
    """But for the 256 that turn a speaker into a level of pitch, where no speaker is known.

    The contour of pitch has no mean, so the gradient of its offset is nothing but rounding."""
    model = build(name)
    model.loss(toy_features()).total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    silent = [n for n in silent if n != "prosody.pitch.out.bias"]
    nobody = name.removesuffix("-normed") in ("no-timbre", "prosody-first")
    assert silent == (["prosody.level.weight"] if nobody else [])


# --- who sees what


def seen_by(model, term):
    "Which of the camera's inputs a loss depends on."
    batch = toy_features()
    inputs = {name: getattr(batch, name).clone().requires_grad_() for name in CAMERA}
    loss = getattr(model.loss(batch._replace(**inputs)), term)
    if not loss.requires_grad:
        return set()
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {name for name, grad in zip(inputs, found) if grad is not None and grad.any()}


ALL = set(CAMERA)
CONTENT = dict.fromkeys(("ce", "masked_ce", "words"), {"lips"})
PAPER = CONTENT | dict(speaker={"face"}, pitch=ALL, energy=ALL, prior=ALL)
SEES = {
    "whole": PAPER,
    "no-timbre": PAPER
    | dict.fromkeys(("pitch", "energy", "prior"), {"lips", "expression"})
    | dict(speaker=set()),
    "no-prosody": PAPER | dict(pitch=set(), energy=set(), prior={"lips", "face"}),
    "no-masked": PAPER | dict(masked_ce=set()),
    "flat": dict.fromkeys(PAPER, set()) | dict(prior=ALL),
    "flat-targets": dict.fromkeys(PAPER, ALL),
    "parallel-targets": PAPER,
    "stages-mel": PAPER | dict(masked_ce=set()),
    "prosody-first": PAPER
    | dict(pitch={"expression"}, energy={"expression"}, ce=ALL, masked_ce=ALL, words=ALL),
    "timbre-first": PAPER | dict.fromkeys(("ce", "masked_ce", "words"), {"lips", "face"}),
}
SEES |= {"added-speaker": PAPER}
SEES |= {f"{name}-normed": seen for name, seen in SEES.items()}


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_a_loss_depends_on_what_its_stage_may_see_and_on_nothing_else(name):
    model = build(name)
    assert {term: seen_by(model, term) for term in PAPER} == SEES[name]


def touched(model, term):
    "Parts that a loss teaches."
    model.zero_grad(set_to_none=True)
    getattr(model.loss(toy_features()), term).backward()
    return {
        name
        for name, part in model.named_children()
        if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }


def test_side_by_side_no_branch_teaches_another():
    parallel = build("parallel-targets")
    assert touched(parallel, "ce") == touched(parallel, "masked_ce") == {"content"}
    assert touched(parallel, "speaker") == {"timbre"}
    assert touched(parallel, "pitch") == {"prosody", "own_lips", "own_face", "from_own_face"}
    assert touched(build("whole"), "pitch") > {"content", "timbre", "film", "prosody"}


def test_heads_of_the_flat_encoder_feed_nothing_back():
    model = build("flat-targets").eval()
    batch = toy_features()
    before = model(*model.inputs(batch)).mu
    for head in (model.units, model.words, model.timbre, model.pitch.out, model.energy.out):
        torch.nn.init.normal_(head.weight)
    same(model(*model.inputs(batch)).mu.detach(), before.detach())
    plain = {name for name, _ in build("flat").named_children()}
    assert plain == {"lips", "to_mu", "encoder", "blocks"}


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_no_variant_sees_a_second_picture_in_the_expression(name):
    "What stands still in an expression may tell who it is; only its movement is seen."
    model = build(name).eval()
    batch = toy_features()
    still = torch.randn_like(batch.expression[:, :1])
    moved = batch._replace(expression=batch.expression + still * batch.mask[..., None])
    same(
        model(*model.inputs(moved)).mu.detach(), model(*model.inputs(batch)).mu.detach(), atol=1e-4
    )


# --- who normalises


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_the_fair_variants_and_the_controls_with_a_norm_normalise_what_is_said(name):
    "A layer norm takes no notice when all that it is told is three times as large."
    model = build(name).eval()
    inputs = model.inputs(toy_features())
    before = model(*inputs).mu
    if isinstance(model, Flat):
        model.blocks[-1].register_forward_hook(lambda block, given, said: 3 * said)
    else:
        said = model.from_content
        model.from_content = lambda *given: 3 * said(*given)
    after = model(*inputs).mu
    normed = name in FAIR or name == "added-speaker-normed"
    assert torch.allclose(after, before, atol=1e-3) == normed


# --- who learns from what


@pytest.mark.parametrize("name", ["flat", "flat-normed", "stages-mel"])
def test_trained_on_the_mel_alone_no_other_target_counts(name):
    model = build(name, replace(SMALL, envelope_weight=2.0)).eval()
    batch = toy_features()
    other = batch._replace(
        units=batch.units.flip(0),
        words=batch.words.flip(0),
        speaker=-batch.speaker,
        log_f0=batch.log_f0 + 1,
        voiced=1 - batch.voiced,
        energy=batch.energy - 1,
    )
    a, b = model.loss(batch), model.loss(other)
    assert all(model.weights[term] == 0 for term in AUXILIARY)
    same(a.total.detach(), (a.prior + 2 * a.envelope).detach(), atol=1e-5)
    assert torch.equal(a.total, b.total)
    terms = {term for term in HierarchyLoss._fields[1:] if getattr(a, term) > 0}
    assert (
        terms == {"prior", "envelope"}
        if name.startswith("flat")
        else terms > {"ce", "speaker", "pitch"}
    )


def test_the_others_have_every_loss_of_the_stages_they_have():
    missing = {"no-timbre": {"speaker"}, "no-prosody": {"pitch", "voicing", "energy"}}
    missing |= {"no-timbre-normed": missing["no-timbre"], "no-masked": {"masked_ce"}}
    for name, variant in ALL_VARIANTS.items():
        model = build(name)
        assert variant.targets == all(model.weights[term] > 0 for term in AUXILIARY)
        if variant.targets:
            loss = model.loss(toy_features())
            assert {t for t in AUXILIARY if getattr(loss, t) == 0} == missing.get(name, set())


def test_the_cascade_in_the_papers_order_is_the_hierarchy():
    cascade = Cascade(SMALL, FrozenFeatures(LIPS)).eval()
    torch.nn.init.normal_(cascade.film.to_film.weight)
    hierarchy = Hierarchy(SMALL, FrozenFeatures(LIPS)).eval()
    hierarchy.load_state_dict(cascade.state_dict())
    batch = toy_features()
    for a, b in zip(cascade.loss(batch), hierarchy.loss(batch)):
        same(a.detach(), b.detach())


@pytest.mark.parametrize(
    "name, kept", [("timbre-first", {"face"}), ("prosody-first", {"face", "expression"})]
)
def test_what_came_before_content_reaches_mu_beside_it(name, kept, monkeypatch):
    model = build(name)
    monkeypatch.setattr(
        model, "from_content", lambda content, mask: torch.zeros_like(content.hidden)
    )
    if name == "timbre-first":
        monkeypatch.setattr(model, "add_prosody", lambda hidden, *_: (None, hidden))
    assert seen_by(model, "prior") == kept


@pytest.mark.parametrize("name", ALL_VARIANTS)
def test_a_padded_clip_is_as_it_is_alone(name):
    model = build(name).eval()
    batch = toy_features(clips=2)
    mask = batch.mask.clone()
    mask[1, 4:] = False
    noise = torch.randn_like(batch.lips), torch.randn_like(batch.expression)
    hidden = ~mask[..., None]
    padded = batch._replace(
        mask=mask,
        lips=torch.where(hidden, noise[0], batch.lips),
        expression=torch.where(hidden, noise[1], batch.expression),
    )
    alone = batch._replace(
        mask=mask[1:, :4],
        lips=batch.lips[1:, :4],
        expression=batch.expression[1:, :4],
        face=batch.face[1:],
        identity=batch.identity[1:],
    )
    with torch.no_grad():
        together, apart = model(*model.inputs(padded)).mu, model(*model.inputs(alone)).mu
    same(together[1:, :, :16], apart, atol=1e-4)
    assert together[1, :, 16:].abs().max() == 0


def test_a_variant_that_cannot_be_as_small_as_the_whole_says_so():
    with pytest.raises(F2VError, match="parallel-targets: cannot be made as small.*width 32"):
        matched_preset("parallel-targets", SMALL, LIPS)


def test_a_variant_that_there_is_not():
    with pytest.raises(F2VError, match="order: is no variant. Choose from whole, no-timbre"):
        check_variants(["whole", "order"])


# --- the experiment, on clips of chance

SENTENCE = "bin blue at f two now"
DEAF = Ear(torch.zeros(481), torch.zeros(481), 0)


def made_clip(i, split="train", frames=20, words=("bin", "blue")):
    "A clip with all its targets and no pictures of lips."
    g = torch.Generator().manual_seed(i)
    T = frames + i % 3
    times = [Word(0.1 * k, 0.1 * k + 0.1, w) for k, w in enumerate(SENTENCE.split())]
    return Clip(
        name=f"{split}{i}",
        speaker_id="ab"[i % 2],
        text=SENTENCE,
        lips=torch.zeros(T, 0, 0, dtype=torch.uint8),
        face=torch.randint(256, (112, 112, 3), generator=g).byte(),
        expression=torch.rand(T, SMALL.expression_dim, generator=g),
        identity=F.normalize(torch.randn(16, generator=g), dim=0),
        wav=torch.randn(640 * T, generator=g),
        log_f0=5 + 0.2 * torch.randn(2 * T, generator=g),
        voiced=(torch.rand(2 * T, generator=g) < 0.6).float(),
        energy=-2 + 0.5 * torch.randn(2 * T, generator=g),
        word_times=tuple(times),
        mel=torch.randn(80, 4 * T, generator=g),
        units=torch.randint(SMALL.n_units, (2 * T,), generator=g),
        words=word_labels(times, 2 * T, words),
        voice=F.normalize(torch.randn(256, generator=g), dim=0),
    )


@pytest.fixture(scope="module")
def seen():
    sizes = dict(train=12, val=3, test=2, unseen=2)
    splits = {
        split: [made_clip(i + 100 * k, split) for i in range(n)]
        for k, (split, n) in enumerate(sizes.items())
    }
    clips = sum(splits.values(), [])
    features = {clip.name: torch.randn(len(clip.lips), LIPS).half() for clip in clips}
    encoder = SpeakerEncoder(width=16).eval()
    return ab.SeenClips(splits, features, encoder, FEATURED)


def log_of(steps):
    return [dict(step=steps, seconds=1.0, total=1.0, prior=1.0)]


def test_all_variants_meet_the_same_batches_in_the_same_order(seen, tmp_path, monkeypatch):
    met = {}

    def look(loss_fn, module, draw, steps, lr, **options):
        found = [draw(step) for step in range(9)]
        options.pop("name")
        met[run] = [b.names for b in found], [b.lips for b in found], (steps, lr, options)
        return log_of(steps)

    monkeypatch.setattr(ab, "fit", look)
    ear = make_ear(seen.splits["train"])
    runs = ab.ablation_runs(ALL_VARIANTS, [1.0], 1, [0, 1])
    for run in runs:
        ab.train_run(run, seen, ear, tmp_path)
    for seed in (0, 1):
        first, *others = [met[run] for run in runs if run.seed == seed]
        for names, lips, how in others:
            assert names == first[0] and how == first[2]
            assert all(map(torch.equal, lips, first[1]))
        assert set(sum(first[0], [])) == {clip.name for clip in seen.splits["train"]}
    assert met[runs[0]][0] != met[runs[-1]][0]


def test_the_seed_draws_the_share_and_small_ones_are_parts_of_large_ones():
    clips = list(range(40))
    shares = [ab.take_share(clips, share, 1) for share in (0.05, 0.25, 1.0)]
    assert [len(share) for share in shares] == [2, 10, 40]
    assert set(shares[0]) < set(shares[1]) < set(shares[2])
    assert ab.take_share(clips, 0.25, 2) != shares[1] == ab.take_share(clips, 0.25, 1)
    assert ab.take_share(clips, 0.001, 1)


def test_a_run_is_judged_where_its_validation_loss_is_smallest(seen, tmp_path, monkeypatch):
    run = ab.AblationRun("whole", 1.0, 4, 0)
    offsets = {1: 3.0, 2: 0.0, 3: 1.0, 4: 2.0}

    def states(loss_fn, module, draw, steps, lr, name, run_dir, **options):
        start = module.state_dict()["to_mu.out.bias"].clone()
        for step, offset in offsets.items():
            with torch.no_grad():
                module.to_mu.out.bias.copy_(start + offset)
            state = {k: v.contiguous() for k, v in module.state_dict().items()}
            if step < 4:
                save_file(state, run_dir / f"{name}-{step}.safetensors")
        return log_of(steps)

    monkeypatch.setattr(ab, "fit", states)
    row = ab.train_run(run, seen, make_ear(seen.splits["train"]), tmp_path)
    assert [point["step"] for point in row["curve"]] == [1, 2, 3, 4]
    assert row["judged_at"] == 2
    first = ab.build_run(run, seen)
    judged = ab.load_run(run, seen, tmp_path)
    same(judged.to_mu.out.bias.detach(), first.to_mu.out.bias.detach(), atol=1e-6)
    losses = ab.mean_losses(judged, seen.splits["val"], seen)
    assert losses["prior"] == row["curve"][1]["prior"] == row["curve"][1]["of_mu"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{run.name}.json",
        f"{run.name}.safetensors",
    ]


def without_time(found):
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "commit", "machine")}
        for row in found["rows"]
    ]
    return json.loads(json.dumps(found | dict(rows=rows)))


FEW = dict(seeds=(0,), variants=("whole", "flat"), shares=(1.0,), steps=5)


@pytest.fixture
def one_thread():
    "A process that is forked has no share in the threads of its parent, and would wait for them."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_what_was_stopped_or_killed_goes_on_and_ends_as_if_nothing_had_been(
    seen, tmp_path, monkeypatch, how
):
    monkeypatch.setattr(ab, "load_seen_clips", lambda data, out, lips, to_mu: seen)
    whole = ab.run_ablation("data", tmp_path / "whole", **FEW)
    draw_batches = ab.seen_batches
    drawn = []

    def breaking(clips, seen, seed):
        draw = draw_batches(clips, seen, seed)

        def at(step):
            drawn.append(step)
            if drawn == [0, 1, 2, 3, 4, 0, 1, 2, 3]:  # in the second run
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            return draw(step)

        return at

    monkeypatch.setattr(ab, "seen_batches", breaking)
    out = tmp_path / "broken"
    child = os.fork()
    if child == 0:
        try:
            ab.run_ablation("data", out, **FEW)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-9 if how == "killed" else 7)
    finished = out / "whole-100-5-0.json"
    written = finished.stat().st_mtime_ns
    assert not (out / "flat-100-5-0.json").exists()
    again = ab.run_ablation("data", out, **FEW)
    assert drawn == ([0, 1, 2, 3, 4] if how == "killed" else [3, 4])
    assert finished.stat().st_mtime_ns == written
    assert without_time(again) == without_time(whole)
    drawn.clear()
    assert ab.run_ablation("data", out, **FEW) == again and not drawn


def test_two_processes_share_the_runs_of_a_folder(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(ab, "load_seen_clips", lambda data, out, lips, to_mu: seen)
    trained = []

    def work_for_both(run, seen, ear, out):
        "This run, while another process finishes the one after it."
        trained.append(run.variant)
        for name in ("whole", "flat"):
            row = run._replace(variant=name)._asdict() | dict(ear_clips=ear.n_clips)
            (tmp_path / f"{run._replace(variant=name).name}.json").write_text(json.dumps(row))

    monkeypatch.setattr(ab, "train_run", work_for_both)
    found = ab.run_ablation("data", tmp_path, **FEW)
    assert trained == ["whole"] and [r["variant"] for r in found["rows"]] == ["whole", "flat"]


def test_an_ear_hears_everybody_and_what_another_one_heard_is_scored_again(
    seen, tmp_path, monkeypatch
):
    many = seen._replace(splits=seen.splits | dict(train=26 * seen.splits["train"]))
    monkeypatch.setattr(ab, "load_seen_clips", lambda data, out, lips, to_mu: many)
    first = ab.run_ablation("data", tmp_path, **FEW)
    assert {row["ear_clips"] for row in first["rows"]} == {26 * 12}
    path = tmp_path / "whole-100-5-0.json"
    row = json.loads(path.read_text())
    other = ab.score_again(row, many, make_ear(seen.splits["train"][:4]), tmp_path)
    assert other["scores"] != row["scores"] and json.loads(path.read_text()) == other
    with monkeypatch.context() as stop:
        stop.setattr(ab, "train_run", lambda *_: pytest.fail("trained again"))
        assert ab.run_ablation("data", tmp_path, **FEW) == first
    path.write_text(json.dumps(other))
    (tmp_path / "whole-100-5-0.safetensors").unlink()
    assert without_time(ab.run_ablation("data", tmp_path, **FEW)) == without_time(first)


@pytest.mark.parametrize("text", ["", "[]", '{"variant": "whole"}', '{"variant": "flat"}'])
def test_a_row_that_is_damaged_or_of_another_run_is_said(tmp_path, text):
    run = ab.AblationRun("whole", 1.0, 5, 0)
    assert ab.finished_row(run, tmp_path) is None
    (tmp_path / f"{run.name}.json").write_text(text)
    with pytest.raises(CheckpointError, match="whole-100-5-0.json.*(damaged|another run)"):
        ab.finished_row(run, tmp_path)


# --- frozen lips


class Counting(torch.nn.Module):
    "Features that count how often they are asked for."

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))
        self.calls = 0

    def forward(self, lips, mask):
        self.calls += 1
        return self.gain * lips.mean((1, 3, 4))[..., None]


def source_of(encoder):
    return ab.LipSource(encoder, lambda batch: batch.lips, True, True)


@pytest.fixture()
def looked_at(tmp_path):
    "A data set of four prepared clips of drawn faces."
    entries = []
    for i in range(4):
        clip = made_clip(i, frames=6)
        lips = torch.randint(256, (len(clip.lips), 96, 96)).byte()
        drawn = clip._replace(lips=lips, identity=torch.zeros(0), wav=clip.wav.clamp(-1, 1))
        save_clip(
            drawn._replace(mel=None, units=None, words=None, voice=None), tmp_path / f"{i}.npz"
        )
        extra = dict(frames=len(lips), sound=True)
        entries.append(Entry(str(i), tmp_path / f"{i}.mp4", "a", "", "train", extra))
    write_manifest(entries, tmp_path / "manifest.jsonl")
    return ClipDataset(tmp_path)


def test_lips_are_looked_at_once_for_each_encoder(looked_at):
    dataset = looked_at
    encoder = Counting()
    store = ab.cache_lips(source_of(encoder), dataset)
    assert encoder.calls == len(dataset) == 4
    again = ab.cache_lips(source_of(encoder), dataset)
    assert encoder.calls == 4
    other = ab.cache_lips(source_of(Counting(2.0)), dataset)
    name = dataset.names[1]
    a, b, c = (s.read(name)["features"] for s in (store, again, other))
    same(a, b)
    same(2 * a.float(), c.float(), atol=1e-2)


def test_lips_that_were_interrupted_are_whole_files_or_none(looked_at, monkeypatch):
    dataset = looked_at
    encoder = Counting(3.0)
    look = encoder.forward

    def stop(lips, mask):
        if encoder.calls == 2:
            raise KeyboardInterrupt
        return look(lips, mask)

    monkeypatch.setattr(encoder, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        ab.cache_lips(source_of(encoder), dataset)
    monkeypatch.setattr(encoder, "forward", look)
    store = ab.cache_lips(source_of(encoder), dataset)
    assert encoder.calls == 4
    folder = store.find(dataset.names[0]).parent
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        f"{name}.safetensors" for name in dataset.names
    )


def test_an_encoder_of_another_world_is_refused(looked_at):
    with pytest.raises(CorpusError, match="drawn faces.*knows real ones"):
        ab.check_lips(source_of(Counting())._replace(drawn=False), looked_at)
    with pytest.raises(CorpusError, match="no points of the mouth"):
        ab.check_lips(source_of(Counting())._replace(pixels=False), looked_at)


# --- scores


def perfect(clip):
    "A model that knows the truth."

    class Perfect:
        def inputs(self, batch):
            return ()

        def __call__(self):
            units = 20 * F.one_hot(clip.units, SMALL.n_units).float()[None]
            words = 20 * F.one_hot(clip.words, 1 + len(GRID_WORDS)).float()[None]
            voiced = clip.voiced[None] * 20 - 10
            contours = clip.log_f0[None], voiced, clip.energy[None], torch.zeros(1)
            content = Content(torch.zeros(1), units, None, words)
            return Mu(clip.mel[None], clip.voice[None], content, Prosody(*contours))

    return Perfect()


def test_the_truth_scores_best_in_every_measure(seen):
    wordy = seen._replace(preset=replace(FEATURED, words=GRID_WORDS))
    clip = made_clip(100 * 2, "test", words=GRID_WORDS)
    clip = clip._replace(voice=seen.speaker_encoder(clip.mel[None])[0].detach())
    nothing = DEAF
    found = ab.score_clip(perfect(clip), clip, wordy, nothing, told=True)
    assert list(found) == list(ab.VARIANT_MEASURES)
    best = {"↓": 0.0, "↑": 1.0}
    for measure, better in ab.VARIANT_MEASURES.items():
        if measure != "prior loss" and "F0 in μ" not in measure:
            assert found[measure] == pytest.approx(best[better], abs=1e-4), measure
    heard = {k for k in found if k not in ("prior loss",)} - {"F0 in μ, r"}
    assert heard and np.isnan(found["F0 in μ, r"])  # a line of zeros hears one note
    wrong = clip.words.clone()
    wrong[clip.words == 1 + GRID_WORDS.index("two")] = 1 + GRID_WORDS.index("nine")
    slip = clip._replace(words=wrong)
    assert ab.score_clip(perfect(slip), clip, wordy, nothing, True)["words wrong"] == pytest.approx(
        1 / 6
    )


def test_what_was_never_taught_is_not_scored(seen):
    clip = seen.splits["test"][0]
    model = build("stages-mel", FEATURED).eval()
    found = ab.score_clip(model, clip, seen, DEAF, told=False)
    assert list(found) == list(ab.VARIANT_MEASURES)[:7]
    told = ab.score_clip(build("whole", FEATURED).eval(), clip, seen, DEAF, told=True)
    assert set(told) == set(ab.VARIANT_MEASURES) - {"words wrong"}


def test_the_ear_hears_a_ridge_in_the_mel():
    g = torch.Generator().manual_seed(0)

    def clip_of_ridge(i):
        log_f0 = 5 + 0.3 * torch.randn(40, generator=g)
        bins = torch.linspace(-1, 1, 80)[:, None]
        mel = (-((bins - (log_f0 - 5)) ** 2) / 0.1).exp().repeat_interleave(2, 1)
        return made_clip(i)._replace(mel=mel, log_f0=log_f0, voiced=torch.ones(40))

    clips = [clip_of_ridge(i) for i in range(20)]
    ear = make_ear(clips[:15], ridge=1e-3)
    for clip in clips[15:]:
        assert np.corrcoef(ear.pitch(clip.mel), clip.log_f0)[0, 1] > 0.95


# --- comparisons


def made_record(seeds=3, clips=8):
    "Each seed is lucky and each clip is hard for all; without timbre the voice is lost."
    rng = np.random.default_rng(0)
    luck, hard = rng.normal(size=seeds), rng.normal(size=clips)
    rows = []
    for seed in range(seeds):
        for name in ("whole", "no-timbre", "flat"):
            scores = {}
            for split in ("test", "unseen"):
                values = luck[seed] + hard + 0.05 * rng.normal(size=clips)
                scores[split] = {
                    "energy, r": values.tolist(),
                    "voice similarity": (values - (name == "no-timbre")).tolist(),
                }
            rows.append(
                dict(variant=name, share=1.0, seed=seed, steps=1, weights=10**6, scores=scores)
            )
    return dict(
        rows=rows,
        clips=dict.fromkeys(("test", "unseen"), [f"c{i}" for i in range(clips)]),
        command="faces2voices ablate data",
        machine="here",
    )


def test_variants_are_compared_within_seed_and_clip_and_corrected_together():
    record = made_record()
    found = ab.compare_variants(record)
    assert len(found) == 2 * 2 * 2 and not any(name == "whole" for _, name, _ in found)
    plain = {}
    for split, name, measure in found:
        theirs, whole = (ab.clip_table(record, n, 1.0, split, measure) for n in (name, "whole"))
        table = np.stack([theirs[seed] - whole[seed] for seed in range(3)])
        plain[split, name, measure] = crossed_difference(table)
        interval = found[split, name, measure].interval
        assert interval == pytest.approx(crossed_interval(table))
    assert [d.p for d in found.values()] == pytest.approx(holm([d.p for d in plain.values()]))
    sure = {key for key, difference in found.items() if difference.p < 0.05}
    assert sure == {(split, "no-timbre", "voice similarity") for split in ("test", "unseen")}
    shown = ab.show_variants(record, "unseen")
    assert shown.count("**") == 2 and "8 comparisons" in shown and "w/o timbre" in shown
    assert ab.compare_variants(made_record(seeds=1)) == {}


def test_a_clip_without_a_number_is_left_out_for_both():
    record = made_record()
    record["rows"][1]["scores"]["test"]["energy, r"][3] = None
    found = ab.compare_variants(record)["test", "no-timbre", "energy, r"]
    theirs, whole = (
        ab.clip_table(record, name, 1.0, "test", "energy, r") for name in ("no-timbre", "whole")
    )
    gap = np.delete(np.stack([theirs[s] - whole[s] for s in range(3)]), 3, axis=1)
    assert found.interval == pytest.approx(crossed_interval(gap)) and found.interval.n == 21
