"The content stage: the hole, the mask, the loss."

from itertools import chain
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from faces2voices import studies
from faces2voices.content import (
    Content,
    ContentEncoder,
    ConvBlock,
    MaskedConvBlock,
    content_loss,
    logit_accuracy,
    pad_examples,
    receptive_field,
    show_receptive_field,
    train_content,
    word_loss,
)
from faces2voices.core import TINY, seed_everything, test_same
from faces2voices.errors import CorpusError
from faces2voices.layers import influence
from faces2voices.statistics import crossed_interval
from faces2voices.studies import (
    CONTENT_MEASURES,
    evaluate_content,
    masked_ce_study,
    recorded_gain,
    lip_features_and_units,
    plot_masked_ce,
)

SMALL = replace(TINY, dim=32, n_units=11)


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0)


def lengths(*n):
    return torch.arange(max(n))[None] < torch.tensor(n)[:, None]


@pytest.mark.parametrize("n_blocks,kernel,hole", [(1, 15, 5), (3, 15, 5), (4, 15, 5), (2, 9, 3)])
def test_the_hole_and_the_reach_are_exact(n_blocks, kernel, hole):
    net = ContentEncoder(
        8, replace(SMALL, n_blocks=n_blocks, mask_kernel=kernel, mask_size=hole)
    ).eval()
    plain, masked = receptive_field(net)
    away = (torch.arange(61) - 30).abs()
    assert ((masked > 0) == ((away > hole // 2) & (away <= kernel // 2 + n_blocks))).all()
    assert ((plain > 0) == (away <= n_blocks)).all()


def test_a_frames_own_lips_never_reach_its_masked_logits():
    net, mask = ContentEncoder(8, SMALL).eval(), torch.ones(1, 30, dtype=torch.bool)
    x = torch.randn(1, 8, 30)
    for unit in (28, 29):  # both halves of frame 14
        seen = influence(lambda x: net(x.mT, mask).masked_logits[0], x, unit)
        assert seen[14] == 0 and seen[11] > 0 and seen[17] > 0
        assert influence(lambda x: net(x.mT, mask).logits[0], x, unit)[14] > 0


def test_masked_block_is_a_convolution_with_taps_at_zero():
    block, x = MaskedConvBlock(4, 7, 3), torch.randn(2, 4, 20)
    plain = nn.Conv1d(4, 4, 7, padding=3)
    plain.load_state_dict(block.conv.state_dict())
    with torch.no_grad():
        plain.weight[..., 2:5] = 0
    test_same(block(x).detach(), plain(x).tanh().detach(), atol=1e-6)
    block(x).sum().backward()
    assert not block.conv.weight.grad[..., 2:5].any() and block.conv.weight.grad[..., 1].all()
    with pytest.raises(AssertionError):
        MaskedConvBlock(4, 7, 7)


def test_conv_block_by_hand():
    b, x, mask = ConvBlock(4, 0.5).eval(), torch.randn(2, 4, 9), torch.ones(2, 9, dtype=torch.bool)
    s = (1 + b.bn1.eps) ** -0.5
    h = F.relu(F.conv1d(x, b.conv1.weight, padding=1) * s)
    test_same(b(x, mask).detach(), F.relu(x + F.conv1d(h, b.conv2.weight) * s).detach(), atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_padding_is_not_felt(training):
    net = ContentEncoder(8, replace(SMALL, dropout=0.0, words=("bin", "blue"))).train(training)
    mask = lengths(12, 7)
    x = torch.randn(2, 12, 8)
    a = net(x, mask)
    b = net(F.pad(x, (0, 0, 0, 5), value=9.0), F.pad(mask, (0, 5)))
    real = mask.repeat_interleave(2, 1)
    for p, q in zip(a, b):
        test_same(p[real], q[:, :24][real], atol=1e-5)
    assert not a.hidden[~real].any()
    if not training:
        test_same(net(x[1:, :7], mask[1:, :7]).logits[0], a.logits[1, :14], atol=1e-5)


def test_the_two_units_of_a_frame_can_differ():
    net = ContentEncoder(8, SMALL).eval()
    up = net.upsample(torch.randn(1, 8, 5))
    assert up.shape == (1, 32, 10) and (up[..., ::2] - up[..., 1::2]).abs().min(1).values.max() > 0


def test_loss_is_smoothed_cross_entropy_over_real_units():
    units = torch.tensor([[1, 2, 3, -100], [0, -100, -100, -100]])
    content = Content(torch.zeros(2, 4, 3), torch.randn(2, 4, 11), torch.zeros(2, 4, 11))
    ce, masked_ce = content_loss(content, units, SMALL)
    real = units != -100
    target = F.one_hot(units[real], 11) * 0.9 + 0.1 / 11
    test_same(ce, -(target * content.logits[real].log_softmax(-1)).sum(-1).mean(), atol=1e-5)
    test_same(masked_ce, torch.tensor(11.0).log(), atol=1e-5)


def test_accuracy_leaves_padding_out():
    units = torch.tensor([[1, 2, -100, -100]])
    assert logit_accuracy(F.one_hot(torch.tensor([[1, 0, 0, 0]]), 3).float(), units) == 0.5


def test_it_learns_a_made_sequence():
    units = (torch.arange(24)[None] + torch.arange(8)[:, None]) % 11
    x, mask = F.one_hot(units[:, ::2], 11).float(), torch.ones(8, 12, dtype=torch.bool)
    net = ContentEncoder(11, replace(SMALL, dropout=0.0))
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        loss = sum(content_loss(net(x, mask), units, SMALL))
        opt.zero_grad()
        loss.backward()
        opt.step()
    out = net.eval()(x, mask)
    assert (
        logit_accuracy(out.logits, units) > 0.95 and logit_accuracy(out.masked_logits, units) > 0.8
    )


def counting(n, T, D=11):
    "Clips whose units count up, and features that show every second one."
    units = [(torch.arange(2 * T) + i) % 11 for i in range(n)]
    return [(F.one_hot(u[::2], D).float(), u) for u in units]


def test_padded_is_the_same_clips():
    features, units, mask = pad_examples([*counting(1, 5), *counting(1, 3)])
    assert features.shape == (2, 5, 11) and units[1].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        -100,
        -100,
        -100,
        -100,
    ]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2] and not features[1, 3:].any()


def trained(weight):
    seed_everything(3)
    return train_content(ContentEncoder(11, SMALL), counting(6, 8), SMALL, weight, steps=6, batch=4)


def test_a_pair_differs_in_nothing_but_the_weight():
    a, b, other = trained(0.0), trained(0.0), trained(0.5)
    for k, v in a.state_dict().items():
        test_same(v, b.state_dict()[k])
    assert not a.training and (a.masked_head.bias == 0).sum() == 0
    seed_everything(3)
    start = ContentEncoder(11, SMALL)

    def moved(net):
        return (net.masked_head.bias - start.masked_head.bias).abs().max()

    assert moved(other) > 5 * moved(a)  # λ = 0: weight decay alone


def test_judge_is_cross_entropy_and_accuracy_of_each_clip():
    net, clips = ContentEncoder(11, SMALL).eval(), counting(3, 4)
    judged = evaluate_content(net, clips)
    assert judged.shape == (3, len(CONTENT_MEASURES))
    c = net(clips[1][0][None], torch.ones(1, 4, dtype=torch.bool))
    units = clips[1][1]
    by_hand = [
        F.cross_entropy(c.logits[0], units).item(),
        logit_accuracy(c.logits[0], units),
        F.cross_entropy(c.masked_logits[0], units).item(),
        logit_accuracy(c.masked_logits[0], units),
    ]
    test_same(judged[1], torch.tensor(by_hand), atol=1e-5)


def test_a_recorded_gain_has_the_limits_that_were_recorded():
    old = dict(gain=[0.5, -0.1], error=[0.1, 0.02], seeds=[0, 1, 2], clips=[270, 360])
    two_errors = (-0.1, -0.14, -0.06, 0.02)  # to either side
    assert recorded_gain(old, 1)[:4] == pytest.approx(two_errors)
    limits = old | dict(low=[0.1, -0.2], high=[0.9, 0.0])
    assert recorded_gain(limits, 0) == (0.5, 0.1, 0.9, 0.1, 3 * 360)


class Lips(nn.Module):
    def forward(self, lips, mask):
        return F.adaptive_avg_pool2d(lips[:, 0], 3).flatten(2)


def prepared(folder, splits):
    "A folder of short prepared clips, and a model that can look at them."
    from types import SimpleNamespace
    from faces2voices.manifests import Entry, write_manifest
    from faces2voices.corpora import Clip, save_clip
    from faces2voices.units import UnitQuantizer

    entries = []
    for i, split in enumerate(splits):
        g, T = torch.Generator().manual_seed(i), 6 + i % 3

        def grey(*shape):
            return torch.randint(256, shape, generator=g).byte()

        clip = Clip(
            f"c{i}",
            "a",
            "",
            grey(T, 96, 96),
            grey(112, 112, 3),
            torch.zeros(T, 4),
            torch.zeros(0),
            0.1 * torch.randn(640 * T, generator=g),
            *torch.zeros(3, 2 * T),
        )
        save_clip(clip, folder / f"c{i}.npz")
        entries.append(
            Entry(f"c{i}", folder / f"c{i}.mp4", "a", "", split, dict(frames=T, sound=True))
        )
    write_manifest(entries, folder / "manifest.jsonl")
    units = UnitQuantizer(11).fit(
        [0.1 * torch.randn(6400, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    )
    return SimpleNamespace(
        hierarchy=SimpleNamespace(lips=Lips(), lip_input=lambda b: b.lips),
        units=units,
        preset=SMALL,
        device=torch.device("cpu"),
    )


def test_study_from_a_folder(tmp_path, capsys, monkeypatch):
    judged = []

    def noted(*args):
        judged.append(evaluate_content(*args))
        return judged[-1]

    monkeypatch.setattr(studies, "evaluate_content", noted)
    model = prepared(tmp_path, ["train"] * 5 + ["val", "test", "test"])
    seen = lip_features_and_units(model, tmp_path, "train")
    assert len(seen) == 5 and seen[1][0].shape == (7, 9) and seen[1][1].shape == (14,)
    for limit in (1, 2, 3, 5, 9):
        assert len(lip_features_and_units(model, tmp_path, "train", limit=limit)) == min(limit, 5)
    with pytest.raises(CorpusError, match="dev"):
        lip_features_and_units(model, tmp_path, "dev")
    study = masked_ce_study(model, tmp_path, seeds=(0, 1), steps=3, batch=2, limit=4)
    assert study["clips"] == [3, 3] and len(study["runs"]) == 4
    assert len(study["gain"]) == len(study["error"]) == 4
    values = {(r["weight"], r["seed"]): torch.tensor(r["values"]) for r in study["runs"]}
    gain = sum(values[0.5, s] - values[0.0, s] for s in (0, 1)) / 2
    test_same(torch.tensor(study["gain"]), gain, atol=2e-5)
    assert all(
        low <= gain <= high for low, gain, high in zip(study["low"], study["gain"], study["high"])
    )
    gains = torch.stack(judged[2:]) - torch.stack(judged[:2])  # (2 seeds, 3 clips, 4 measures)
    for k in range(4):
        right = crossed_interval(gains[..., k])
        assert (study["low"][k], study["high"][k]) == pytest.approx(right[1:3], abs=2e-5)
    pytest.importorskip("matplotlib").use("Agg")
    plot_masked_ce({"a": study, "b": study})


def test_figure():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    show_receptive_field(ContentEncoder(8, SMALL).eval())
    assert not plt.get_fignums()  # shown and closed


def test_the_vocabulary_of_grid_is_its_grammar():
    from faces2voices.core import GRID_WORDS
    from faces2voices.manifests import GRID_GRAMMAR

    assert GRID_WORDS == tuple(
        chain.from_iterable(words.values() for words in GRID_GRAMMAR.values())
    )


def test_word_loss_is_cross_entropy_where_words_are_known():
    logits, words = torch.randn(2, 5, 4), torch.tensor([[1, 0, 3, -100, 2], [-100] * 5])
    test_same(
        word_loss(logits, words),
        F.cross_entropy(logits[0, [0, 1, 2, 4]], words[0, [0, 1, 2, 4]], label_smoothing=0.1),
        atol=1e-6,
    )
    assert word_loss(logits, torch.full_like(words, -100)) == 0
