"Shared layers, computed by hand."

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from faces2voices.core import seed_everything, test_same
from faces2voices.layers import BasicBlock, masked_batch_norm


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0)


def test_masked_batch_norm_is_batch_norm_of_the_real_positions():
    ours, ref = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    x = torch.randn(2, 4, 9) * 3 + 1
    y = masked_batch_norm(ours, x, mask)
    test_same(y.mT[mask].detach(), ref(torch.cat([x[0].T, x[1, :, :4].T])).detach(), atol=1e-6)
    test_same(ours.running_var, ref.running_var, atol=1e-6)
    assert not y.mT[~mask].any()


@torch.no_grad()
def test_residual_block_by_hand():
    b, x = BasicBlock(4, 6, 2).eval(), torch.randn(2, 4, 9, 9)

    def unit(bn, y):
        return y / (1 + bn.eps) ** 0.5  # fresh BatchNorm: mean 0, variance 1

    def prelu(y):
        return torch.where(y > 0, y, 0.25 * y)

    way_round = unit(b.downsample[1], F.conv2d(x, b.downsample[0].weight, stride=2))
    y = prelu(unit(b.bn1, F.conv2d(x, b.conv1.weight, stride=2, padding=1)))
    y = unit(b.bn2, F.conv2d(y, b.conv2.weight, padding=1))
    test_same(b(x), prelu(y + way_round), atol=1e-5)
