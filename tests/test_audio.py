"Sound: the mel contract against independent implementations, pitch, files of every kind."

import importlib.util
import math
import sys
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faces2voices.soundfiles import MAX_SECONDS, fit_length, load_audio, save_wav
from faces2voices.audio import (
    MEL,
    MelSpec,
    crepe_pitch,
    energy,
    griffin_lim,
    pitch,
    show_speech,
    vowel,
)
from faces2voices.errors import MediaError, ToolMissingError
from faces2voices.core import test_same

SECOND = 16000


@pytest.fixture(scope="module")
def rising():
    return torch.linspace(110, 220, SECOND)


@pytest.fixture(scope="module")
def sound(rising):
    return vowel(rising) + 1e-3 * torch.randn(SECOND, generator=torch.Generator().manual_seed(0))


# The published 16 kHz contract, written out: a Fourier basis, Slaney's mel scale, triangles of
# unit area
def slaney(hz):
    return np.where(
        hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1) / 1000) / math.log(6.4)
    )


def slaney_inverse(mel):
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def contract(wav, pad, n_fft=640, hop=160, n_mels=80, fmin=0.0, fmax=8000.0, floor=1e-5):
    "(n_mels, frames) natural-log mel in double precision, without a line of librosa or torch.stft."
    x = np.pad(np.asarray(wav, float), pad, mode="reflect")
    n, k = np.arange(n_fft), np.arange(n_fft // 2 + 1)
    basis = (
        np.exp(-2j * np.pi * np.outer(n, k) / n_fft)
        * (0.5 - 0.5 * np.cos(2 * np.pi * n / n_fft))[:, None]
    )
    magnitude = np.abs(
        np.stack([x[i : i + n_fft] for i in range(0, len(x) - n_fft + 1, hop)]) @ basis
    )
    edges = slaney_inverse(np.linspace(slaney(fmin), slaney(fmax), n_mels + 2))
    hz = k * 16000 / n_fft
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = (
        np.maximum(0, np.minimum((hz - low) / (mid - low), (high - hz) / (high - mid)))
        * 2
        / (high - low)
    )
    return np.log(np.maximum(triangles @ magnitude.T, floor))


def test_numbers_of_the_contract():
    assert MEL == MelSpec(
        sr=16000,
        n_fft=640,
        hop=160,
        n_mels=80,
        fmin=0.0,
        fmax=8000.0,
        floor=1e-5,
        mean=-6.0,
        std=2.5,
    )


def test_mel_is_the_published_contract(sound):
    test_same(MEL(sound), contract(sound, 240).astype(np.float32), atol=1e-4)


def test_mel_is_librosa(sound):
    import librosa

    S = librosa.feature.melspectrogram(
        y=np.pad(sound.numpy(), 240, mode="reflect"),
        sr=16000,
        n_fft=640,
        hop_length=160,
        center=False,
        power=1.0,
        n_mels=80,
        fmin=0,
        fmax=8000,
    )
    test_same(MEL(sound), np.log(np.maximum(S, 1e-5)), atol=1e-4)


def test_what_the_labs_vocoders_read_lies_half_a_hop_away(sound):
    theirs = contract(sound, 320)  # Tacotron's padding: half a window
    assert theirs.shape[1] == MEL(sound).shape[1] + 1
    later = F.pad(sound, (80, -80))
    test_same(MEL(later)[:, 5:-5], theirs[:, 5:-6].astype(np.float32), atol=1e-4)
    assert np.abs(MEL(sound).numpy() - theirs[:, :-1]).max() > 0.1  # and is not the same


@pytest.mark.parametrize("n", [160, 320, 640, 16000, 161 * 160])
def test_one_column_for_each_hop(n):
    wav = torch.randn(2, n)
    assert MEL(wav).shape == (2, 80, n // 160) and MEL(wav[0]).shape == (80, n // 160)


def test_mel_of_silence_is_its_floor():
    test_same(MEL(torch.zeros(640)), torch.full((80, 4), math.log(1e-5)), atol=1e-6)


def test_mel_backpropagates(sound):
    x = sound[:3200].clone().requires_grad_()
    MEL(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_normalize_and_back(sound):
    test_same(MEL.denormalize(MEL.normalize(MEL(sound))), MEL(sound), atol=1e-5)


def test_griffin_lim_keeps_the_mel(sound):
    wav = griffin_lim(MEL(sound))
    assert wav.shape == (SECOND,) and (MEL(wav) - MEL(sound))[:, 5:-5].abs().mean() < 0.5


def cents(log_f0, hz):
    return (1200 / math.log(2) * (log_f0 - torch.as_tensor(hz).log())).abs()


@pytest.mark.parametrize("hz", [85.0, 130.0, 240.0])
def test_pitch_of_a_vowel(hz):
    log_f0, voiced = pitch(vowel(torch.full((SECOND // 2,), hz)))
    assert log_f0.shape == voiced.shape == (25,) and log_f0.dtype == voiced.dtype == torch.float32
    assert voiced.mean() > 0.9 and cents(log_f0, hz)[voiced > 0].max() < 25


def test_pitch_is_bridged_through_silence():
    low, high = vowel(torch.full((6400,), 100.0)), vowel(torch.full((6400,), 200.0))
    log_f0, voiced = pitch(torch.cat([low, torch.zeros(6400), high]))
    gap = log_f0[24:36]
    assert (
        voiced[24:36].sum() == 0
        and (gap.diff() > 0).all()
        and math.log(95) < gap[0] < gap[-1] < math.log(210)
    )
    test_same(gap.diff(), gap.diff().mean().expand(11), atol=1e-4)  # a straight line


def test_pitch_of_silence():
    log_f0, voiced = pitch(torch.zeros(6400))
    test_same(log_f0, torch.full((20,), 5.0))
    test_same(voiced, torch.zeros(20))


@pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None,
    reason="torchcrepe is not installed (pip install torchcrepe)",
)
def test_crepe_agrees_with_pyin_and_with_itself(rising):
    wav, truth = vowel(rising), rising[160::320]
    log_f0, voiced = crepe_pitch(wav, model="tiny")
    by_pyin, also = pitch(wav)
    assert log_f0.shape == voiced.shape == (50,) and log_f0.dtype == voiced.dtype == torch.float32
    both = voiced * also > 0
    assert (
        both.float().mean() > 0.85
        and cents(log_f0, truth)[both].median() < 25
        and cents(log_f0, by_pyin.exp())[both].median() < 25
    )
    test_same(crepe_pitch(wav, model="tiny")[0], log_f0)
    assert crepe_pitch(torch.zeros(6400), model="tiny")[1].sum() == 0


def test_crepe_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcrepe", None)
    with pytest.raises(ToolMissingError, match="pip install torchcrepe"):
        crepe_pitch(torch.zeros(640))


def test_energy():
    hum = torch.sin(torch.arange(6400) * 0.3)
    assert energy(hum).shape == (20,) and energy(torch.stack([hum, hum])).shape == (2, 20)
    test_same(energy(hum)[2:-2], torch.full((16,), math.log(0.5**0.5)), atol=1e-2)
    test_same(energy(hum / 2), energy(hum) - math.log(2), atol=1e-3)


def test_fit_length():
    x = torch.arange(4.0)
    test_same(fit_length(x, 6), torch.tensor([0.0, 1, 2, 3, 0, 0]))
    test_same(fit_length(x, 2), x[:2])
    test_same(fit_length(x[None], 4), x[None])


@pytest.mark.parametrize(
    "name", ["plain.wav", "take:2.wav", "http:x.wav", "-y.wav", "with space %20 #1?.wav", "ünï.wav"]
)
def test_any_name_can_be_read(tmp_path, name, sound):
    save_wav(tmp_path / name, sound)
    test_same(load_audio(tmp_path / name), sound, atol=2**-14)
    with pytest.raises(Exception, match="already exists"):
        save_wav(tmp_path / name, sound)


def test_a_relative_name_with_a_colon(tmp_path, monkeypatch, sound):
    monkeypatch.chdir(tmp_path)
    save_wav("a:b.wav", sound)
    assert load_audio("a:b.wav").shape == sound.shape


def test_saved_sound_says_that_it_is_synthetic(tmp_path):
    import soundfile

    save_wav(tmp_path / "x.wav", 3 * torch.ones(640))
    assert soundfile.SoundFile(tmp_path / "x.wav").comment == "synthetic speech (faces2voices)"
    assert load_audio(tmp_path / "x.wav").max() <= 1


def test_rates_and_channels_are_made_one(tmp_path):
    import soundfile

    t = np.arange(44100) / 44100
    soundfile.write(
        tmp_path / "x.flac",
        np.stack([np.sin(2 * np.pi * 440 * t), np.zeros_like(t)], 1) * 0.5,
        44100,
    )
    wav = load_audio(tmp_path / "x.flac")
    assert abs(len(wav) - 16000) < 64 and wav.dtype == torch.float32
    spectrum = torch.fft.rfft(wav[:16000] * torch.hann_window(16000)).abs()
    assert abs(spectrum.argmax() - 440) <= 1


def wav_bytes(tmp_path, sound):
    save_wav(tmp_path / "ok.wav", sound)
    return (tmp_path / "ok.wav").read_bytes()


def test_broken_files_are_named(tmp_path, sound):
    good = wav_bytes(tmp_path, sound[:1600])

    def rate(hz):
        return good[:24] + hz.to_bytes(4, "little") + good[28:]

    cases = dict(
        none=b"",
        noise=np.random.default_rng(0).bytes(5000),
        text=b"#EXTM3U\nhttp://localhost:1/x.ts\n",
        header=good[:44],
        half_header=good[:20],
        slow=rate(1),
        fast=rate(2**31 - 1),
        zero=rate(0),
        channels=good[:22] + b"\xff\xff" + good[24:],
    )
    for name, data in cases.items():
        path = tmp_path / f"{name}.wav"
        path.write_bytes(data)
        with pytest.raises(MediaError) as e:
            load_audio(path)
        assert str(path) in str(e.value), name
    for path in (tmp_path, tmp_path / "nowhere.wav"):
        with pytest.raises(MediaError, match="no such file"):
            load_audio(path)


def test_truncated_and_flipped_files_never_crash(tmp_path, sound):
    good, rng = wav_bytes(tmp_path, sound[:3200]), np.random.default_rng(0)
    for i in range(40):
        data = bytearray(good[: rng.integers(1, len(good))] if i % 2 else good)
        for at in rng.integers(0, min(len(data), 60), 4):
            data[at] ^= 1 << int(rng.integers(8))
        path = tmp_path / "bad.wav"
        path.write_bytes(data)
        try:
            assert len(load_audio(path)) <= 4 * 3200
        except MediaError:
            pass


def test_sound_of_an_unknown_codec_is_refused_before_it_is_decoded(tmp_path, sound):
    "PyAV before 18, the newest for Python 3.10, dereferences the decoder that is not there."
    good, path = wav_bytes(tmp_path, sound[:1600]), tmp_path / "unknown.wav"
    path.write_bytes(good[:20] + b"\x81\x01" + good[22:])
    with pytest.raises(MediaError, match="its sound cannot be decoded"):
        load_audio(path)


def test_a_video_without_sound_is_named(tmp_path):
    from faces2voices.media import write_video

    write_video(tmp_path / "mute.mp4", np.zeros((5, 64, 64, 3), np.uint8))
    with pytest.raises(MediaError, match="has no sound"):
        load_audio(tmp_path / "mute.mp4")


def test_too_long_is_refused(tmp_path, sound, monkeypatch):
    monkeypatch.setattr("faces2voices.soundfiles.MAX_SECONDS", 0.5)
    save_wav(tmp_path / "long.wav", sound)
    with pytest.raises(MediaError, match="long"):
        load_audio(tmp_path / "long.wav")
    assert MAX_SECONDS == 4 * 3600


def test_what_is_shown_has_words(monkeypatch, sound):
    "Figure with a text alternative, and a player of at most three seconds."
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    show_speech(torch.cat([sound] * 4), "title", "Four vowels.")
    picture, player = shown
    assert (
        picture.alt.endswith("4.0 s of speech. Four vowels.")
        and len(player.data) <= 3 * SECOND * 2 + 44
    )
    show_speech(sound, play=False)
    assert len(shown) == 3


def test_sound_that_is_not_numbers_is_refused(tmp_path):
    import soundfile

    wav = np.zeros(16000, np.float32)
    wav[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", wav, 16000, subtype="FLOAT")
    (tmp_path / "empty.wav").touch()
    with pytest.raises(MediaError, match="nan.wav: its sound holds values that are not numbers"):
        load_audio(tmp_path / "nan.wav")
    with pytest.raises(MediaError, match="empty.wav: its sound cannot be read"):
        load_audio(tmp_path / "empty.wav")


def test_a_mel_made_for_inference_first_can_still_be_trained_through():
    from faces2voices.audio import _mel_filters

    _mel_filters.cache_clear()
    with torch.inference_mode():
        MEL(vowel(torch.full((SECOND,), 120.0)))
    wav = vowel(torch.full((SECOND,), 120.0)).requires_grad_()
    MEL(wav).mean().backward()
    assert wav.grad.isfinite().all()
