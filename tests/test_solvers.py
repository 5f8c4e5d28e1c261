"Oracles of the solvers lesson: orders of convergence, closed solutions, a peer, identities."

import math
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from faces2voices.core import test_same as same
from faces2voices.flow import mixture_field
from faces2voices.solvers import (
    SOLVERS,
    euler,
    guide,
    guided,
    heun,
    midpoint,
    plot_race,
    race,
    rk4,
    solver_race,
    time_grid,
)

ORDER = dict(euler=1, midpoint=2, heun=2, rk4=4)


def grid(n):
    return torch.linspace(0, 1, n + 1, dtype=torch.float64)


@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name):
    "x' = -2 t x^2 from 1 has x = 1 / (1 + t^2): halving the step divides the error by 2 ** order."
    solve = SOLVERS[name][0]
    error = [
        (solve(lambda x, t: -2 * t * x**2, torch.ones(1, 1).double(), grid(n))[-1] - 0.5)
        .abs()
        .item()
        for n in (32, 64)
    ]
    assert abs(math.log2(error[0] / error[1]) - ORDER[name]) < 0.1


@pytest.mark.parametrize("name", ORDER)
def test_calls_are_counted_right(name):
    solve, cost = SOLVERS[name]
    calls = []
    solve(lambda x, t: calls.append(t) or x, torch.ones(1), grid(6))
    assert len(calls) == 6 * cost and all(0 <= t <= 1 for t in calls)


@pytest.mark.parametrize("name", ORDER)
def test_trajectory_holds_every_stop_and_a_straight_road_is_exact(name):
    x0, u = torch.randn(3, 80, 5).double(), torch.randn(3, 80, 5).double()
    xs = SOLVERS[name][0](lambda x, t: u, x0, grid(4))
    assert xs.shape == (5, 3, 80, 5)
    for t, x in zip(grid(4), xs):
        same(x, x0 + t * u, atol=1e-12)


@pytest.mark.parametrize("name", ORDER)
def test_uneven_grids_end_at_the_end(name):
    xs = SOLVERS[name][0](lambda x, t: torch.ones_like(x), torch.zeros(2), time_grid(7, -1.0))
    same(xs[-1], torch.ones(2), atol=1e-6)


def test_euler_on_a_linear_field_in_closed_form():
    same(
        euler(lambda x, t: x, torch.ones(1).double(), grid(10))[-1],
        torch.tensor([1.1**10], dtype=torch.float64),
        atol=1e-12,
    )


@pytest.mark.parametrize("solve", [midpoint, heun])
def test_second_order_on_a_linear_field_in_closed_form(solve):
    h = 0.1
    same(
        solve(lambda x, t: x, torch.ones(1).double(), grid(10))[-1],
        torch.tensor([(1 + h + h * h / 2) ** 10], dtype=torch.float64),
        atol=1e-12,
    )


def test_rk4_is_torchdiffeqs():
    odeint = pytest.importorskip("torchdiffeq", reason="torchdiffeq is a development extra").odeint

    def field(x, t):
        return torch.sin(3 * t) * x + torch.cos(x)

    x0 = torch.randn(5, 2).double()
    for ours, theirs in ((euler, "euler"), (midpoint, "midpoint")):
        same(
            ours(field, x0, grid(9)),
            odeint(lambda t, x: field(x, t), x0, grid(9), method=theirs),
            atol=1e-12,
        )
    same(
        rk4(field, x0, grid(200))[-1],
        odeint(lambda t, x: field(x, t), x0, grid(1), rtol=1e-10, atol=1e-10)[-1],
        atol=1e-8,
    )


def test_rk4_on_a_flow_against_an_adaptive_solver():
    odeint = pytest.importorskip("torchdiffeq", reason="torchdiffeq is a development extra").odeint
    means = torch.tensor([[2.0, 1.0], [-2.0, 0.0]]).double()
    stds = torch.tensor([0.3, 0.5]).double()
    weights = torch.tensor([0.4, 0.6]).double()

    def field(x, t):
        return mixture_field(x, t, means, stds, weights)

    x0 = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    same(
        rk4(field, x0, grid(200))[-1],
        odeint(lambda t, x: field(x, t), x0, grid(1), rtol=1e-9, atol=1e-9)[-1],
        atol=1e-4,
    )


@pytest.mark.parametrize("sway", [-1.0, -0.5, 0.0, 0.5])
def test_time_grid_runs_up_from_noise_to_data(sway):
    ts = time_grid(12, sway)
    assert ts.shape == (13,) and (ts.diff() > 0).all()
    same(ts[[0, -1]], torch.tensor([0.0, 1.0]), atol=1e-6)


def test_time_grid_at_its_two_names():
    s = torch.linspace(0, 1, 9)
    same(time_grid(8), s)
    same(time_grid(8, -1.0), 1 - torch.cos(math.pi / 2 * s), atol=1e-6)
    assert time_grid(8, -1.0).diff()[0] < time_grid(8).diff()[0] < time_grid(8, 0.5).diff()[0]


def test_guidance_identities():
    c, u = torch.randn(4, 80, 3).double(), torch.randn(4, 80, 3).double()
    same(guide(c, u, 0.0), u)
    same(guide(c, u, 1.0), c, atol=1e-12)
    same(guide(c, c, 7.0), c, atol=1e-12)
    same(guide(c, u, 1.7), 1.7 * c - 0.7 * u, atol=1e-12)
    field = guided(lambda x, t: c * t, lambda x, t: u + x, 2.0)
    same(field(c, torch.tensor(0.5).double()), guide(c * 0.5, u + c, 2.0), atol=1e-12)


BLOBS = (
    torch.tensor([[2.0, 1.5], [-2.0, 1.5], [0.0, -2.0]]),
    torch.tensor([0.3, 0.5, 0.4]),
    torch.tensor([0.3, 0.3, 0.4]),
)


def test_a_race_costs_everyone_the_same_and_knows_where_it_should_end():
    "One turn of a rotation ends where it began."
    calls, x0 = [], torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    end, found = race(
        lambda x, t: calls.append(t) or 2 * math.pi * torch.stack([-x[:, 1], x[:, 0]], 1), x0, 32
    )
    assert len(calls) == 4 * 200 + 4 * 32
    same(end, x0, atol=1e-4)
    for name, (way, error) in found.items():
        same(way[0], x0)
        assert len(way) == 32 // SOLVERS[name][1] + 1
        assert abs(error - (way[-1] - x0).square().mean().sqrt().item()) < 1e-4
    assert found["rk4"][1] < found["midpoint"][1] < found["euler"][1]


@pytest.mark.parametrize("nfe", [0, 2, 6, -4])
def test_a_price_that_not_all_can_pay_is_refused(nfe):
    with pytest.raises(ValueError, match="a multiple of 4"):
        race(lambda x, t: x, torch.ones(1, 2), nfe)


def shown(**dials):  # title → its number, and what is drawn
    fig = plot_race(BLOBS, **dials)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    titles = [ax.get_title() for ax in fig.axes[1:]]
    errors = {title.split(",")[0]: float(title.split("error ")[1]) for title in titles}
    return errors, bytes(canvas.buffer_rgba())


def test_every_dial_of_the_race_changes_the_picture():
    errors, picture = shown(nfe=8)
    assert list(errors) == list(SOLVERS) and shown(nfe=8)[1] == picture
    more, _ = shown(nfe=64)
    assert all(more[name] < errors[name] for name in SOLVERS)
    for dial in (dict(guidance=2.0), dict(sigma_min=0.3), dict(t=0.9), dict(nfe=12)):
        assert shown(**dict(nfe=8) | dial)[1] != picture, dial


def test_the_race_has_its_sliders():
    sliders = solver_race(BLOBS).widget.children[:-1]
    assert [s.description for s in sliders] == ["nfe", "guidance", "sigma_min", "t"]
    assert (sliders[0].min, sliders[0].max, sliders[0].step) == (4, 64, 4)
