"Oracles of the decoder lesson: torch's own layers, the law of padding, the identities of sampling."

import json
import sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from faces2voices.errors import CheckpointError
from faces2voices.core import PAPER, TINY, test_same as same
from faces2voices.decoder import (
    Attention,
    ChannelNorm,
    Decoder,
    FiLMResBlock,
    UNet,
    mel_error,
    mel_noise,
    time_embedding,
)
from faces2voices.matcha import MatchaDecoder, SnakeBeta, load_matcha
from faces2voices.flow import cfm_loss, gaussian_field
from faces2voices.solvers import guide, rk4, time_grid

sys.path.insert(0, str(Path(__file__).with_name("matcha")))
from official import FILE, SIZES, inputs as matcha_inputs, official, weights

SMALL = replace(TINY, decoder_channels=(32, 48), decoder_mid=1)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make(preset=SMALL):
    "A decoder whose zero layers are shaken, so that it says something."
    torch.manual_seed(0)
    d = Decoder(preset).eval()
    for p in (*d.out.parameters(), *d.gates.parameters()):
        nn.init.normal_(p, std=0.1)
    return d


def inputs(B=2, L=37, seed=0):
    def r(*s):
        return torch.randn(*s, generator=gen(seed + len(s) + s[0]))

    return (
        r(B, 80, L),
        torch.rand(B, generator=gen(seed)),
        torch.randn(B, 80, L, generator=gen(seed + 9)),
        torch.ones(B, 1, L),
        F.normalize(r(B, 256), dim=1),
    )


def test_channel_norm_is_torchs_rms_norm():
    x, norm = torch.randn(2, 16, 5), ChannelNorm(16)
    nn.init.normal_(norm.weight)
    same(
        norm(x),
        F.rms_norm(x.transpose(1, 2), (16,), norm.weight[:, 0], 1e-5).transpose(1, 2),
        atol=1e-5,
    )


def test_time_embedding_by_hand():
    e = time_embedding(torch.tensor([0.0, 0.25]), 8, scale=1000.0)
    same(e[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    freqs = torch.tensor([1e4 ** (-i / 3) for i in range(4)])
    same(e[1], torch.cat([(250 * freqs).sin(), (250 * freqs).cos()]), atol=1e-4)


@torch.no_grad()
def test_attention_is_torchs_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(128), nn.MultiheadAttention(128, 2, batch_first=True)
    theirs.in_proj_weight.copy_(ours.qkv.weight)
    theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, mask = torch.randn(2, 128, 9), torch.ones(2, 1, 9)
    mask[1, :, 5:] = 0
    h = ours.norm(x.transpose(1, 2))
    y = x.transpose(1, 2) + theirs(h, h, h, key_padding_mask=mask[:, 0] == 0, need_weights=False)[0]
    same(ours(x, mask), (y + ours.mlp(y)).transpose(1, 2), atol=1e-5)


def test_resblock_film_is_scale_and_shift():
    block = FiLMResBlock(4, 6, 3)
    x, mask, emb = torch.randn(2, 4, 5), torch.ones(2, 1, 5), torch.randn(2, 3)
    scale, shift = block.film(emb)[:, :, None].chunk(2, 1)
    h = F.mish(block.first.norm(block.first.conv(x)) * (1 + scale) + shift)
    h = F.mish(block.second.norm(block.second.conv(h)))
    same(block(x, mask, emb), block.shortcut(x) + h, atol=1e-6)


@pytest.mark.parametrize("channels", [(16,), (16, 24), (16, 24, 32)])
def test_unet_keeps_the_length_at_any_depth(channels):
    unet = UNet(160, channels, 1, 8)
    h = unet(torch.randn(2, 160, 12), torch.ones(2, 1, 12), torch.randn(2, 8))
    assert h.shape == (2, channels[0], 12)


def test_starts_at_zero_and_every_parameter_learns():
    torch.manual_seed(0)
    d, (xt, t, mu, mask, speaker) = Decoder(SMALL), inputs()
    same(d(xt, t, mu, mask, speaker), torch.zeros_like(xt))
    d = make()
    d.loss(xt, mask, mu, speaker, gen()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in d.parameters())


def test_sizes():
    def n(preset):
        return sum(w.numel() for w in Decoder(preset).parameters()) / 1e6

    assert n(TINY) <= 2.2 and n(TINY) < n(PAPER)


@torch.no_grad()
@pytest.mark.parametrize("preset", [SMALL, TINY], ids=["small", "tiny"])
@pytest.mark.parametrize("pad", [1, 2, 3, 11, 40])
def test_padding_changes_nothing(preset, pad):
    d, (xt, t, mu, mask, speaker) = make(preset), inputs()
    v = d(xt, t, mu, mask, speaker)
    dirty = d(
        F.pad(xt, (0, pad), value=9.0),
        t,
        F.pad(mu, (0, pad), value=-7.0),
        F.pad(mask, (0, pad)),
        speaker,
    )
    same(dirty[..., :37], v, atol=1e-4)
    same(dirty[..., 37:], torch.zeros(2, 80, pad))


@torch.no_grad()
def test_items_of_a_batch_do_not_meet():
    d, (xt, t, mu, mask, speaker) = make(), inputs(3, 20)
    mask[1, :, 7:] = 0
    v = d(xt, t, mu, mask, speaker)
    for i, n in enumerate((20, 7, 20)):
        one = slice(i, i + 1)
        same(
            v[one, :, :n],
            d(xt[one, :, :n], t[one], mu[one, :, :n], mask[one, :, :n], speaker[one]),
            atol=1e-4,
        )


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 50])
def test_any_length_alone(length):
    d, (xt, t, mu, mask, speaker) = make(), inputs(1, length)
    v = d(xt, t, mu, mask, speaker)
    assert v.shape == (1, 80, length) and v.isfinite().all()
    same(d(xt, t[0], mu, mask.bool(), speaker), v)  # one time for all, a mask of booleans


@torch.no_grad()
def test_every_input_is_heard():
    d, (xt, t, mu, mask, speaker) = make(), inputs()
    v = d(xt, t, mu, mask, speaker)
    for other in (
        d(-xt, t, mu, mask, speaker),
        d(xt, 1 - t, mu, mask, speaker),
        d(xt, t, -mu, mask, speaker),
        d(xt, t, mu, mask, -speaker),
    ):
        assert (v - other).abs().max() > 1e-3


def test_loss_is_cfm_loss_and_drops_whole_conditions():
    xt, t, mu, mask, speaker = inputs(4, 12)
    never = make(replace(SMALL, condition_drop=0.0))
    always = make(replace(SMALL, condition_drop=1.0))

    def expected(c):
        g = gen(5)
        torch.rand(4, generator=g)  # the draw that decides who loses the condition
        return cfm_loss(lambda x, s: never(x, s, c * mu, mask, c * speaker), xt, mask, generator=g)

    same(never.loss(xt, mask, mu, speaker, gen(5)), expected(1.0), atol=1e-6)
    same(always.loss(xt, mask, mu, speaker, gen(5)), expected(0.0), atol=1e-6)


def test_dropping_is_per_item_and_at_the_stated_rate():
    d, seen = make(replace(SMALL, condition_drop=0.25)), []
    d.forward = lambda xt, t, mu, mask, speaker: seen.append((mu, speaker)) or 0 * xt
    d.loss(
        torch.zeros(2000, 80, 1),
        torch.ones(2000, 1, 1),
        torch.ones(2000, 80, 1),
        torch.ones(2000, 256),
        gen(),
    )
    mu, speaker = seen[0]
    dropped = speaker[:, 0] == 0
    assert ((mu[:, 0, 0] == 0) == dropped).all()
    assert 0.21 < dropped.float().mean() < 0.29


def test_noise_depends_on_the_seed_alone():
    for long, short in ((50, 20), (33, 1), (301, 300)):
        same(mel_noise(long, [4])[..., :short], mel_noise(short, [3, 4])[1:])
    assert (mel_noise(9, [1]) != mel_noise(9, [2])).all()
    assert abs(mel_noise(500, [0]).std() - 1) < 0.02


def test_sampling_is_deterministic_and_blind_to_its_neighbours():
    d, (_, _, mu, mask, speaker) = make(), inputs()
    x = d.sample(mu, mask, speaker, steps=3, seed=2)
    same(d.sample(mu, mask, speaker, steps=3, seed=2), x)
    same(d.sample(mu[1:], mask[1:], speaker[1:], steps=3, seed=2), x[1:], atol=1e-4)
    padded = d.sample(F.pad(mu, (0, 9), value=5.0), F.pad(mask, (0, 9)), speaker, steps=3, seed=2)
    same(padded[..., :37], x, atol=1e-4)
    same(d.sample(mu, mask, speaker, steps=3, seed=[7, 2])[1:], x[1:], atol=1e-4)
    assert (d.sample(mu, mask, speaker, steps=3, seed=3) - x).abs().max() > 0.1


def test_sampling_is_the_solver_on_the_field():
    d, (_, _, mu, mask, speaker) = make(), inputs()
    with torch.no_grad():
        xs = rk4(lambda x, t: d(x, t, mu, mask, speaker), 0.5 * mel_noise(37, [0, 0]), time_grid(2))
    same(
        d.sample(mu, speaker=speaker, steps=2, solver=rk4, temperature=0.5, trajectory=True),
        xs,
        atol=1e-5,
    )
    same(d.sample(mu, steps=2), d.sample(mu, mask, 0 * speaker, steps=2))


def test_sampling_from_given_noise_and_with_no_steps():
    d, (_, _, mu, mask, speaker) = make(), inputs()
    kw = dict(steps=3, temperature=0.6)
    x = d.sample(mu, mask, speaker, x0=mel_noise(37, [4, 5]), **kw)
    same(x, d.sample(mu, mask, speaker, seed=[4, 5], **kw))
    same(d.sample(mu, mask, speaker, steps=0), mu)
    assert d.sample(mu, steps=0, trajectory=True).shape == (1, 2, 80, 37)


def test_guidance_of_the_field():
    d, (xt, t, mu, mask, speaker) = make(), inputs()
    t = torch.tensor(0.3)
    with torch.no_grad():
        c, u = d(xt, t, mu, mask, speaker), d(xt, t, 0 * mu, mask, 0 * speaker)
        for w in (0.0, 1.0, 2.5):
            same(d.field(mu, mask, speaker, w)(xt, t), guide(c, u, w), atol=1e-5)


def test_state_survives_a_round_trip(tmp_path):
    from safetensors.torch import load_file

    a, (xt, t, mu, mask, speaker) = make(), inputs()
    save_file(a.state_dict(), tmp_path / "decoder.safetensors")
    b = Decoder(SMALL)
    b.load_state_dict(load_file(tmp_path / "decoder.safetensors"))
    same(b(xt, t, mu, mask, speaker), a(xt, t, mu, mask, speaker))


def test_it_learns_one_mel():
    torch.manual_seed(0)
    d = Decoder(SMALL)
    x1 = torch.linspace(-1, 1, 80)[:, None] * torch.cos(torch.arange(16) / 3)[None]
    x1, mask, speaker = x1[None].expand(8, -1, -1), torch.ones(8, 1, 16), torch.zeros(8, 256)
    opt = torch.optim.Adam(d.parameters(), 3e-3)
    for _ in range(120):
        loss = d.loss(x1, mask, x1, speaker)
        opt.zero_grad()
        loss.backward()
        opt.step()
    x = d.eval().sample(x1[:1], speaker=speaker[:1], steps=8)
    assert mel_error(x, x1[:1]).item() < 0.5 * mel_error(mel_noise(16, [0]), x1[:1]).item()


# --- the residual as what the noise becomes

RESIDUAL = replace(SMALL, flow_target="residual", condition_drop=0.0)


def scaled(preset=RESIDUAL):
    "A decoder of the residual form whose scale differs from bin to bin."
    d = make(preset)
    d.residual_scale.copy_(torch.linspace(0.1, 0.6, 80))
    return d


def test_scale_is_the_root_mean_square_of_the_residual_over_all_frames():
    d, mu = make(RESIDUAL), torch.randn(80, 30, generator=gen())
    lengths = 10, 20  # a longer clip counts for more
    rests = [c * torch.ones(80, n) for c, n in zip((1.0, 2.0), lengths)]
    for rest in rests:
        rest[0] = 0.0  # a bin that never varies
    parts = mu.split(lengths, 1)
    d.measure_scale((m + r, m) for m, r in zip(parts, rests))
    expected = torch.full((80,), ((10 * 1 + 20 * 4) / 30) ** 0.5)
    expected[0] = 0.01
    same(d.residual_scale, expected, atol=1e-6)


@torch.no_grad()
def test_both_forms_turn_round_exactly():
    _, _, mu, mask, _ = inputs()
    mel = torch.randn(2, 80, 37, generator=gen(3))
    d = scaled()
    same(d.to_flow(mel, mu)[0, 79], (mel - mu)[0, 79] / 0.6, atol=1e-5)
    same(d.from_flow(d.to_flow(mel, mu), mu), mel, atol=1e-5)
    plain = make()
    same(plain.to_flow(mel, mu), mel)
    same(plain.from_flow(mel, mu), mel)


def test_the_loss_is_that_of_the_scaled_residual():
    d, (mel, _, mu, mask, speaker) = scaled(), inputs(4, 12)
    g = gen(5)
    torch.rand(4, generator=g)  # the draw that decides who loses the condition
    x1 = (mel - mu) / d.residual_scale[:, None]
    expected = cfm_loss(lambda x, t: d(x, t, mu, mask, speaker), x1, mask, generator=g)
    same(d.loss(mel, mask, mu, speaker, gen(5)), expected, atol=1e-6)


def test_a_dropped_condition_leaves_the_residual_what_it_was():
    d, (mel, _, mu, mask, speaker) = scaled(replace(RESIDUAL, condition_drop=1.0)), inputs(4, 12)
    x1, g = d.to_flow(mel, mu), gen(5)
    torch.rand(4, generator=g)
    expected = cfm_loss(lambda x, t: d(x, t, 0 * mu, mask, 0 * speaker), x1, mask, generator=g)
    same(d.loss(mel, mask, mu, speaker, gen(5)), expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_exact_field_of_a_gaussian_residual_draws_it(temperature, guidance):
    "Given μ the mel is N(μ, s²), so x' is standard normal and its field is known."
    d, mu = scaled(), torch.randn(1, 80, 2000, generator=gen(1))
    d.forward = lambda xt, t, mu, mask, speaker: gaussian_field(xt, t, 0.0, 1.0) * mask
    x = d.sample(mu, steps=20, temperature=temperature, guidance=guidance, solver=rk4, seed=4)
    rest = x - mu
    same(rest.std(2)[0], temperature * d.residual_scale, atol=0.04)
    same(rest.mean(), torch.tensor(0.0), atol=0.01)


@torch.no_grad()
def test_every_stop_of_the_way_is_a_mel_and_padding_is_empty():
    d, (_, _, mu, mask, speaker) = scaled(), inputs()
    mask[1, :, 20:] = 0
    way = d.sample(mu, mask, speaker, steps=3, seed=[1, 2], trajectory=True)
    noise = mel_noise(37, [1, 2])
    same(way[0], (mu + d.residual_scale[:, None] * noise) * mask, atol=1e-5)
    same(way[:, 1, :, 20:], torch.zeros(4, 80, 17))
    same(way[-1], d.sample(mu, mask, speaker, steps=3, seed=[1, 2]))
    same(d.sample(mu, mask, speaker, steps=0), mu)


def test_the_scale_is_stored_and_a_model_without_it_is_of_matchas_form():
    d = scaled()
    again = Decoder(RESIDUAL)
    again.load_state_dict(d.state_dict())
    same(again.residual_scale, torch.linspace(0.1, 0.6, 80))
    assert "residual_scale" not in Decoder(SMALL).state_dict()
    with pytest.raises(RuntimeError, match="residual_scale"):
        again.load_state_dict(make().state_dict())  # weights of the other form


def test_presets_without_the_new_choices_are_of_the_old_form():
    old = TINY.to_json()
    del old["flow_target"], old["flow_times"]
    preset = type(TINY).from_json(old)
    assert (preset.flow_target, preset.flow_times) == ("mel", "uniform")
    assert PAPER.flow_target == "mel"
    for wrong in (dict(flow_target="mu"), dict(flow_times="normal")):
        with pytest.raises(CheckpointError):
            type(TINY).from_json(TINY.to_json() | wrong)


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_the_loss_draws_its_times_as_the_preset_says(times):
    "What the exact field of a standard normal residual pays: the mean of 1 / (t² + (1 − t)²)."
    d = scaled(replace(RESIDUAL, flow_times=times))
    d.forward = lambda xt, t, mu, mask, speaker: gaussian_field(xt, t, 0.0, 1.0)
    s = d.residual_scale[:, None]
    mel = s * torch.randn(6000, 80, 4, generator=gen())
    paid = d.loss(mel, torch.ones(6000, 1, 4), 0 * mel, torch.zeros(6000, 256), gen(1))
    p = (torch.arange(200_000) + 0.5) / 200_000
    t = p if times == "uniform" else torch.special.ndtri(p).sigmoid()
    same(paid.detach(), (1 / (t**2 + (1 - t) ** 2)).mean(), atol=0.01)


# --- the decoder of Matcha-TTS


def recorded(name):
    "What Matcha's own module said, and the weights that it had."
    with safe_open(FILE, "pt") as file:
        return file.get_tensor(name), weights(json.loads(file.metadata()["shapes"])[name])


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_matchas_weights_give_matchas_answer(name, tmp_path):
    "Down to padding, levels, transformer blocks, a speaker; through a file, under Matcha's names."
    answer, state = recorded(name)
    save_file(state, tmp_path / "matcha.safetensors")
    xt, t, mu, mask, who = matcha_inputs(SIZES[name])
    model = load_matcha(tmp_path / "matcha.safetensors", heads=SIZES[name]["num_heads"])
    same(model(xt, t, mu, mask, who), answer, atol=1e-5)


@torch.no_grad()
def test_matchas_own_module_says_the_same_where_it_is_installed():
    pytest.importorskip(
        "matcha.models.components.decoder",
        reason="matcha-tts is not installed (see tests/matcha/official.py)",
    )
    answer, state = recorded("deep")
    theirs = official(**SIZES["deep"])
    theirs.load_state_dict(state)
    xt, t, mu, mask, who = matcha_inputs(SIZES["deep"])
    same(theirs(xt, mask, mu, t, spks=who), answer, atol=1e-5)


def test_a_whole_matcha_checkpoint_is_read_and_others_are_refused(tmp_path):
    _, state = recorded("deep")
    whole = {f"decoder.estimator.{k}": w for k, w in state.items()}
    whole["encoder.emb.weight"] = torch.ones(2)
    torch.save(dict(state_dict=whole), tmp_path / "whole.ckpt")
    torch.save(state, tmp_path / "plain.pt")
    a, b = [load_matcha(tmp_path / n, heads=3).state_dict() for n in ("whole.ckpt", "plain.pt")]
    for k in a:
        same(a[k], b[k])
    torch.save(dict(state_dict={}), tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    torn = {k: w for k, w in state.items() if "mid" not in k}
    torn["mid_blocks.0.0.mlp.1.weight"] = torch.ones(2)
    torch.save(torn, tmp_path / "torn.pt")
    for name in ("empty.pt", "text.pt", "torn.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_matcha(tmp_path / name)


def test_snake_by_hand_and_every_weight_of_matchas_layout_learns():
    snake, x = SnakeBeta(3), torch.randn(2, 5, 3)
    nn.init.normal_(snake.alpha)
    nn.init.normal_(snake.beta)
    same(snake(x), x + (x * snake.alpha.exp()).sin() ** 2 / snake.beta.exp(), atol=1e-5)
    torch.manual_seed(0)
    net = MatchaDecoder(channels=(16, 16), heads=2, head_dim=8)
    xt, t, mu, mask, _ = matcha_inputs(SIZES["deep"])
    net(xt, t, mu, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters())
