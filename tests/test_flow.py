"Oracles of the flow lesson: closed forms, automatic differentiation, Monte Carlo."

import math
import pytest
import torch
from faces2voices.core import test_same as same
from faces2voices.flow import (
    ToyField,
    cfm_loss,
    detour,
    draw_times,
    field_error,
    fit_toy,
    gaussian_field,
    mixture_field,
    mixture_sample,
    ot_path,
    ot_target,
    pad_time,
    responsibilities,
)

MEANS = torch.tensor([[2.0, 1.5], [-2.0, 1.5], [0.0, -2.0]])
STDS = torch.tensor([0.3, 0.5, 0.4])
WEIGHTS = torch.tensor([0.3, 0.3, 0.4])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def exact(x, t):
    return mixture_field(x, t, MEANS, STDS, WEIGHTS)


@pytest.mark.parametrize("shape", [(3, 2), (3, 80, 7)])
def test_path_runs_from_noise_to_data(shape):
    x0, x1 = torch.randn(shape, generator=gen()), torch.randn(shape, generator=gen(1))
    same(ot_path(x0, x1, torch.zeros(3)), x0)
    same(ot_path(x0, x1, torch.ones(3)), x1 + 1e-4 * x0, atol=1e-6)
    same(
        ot_path(x0, x1, torch.tensor([0.0, 1.0, 0.0]))[1], (x1 + 1e-4 * x0)[1], atol=1e-6
    )  # a time for each item


@pytest.mark.parametrize("sigma_min", [0.0, 1e-4, 0.1])
def test_target_is_the_derivative_of_the_path(sigma_min):
    x0 = torch.randn(5, 80, 4, generator=gen())
    x1 = torch.randn(5, 80, 4, generator=gen(1))
    t = torch.rand(5, generator=gen(2))
    _, dxdt = torch.func.jvp(lambda t: ot_path(x0, x1, t, sigma_min), (t,), (torch.ones(5),))
    same(dxdt, ot_target(x0, x1, sigma_min), atol=1e-5)


def test_target_equals_lipman_conditional_field():
    x0 = torch.randn(6, 3, generator=gen()).double()
    x1 = torch.randn(6, 3).double()
    t = torch.rand(6).double() * 0.9
    s = 0.05
    xt = ot_path(x0, x1, t, s)
    same((x1 - (1 - s) * xt) / (1 - (1 - s) * pad_time(t, xt)), ot_target(x0, x1, s), atol=1e-10)


def test_pad_time_takes_one_or_many():
    x = torch.zeros(4, 80, 9)
    assert pad_time(torch.zeros(4), x).shape == (4, 1, 1)
    assert pad_time(torch.tensor(0.5), x).shape == (1, 1, 1)


def test_gaussian_field_is_the_conditional_mean():
    "Linear regression of u on x_t, from a million draws."
    x1 = 0.7 * torch.randn(1_000_000, 1, generator=gen()) + 2
    x0 = torch.randn(1_000_000, 1, generator=gen(1))
    t = torch.tensor(0.4)
    xt, u = ot_path(x0, x1, t), ot_target(x0, x1)
    slope = torch.cov(torch.cat([xt, u], 1).T)[0, 1] / xt.var()
    same(
        gaussian_field(torch.tensor([[0.0], [1.0]]), t, 2.0, 0.7).diff(dim=0)[0, 0],
        slope,
        atol=0.01,
    )
    same(gaussian_field(xt.mean(0, keepdim=True), t, 2.0, 0.7), u.mean(0, keepdim=True), atol=0.01)


@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_mixture_field_follows_from_the_score(t):
    x, t, s = torch.randn(50, 2, generator=gen()).double(), torch.tensor(t).double(), 1e-3
    m, sd, w = MEANS.double(), STDS.double(), WEIGHTS.double()
    sigma = 1 - (1 - s) * t

    def log_density(x):
        var = (t * sd) ** 2 + sigma**2
        gap = (x[:, None] - t * m).square().sum(-1)
        return (w.log() - gap / (2 * var) - var.log()).logsumexp(-1)

    score = torch.func.grad(lambda x: log_density(x).sum())(x)
    same(
        mixture_field(x, t, m, sd, w, s),
        (x + sigma**2 * score) / t + (1 - s) * sigma * score,
        atol=1e-9,
    )


def test_mixture_field_at_the_start_heads_for_the_mean():
    v = exact(torch.zeros(1, 2), torch.tensor(0.0))
    same(v, (WEIGHTS @ MEANS)[None], atol=1e-5)


def test_mixture_of_one_is_a_gaussian():
    x, t = torch.randn(9, 2, generator=gen()), torch.rand(9, generator=gen())
    same(
        mixture_field(x, t, MEANS[:1], STDS[:1], WEIGHTS[:1]),
        gaussian_field(x, t, MEANS[0], STDS[0]),
        atol=1e-6,
    )
    same(responsibilities(x, t, MEANS, STDS, WEIGHTS).sum(1), torch.ones(9), atol=1e-6)


def test_exact_field_carries_noise_to_the_mixture():
    x = torch.randn(4000, 2, generator=gen())
    for t in torch.arange(200) / 200:
        x = x + exact(x, t) / 200
    r = responsibilities(x, torch.tensor(1.0), MEANS, STDS, WEIGHTS)
    same(r.mean(0), WEIGHTS, atol=0.03)
    same(x.mean(0), WEIGHTS @ MEANS, atol=0.08)
    for k in range(3):
        expected = MEANS[k] + STDS[k] * torch.randn(4000, 2, generator=gen(1))
        same(x[r.argmax(1) == k].std(), expected.std(), atol=0.06)


@pytest.mark.parametrize("s", [0.2, 1.0])
def test_floor_of_the_loss_in_closed_form(s):
    x1 = s * torch.randn(200_000, 1, generator=gen())
    loss = cfm_loss(
        lambda x, t: gaussian_field(x, t, 0.0, s), x1, torch.ones(len(x1), 1), generator=gen(1)
    )
    same(loss, torch.tensor(math.pi / 2 * s), atol=0.02)


def test_no_field_beats_the_exact_one():
    x1 = mixture_sample(20_000, MEANS, STDS, WEIGHTS, gen())

    def loss(field):
        return cfm_loss(field, x1, torch.ones(len(x1), 1), generator=gen(1)).item()

    floor = loss(exact)
    for off in (
        lambda x, t: exact(x, t) + 0.2,
        lambda x, t: 0.9 * exact(x, t),
        lambda x, t: exact(x, 1 - t),
    ):
        assert loss(off) > floor + 0.005


def test_loss_ignores_padding_in_value_and_in_the_mean():
    "The same draws, padded: noise under the mask must weigh nothing, above or below the bar."
    x1, mask = torch.randn(2, 80, 10, generator=gen()), torch.ones(2, 1, 10)
    mask[1, :, 6:] = 0
    perfect = {}

    def spy(xt, t):
        perfect["xt"], perfect["t"] = xt, t
        return 0 * xt

    loss = cfm_loss(spy, x1, mask, generator=gen(1))
    x0 = (perfect["xt"] - pad_time(perfect["t"], x1) * x1) / (
        1 - (1 - 1e-4) * pad_time(perfect["t"], x1)
    )
    u = ot_target(x0, x1)
    same(loss, torch.cat([u[0].flatten(), u[1, :, :6].flatten()]).square().mean(), atol=1e-3)
    dirty = torch.where(mask > 0, x1, torch.tensor(1e3))
    same(cfm_loss(lambda xt, t: 0 * xt, dirty, mask, generator=gen(1)), loss, atol=1e-5)
    same(cfm_loss(lambda xt, t: 0 * xt, x1, mask.bool(), generator=gen(1)), loss, atol=1e-6)


def test_loss_draws_one_time_for_each_item():
    seen = []
    cfm_loss(
        lambda xt, t: seen.append(t) or 0 * xt,
        torch.zeros(64, 2),
        torch.ones(64, 1),
        generator=gen(),
    )
    t = seen[0]
    assert t.shape == (64,) and t.min() < 0.1 and t.max() > 0.9 and t.unique().numel() == 64


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_times_have_their_law(times):
    "P(t ≤ a) is a, or Φ(ln a / (1 − a)); and the generator decides them."
    t = draw_times(200_000, times, gen(4))
    a = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.9, 0.98])
    known = a if times == "uniform" else torch.special.ndtr(a.logit())
    same((t[:, None] <= a).float().mean(0), known, atol=0.004)
    assert 0 <= t.min() and t.max() <= 1
    same(draw_times(5, times, gen(4)), draw_times(5, times, gen(4)))


def test_loss_takes_noise_and_times_that_are_given():
    "The draws of today, made outside: first the times, then the noise."
    x1, mask = torch.randn(5, 3, generator=gen()), torch.ones(5, 1)
    g = gen(1)
    t = torch.rand(5, generator=g)
    x0 = torch.randn(5, 3, generator=g)
    drawn = cfm_loss(exact_3d, x1, mask, generator=gen(1))
    assert cfm_loss(exact_3d, x1, mask, x0=x0, t=t) == drawn
    perfect = ot_target(x0, x1)
    same(cfm_loss(lambda xt, t: perfect, x1, mask, x0=x0), torch.tensor(0.0))


def exact_3d(x, t):
    return gaussian_field(x, t, 0.0, 1.0)


def test_a_small_network_learns_the_exact_field():
    torch.manual_seed(0)
    net = ToyField(2, 64)
    fit_toy(net, lambda n: mixture_sample(n, MEANS, STDS, WEIGHTS), steps=700, batch=256)
    data = mixture_sample(5000, MEANS, STDS, WEIGHTS)
    of_nothing = field_error(lambda x, t: 0 * x, exact, data, gen())
    assert field_error(net, exact, data, gen()) < 0.3 * of_nothing


def test_detour_of_a_line_and_of_a_half_circle():
    s = torch.linspace(0, math.pi, 1001)[:, None]
    assert abs(detour(torch.stack([s, 2 * s], -1))) < 1e-4
    assert abs(detour(torch.stack([s.cos(), s.sin()], -1)) - (math.pi / 2 - 1)) < 1e-3
