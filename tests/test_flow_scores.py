"Oracles of the flow's scores: Gaussians, whose scores are known."

import math
import numpy as np
import pytest
import torch
from faces2voices.core import test_same as same
from faces2voices.flow_scores import (
    add_roughness,
    classifier_accuracy,
    crps,
    energy_score,
    frechet_distance,
    mel_patches,
    modulation_power,
    variety_and_bias,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_crps_of_a_normal_is_unbiased_for_any_number_of_draws(n):
    z, s = torch.tensor([-1.5, 0.0, 0.8]), 0.7
    normal = torch.distributions.Normal(0.0, 1.0)
    known = z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - math.pi**-0.5
    draws = 2 + s * torch.randn(n, 60_000, 3, generator=gen())
    same(crps(draws, 2 + s * z.expand(60_000, 3)).mean(0), s * known, atol=0.01)


@pytest.mark.parametrize("dim", [1, 3, 640])
def test_energy_score_of_a_normal(dim):
    "At the centre, and on average over truths of the same law: Γ((D + 1) / 2) / Γ(D / 2)."
    ratio = math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    n = 40_000 if dim < 9 else 400
    draws = torch.randn(8, n, dim, generator=gen())
    centre = energy_score(draws, torch.zeros(n, dim)).mean().item()
    assert centre == pytest.approx((math.sqrt(2) - 1) * ratio, abs=0.01 * ratio)
    lawful = energy_score(draws, torch.randn(n, dim, generator=gen(1))).mean().item()
    assert lawful == pytest.approx(ratio, rel=0.01)


def test_energy_score_is_proper_and_a_single_draw_pays_its_distance():
    truth = torch.randn(4000, 6, generator=gen())
    paid = {
        s: energy_score(s * torch.randn(8, 4000, 6, generator=gen(1)), truth).mean()
        for s in (0.0, 0.6, 1.0, 1.6)
    }
    assert min(paid, key=paid.get) == 1.0
    same(energy_score(truth[None], truth), torch.zeros(4000))
    same(energy_score(truth[None], 0 * truth), truth.norm(dim=1))


def test_patches_are_whole_and_in_order():
    mel = torch.randn(3, 80, 21, generator=gen())
    patches = mel_patches(mel, 8)
    assert patches.shape == (3, 2, 640)
    same(patches[2, 1].reshape(80, 8), mel[2, :, 8:16])


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [2, 8])
def test_variety_over_bias_is_the_ratio_of_variances(spread, n):
    truth = torch.randn(80_000, generator=gen())
    draws = spread * torch.randn(n, 80_000, generator=gen(1))
    variety, bias = variety_and_bias(draws, truth)
    assert variety == pytest.approx(spread**2, rel=0.03)
    assert bias == pytest.approx(1, abs=0.05)
    assert variety_and_bias(draws[:1], truth)[0] == 0


@pytest.mark.parametrize("length", [200, 301])
def test_modulation_powers_add_up_and_find_a_wave(length):
    x = torch.randn(80, length, generator=gen())
    bands = [modulation_power(x, a, b) for a, b in ((0, 3), (3, 30), (30, 51))]
    assert sum(bands) == pytest.approx(x.square().mean().item(), rel=1e-4)
    assert bands[2] == pytest.approx(0.4, abs=0.03)
    wave = 2 * torch.cos(2 * math.pi * 10 * torch.arange(200) / 100).expand(80, -1)
    assert modulation_power(wave, 9, 11) == pytest.approx(2, rel=1e-4)


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    root_a, root_b = rng.normal(size=(2, 3, 3))
    a = rng.normal(size=(200_000, 3)) @ root_a
    b = rng.normal(size=(200_000, 3)) @ root_b + [1, 2, 0]
    A, B = root_a.T @ root_a, root_b.T @ root_b
    cross = np.sqrt(np.linalg.eigvals(A @ B).real).sum()  # tr (A^½ B A^½)^½
    known = 5 + np.trace(A) + np.trace(B) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(known, rel=0.02)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert abs(frechet_distance(a, a)) < 1e-6


@pytest.mark.parametrize("away", [0.0, 1.0, 2.5])
def test_classifier_reaches_the_bayes_rate_and_no_more(away):
    rng = np.random.default_rng(1)
    clips = np.arange(3000) % 12
    real, made = rng.normal(size=(2, 3000, 5))
    made[:, 1] += away
    best = torch.special.ndtr(torch.tensor(away / 2)).item()
    assert classifier_accuracy(real, made, clips, clips) == pytest.approx(best, abs=0.03)


def test_classifier_is_asked_about_clips_that_it_never_saw():
    "Each clip has a colour of its own, and its real and its made items look alike."
    rng = np.random.default_rng(2)
    clips = np.repeat(np.arange(20), 40)
    colour = 5 * rng.normal(size=(20, 8))[clips]
    label = rng.integers(0, 2, 20)[clips]  # made and real differ only in a clip-wise sign
    real = np.c_[colour, label + 0.1 * rng.normal(size=800)]
    made = np.c_[colour, 1 - label + 0.1 * rng.normal(size=800)]
    assert abs(classifier_accuracy(real, made, clips, clips) - 0.5) < 0.2


def test_roughness_is_the_mean_change_along_time_and_bins():
    wave = 3 * torch.tensor([0.0, 1.0]).repeat(4).expand(80, 8)
    ramp = 0.5 * torch.arange(80.0)[:, None].expand(80, 8)
    found = add_roughness(mel_patches(wave + ramp))
    assert found.shape == (1, 728)
    same(found[0, 640:720], torch.full((80,), 3.0))
    same(found[0, 720:], torch.full((8,), 0.5))
