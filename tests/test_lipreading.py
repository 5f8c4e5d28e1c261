"Lip encoders: padding, principal pictures, and the encoder that a preset asks for."

from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from lips import batch
from faces2voices.core import EIGENLIPS, GRID, PAPER, TINY, seed_everything, seeded, test_same
from faces2voices.eigenlips import EigenlipEncoder, Eigenlips
from faces2voices.errors import CheckpointError
from faces2voices.layers import Frozen, influence
from faces2voices.lipreading import (
    LipReader,
    SlimLipEncoder,
    load_reader,
    make_lip_encoder,
    mouth_features,
    read_clips,
    stack_frames,
    words_wrong,
)
from faces2voices.mouths import MouthBatch, MouthClip


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


# --- a reader of nine points


def points(B=2, T=40):
    "Mouths that move, in pixels, and their mask: the second is shorter, with rubbish behind it."
    rest = [[-20, 0], [20, 0], [0, -3], [0, 3], [0, 30], [8, -2], [-8, -2], [8, 2], [-8, 2]]
    mouth = torch.tensor(rest).float() + torch.randn(B, T, 9, 2).cumsum(1) / 5
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1:, T // 2 :] = False
    mouth[1:, T // 2 :] = 99.0
    return mouth, mask


@pytest.mark.parametrize("change", ["shift", "turn", "scale"])
def test_features_do_not_know_where_the_mouth_is(change):
    mouth, mask = points()
    angle = torch.tensor(0.4)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    changed = dict(shift=mouth + torch.tensor([30.0, -70]), turn=mouth @ turn, scale=2.5 * mouth)
    # a median of x and y does not turn quite as the points do: a hundredth of the mouth's width
    atol = 0.1 if change == "turn" else 2e-3
    test_same(mouth_features(changed[change], mask), mouth_features(mouth, mask), atol=atol)
    mouth[:, :, 0], mouth[:, :, 1] = torch.tensor([-20.0, 0]), torch.tensor([20.0, 0])
    mouth[:, :, 2:] = mouth[:, :1, 2:].clone()
    mouth[:, ::3, 3:5, 1] += 9.0  # still but for the jaw, which drops in every third frame
    test_same(mouth_features(mouth @ turn, mask), mouth_features(mouth, mask), atol=2e-3)


def test_features_do_not_know_the_mouth_at_rest():
    "Points and their speed; the openings themselves may tell, and do."
    mouth, mask = points()
    other = mouth.clone()
    other[:, :, 4] += torch.tensor([3.0, 12.0])  # a longer chin
    other[:, :, [5, 6], 1] -= 2.0  # a fuller lip
    before, after = mouth_features(mouth, mask), mouth_features(other, mask)
    test_same(after[..., :18], before[..., :18], atol=2e-3)
    test_same(after[..., 28:46], before[..., 28:46], atol=2e-3)
    assert (after[..., 23:28] - before[..., 23:28])[mask].abs().max() > 0.1


def test_features_tell_an_opening_mouth():
    mouth, mask = points(1)
    mouth = mouth[:, :1].repeat(1, 40, 1, 1)
    mouth[:, 20:30, [3, 4, 7, 8], 1] += 10.0
    change = mouth_features(mouth, mask)[0]
    assert not change[:19, :18].any() and (change[20:30, 7] > 1).all()  # the lower lip, down
    assert (change[20, 28 + 7] > 0) and (change[30, 28 + 7] < 0)  # down, and up again


@torch.no_grad()
def test_features_and_reader_do_not_feel_padding():
    mouth, mask = points()
    reader = LipReader(dim=16).eval()
    for see in (mouth_features, reader):
        both = see(mouth, mask)
        assert not both[~mask].any()
        test_same(both[1, :20], see(mouth[1:, :20], mask[1:, :20])[0], atol=1e-4)


@torch.no_grad()
def test_reader_in_training_does_not_feel_padding():
    "Batch norm counts real frames alone."
    mouth, mask = points()
    rubbish = torch.where(mask[..., None, None], mouth, torch.nan)
    seen = []
    for batch in (mouth, rubbish):
        seed_everything(3)
        reader = LipReader(dim=16, dropout=0.0).train()
        seen.append((reader(batch, mask), reader.norm.running_var.clone()))
    test_same(seen[0][0], seen[1][0])
    test_same(seen[0][1], seen[1][1])


def test_features_hold_the_nearest_frame_over_a_gap():
    mouth, mask = points()
    held, gappy = mouth.clone(), mouth.clone()
    gappy[0, 5:8] = torch.nan
    gappy[1, :2] = torch.nan
    held[0, [5, 6, 7]] = mouth[0, [4, 4, 8]]
    held[1, :2] = mouth[1, 2]
    test_same(mouth_features(gappy, mask), mouth_features(held, mask), atol=1e-4)
    lost = torch.full((1, 12, 9, 2), torch.nan)
    whole = torch.ones(1, 12, dtype=torch.bool)
    assert not mouth_features(lost, whole).any()


def test_every_parameter_of_the_reader_learns():
    mouth, mask = points()
    reader = LipReader(dim=16).train()
    words = torch.randint(0, 52, mask.shape).masked_fill(~mask, -100)
    reader.loss(MouthBatch(["a", "b"], mouth, mask, words)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reader.parameters())


def test_words_wrong_counts_words_and_a_clip_too_short_is_all_wrong(monkeypatch):
    reader = LipReader(dim=16).eval()
    said = "bin blue at f two now"
    mouth, words = points(1)[0][0], torch.zeros(40).long()
    clips = [MouthClip(name, "s", said, mouth[:T], words[:T]) for name, T in (("a", 40), ("b", 3))]
    assert read_clips(reader, clips)[1] == "" and words_wrong(reader, clips)[1] == 1
    monkeypatch.setattr(LipReader, "read", lambda self, mouth, mask: ["bin red at f one now"] * 2)
    assert words_wrong(reader, clips).tolist() == pytest.approx([2 / 6, 2 / 6])
    assert words_wrong(reader, []).shape == (0,)


def test_frozen_stays_frozen():
    mouth, mask = points()
    net = nn.Sequential(Frozen(LipReader(dim=16)))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    seen = net.eval()[0](mouth, mask)
    net.train()
    test_same(net[0](mouth, mask), seen)  # no dropout, no statistics of the batch
    assert net[0].training and not net[0].net.training
    assert not [p for p in net.parameters() if p.requires_grad] and not seen.requires_grad
    for name, x in net.state_dict().items():
        test_same(x, before[name])


def test_a_reader_is_loaded_as_it_was_saved(tmp_path):
    mouth, mask = points()
    reader = LipReader(dim=16).train()
    reader(mouth, mask)  # statistics of batch norm that are not the first ones
    save_file(reader.state_dict(), tmp_path / "reader.safetensors")
    with torch.no_grad():
        test_same(
            load_reader(tmp_path / "reader.safetensors")(mouth, mask), reader.eval()(mouth, mask)
        )
    preset = replace(EIGENLIPS, lip_encoder="landmarks", reader_dim=8)
    encoder = make_lip_encoder(preset, tmp_path / "reader.safetensors")
    assert isinstance(encoder, Frozen) and encoder.dim == 16


def points_and_pixels(folder, encoder="landmarks+eigenlips"):
    "An encoder of a few clips that its eigenlips know, and what it sees of them."
    mouth, mask = points()
    pixels = torch.rand(len(mouth), 1, mouth.shape[1], 88, 88)
    reader = LipReader(dim=16)
    save_file(reader.state_dict(), folder / "reader.safetensors")
    preset = replace(GRID, lip_encoder=encoder, eigenlips=8, lip_memory=8, reader_dim=16)
    encoder = make_lip_encoder(preset, folder / "reader.safetensors").eval()
    seeded(0, lambda: encoder.fit(pixels, mask))
    encoder.strange.fill_(torch.inf)
    return encoder, reader.eval(), mouth, pixels, mask


def test_points_and_pixels_stand_side_by_side_and_one_may_be_silent_in_training(tmp_path):
    encoder, reader, mouth, pixels, mask = points_and_pixels(tmp_path)
    both = encoder((mouth, pixels), mask)
    assert both.shape[-1] == encoder.dim == 16 + 16
    test_same(both[..., :16], reader(mouth, mask))
    test_same(both[..., 16:], encoder.pixels(pixels, mask))
    encoder.train()
    silent = set()
    for _ in range(30):
        out = encoder((mouth, pixels), mask)
        lost = [not kind.any() for kind in out[0].split(16, -1)]
        silent.add(tuple(lost))
        if not lost[0]:
            test_same(out[0, :, :16], both[0, :, :16])  # frozen: no dropout, no batch statistics
    assert silent == {(False, False), (True, False), (False, True)}


@torch.no_grad()
def test_pixels_are_not_believed_of_a_mouth_that_the_eigenlips_do_not_know(tmp_path):
    encoder, reader, mouth, pixels, mask = points_and_pixels(tmp_path)
    encoder.strange.copy_(encoder.pixels.strangeness(pixels[:1], mask[:1]).max())
    pixels[1:] = pixels[1:].flip(-1).square()  # other mouths
    seen = encoder((mouth, pixels), mask)[..., 16:]
    assert seen[:1].any() and not seen[1:].any()
    words = encoder.read(encoder((mouth, pixels), mask))
    test_same(words[1:], reader.head(reader(mouth, mask))[1:].log_softmax(-1), atol=1e-5)


def test_what_no_eigenlip_draws_is_measured_as_a_projection_leaves_it():
    eigen, (lips, mask) = Eigenlips(8, 88), batch()
    eigen.fit(lips, mask)
    x = eigen.normalize(lips, mask) - eigen.mean
    rest = x - x @ torch.linalg.pinv(eigen.basis.T) @ eigen.basis.T
    expected = rest.square().mean(1).split(mask.sum(1).tolist())
    test_same(eigen.strangeness(lips, mask), torch.stack([r.mean() for r in expected]), atol=1e-5)


def test_words_of_points_and_of_pixels_are_multiplied_and_only_the_pixels_learn(tmp_path):
    encoder, reader, mouth, pixels, mask = points_and_pixels(tmp_path)
    features = encoder((mouth, pixels), mask)
    beliefs = encoder.read(features).softmax(-1)
    by_points = reader.head(features[..., :16]).softmax(-1)
    by_pixels = encoder.pixel_words(features[..., 16:]).softmax(-1)
    product = by_points * by_pixels
    test_same(beliefs[mask], (product / product.sum(-1, keepdim=True))[mask], atol=1e-5)
    encoder.train()
    test_same(encoder.read(features)[mask], encoder.pixel_words(features[..., 16:])[mask])
    blind = torch.cat([features[..., :16], 0 * features[..., 16:]], -1)
    test_same(encoder.read(blind), reader.head(features[..., :16]))
    encoder.read(features).square().mean().backward()
    assert encoder.pixel_words.weight.grad.any()
    assert all(p.grad is None for p in encoder.points.parameters())


def test_a_file_that_holds_no_reader_is_named(tmp_path):
    path = tmp_path / "reader.safetensors"
    whole = LipReader(dim=16).state_dict()
    wrong = [
        dict(x=torch.zeros(3)),
        {k: v for k, v in whole.items() if not k.startswith("blocks.3")},
        whole | dict(other=torch.zeros(2)),
        whole | {"conv.weight": torch.zeros(16, 50, 5)},
    ]
    for state in wrong:
        save_file(state, path)
        with pytest.raises(CheckpointError, match="reader.safetensors"):
            load_reader(path)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(CheckpointError, match="reader.safetensors"):
        load_reader(path)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_reader(tmp_path / "nowhere")
