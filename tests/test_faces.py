"Drawn faces: the link to the voice, the drawing, and the locator that finds it."

import math
import numpy as np
import pytest
import torch
from faces2voices.core import test_same as same
from faces2voices.video import crop
from faces2voices.speaking import VISEMES
from faces2voices.drawing import (
    FaceShape,
    coverage,
    draw_face,
    face_points,
    jaw_width,
    to_frame,
    to_head,
)
from faces2voices.talkers import LINKED, draw_shapes, make_face, random_face
from faces2voices.locator import Locator, LocatorBackend, face_pool, scatter_faces, train_locator

REST, OPEN, FRONT = (0,) * 6, (1, 0, 0, 0, 0, 0), (0, 0, 0, 1)


def a_face(seed=3, **changes):
    return random_face(np.random.default_rng(seed))._replace(
        glasses=0.0, beard=0.0, moustache=0.0, **changes
    )


def correlations(link):
    lengths, log_f0, faces = draw_shapes(300, link)
    shape = np.array([[getattr(f, k) for k in LINKED] for f in faces]).T
    jaws = [jaw_width(f) for f in faces]
    return np.abs(np.corrcoef([*shape, jaws, 1 / lengths, log_f0])[-2:, :-2])


def test_no_link_no_correlation():
    assert correlations(0.0).max() < 0.2


def test_full_link():
    by_tract, by_pitch = correlations(1.0)
    assert (
        np.maximum(by_tract, by_pitch) > 0.85
    ).all()  # every tied feature follows one of the two
    assert by_tract.max() > 0.95 and by_pitch.max() > 0.95  # and each of the two can be read off


def test_link_is_graded():
    assert correlations(0.0).max() < correlations(0.4)[:, :-1].max() < correlations(1.0).max()


def test_nuisances_ignore_the_voice():
    one, other = (
        make_face(np.random.default_rng(5), 1 / formants, math.log(f0), 1.0)
        for formants, f0 in ((0.86, 90), (1.17, 230))
    )
    for k in set(FaceShape._fields) - set(LINKED):
        assert getattr(one, k) == getattr(other, k), k


def test_same_seed_same_bytes():
    shown = VISEMES["s"][1], 0.4, (0.02, 0.01, 0.1, 1.05)
    a, b = (draw_face(a_face(), *shown) for _ in range(2))
    assert a.shape == (160, 160, 3) and a.dtype == np.uint8
    same(a, b)


def test_pose_round_trip():
    at, pose = np.random.default_rng(0).uniform(-1, 1, (9, 2)), (0.05, -0.1, 0.3, 0.8)
    same(np.stack(to_head(*to_frame(at, pose, 160).T, pose, 160), 1), at, atol=1e-12)


def test_soft_edge():
    same(coverage(np.array([-1.0, 0.0, 0.25, 1.0]), 1.0), np.array([1.0, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize("pose", [FRONT, (0.06, -0.04, 0.2, 0.9), (-0.05, 0.03, -0.15, 1.1)])
def test_points_lie_on_the_eyes(pose):
    "Two green irises, nothing else green, wide open: their centres are the points."
    face = a_face(
        skin=(0.5, 0.5, 0.5), iris=(0.0, 1.0, 0.0), background=(0.5,) * 6, clothes=(0.5,) * 3
    )
    picture = draw_face(face, REST, 1.0, pose).astype(int)
    points = face_points(face, REST, 1.0, pose)
    rows, columns = np.nonzero(picture[..., 1] - picture[..., 0] > 60)
    side = columns > points[:2, 0].mean()
    for eye, here in zip(points[:2], (~side, side)):
        assert np.hypot(columns[here].mean() - eye[0], rows[here].mean() - eye[1]) < 1.5


@pytest.mark.parametrize("mouth", ["A", "w", "i", "p"])
def test_points_lie_on_the_corners(mouth):
    "The lips, painted red, reach from one corner to the other."
    face, m = a_face(), VISEMES[mouth][1]
    points = face_points(face, m, 0.0, FRONT)
    assert points[3, 0] < points[2, 0] < points[4, 0] and (points[3:, 1] > points[2, 1]).all()
    red = draw_face(
        face._replace(lip_colour=(1.0, 0.0, 0.0), skin=(0.5, 0.5, 0.5)), m, 0.0, FRONT
    ).astype(int)
    lips = red[..., 0] - red[..., 1] > 60
    across = np.flatnonzero(lips[90:].any(0))
    assert abs(across.min() - points[3, 0]) < 3.5 and abs(across.max() - points[4, 0]) < 3.5


def test_open_mouth_changes_mouth_and_chin_only():
    shut, wide = (draw_face(a_face(), m, 0.0, FRONT).astype(int) for m in (REST, OPEN))
    where = np.abs(shut - wide).max(-1) > 20
    middle = round(face_points(a_face(), REST, 0.0, FRONT)[3:, 1].mean())
    assert not where[:80].any() and where[middle : middle + 12, 70:90].mean() > 0.5
    assert wide[middle + 5, 80].sum() < 0.5 * shut[middle + 5, 80].sum()  # dark inside


def test_expression_changes_the_upper_face_only():
    low, high = (draw_face(a_face(), REST, e, FRONT).astype(int) for e in (-1, 1))
    where = np.abs(low - high).max(-1) > 20
    assert where[40:75].any() and not where[85:].any()


def test_every_mouth_number_shows():
    base = (0.4, 0, 0, 0.3, 0.1, 0)
    for i, value in enumerate((1, 1, 1, 1, 1, 1)):
        other = base[:i] + (value,) + base[i + 1 :]
        a, b = (
            draw_face(a_face(), m, 0.0, FRONT)[90:130, 50:110].astype(int) for m in (base, other)
        )
        assert (np.abs(a - b).max(-1) > 25).sum() > 25, i


def test_face_out_of_frame_is_drawn():
    assert draw_face(a_face(), OPEN, 1.0, (0.9, 0.9, 0.5, 1.0)).shape == (160, 160, 3)


def test_locator_shapes():
    points, logit = Locator()(torch.rand(3, 1, 80, 80))
    assert (
        points.shape == (3, 5, 2) and logit.shape == (3,) and 0 < points.min() and points.max() < 1
    )
    assert sum(p.numel() for p in Locator().parameters()) < 80_000


def test_scatter_moves_points_with_the_picture():
    "A white dot at the points must be found at the points given back."
    points = torch.full((8, 5, 2), 0.5) + 0.15 * torch.tensor(
        [(-1, -1), (1, -1), (0, 0), (-1, 1), (1, 1)]
    )
    dots = torch.zeros(8, 1, 160, 160)
    for x, y in (points[0] * 160).int().tolist():
        dots[:, 0, y - 3 : y + 3, x - 3 : x + 3] = 60.0
    x, at, is_face = scatter_faces(dots, points, torch.Generator().manual_seed(0), no_face=0.0)
    assert is_face.all()
    for picture, five in zip(x[:, 0], at):
        for u, v in (five * 80).int().tolist():
            assert picture[v - 1 : v + 2, u - 1 : u + 2].max() > 8


def test_locator_learns():
    locator = train_locator(40, 16, seed=0, progress=False)
    assert not locator.training
    pictures, points = face_pool(24, seed=5)
    small = torch.nn.functional.interpolate(
        pictures, size=(80, 80), mode="bilinear", antialias=True
    )

    def error(net):
        return (net(small)[0] - points).norm(dim=-1).median().item() * 160

    with torch.no_grad():
        assert error(locator) < 0.8 * error(Locator().eval())


def test_backend_interface():
    locator = Locator().eval()
    with torch.no_grad():
        locator.is_face.bias.fill_(50.0)
    backend = LocatorBackend(locator)
    frame = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
    [face] = backend.detect(frame)
    assert (
        backend.name == "locator"
        and face.points.shape == (5, 2)
        and face.box.shape == (4,)
        and 0.5 < face.score <= 1
    )
    crops = crop(frame[None], face.points[None], backend)
    assert crops.identity.shape == (0,) and crops.expression.shape == (1, 1152)
    with torch.no_grad():
        locator.is_face.bias.fill_(-50.0)
    assert backend.detect(frame) == []
