"Variance predictors and their losses: masks, normalisation, teacher forcing, level and movement."

import io
import math
from dataclasses import replace
from typing import NamedTuple
import numpy as np
import pytest
import torch
from faces2voices.core import TINY, test_same as same
from faces2voices.prosody import *

SMALL = replace(TINY, dim=32, dropout=0.0)


class Truth(NamedTuple):
    log_f0: torch.Tensor
    voiced: torch.Tensor
    energy: torch.Tensor
    mask: torch.Tensor


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def truth(B=2, T=12):
    return Truth(
        5 + 0.3 * torch.randn(B, 2 * T),
        (torch.rand(B, 2 * T) > 0.4).float(),
        -4 + torch.randn(B, 2 * T),
        torch.ones(B, T, dtype=torch.bool),
    )


def test_normalisation_round_trip():
    x = torch.linspace(4, 6, 9)
    same(denormalize_pitch(normalize_pitch(x)), x, atol=1e-6)
    same(denormalize_energy(normalize_energy(-x)), -x, atol=1e-6)
    assert normalize_pitch(5.0) == 0 and normalize_energy(-4.0) == 0


def test_losses_by_hand():
    t = truth()
    # one normalised unit off in pitch and energy
    p = Prosody(t.log_f0 + 0.5, torch.zeros_like(t.voiced), t.energy + 2, None)
    loss = prosody_loss(p, t)
    same(loss.pitch, torch.tensor(1 - 0.25 / 2), atol=1e-5)  # smooth L1, beta 0.25, distance 1
    same(loss.voicing, torch.tensor(2.0).log(), atol=1e-6)
    same(loss.energy, torch.tensor(1.0), atol=1e-5)


def test_unvoiced_pitch_and_padding_never_count():
    t = truth()
    t.mask[1, 7:] = False
    p = Prosody(t.log_f0 + 0.1, torch.randn_like(t.voiced), t.energy + 0.3, None)
    base = prosody_loss(p, t)
    outside = ~t.mask.repeat_interleave(2, 1)
    wild = Prosody(
        torch.where(outside | (t.voiced == 0), 99.0, p.log_f0),
        torch.where(outside, 50.0, p.voiced_logit),
        torch.where(outside, -70.0, p.energy),
        None,
    )
    for a, b in zip(base, prosody_loss(wild, t)):
        same(a, b, atol=1e-6)


def test_a_batch_without_voice_has_a_finite_loss():
    t = truth()._replace(voiced=torch.zeros(2, 24))
    same(prosody_loss(Prosody(t.log_f0 + 1, t.voiced, t.energy, None), t).pitch, torch.tensor(0.0))


@pytest.mark.parametrize("E", [1152, 52])
def test_padding_is_not_heard(E):
    encoder = ProsodyEncoder(replace(SMALL, expression_dim=E)).eval()
    hidden, speaker = torch.randn(2, 40, 32), torch.randn(2, 256)
    expression = torch.rand(2, 20, E)
    mask = torch.arange(20) < torch.tensor([[20], [13]])
    with torch.no_grad():
        both = encoder(hidden, speaker, expression, mask)
        alone = encoder(hidden[1:, :26], speaker[1:], expression[1:, :13], mask[1:, :13])
    for a, b in zip(both, alone):
        same(a[1:, :26], b, atol=1e-5)


def test_teacher_changes_the_embedding_only():
    encoder, t = ProsodyEncoder(SMALL).eval(), truth()
    args = torch.randn(2, 24, 32), torch.randn(2, 256), torch.rand(2, 12, 1152), t.mask
    free, forced = encoder(*args), encoder(*args, teacher=t)
    for a, b in zip(free[:3], forced[:3]):
        same(a.detach(), b.detach())
    assert (free.embedding - forced.embedding).abs().max() > 1e-3
    silent = t._replace(log_f0=t.log_f0 + 2 * (1 - t.voiced))  # another pitch, without voice
    same(forced.embedding.detach(), encoder(*args, teacher=silent).embedding.detach(), atol=1e-6)


def test_level_from_the_speaker_and_movement_from_the_brows_whatever_the_lips_show():
    def made(seed, B=8, T=16):
        g = torch.Generator().manual_seed(seed)
        level, move = torch.rand(B, 1, generator=g) * 2 - 1, torch.randn(B, T, generator=g)
        both = 0.4 * level + 0.2 * (move - move.mean(1, keepdim=True)).repeat_interleave(2, 1)
        t = Truth(
            5 + both, torch.ones_like(both), -4 + 2 * both, torch.ones(B, T, dtype=torch.bool)
        )
        lips = (level * torch.linspace(-1, 1, 32))[:, None].expand(-1, 2 * T, -1)
        speaker = level * torch.linspace(-1, 1, 256)
        return lips, speaker, torch.sigmoid(move + level)[..., None].expand(-1, -1, 52), t

    encoder = ProsodyEncoder(replace(SMALL, expression_dim=52))
    opt, losses = torch.optim.AdamW(encoder.parameters(), lr=3e-3), []
    for step in range(150):
        *seen, t = made(step)
        loss = sum(prosody_loss(encoder(*seen, t.mask), t))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    lips, speaker, expression, t = made(999)
    with torch.no_grad():
        out = encoder.eval()(lips, speaker, expression, t.mask)
        still = encoder(lips, speaker, torch.full_like(expression, 0.5), t.mask)
        swapped = encoder(lips, speaker.flip(0), expression, t.mask)

    def level(p):
        voiced = p.voiced_logit.sigmoid()
        return (p.log_f0 * voiced).sum(1) / voiced.sum(1)

    both = torch.stack([out.log_f0.flatten(), t.log_f0.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    same(level(still), level(out), atol=1e-4)  # the level is still there
    swing, left = (p.log_f0[:, 8:-8].std(1).mean() for p in (out, still))
    assert left < 0.3 * swing  # the movement is not
    same(level(swapped), level(out).flip(0), atol=1e-4)  # and goes with the voice alone


def test_bending_a_contour_does_what_it_says():
    log_f0, voiced = 5 + 0.2 * torch.randn(60), (torch.rand(60) > 0.3).float()

    def mean(x):
        return (x * voiced).sum() / voiced.sum()

    same(bend(log_f0, voiced), log_f0, atol=1e-5)
    same(bend(log_f0, voiced, shift=7), log_f0 + 7 * math.log(2) / 12, atol=1e-5)
    wide = bend(log_f0, voiced, pitch_range=1.7)
    same(mean(wide), mean(log_f0), atol=1e-5)
    same(wide - mean(wide), 1.7 * (log_f0 - mean(log_f0)), atol=1e-5)
    slope = bend(torch.full((51,), 5.0), torch.ones(51), tilt=3)  # one second
    same(slope[-1] - slope[0], torch.tensor(3 * math.log(2) / 12), atol=1e-5)
    same(slope.mean(), torch.tensor(5.0), atol=1e-5)
    assert bend(log_f0, torch.zeros(60), pitch_range=2.0).isfinite().all()  # nothing voiced


def test_correlation_counts_only_what_it_is_told_to():
    a, b, weight = torch.randn(3, 40), torch.randn(3, 40), torch.rand(3, 40) > 0.4
    for i in range(3):
        reference = torch.corrcoef(torch.stack([a[i, weight[i]], b[i, weight[i]]]))[0, 1]
        same(weighted_correlation(a, b, weight.float())[i], reference, atol=1e-5)
    same(weighted_correlation(a, -2 * a + 3, weight.float()), -torch.ones(3), atol=1e-5)


def test_the_widget_speaks_what_its_sliders_say():
    pytest.importorskip("ipywidgets")
    import soundfile

    log_f0, said = 5 + 0.1 * torch.sin(torch.arange(50) / 5), []

    def speak(bent):
        said.append(bent)
        turns = torch.cumsum(bent.exp().repeat_interleave(320) / 16000, 0)
        return 0.5 * torch.sin(2 * math.pi * turns)

    controls, picture = bend_widget(log_f0, torch.ones(50), speak).children
    *dials, sound = controls.children

    def crossings():
        heard, _ = soundfile.read(io.BytesIO(sound.value))
        return (abs(np.diff(np.sign(heard))) > 1).sum()

    same(said[0], log_f0, atol=1e-6)
    before, drawn = crossings(), picture.value
    assert [d.description for d in dials] == ["shift", "range", "tilt"]
    assert not sound.autoplay and drawn[:4] == b"\x89PNG"
    for dial, value in zip(dials, (6.0, 0.0, -6.0)):
        dial.value = value
    same(said[-1], bend(log_f0, torch.ones(50), 6.0, 0.0, -6.0), atol=1e-6)
    assert sound.autoplay and picture.value != drawn
    assert crossings() / before == pytest.approx(2**0.5, rel=0.05)
