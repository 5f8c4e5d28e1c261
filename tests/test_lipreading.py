"Lip encoders: padding, principal pictures, and the encoder that a preset asks for."

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from lips import batch
from faces2voices.core import EIGENLIPS, PAPER, TINY, seed_everything, test_same
from faces2voices.layers import influence
from faces2voices.lipreading import (
    EigenlipEncoder,
    Eigenlips,
    SlimLipEncoder,
    make_lip_encoder,
    stack_frames,
)


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0)


# --- slim encoder


def test_stacked_2d_convolution_is_the_3d_one():
    conv = nn.Conv3d(1, 4, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False)
    lips = torch.randn(2, 1, 6, 20, 20)
    stacked = stack_frames(lips).flatten(0, 1).movedim(-1, 1)
    flat = F.conv2d(stacked, conv.weight[:, 0], stride=2, padding=3)
    test_same(flat.unflatten(0, (2, 6)).transpose(1, 2), conv(lips), atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", [1, 2])
@torch.no_grad()
def test_slim_does_not_feel_padding(scale, training):
    net, (lips, mask) = SlimLipEncoder(8, 32, scale=scale, dropout=0.0).train(training), batch()
    padded = net(F.pad(lips, (0, 0, 0, 0, 0, 3), value=7.0), F.pad(mask, (0, 3)))
    test_same(padded[:, :9], net(lips, mask), atol=1e-4)
    assert not padded[~F.pad(mask, (0, 3))].any()
    if not training:
        test_same(padded[1, :5], net(lips[1:, :, :5], mask[1:, :5])[0], atol=1e-4)


def test_slim_sees_the_whole_clip_and_every_parameter_learns():
    net, (lips, mask) = SlimLipEncoder(8, 32), batch()
    net(lips, mask).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    full = torch.ones(1, 9, dtype=torch.bool)
    assert (influence(lambda x: net.eval()(x, full)[0], lips[:1], 4) > 0).all()


def test_slim_in_bfloat16():
    net, (lips, mask) = SlimLipEncoder(8, 32).eval(), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = net(lips, mask)
    with torch.no_grad():
        high = net(lips, mask)
    assert low.dtype == torch.float32
    assert F.cosine_similarity(low[mask], high[mask]).min() > 0.98


# --- eigenlips


def mouths(n=40, size=6):
    "Clips of 20 pictures, spread over eight directions with eight different widths, and a mask."
    directions = torch.linalg.qr(torch.randn(size**2, 8))[0]
    pictures = torch.randn(20 * n, 8) * torch.arange(8, 0, -1.0) @ directions.T
    return pictures.view(n, 1, 20, size, size), torch.ones(n, 20, dtype=torch.bool)


def test_eigenlips_are_the_principal_components_of_scikit_learn():
    from sklearn.decomposition import PCA

    eigen, (lips, mask) = Eigenlips(4, 6), mouths()
    eigen.fit(lips, mask)
    x = eigen.normalize(lips, mask)
    reference = torch.from_numpy(PCA(4, whiten=True).fit_transform(x.numpy())).float()
    z = eigen(lips, mask)[mask]
    inside = (reference.abs() < 4.9).all(1)
    test_same((z.sign() * z)[inside], reference.abs()[inside], atol=0.02)
    assert (F.cosine_similarity(z.T, reference.T).abs() > 0.9999).all()


def test_eigenlips_do_not_see_the_light():
    eigen, (lips, mask) = Eigenlips(4, 6), mouths()
    eigen.fit(lips, mask)
    test_same(eigen(3 * lips - 7, mask), eigen(lips, mask), atol=1e-3)


def test_eigenlips_of_a_black_clip_are_finite():
    eigen, (lips, mask) = Eigenlips(4, 6), mouths()
    eigen.fit(lips, mask)
    assert eigen(0 * lips, mask).isfinite().all()


def eigenlip_encoder(**kw):
    net, (lips, mask) = EigenlipEncoder(8, 16, **kw), batch()
    net.fit(lips, mask)
    return net, lips, mask


@pytest.mark.parametrize("scale", [1, 2])
@torch.no_grad()
def test_eigenlip_encoder_does_not_feel_padding(scale):
    net, lips, mask = eigenlip_encoder(scale=scale)
    net.eval()
    padded = net(F.pad(lips, (0, 0, 0, 0, 0, 3), value=7.0), F.pad(mask, (0, 3)))
    test_same(padded[:, :9], net(lips, mask), atol=1e-4)
    assert not padded[~F.pad(mask, (0, 3))].any()
    test_same(padded[1, :5], net(lips[1:, :, :5], mask[1:, :5])[0], atol=1e-4)


def test_eigenlip_encoder_learns_with_every_parameter_and_keeps_its_pictures():
    net, lips, mask = eigenlip_encoder()
    net(lips, mask).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    pictures = {"eigen.mean", "eigen.basis"}
    assert pictures <= net.state_dict().keys()
    assert not pictures & dict(net.named_parameters()).keys()


def test_make_lip_encoder_matches_the_preset():
    assert make_lip_encoder(TINY).dim == TINY.dim
    assert make_lip_encoder(EIGENLIPS).dim == 2 * EIGENLIPS.lip_memory
    with torch.device("meta"):
        big = make_lip_encoder(PAPER)
    assert big.dim == 1024
    assert [n for n, p in big.named_parameters() if p.requires_grad] == ["weights"]
