"Oracles of pictures of the flow on mels: straight walks, circles, planes."

import pytest
import torch

from faces2voices.core import test_same as same
from faces2voices.flow import ot_path, ot_target
from faces2voices.mel_field import Walk, choice, noise_arc, plane_through, read_walk
from faces2voices.solvers import euler, time_grid


def noise(n, seed=0):
    return torch.randn(n, 80, 30, generator=torch.Generator().manual_seed(seed))


def test_on_a_straight_road_every_guess_is_the_datum():
    x0, x1 = noise(2), noise(2, 1)
    ts = torch.tensor([0.0, 0.2, 0.3, 0.7, 1.0])  # not a uniform clock
    xt = torch.stack([ot_path(x0, x1, t, 0.0) for t in ts])
    walk = read_walk(ts, xt)
    same(walk.guess, x1.expand(5, -1, -1, -1), atol=1e-4)
    same(walk.v, ot_target(x0, x1, 0.0).expand(5, -1, -1, -1), atol=1e-4)


def test_velocities_are_those_that_the_solver_asked_for():
    ts, asked = time_grid(6), []

    def field(x, t):
        asked.append((1 + t) * torch.sin(x))
        return asked[-1]

    walk = read_walk(ts, euler(field, noise(1), ts))
    same(walk.v[:-1], torch.stack(asked), atol=1e-4)


def test_noise_on_an_arc_is_as_loud_as_noise_and_a_line_is_not():
    a, b = noise(2, 5)
    arc = noise_arc(a, b, 7)
    same(arc[[0, -1]], torch.stack([a, b]), atol=1e-5)
    same(arc.std((1, 2)), torch.ones(7), atol=0.05)
    assert ((a + b) / 2).std() < 0.8


def test_a_plane_holds_its_three_mels_and_keeps_lengths():
    a, b, c = noise(3, 2)
    plane = plane_through(a, b, c)
    places = plane.place(torch.stack([a, b, c]))
    same(places[:2], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), atol=1e-5)
    assert places[2, 1] > 0
    same(plane.points(places), torch.stack([a, b, c]), atol=1e-4)
    apart = (plane.points(places)[0] - plane.points(places)[2]).norm() / ((a - b) / 2).norm()
    same((places[0] - places[2]).norm(), apart, atol=1e-4)  # one unit in both directions


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_choice_is_where_a_guess_stands_between_the_ends(share):
    a, b = noise(2, 3)
    between = share * a + (1 - share) * b
    ends = torch.stack([a, between, b])
    guess = torch.stack([between.expand(3, -1, -1), ends])
    chosen = choice(Walk(torch.tensor([0.0, 1.0]), guess, guess, guess))
    wanted = torch.tensor([[2 * share - 1] * 3, [1.0, 2 * share - 1, -1.0]])
    same(chosen, wanted, atol=1e-5)
