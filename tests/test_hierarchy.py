"The three stages together: shapes, padding, gradients, ablations, and who moves what."

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.nn.functional as F
from faces2voices.errors import CorpusError
from faces2voices.core import TINY, test_same as same
from faces2voices.audio import MEL
from faces2voices.layers import influence
from faces2voices.manifests import Entry, write_manifest
from faces2voices.corpora import Batch, Clip, save_clip
from faces2voices.units import UnitQuantizer, fit_phone_classifier
from faces2voices.hierarchy import *
from faces2voices.probes import linear_probe, stage_features
from faces2voices.toyworld import toy_batch
from faces2voices.studies import (
    STAGE_GOALS,
    PROBES,
    ProbeClip,
    clip_scores,
    clip_metrics,
    stage_study,
    load_labelled_clip,
    probe_targets,
    show_clip_metrics,
    plot_probes,
    unseen_entries,
)

SMALL = replace(TINY, dim=32, n_units=8, n_blocks=2, lip_width=4, lip_scale=4, dropout=0.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("preset", [SMALL, replace(SMALL, identity_dim=16, expression_dim=52)])
def test_shapes(preset):
    model = Hierarchy(preset).eval()
    out = model(*model.inputs(toy_batch(preset, 2, 6)))
    assert out.mu.shape == (2, 80, 24)
    assert out.content.logits.shape == (2, 12, 8) and out.prosody.log_f0.shape == (2, 12)
    same(out.speaker.detach().norm(dim=-1), torch.ones(2), atol=1e-5)


def test_prior_loss_is_a_gaussian():
    mu, x1 = torch.randn(2, 2, 80, 12)
    mask = torch.arange(12) < torch.tensor([[12], [5]])
    nll = -torch.distributions.Normal(mu, 1.0).log_prob(x1)
    expected = torch.cat([nll[0].flatten(), nll[1, :, :5].flatten()]).mean()
    same(prior_loss(mu, x1, mask), expected, atol=1e-5)


def speechlike(seed, L=120):
    "Normalised mel that rises and falls, with a pause at the end."
    g = torch.Generator().manual_seed(seed)
    mel = F.interpolate(torch.randn(1, 80, L // 8, generator=g), L, mode="linear")[0]
    mel[:, -20:] -= 4
    return mel


def test_third_octaves_are_those_of_pystoi():
    from pystoi.utils import thirdoct
    import librosa

    edges, bands = librosa.mel_frequencies(82, fmin=0, fmax=8000), third_octaves()
    middle, width = edges[1:-1], (edges[2:] - edges[:-2]) / 2
    assert bands.shape == (15, 80)
    for row, centre in zip(bands, thirdoct(10000, 512, 15, 150)[1]):
        inside = (middle > centre * 2 ** (-1 / 6)) & (middle < centre * 2 ** (1 / 6))
        same(row, torch.from_numpy(inside * width).float(), atol=1e-4)


def test_envelopes_match_as_in_pystoi():
    from pystoi.utils import row_col_normalize

    bands = third_octaves().double().numpy()
    mel, truth = speechlike(0), speechlike(1)
    x, y = (np.sqrt(bands @ np.exp(2 * MEL.denormalize(m).double().numpy())) for m in (mel, truth))
    decibels = 20 * np.log10(np.linalg.norm(y, axis=0))
    loud = decibels > decibels.max() - 40
    assert 38 < loud.sum() <= 100

    def windows(envelope):
        starts = range(0, loud.sum() - 37, 4)
        return row_col_normalize(np.stack([envelope[:, loud][:, i : i + 38] for i in starts]))

    expected = (windows(x) * windows(y)).sum(1).mean()
    assert envelope_match(mel, truth).item() == pytest.approx(expected, abs=1e-4)


def test_the_envelope_loss_hears_shape_not_level():
    x1 = torch.stack([speechlike(0), speechlike(1)])
    mask = torch.arange(120) < torch.tensor([[120], [90]])
    same(envelope_loss(x1, x1, mask), torch.tensor(0.0), atol=1e-5)
    same(envelope_loss(x1 + 1, x1, mask), torch.tensor(0.0), atol=1e-5)
    noise = torch.randn_like(x1)
    losses = [envelope_loss(x1 + n * noise, x1, mask) for n in (0, 0.3, 1, 3)]
    assert losses == sorted(losses) and losses[-1] > 0.5
    a = envelope_loss(x1 + noise, x1, mask)
    x1[1, :, 90:] = 7.0
    same(envelope_loss(x1 + noise, x1, mask), a, atol=1e-6)


def test_the_envelope_loss_of_a_mu_that_explodes_is_finite():
    g = torch.Generator().manual_seed(0)
    x1 = torch.randn(1, 80, 60, generator=g)
    mu = (40 * torch.randn(x1.shape, generator=g)).requires_grad_()
    loss = envelope_loss(mu, x1, torch.ones_like(x1[:, 0], dtype=torch.bool))
    loss.backward()
    assert loss.isfinite() and mu.grad.isfinite().all()


@pytest.mark.parametrize("x1", [torch.zeros(1, 80, 60), torch.full((1, 80, 3), -2.2)])
def test_the_envelope_loss_of_silence_and_of_very_short_clips_is_finite(x1):
    mu = torch.zeros_like(x1).requires_grad_()
    loss = envelope_loss(mu, x1, torch.ones_like(x1[:, 0], dtype=torch.bool))
    loss.backward()
    assert 0 <= loss <= 2 and mu.grad.isfinite().all()


def test_its_weight_puts_it_into_the_total():
    batch, preset = toy_batch(SMALL, 2, 8), replace(SMALL, envelope_weight=2.0)
    model = Hierarchy(preset).eval()
    with torch.no_grad():
        loss, mu = model.loss(batch), model(*model.inputs(batch), batch).mu
    same(loss.envelope, envelope_loss(mu, batch.mel, batch.mask.repeat_interleave(4, 1)), atol=1e-6)
    same(loss.total, sum(w * getattr(loss, k) for k, w in loss_weights(preset).items()), atol=1e-5)
    assert Hierarchy(SMALL).eval().loss(batch).envelope == 0


@pytest.mark.parametrize("preset", [SMALL, replace(SMALL, identity_dim=16, expression_dim=52)])
def test_padding_never_reaches_a_real_frame(preset):
    model = Hierarchy(preset).eval()
    long, short = toy_batch(preset, 1, 14, seed=1), toy_batch(preset, 1, 9, seed=2)
    lips = torch.cat([long.lips, F.pad(short.lips, (0, 0, 0, 0, 0, 5))])  # as collate pads them
    noise = torch.randn_like(short.expression[:, :5])
    padded = torch.cat([short.expression, noise], 1)
    expression = torch.cat([long.expression, padded])
    face, identity = (
        torch.cat([getattr(b, k) for b in (long, short)]) for k in ("face", "identity")
    )
    mask = torch.arange(14) < torch.tensor([[14], [9]])
    with torch.no_grad():
        together = model(lips, face, identity, expression, mask)
        first, alone = model(*model.inputs(long)), model(*model.inputs(short))
    same(together.mu[1:, :, :36], alone.mu, atol=1e-4)
    same(together.mu[:1], first.mu, atol=1e-4)
    assert together.mu[1, :, 36:].abs().max() == 0


def test_every_parameter_gets_a_gradient():
    model, batch = Hierarchy(SMALL), toy_batch(SMALL, 4, 6)
    torch.nn.init.normal_(model.film.to_film.weight)
    model.loss(batch).total.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    for name, stage in model.named_children():
        assert any(p.grad.abs().sum() > 0 for p in stage.parameters()), name


WORDY = replace(SMALL, words=("bin", "blue", "at"))


def test_words_are_learned_where_they_are_known():
    model, batch = Hierarchy(WORDY), toy_batch(WORDY, 4, 6)
    unknown = torch.full_like(batch.units, -100)
    assert model.loss(batch).words == 0
    assert model.loss(batch._replace(words=unknown)).words == 0
    loss = model.loss(batch._replace(words=batch.units % 4))
    assert loss.words > 0
    loss.total.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    out = model.eval()(*model.inputs(batch))
    assert out.content.word_logits.shape == (4, 12, 4)


def test_what_is_believed_of_words_reaches_mu():
    model, batch = Hierarchy(WORDY).eval(), toy_batch(WORDY, 2, 6)
    torch.nn.init.zeros_(model.content.word_head.weight)

    def mu(word):
        model.content.word_head.bias.data = 20 * F.one_hot(torch.tensor(word), 4).float().repeat(2)
        with torch.no_grad():
            return model(*model.inputs(batch)).mu

    assert (mu(1) - mu(2)).abs().max() > 1e-3 and (mu(1) == mu(1)).all()


def test_total_is_the_weighted_sum_and_padding_of_the_targets_does_not_count():
    model, batch = Hierarchy(SMALL).eval(), toy_batch(SMALL, 2, 8)
    batch.mask[1, 5:] = False
    batch.units[1, 10:] = -100
    batch.lips[1, :, 5:] = 0.0
    with torch.no_grad():
        a = model.loss(batch)
    fixed = {name: LOSS_WEIGHTS[name] for name in ("speaker", "pitch", "voicing", "energy")}
    of_preset = dict(ce=1, masked_ce=SMALL.masked_weight, prior=SMALL.prior_weight)
    weights = fixed | of_preset
    same(a.total, sum(w * getattr(a, name) for name, w in weights.items()), atol=1e-5)
    batch.mel[1, :, 5 * 4 :] = 0.9
    for target in (batch.log_f0, batch.voiced, batch.energy):
        target[1, 5 * 2 :] = 0.9
    with torch.no_grad():
        b = model.loss(batch)
    for x, y in zip(a, b):
        same(x, y, atol=1e-5)


def test_speaker_coin():
    model, said = Hierarchy(SMALL), torch.zeros(400, 256)
    true = toy_batch(SMALL, 400, 2)._replace(speaker=torch.ones(400, 256))
    share = model.train()._fed_speaker(said, true).mean()
    assert 0.4 < share < 0.6
    assert model.eval()._fed_speaker(said, true).min() == 1
    assert model._fed_speaker(said, None).max() == 0


def said_by(model, batch):
    "What the content stage says of a batch, and the two ways in which μ hears it."
    content = model.content(model.lips(batch.lips, batch.mask), batch.mask)
    mask = batch.mask.repeat_interleave(2, 1)
    by_units = model.from_units(content.logits.softmax(-1))
    return content, mask, by_units, model.pronounce(content.word_logits.softmax(-1), mask)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_through_the_bottleneck_go_units_and_words_alone(bottleneck):
    preset = replace(SMALL, words=("ah", "oh"), bottleneck=bottleneck)
    model = Hierarchy(preset).eval()
    content, mask, by_units, by_words = said_by(model, toy_batch(preset, 4, 4))
    said = by_units + by_words
    expected = said if bottleneck else content.hidden + said
    same(model.from_content(content, mask), expected, atol=1e-5)


def test_some_training_clips_are_spoken_from_words_alone():
    preset = replace(SMALL, words=("ah", "oh"), bottleneck=True, unit_dropout=0.5, dropout=0.0)
    model = Hierarchy(preset).train()
    content, mask, by_units, by_words = said_by(model, toy_batch(preset, 400, 4))
    heard = model.from_content(content, mask) - by_words
    without = heard.abs().amax((1, 2)) < 1e-5
    assert 0.4 < without.float().mean() < 0.6
    same(heard[~without], by_units[~without], atol=1e-5)


def test_a_word_is_pronounced_with_its_beginning_and_its_end_in_view():
    torch.manual_seed(0)
    pronounce = Pronouncer(3, 8).eval()
    words = torch.randn(1, 121, 3).softmax(-1)
    mask = torch.ones(1, 121, dtype=torch.bool)
    seen = influence(lambda x: pronounce(x.mT, mask)[0], words.mT, 60)
    assert seen[29:92].all() and not seen[:29].any() and not seen[92:].any()
    padded = torch.cat([words, torch.ones(1, 7, 3)], 1)
    longer = torch.arange(128)[None] < 121
    same(pronounce(padded, longer)[:, :121], pronounce(words, mask), atol=1e-5)
    assert not pronounce(padded, longer)[:, 121:].any()


def test_speaker_noise_reaches_film_in_training_and_nothing_else(monkeypatch):
    model = Hierarchy(replace(SMALL, speaker_noise=0.5))
    heard = {}
    model.film.register_forward_pre_hook(lambda film, args: heard.update(film=args[1]))
    model.prosody.register_forward_pre_hook(lambda prosody, args: heard.update(prosody=args[1]))
    batch = toy_batch(SMALL, 8, 4)
    for training in (True, False):
        model.train(training)
        with torch.autocast("cpu", torch.bfloat16, enabled=training):
            model(*model.inputs(batch))
        moved = (heard["film"] - heard["prosody"]).norm(dim=-1)
        assert moved.min() > 0.1 if training else not moved.any()


@pytest.fixture(scope="module")
def learned():
    "A model fitted to one tiny batch, and its first and last loss."
    torch.manual_seed(0)
    model, batch, losses = Hierarchy(SMALL), toy_batch(SMALL, 4, 8), []
    opt = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model.loss(batch)
        opt.zero_grad()
        loss.total.backward()
        opt.step()
        losses.append(loss)
    return model.eval(), batch, losses


def test_overfits_one_batch(learned):
    model, batch, losses = learned
    constant = 0.5 * math.log(2 * math.pi)
    assert losses[-1].ce < losses[0].ce / 2  # label smoothing keeps it above zero
    assert losses[-1].speaker < 0.1 * losses[0].speaker
    assert losses[-1].prior - constant < 0.25 * (losses[0].prior - constant)


def test_another_face_changes_the_voice_and_not_the_words(learned):
    model, batch, _ = learned
    turned = batch._replace(face=batch.face.roll(1, 0))
    with torch.no_grad():
        own, other = model(*model.inputs(batch)), model(*model.inputs(turned))
    same(own.content.logits, other.content.logits)
    same(other.speaker, own.speaker.roll(1, 0), atol=1e-5)
    assert (own.mu - other.mu).abs().max() > 0.05


def test_another_expression_changes_the_prosody_only(learned):
    model, batch, _ = learned
    backwards = batch._replace(expression=batch.expression.flip(1))
    with torch.no_grad():
        own, other = model(*model.inputs(batch)), model(*model.inputs(backwards))
    same(own.content.logits, other.content.logits)
    same(own.speaker, other.speaker)
    assert (own.prosody.log_f0 - other.prosody.log_f0).abs().max() > 1e-3


def test_toy_batch_is_a_batch_of_the_agreed_shapes():
    b = toy_batch(SMALL, 3, 7)
    assert isinstance(b, Batch)
    assert b.lips.shape == (3, 1, 7, 88, 88) and b.mel.shape == (3, 80, 28)
    assert b.units.shape == b.energy.shape == (3, 14)
    same(toy_batch(SMALL, 3, 7, seed=4).mel, toy_batch(SMALL, 3, 7, seed=4).mel)


def test_the_toy_world_is_the_same_for_every_seed():
    a, b = toy_batch(SMALL, 4, 8, seed=1), toy_batch(SMALL, 4, 8, seed=2)
    unit = next(int(u) for u in a.units.unique() if u in b.units)
    one, two = (x.lips[:, 0][x.units[:, ::2] == unit][0] for x in (a, b))
    same(one, two)
    assert (a.log_f0.mean(1) - 5).abs().max() < 1.5
    assert (a.energy.mean(1) + 4).abs().max() < 1e-5  # how has mean zero


def test_probe():
    x = torch.randn(300, 5)
    assert linear_probe(x, x @ torch.randn(5)) > 0.99 and linear_probe(x, torch.randn(300)) < 0.2
    assert linear_probe(x, (x[:, 0] > 0).long()) > 0.9


def test_a_probe_that_holds_out_groups_cannot_learn_them_by_heart():
    group = torch.arange(40).repeat_interleave(10)
    x, y = F.one_hot(group, 40).float(), torch.randn(40)[group]
    assert linear_probe(x, y) > 0.9 and linear_probe(x, y, groups=group) < 0.1


@torch.no_grad()
def test_what_each_stage_leaves_adds_up_to_mu():
    model, batch = Hierarchy(SMALL).eval(), toy_batch(SMALL, 2, 7)
    left, out = stage_features(model, batch), model(*model.inputs(batch))
    assert list(left) == ["lips", "content", "timbre", "prosody", "μ"]
    assert all(h.shape[:2] == (2, 14) for h in left.values())
    same(left["μ"], (out.mu[..., ::2] + out.mu[..., 1::2]).transpose(1, 2) / 2, atol=1e-6)
    same(model.to_mu(left["prosody"], batch.mask), out.mu, atol=1e-6)
    same(left["prosody"] - left["timbre"], out.prosody.embedding, atol=1e-5)


def truth(batch):
    "The Mu of a model that knows everything."
    content = SimpleNamespace(logits=F.one_hot(batch.units, 8).float())
    prosody = SimpleNamespace(log_f0=batch.log_f0, energy=batch.energy)
    return Mu(batch.mel, batch.speaker, content, prosody)


def test_scores_of_one_who_knows_and_of_one_who_does_not():
    batch = toy_batch(SMALL, 1, 20)
    phones = batch.units[0] // 2
    phones[:4] = -1
    reader = fit_phone_classifier([batch.units[0]], [phones])
    knows = clip_scores(truth(batch), batch, phones, reader)
    same(knows, torch.tensor([36.0, 36.0, 36.0, 36.0, 1.0, 1.0]), atol=1e-4)
    mistaken = batch._replace(units=(batch.units + 3) % 8, log_f0=10 - batch.log_f0)
    wrong = clip_scores(truth(mistaken), batch, phones, reader)
    assert wrong[2] == 0 and wrong[0] < 20 and abs(wrong[4] + 1) < 1e-4 and wrong[1] == 36


def test_figures_by_hand():
    nan = float("nan")
    scores = torch.tensor([[8.0, 10.0, 6.0, 20.0, 0.5, 0.9], [4.0, 5.0, 3.0, 10.0, 0.7, nan]])
    found = clip_metrics(scores)
    estimates = {name: round(interval.estimate, 6) for name, interval in found.items()}
    assert (
        estimates.items()
        >= {
            "phonemes, share of true units": 0.8,
            "phonemes, true units": 0.5,
            "units right": 0.3,
            "phonemes, predicted units": 0.4,
            "F0 contour, r": 0.6,
            "energy, r": 0.9,
        }.items()
    )
    assert set(STAGE_GOALS) < set(found)
    assert found["phonemes, share of true units"].error < 1e-12
    assert found["F0 contour, r"].error > 0.03
    assert found["energy, r"].n == 1
    assert np.isnan(found["energy, r"].error)  # of one clip no error is known


def test_questions_hold_out_people_and_for_a_person_takes():
    g = torch.Generator().manual_seed(0)

    def clip(person, take):
        return ProbeClip(
            {"a": torch.randn(3, 4, generator=g)},
            {"a": torch.randn(4, generator=g)},
            torch.tensor([1, 2, 1]),
            torch.tensor([0.1, 0.2, 0.3]),
            torch.tensor([True, False, True]),
            5.0 + person,
            person,
            take,
        )

    asked = probe_targets([clip(0, 0), clip(1, 0), clip(0, 1)], "a")
    assert {name: groups.tolist() for name, (_, _, groups) in asked.items()} == {
        "phoneme": [0] * 3 + [1] * 3 + [0] * 3,
        "person": [0, 0, 1],
        "pitch of the voice": [0, 1, 0],
        "pitch movement": [0, 0, 1, 1, 0, 0],
    }
    same(asked["pitch movement"][1], torch.tensor([0.1, 0.3] * 3))
    same(asked["pitch of the voice"][1], torch.tensor([5.0, 6.0, 5.0]))
    assert list(asked) == list(PROBES)
    assert all(len(x) == len(y) == len(z) for x, y, z in asked.values())


def noise_clip(i, speaker):
    "A clip of noise with the seed i."
    g, T = torch.Generator().manual_seed(i), 20

    def picture(*shape):
        return torch.randint(256, shape, generator=g).byte()

    def noise(*shape):
        return torch.randn(*shape, generator=g)

    return Clip(
        f"c{i}",
        speaker,
        f"say {i}",
        picture(T, 96, 96),
        picture(112, 112, 3),
        torch.rand(T, 1152, generator=g),
        torch.zeros(0),
        0.1 * noise(640 * T),
        5 + 0.1 * noise(2 * T),
        torch.ones(2 * T),
        noise(2 * T),
    )


def a_world(folder, speakers, splits):
    "Noise with phones, spoken by nobody, as prepared clips."
    facts = dict(frames=20, sound=True, phones=[["a", 0.1, 0.4], ["b", 0.4, 0.7]])
    entries = []
    for i, (speaker, split) in enumerate(zip(speakers, splits)):
        save_clip(noise_clip(i, speaker), folder / f"c{i}.npz")
        entries.append(Entry(f"c{i}", folder / f"c{i}.mp4", speaker, f"say {i}", split, facts))
    write_manifest(entries, folder / "manifest.jsonl")


def test_judge_stages_from_a_folder(tmp_path):
    speakers = ["x", "x", "y", "u", "u", "v", "v", "w", "w", "x"]
    a_world(tmp_path, speakers, ["train"] * 3 + ["val"] * 2 + ["test"] * 5)
    units = UnitQuantizer(8).fit([0.1 * torch.randn(12800) for _ in range(3)])
    model = SimpleNamespace(hierarchy=Hierarchy(SMALL).eval(), preset=SMALL, units=units)
    unseen = [e.name for e in unseen_entries(tmp_path, "val", "test")]
    assert unseen == ["c3", "c4", "c5", "c6", "c7", "c8"]  # the last is of a known voice
    with pytest.raises(CorpusError, match="dev"):
        unseen_entries(tmp_path, "dev")
    record = stage_study(model, tmp_path)
    assert record["clips"] == 6 and record["speakers"] == 3
    assert set(record["figures"]) == set(record["errors"]) >= set(STAGE_GOALS)
    stages = ["lips", "content", "timbre", "prosody", "μ"]
    asked = [(r["stage"], r["probe"]) for r in record["probes"]]
    assert asked == list(product(stages, PROBES))
    with pytest.raises(CorpusError, match="phones"):
        load_labelled_clip(model, tmp_path, Entry("c0", tmp_path / "c0.mp4"), ["a"])
    pytest.importorskip("matplotlib").use("Agg")
    plot_probes(record)
    assert len(show_clip_metrics(record)) == len(record["figures"])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_preset_says_how_often_the_teacher_speaks(share):
    model, batch = Hierarchy(replace(SMALL, teacher_forcing=share)).eval(), toy_batch(SMALL, 2, 8)
    with torch.no_grad():
        same(model.loss(batch).prior, model.loss(batch, share == 1).prior)
    with torch.no_grad():
        assert (model.loss(batch, True).prior - model.loss(batch, False).prior).abs() > 1e-6
