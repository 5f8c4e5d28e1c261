"The vocoder: shapes, published layout, weight norm, known losses, and a run that learns."

import math
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from faces2voices.errors import CheckpointError
from faces2voices.core import PAPER, TINY, seed_everything, test_same as same
from faces2voices.audio import MEL, pitch, vowel
from faces2voices.hifigan import HIFIGAN, hifigan, load_hifigan
from faces2voices.statistics import paired_difference
from faces2voices.streaming import context_columns, stream_with_context, vocode_stream
from faces2voices.vocoder import (
    FFT_BINS,
    Generator,
    Source,
    SourceFilter,
    copy_synthesis,
    discriminator_loss,
    excitation,
    fold,
    full_discriminators,
    make_vocoder,
    mel_loss,
    n_weights,
    noise_stream,
    period_discriminator,
    scale_discriminator,
    segment_batches,
    slim_discriminators,
    degrade_mel,
    istft,
    stft,
    stft_loss,
    spectral_envelope,
)
from faces2voices.training import train_vocoder
from faces2voices.studies import COPY_MEASURES, compare_copies, copy_study

SMALL = replace(
    PAPER,
    vocoder_channels=64,
    vocoder_kernels=(3, 7),
    vocoder_dilations=((1,), (3,)),
    steps=dict(vocoder=6),
    batch=dict(vocoder=2),
    lr=dict(vocoder=2e-3),
)
DRIVEN = replace(
    TINY, vocoder_channels=24, vocoder_blocks=2, batch=dict(vocoder=2), lr=dict(vocoder=2e-3)
)


@pytest.fixture
def generator():
    seed_everything(0)
    return Generator(SMALL).eval()


@pytest.mark.parametrize("L", [1, 2, 3, 50, 401])
def test_length_is_exact(generator, L):
    out = generator(torch.randn(2, 80, L))
    assert out.shape == (2, 160 * L) and out.dtype == torch.float32 and out.abs().max() <= 1


def test_removing_weight_norm_changes_nothing(generator):
    mel = torch.randn(1, 80, 30)
    with torch.inference_mode():
        before = generator(mel)
        assert generator.remove_weight_norm() is generator
        same(before, generator(mel), atol=1e-5)
    assert {k.rsplit(".", 1)[1] for k in generator.state_dict()} == {"weight", "bias"}


def published_state(preset):
    "A checkpoint with the names and shapes of HiFi-GAN's own code, written out by hand."
    c, state = preset.vocoder_channels, {}

    def put(name, shape, g):
        state.update(
            {
                f"{name}.weight_v": torch.randn(shape) * 0.05,
                f"{name}.weight_g": torch.rand(g, 1, 1) + 0.5,
                f"{name}.bias": torch.randn(shape[1] if name.startswith("ups") else shape[0]) * 0.1,
            }
        )

    put("conv_pre", (c, 80, 7), c)
    for i, k in enumerate((11, 8, 4, 4, 4)):
        put(f"ups.{i}", (c >> i, c >> i + 1, k), c >> i)
        for j, (kernel, dilations) in enumerate(
            zip(preset.vocoder_kernels, preset.vocoder_dilations)
        ):
            w = c >> i + 1
            for d in range(len(dilations)):
                for part in ("convs1", "convs2"):
                    put(
                        f"resblocks.{len(preset.vocoder_kernels) * i + j}.{part}.{d}",
                        (w, w, kernel),
                        w,
                    )
    put("conv_post", (1, c >> 5, 7), 1)
    return state


@pytest.mark.parametrize("preset", [SMALL, PAPER], ids=["small", "paper"])
def test_published_layout_loads_strictly(tmp_path, preset):
    state = published_state(preset)
    torch.save({"generator": state}, tmp_path / "g")
    g = load_hifigan(tmp_path / "g", preset)
    v, s = state["ups.1.weight_v"], state["ups.1.weight_g"]
    same(g.ups[1].weight, s * v / v.flatten(1).norm(dim=1)[:, None, None], atol=1e-5)
    same(g.conv_pre.bias, state["conv_pre.bias"])


def test_the_third_size_loads_from_its_own_names(tmp_path):
    "V3 has `convs` where V1 and V2 have `convs1` and `convs2`; a file has weight_g and weight_v."
    g = hifigan("V3").eval()
    old = {}
    for name, weight in g.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        old[name.replace("parametrizations.weight.original1", "weight_v")] = weight
    assert {"resblocks.0.convs.1.weight_g", "ups.4.weight_v", "conv_post.bias"} <= set(old)
    assert len(old) == 3 * (2 + 5 + 15 * 2)
    torch.save({"generator": old}, tmp_path / "g")
    mel, loaded = torch.randn(1, 80, 9), load_hifigan(tmp_path / "g", "V3")
    with torch.inference_mode():
        same(loaded.remove_weight_norm()(mel), g(mel), atol=1e-5)


def test_a_wrong_checkpoint_is_named(tmp_path):
    torch.save({"generator": published_state(SMALL)}, tmp_path / "g")
    with pytest.raises(CheckpointError, match="512 channels"):
        load_hifigan(tmp_path / "g", PAPER)
    with pytest.raises(CheckpointError, match="no such file"):
        load_hifigan(tmp_path / "h", PAPER)


@pytest.mark.parametrize("name", HIFIGAN)
def test_published_sizes(name):
    """Table 1 of HiFi-GAN: 13.92, 0.92 and 1.46 M weights.

    At hop 160 they are still of that order, and make 160 samples of a column.
    """
    assert abs(n_weights(hifigan(name, published=True)) / 1e6 - HIFIGAN[name].published) < 0.01
    assert 0.8 < n_weights(hifigan(name)) / 1e6 / HIFIGAN[name].published < 1
    assert hifigan("V3")(torch.randn(1, 80, 3)).shape == (1, 480)


def test_first_size_is_exact():
    assert n_weights(hifigan("V1", published=True)) == 13_926_017


def test_full_discriminators_have_the_published_sizes():
    "HiFi-GAN's MPD has 41.1 M and its MSD 29.6 M weights, as anyone's count of them shows."

    def count(make, keys):
        return sum(n_weights(make(k)) for k in keys)

    assert count(period_discriminator, (2, 3, 5, 7, 11)) == 5 * (
        32 * 5
        + 32
        + 128 * 32 * 5
        + 128
        + 512 * 128 * 5
        + 512
        + 1024 * 512 * 5
        + 1024
        + 1024 * 1024 * 5
        + 1024
        + 1024 * 3
        + 1
    )
    scale = (
        128 * 15
        + 128
        + 128 * 32 * 41
        + 128
        + 256 * 8 * 41
        + 256
        + 512 * 16 * 41
        + 512
        + 1024 * 32 * 41
        + 1024
        + 1024 * 64 * 41
        + 1024
        + 1024 * 1024 * 5
        + 1024
        + 1024 * 3
        + 1
    )
    assert count(scale_discriminator, (0, 1, 2)) == 3 * scale


def test_discriminators_score_every_size_of_sound():
    for discriminators in (full_discriminators(), slim_discriminators()):
        seen = discriminators(torch.randn(2, 4001))
        assert len(seen) == 8 and all(layers[-1].shape[:2] == (2, 1) for layers in seen)


def test_fold_keeps_order_and_reflects_the_rest():
    same(fold(torch.arange(7.0)[None], 3)[0, 0], torch.tensor([[0.0, 1, 2], [3, 4, 5], [6, 5, 4]]))


def test_the_context_is_local(generator):
    r, mel = context_columns(generator), torch.randn(1, 80, 100)
    other = mel.clone()
    other[..., 60:] += 1
    with torch.inference_mode():
        a, b = generator(mel), generator(other)
    same(a[:, : (60 - r) * 160], b[:, : (60 - r) * 160], atol=1e-6)
    assert (a[:, (60 - r) * 160 : 60 * 160] - b[:, (60 - r) * 160 : 60 * 160]).abs().max() > 0


def test_pieces_join_without_a_seam(generator):
    r, mel = context_columns(generator), torch.randn(1, 80, 100)
    with torch.inference_mode():
        whole, piece = generator(mel), generator(mel[..., 40 - r : 60 + r])
    same(piece[:, r * 160 : -r * 160], whole[:, 40 * 160 : 60 * 160], atol=1e-5)


def test_losses_with_known_values():
    x = torch.randn(2, 8000) * 0.1
    same(mel_loss(x, x), torch.tensor(0.0))
    same(stft_loss(x, x), torch.tensor(0.0), atol=1e-6)
    same(mel_loss(x / 10, x), torch.tensor(math.log(10)), atol=0.02)
    same(stft_loss(x / 10, x), torch.tensor(0.9 + math.log(10)), atol=0.02)
    ones, zeros = [[torch.ones(3, 1)]] * 8, [[torch.zeros(3, 1)]] * 8
    assert discriminator_loss(ones, zeros) == 0 and discriminator_loss(zeros, ones) == 16


def test_stft_loss_has_a_gradient_in_silence():
    x = torch.zeros(1, 8000, requires_grad=True)
    (stft_loss(x, torch.randn(1, 8000)) + mel_loss(x, torch.randn(1, 8000))).backward()
    assert x.grad.isfinite().all()


def test_segments_belong_together():
    wav = vowel(torch.linspace(100, 200, 24000))
    draw = segment_batches([wav, wav[:3000]], 6)
    b = draw(3)
    assert b.mel.shape == (6, 80, 50) and b.wav.shape == (6, 8000) and len(b.names) == 6
    same(b.mel[..., 2:-2], MEL(b.wav)[..., 2:-2], atol=1e-3)
    same(b.wav, draw(3).wav)
    assert (b.wav - draw(4).wav).abs().max() > 0


def test_degrading_leaves_about_half_alone():
    mel = torch.randn(400, 80, 12)
    out = degrade_mel(mel, torch.Generator().manual_seed(0))
    same_ones = (out == mel).flatten(1).all(1).float().mean()
    assert 0.4 < same_ones < 0.6 and out.isfinite().all()
    flat = torch.full((40, 80, 12), -3.0)
    out = degrade_mel(flat, torch.Generator().manual_seed(1))
    assert (out.mean() + 3).abs() < 0.05  # a kernel of weight 1


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_as_many_mels_are_softened_as_was_asked(share):
    mel = torch.randn(400, 80, 12)
    out = degrade_mel(mel, torch.Generator().manual_seed(0), share)
    assert (out != mel).flatten(1).any(1).float().mean().item() == pytest.approx(share, abs=0.06)


def sounds():
    return [vowel(torch.linspace(90 + 10 * i, 200 - 10 * i, 16000)) for i in range(4)]


def test_training_resumes_and_learns_in_both_phases(tmp_path):
    a, b = Generator(SMALL), Generator(SMALL)
    log = train_vocoder(sounds(), a, SMALL, run_dir=tmp_path, plain_share=0.5)
    assert {"mel", "stft"} <= set(log[0])
    assert {"feature", "adversarial", "discriminators_total"} <= set(log[-1])
    train_vocoder(sounds(), b, SMALL, run_dir=tmp_path, plain_share=0.5)  # finished: only loads
    same(a.conv_pre.weight, b.conv_pre.weight)


def test_sixty_steps_cut_the_error_by_half():
    seed_everything(0)
    g, preset = Generator(SMALL), replace(SMALL, steps=dict(vocoder=60))
    wav = sounds()[0]
    before = mel_loss(copy_synthesis(g, wav)[None], wav[None])
    train_vocoder(sounds(), g, preset, plain_share=1.0)
    assert mel_loss(copy_synthesis(g, wav)[None], wav[None]) < before / 2


def glide():
    return torch.linspace(math.log(100), math.log(180), 50)


def glided():
    fine = F.interpolate(glide()[None, None].double(), scale_factor=320, mode="linear")
    return vowel(fine[0, 0].exp())


@pytest.fixture
def shaper():
    "A SourceFilter whose gains say something."
    seed_everything(0)
    g = SourceFilter(DRIVEN).eval()
    torch.nn.init.normal_(g.gains.weight, std=0.1)
    return g


@pytest.mark.parametrize("L", [4, 50])
def test_a_driven_vocoder_keeps_the_length(shaper, L):
    out = shaper(torch.randn(2, 80, L) - 5, torch.randn(2, 2, 160 * L) * 0.1)
    assert out.shape == (2, 160 * L) and out.isfinite().all()


def test_an_untrained_network_is_the_filter_alone():
    wav = glided()
    mel, e = MEL(wav)[None], excitation(glide(), torch.ones(50))[None]
    alone = istft(stft(e.sum(1)) * spectral_envelope(mel, e.sum(1)).exp())
    with torch.inference_mode():
        same(SourceFilter(DRIVEN)(mel, e), alone, atol=1e-5)


def test_a_clip_does_not_hear_its_neighbour_in_the_batch(shaper):
    mel, e = torch.randn(3, 80, 20) - 5, torch.randn(3, 2, 3200) * 0.1
    with torch.inference_mode():
        same(shaper(mel, e)[1:2], shaper(mel[1:2], e[1:2]), atol=1e-5)


def test_gains_are_those_of_channel_and_bin(shaper):
    "A bias of ln 2 doubles the tones, and leaves the hiss; a turn of π turns it upside down."
    mel = torch.full((1, 80, 30), -5.0)
    e = torch.randn(1, 2, 4800, generator=torch.Generator().manual_seed(0)) * 0.1
    torch.nn.init.zeros_(shaper.gains.weight)
    a_tones, a_hiss, turn_tones, turn_hiss = shaper.gains.bias.data.unflatten(0, (4, FFT_BINS))
    with torch.inference_mode():
        a_tones.fill_(-99.0)
        hiss = shaper(mel, e)
        a_tones.fill_(0.0)
        both = shaper(mel, e)
        a_tones.fill_(math.log(2))
        same(shaper(mel, e), 2 * both - hiss, atol=1e-4)
        a_tones.fill_(0.0)
        turn_hiss.fill_(math.pi)
        same(shaper(mel, e), both - 2 * hiss, atol=1e-4)


@pytest.mark.parametrize("kind", ["generator", "shaper"])
def test_half_precision_inside_is_float_outside(kind, request):
    "Losses on spectrograms cannot be taken in bfloat16."
    g = request.getfixturevalue(kind)
    mel, e = torch.randn(1, 80, 20) - 5, torch.randn(1, 2, 3200) * 0.1
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = g(mel, e)
    with torch.inference_mode():
        assert half.dtype == torch.float32 and (half - g(mel, e)).abs().max() < 0.1


def test_a_preset_decides_which_vocoder():
    assert isinstance(make_vocoder(SMALL), Generator)
    assert isinstance(make_vocoder(DRIVEN), SourceFilter)
    assert n_weights(make_vocoder(TINY)) * 2 < 8e6, "shipped in half precision"


def test_the_source_has_the_pitch_and_is_flat():
    e = excitation(torch.full((100,), math.log(160.0)), torch.ones(100))
    assert e.shape == (2, 32000) and abs(pitch(e.sum(0))[0].exp().mean() - 160) < 1
    S = torch.fft.rfft(e.sum(0)).abs()[320:15000:320]  # harmonics of 160 Hz, half a hertz a bin
    assert S.max() / S.min() < 2


def test_the_unvoiced_source_is_noise():
    tones, e = excitation(torch.full((100,), 5.0), torch.zeros(100))
    assert not tones.any()
    S = torch.fft.rfft(e).abs().pow(2)[1:].reshape(16, -1).mean(1)
    assert S.max() / S.min() < 1.5
    same(e, excitation(torch.full((100,), 4.0), torch.zeros(100))[1])


def coloured(mel, log_f0):
    e = excitation(log_f0, torch.ones(len(log_f0))).sum(0)[None]
    return istft(stft(e) * spectral_envelope(mel[None], e).exp())[0]


def test_the_filter_is_near_the_mel_and_on_pitch():
    wav = glided()
    said = coloured(MEL(wav), glide())
    assert said.shape == wav.shape and mel_loss(said[None], wav[None]) < 1
    assert (pitch(said)[0] - glide())[5:-5].abs().mean() < 0.01


def test_another_pitch_gives_another_pitch():
    "The sound has the pitch it is given, not the one in the mel."
    higher = coloured(MEL(glided()), glide() + math.log(1.3))
    assert ((pitch(higher)[0] - glide())[5:-5].mean() - math.log(1.3)).abs() < 0.02


@pytest.mark.parametrize("model", ["talkers", "grid"])
def test_the_shipped_vocoder_obeys_the_pitch(model):
    "Even where the mel has the harmonics of another one."
    from faces2voices.synthesis import FacesToVoices

    vocoder = FacesToVoices.from_pretrained(model, device="cpu").vocoder.eval()
    with torch.inference_mode():
        higher = vocoder(
            MEL(glided())[None], excitation(glide() + math.log(1.3), torch.ones(50))[None]
        )[0]
    assert ((pitch(higher)[0] - glide())[5:-5].median() - math.log(1.3)).abs() < 0.05


def test_sources_are_cut_where_the_sounds_are():
    wavs = [torch.randn(20160), torch.randn(5120)]
    rise = torch.linspace(5.1, 5.4, 63)
    b = segment_batches(wavs, 6, contours=[torch.stack([rise, torch.ones(63)]), torch.ones(2, 16)])(
        1
    )
    assert b.source.shape == (6, 2, 8000)
    for name, wav, source in zip(b.names, b.wav, b.source):
        clip, at = name.startswith("clip 1"), int(name.split()[-1])
        same(wav[:3000], wavs[clip][at : at + 3000])
        if not clip:
            assert (
                pitch(F.pad(source.sum(0), (0, 320)))[0][3:-4] - rise[at // 320 :][3:22]
            ).abs().max() < 0.05
    assert {name.split()[1] for name in b.names} == {"0", "1"}
    assert segment_batches(wavs, 2)(0).source is None


def test_a_driven_vocoder_is_ahead_of_a_plain_one():
    "At the same few steps, and it speaks at the pitch of the sound."
    wavs, preset = [glided()] * 2, replace(DRIVEN, steps=dict(vocoder=40))
    contours = [torch.stack([glide(), torch.ones(50)])] * 2
    seed_everything(0)
    plain, driven = Generator(SMALL), SourceFilter(DRIVEN)
    a = train_vocoder(wavs, plain, replace(SMALL, steps=dict(vocoder=40)), plain_share=1.0)
    b = train_vocoder(wavs, driven, preset, contours=contours, plain_share=1.0)
    assert b[-1]["mel"] < a[-1]["mel"]
    with torch.inference_mode():
        out = driven(MEL(wavs[0])[None], excitation(*contours[0])[None])[0]
    assert (pitch(out)[0] - glide())[5:-5].abs().mean() < 0.03


def test_noise_does_not_depend_on_who_asks():
    whole = noise_stream(0, 5000, 100, 3, seed=7)
    same(noise_stream(1990, 4100, 100, 3, seed=7), whole[1990:4100])
    assert abs(whole.mean()) < 0.02 and abs(whole.std() - 1) < 0.02
    assert (whole[:2000] - whole[2000:4000]).abs().max() > 1
    first = torch.randn(64, generator=torch.Generator().manual_seed(2))
    same(noise_stream(0, 64, 16000, seed=2)[:, 0], first)


def test_a_source_goes_on_where_it_was():
    log_f0, voiced = 5 + 0.3 * torch.randn(200).cumsum(0) / 10, (torch.arange(200) % 50 > 9).float()
    source = Source(log_f0, voiced, seed=4)
    blocks = [source.read_block(n) for n in (1, 2, 97, 60, 40)]
    same(torch.cat(blocks, 1), excitation(log_f0, voiced, seed=4), atol=1e-6)


def test_a_stream_with_context_hands_out_every_column_once():
    "With a speaker that repeats its columns, and whatever the sizes of the pieces."
    x = torch.arange(100.0)[None]

    def repeat(held):
        return held[0].repeat_interleave(160)

    for sizes in ([100], [1] * 100, [3, 40, 2, 55], [99, 1]):
        for context in (0, 4, 13):
            columns, wavs = zip(*stream_with_context(repeat, x.split(sizes, 1), context))
            same(torch.cat(columns, 1), x)
            same(torch.cat(wavs), x[0].repeat_interleave(160))


@pytest.mark.parametrize("kind", ["generator", "shaper"])
def test_sound_of_pieces_is_the_sound_of_the_whole(kind, request):
    g, L = request.getfixturevalue(kind), 240
    mel = torch.randn(80, L, generator=torch.Generator().manual_seed(1)) - 5
    log_f0 = torch.linspace(4.6, 5.4, L // 2)
    voiced = (torch.arange(L // 2) % 40 > 9).float()
    with torch.inference_mode():
        whole = g(mel[None], excitation(log_f0, voiced, 3)[None])[0]
        mels, wavs = zip(*vocode_stream(g, mel.split([4, 100, 80, 56], 1), log_f0, voiced, 3))
        cut = vocode_stream(g, mel.split(60, 1), log_f0, voiced, 3, context=0)
        short = torch.cat([wav for _, wav in cut])
    assert len(wavs) > 2 and all(m.shape[1] * 160 == len(w) for m, w in zip(mels, wavs))
    same(torch.cat(wavs), whole, atol=1e-6)
    same(torch.cat(mels, 1), mel)
    assert (short - whole).abs().max() > 1e-4, "without neighbours there must be seams"


def test_measuring_the_context_leaves_no_gradients(generator):
    context_columns(generator)
    assert all(p.grad is None for p in generator.parameters())


def test_copies_are_compared_on_the_same_clips():
    hard = torch.linspace(0, 1, 12).tolist()

    def row(shift):
        return {
            k: [x + shift + (0.01 if i % 2 else -0.01) for i, x in enumerate(hard)]
            for k in COPY_MEASURES
        }

    rows = {"original": row(0.5), "filter alone": row(-0.3), "Griffin-Lim, 32": row(0)}
    rows["our vocoder"] = {k: hard for k in COPY_MEASURES}
    faint = [
        x - 0.024 + (0.03 if i % 2 else -0.03) for i, x in enumerate(hard)
    ]  # holds alone, and not among nine
    rows["Griffin-Lim, 32"]["ESTOI"] = faint
    assert 0.05 / 4 < paired_difference(hard, faint).p < 0.05
    table = compare_copies(dict(rows=dict(drawn=rows)))
    lines = {
        line.split("|")[2].strip(): line for line in table.splitlines() if line.startswith("|")
    }
    assert lines["our vocoder − filter alone"].count("**+0.30 ± 0.01**") == 4  # clips differ by 1
    assert lines["our vocoder − Griffin-Lim, 32"].count("0.00 ± 0.01") == 3
    assert (
        lines["our vocoder − original"].count("**") == 2
        and "5 of 9 differences hold together" in table
    )


def test_a_study_of_copies_between_its_bounds(monkeypatch):
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    from faces2voices import studies
    from faces2voices.corpora import Clip

    wav, none = glided(), torch.zeros(0)
    clips = [
        Clip(
            "a",
            "",
            "",
            torch.zeros(25, 96, 96),
            none,
            torch.zeros(25, 1),
            none,
            wav,
            none,
            none,
            none,
        )
    ]
    monkeypatch.setattr(studies, "ClipDataset", lambda folder, split: clips * 2)
    monkeypatch.setattr(studies, "dnsmos", lambda wav: dict(ovrl_mos=3.0))
    monkeypatch.setattr(studies, "pesq", lambda wav, ref: 4.6 - float((wav - ref).abs().mean()))
    found = copy_study("anywhere/drawn", n=2, model="talkers")
    rows = found["rows"]["drawn"]
    assert list(rows) == ["original", "filter alone", "our vocoder", "Griffin-Lim, 32"]
    assert (
        rows["original"]["mel distance"][0] == 0 < rows["our vocoder"]["mel distance"][0]
        and rows["original"]["ESTOI"][0] > 0.99
    )
