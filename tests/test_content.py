"The content stage: the hole, the mask, the loss."
from dataclasses import replace
import pytest, torch
import torch.nn.functional as F
from torch import nn
from faces2voices.core import TINY, seed_everything, test_same
from faces2voices.avhubert import influence
from faces2voices.content import (Content, ContentEncoder, ConvBlock, MaskedConvBlock, content_loss, norm_real, receptive_field,
                                  show_receptive_field, unit_accuracy)

SMALL = replace(TINY, dim=32, n_units=11)

@pytest.fixture(autouse=True)
def _seed(): seed_everything(0)

def lengths(*n): return torch.arange(max(n))[None] < torch.tensor(n)[:, None]

@pytest.mark.parametrize("n_blocks,kernel,hole", [(1, 15, 5), (3, 15, 5), (4, 15, 5), (2, 9, 3)])
def test_the_hole_and_the_reach_are_exact(n_blocks, kernel, hole):
    net = ContentEncoder(8, replace(SMALL, n_blocks=n_blocks, mask_kernel=kernel, mask_size=hole)).eval()
    plain, masked = receptive_field(net)
    away = (torch.arange(61) - 30).abs()
    assert ((masked > 0) == ((away > hole//2) & (away <= kernel//2 + n_blocks))).all()
    assert ((plain > 0) == (away <= n_blocks)).all()

def test_a_frames_own_lips_never_reach_its_masked_logits():
    net, mask = ContentEncoder(8, SMALL).eval(), torch.ones(1, 30, dtype=torch.bool)
    x = torch.randn(1, 8, 30)
    for unit in (28, 29):                                               # both halves of frame 14
        seen = influence(lambda x: net(x.mT, mask).masked_logits[0], x, unit)
        assert seen[14] == 0 and seen[11] > 0 and seen[17] > 0
        assert influence(lambda x: net(x.mT, mask).logits[0], x, unit)[14] > 0

def test_masked_block_is_a_convolution_with_taps_at_zero():
    block, x = MaskedConvBlock(4, 7, 3), torch.randn(2, 4, 20)
    plain = nn.Conv1d(4, 4, 7, padding=3)
    plain.load_state_dict(block.conv.state_dict())
    with torch.no_grad(): plain.weight[..., 2:5] = 0
    test_same(block(x).detach(), plain(x).tanh().detach(), atol=1e-6)
    block(x).sum().backward()
    assert not block.conv.weight.grad[..., 2:5].any() and block.conv.weight.grad[..., 1].all()
    with pytest.raises(AssertionError): MaskedConvBlock(4, 7, 7)

def test_conv_block_by_hand():
    b, x, mask = ConvBlock(4, 0.5).eval(), torch.randn(2, 4, 9), torch.ones(2, 9, dtype=torch.bool)
    s = (1 + b.bn1.eps)**-.5
    h = F.relu(F.conv1d(x, b.conv1.weight, padding=1)*s)
    test_same(b(x, mask).detach(), F.relu(x + F.conv1d(h, b.conv2.weight)*s).detach(), atol=1e-5)

def test_norm_real_is_batch_norm_of_the_real_positions():
    ours, ref, mask = nn.BatchNorm1d(4), nn.BatchNorm1d(4), lengths(9, 4)
    x = torch.randn(2, 4, 9)*3 + 1
    y = norm_real(ours, x, mask)
    test_same(y.mT[mask].detach(), ref(torch.cat([x[0].T, x[1, :, :4].T])).detach(), atol=1e-6)
    test_same(ours.running_var, ref.running_var, atol=1e-6)
    assert not y.mT[~mask].any()

@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_padding_is_not_felt(training):
    net, mask = ContentEncoder(8, replace(SMALL, dropout=0.)).train(training), lengths(12, 7)
    x = torch.randn(2, 12, 8)
    a = net(x, mask)
    b = net(F.pad(x, (0, 0, 0, 5), value=9.), F.pad(mask, (0, 5)))
    real = mask.repeat_interleave(2, 1)
    for p, q in zip(a, b): test_same(p[real], q[:, :24][real], atol=1e-5)
    assert not a.hidden[~real].any()
    if not training: test_same(net(x[1:, :7], mask[1:, :7]).logits[0], a.logits[1, :14], atol=1e-5)

def test_the_two_units_of_a_frame_can_differ():
    net = ContentEncoder(8, SMALL).eval()
    up = net.upsample(torch.randn(1, 8, 5))
    assert up.shape == (1, 32, 10) and (up[..., ::2] - up[..., 1::2]).abs().min(1).values.max() > 0

def test_loss_is_smoothed_cross_entropy_over_real_units():
    units = torch.tensor([[1, 2, 3, -100], [0, -100, -100, -100]])
    content = Content(torch.zeros(2, 4, 3), torch.randn(2, 4, 11), torch.zeros(2, 4, 11))
    ce, masked_ce = content_loss(content, units, SMALL)
    real = units != -100
    target = F.one_hot(units[real], 11)*0.9 + 0.1/11
    test_same(ce, -(target*content.logits[real].log_softmax(-1)).sum(-1).mean(), atol=1e-5)
    test_same(masked_ce, torch.tensor(11.).log(), atol=1e-5)

def test_accuracy_leaves_padding_out():
    units = torch.tensor([[1, 2, -100, -100]])
    assert unit_accuracy(F.one_hot(torch.tensor([[1, 0, 0, 0]]), 3).float(), units) == 0.5

def test_it_learns_a_made_sequence():
    units = (torch.arange(24)[None] + torch.arange(8)[:, None]) % 11
    x, mask = F.one_hot(units[:, ::2], 11).float(), torch.ones(8, 12, dtype=torch.bool)
    net = ContentEncoder(11, replace(SMALL, dropout=0.))
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        loss = sum(content_loss(net(x, mask), units, SMALL))
        opt.zero_grad(); loss.backward(); opt.step()
    out = net.eval()(x, mask)
    assert unit_accuracy(out.logits, units) > 0.95 and unit_accuracy(out.masked_logits, units) > 0.8

def test_figure():
    matplotlib = pytest.importorskip("matplotlib"); matplotlib.use("Agg")
    assert len(show_receptive_field(ContentEncoder(8, SMALL).eval()).axes) == 2
