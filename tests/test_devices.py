"""Where the accelerator is, the model is: found out without a GPU.

On `meta` a tensor has a shape and no numbers, and an operation on it and on a tensor of the CPU
raises: with an accelerator of that device, whole training steps run, with gradient, optimiser,
average, log and sample. Under `FakeTensorMode` tensors have no numbers either but say that they
are on `cuda`, and every operation is checked more strictly; a gradient would need a CUDA context,
so there forward passes, losses and sampling run.

What a test must answer, since there are no numbers: yes to every question, 1 to every number that
is read. Recurrence over packed sequences needs true lengths, so it runs over the padded ones here;
the inverse STFT checks its window's numbers, so something of the same shape stands for it; autocast
knows no `meta`, so it is off.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
import pytest
import torch
from accelerate.utils import send_to_device
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_impls import op_implementations_dict
from torch.fx.experimental import _config as functorch_config
from faces2voices import (
    audio,
    avhubert,
    eigenlips,
    hierarchy,
    lipreading,
    parts,
    runs,
    timbre,
    training,
    units,
    vocoder,
)
from faces2voices.core import GRID, PAPER, TINY
from faces2voices.corpora import Clip, ClipDataset, collate
from faces2voices.synthesis import FacesToVoices

PARTS = "locator", "units", "speaker", "hierarchy", "decoder", "vocoder"
SMALL = dict(dim=64, decoder_channels=(32, 32), vocoder_channels=64, n_units=8, eigenlips=16)
ONE = dict.fromkeys(PARTS, 1)
BATCH = ONE | dict(speaker=4, hierarchy=2, decoder=2, vocoder=2)
FEW = dict(steps=ONE | dict(vocoder=2), batch=BATCH, lr=dict.fromkeys(PARTS, 1e-3))
PRESETS = [replace(p, **SMALL, **FEW, unit_features="mfcc") for p in (TINY, GRID, PAPER)]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def a_small_hubert(monkeypatch):
    "AV-HuBERT with one block: where its tensors are does not depend on how many it has."
    monkeypatch.setitem(avhubert.AVHUBERT_SIZES, "large", dict(dim=64, n_layers=1, ffn=64))


def clip(preset, i: int, frames: int) -> Clip:
    g = torch.Generator().manual_seed(i)
    noise = partial(torch.randn, generator=g)
    contour, units = torch.ones(2 * frames), torch.zeros(2 * frames, dtype=torch.long)
    seen = (50 * noise(frames, 96, 96)).byte(), (50 * noise(112, 112, 3)).byte()
    seen += noise(frames, preset.expression_dim), noise(preset.identity_dim)
    heard = 0.1 * noise(640 * frames), 5 * contour, contour, -4 * contour
    mouth = 20 * noise(1, 9, 2) + noise(frames, 9, 2)
    targets = dict(units=units, words=units, voice=noise(256))
    return Clip(f"clip{i}", f"talker{i % 2}", "", *seen, *heard, mouth=mouth, **targets)


def clips(preset) -> ClipDataset:
    "Four clips of two people, of two lengths, so that there is padding."
    return ClipDataset([clip(preset, i, frames) for i, frames in enumerate((50, 60, 60, 50))])


def over_the_padded(rnn, frames, mask):
    return rnn(frames)[0] * mask[..., None]


def one_hop_a_column(S):
    return torch.fft.irfft(S, audio.MEL.n_fft, 1)[:, : audio.MEL.hop, 1:].mT.flatten(1)


def of_its_shape(rnn, x):
    "In place of a GRU, which would ask cuDNN for one; its weights must be where its input is."
    y = (x @ rnn.weight_ih_l0.T)[..., :1] + sum(w.sum() for w in rnn.parameters())
    return y.expand(*x.shape[:-1], rnn.hidden_size * (1 + rnn.bidirectional)), None


def everywhere(mode, op, x):
    "The places of a mask that is true everywhere."
    return x.new_empty((x.numel(), x.dim()), dtype=torch.long)


@pytest.fixture()
def meta(monkeypatch):
    "An accelerator whose device is `meta`, and answers where numbers are asked for."
    device = torch.device("meta")
    accelerator = SimpleNamespace(
        device=device,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        reduce=lambda x, how: x,
        wait_for_everyone=lambda: None,
    )
    monkeypatch.setattr(runs, "Accelerator", lambda **kw: accelerator)

    def answered(name, answer):
        real = getattr(torch.Tensor, name)

        def either(x, *args):
            return answer(x) if x.is_meta else real(x, *args)

        monkeypatch.setattr(torch.Tensor, name, either)

    answered("__bool__", lambda x: True)
    answered("__int__", lambda x: 1)
    answered("item", lambda x: 1.0)
    answered("tolist", lambda x: torch.ones(x.shape, dtype=x.dtype, device="cpu").tolist())
    answered("cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype, device="cpu"))
    monkeypatch.setattr(torch, "autocast", lambda *a, **kw: nullcontext())
    monkeypatch.setattr(lipreading, "packed_rnn", over_the_padded)
    monkeypatch.setattr(eigenlips, "packed_rnn", over_the_padded)
    monkeypatch.setattr(vocoder, "istft", one_hop_a_column)
    with functorch_config.patch(meta_nonzero_assume_all_nonzero=True):
        yield device


@pytest.mark.filterwarnings(
    "ignore:Number of distinct clusters", "ignore:for .* copying from a non-meta"
)
@by_name
def test_a_whole_training_stays_on_the_accelerator(preset, meta, monkeypatch, tmp_path):
    "`train_system` without weights, which nobody can write: each part steps, logs, shows a sample."
    ds, seen = clips(preset), {}

    def train(run, name, module, step, only=None):
        step()
        seen[name] = {x.device for x in (*module.parameters(), *module.buffers())}
        module.eval()

    monkeypatch.setattr(training, "load_or_train", train)
    monkeypatch.setattr(training, "training_clips", lambda *a: ds)
    monkeypatch.setattr(training, "sample_batch", lambda folder: collate([ds[0]]))
    monkeypatch.setattr(training, "SampleLogger", partial(runs.SampleLogger, every=1))
    monkeypatch.setattr(training, "assemble", lambda model, *a: model)
    monkeypatch.setattr(training.Trainer, "save_checkpoint", lambda trainer: None)
    monkeypatch.setattr(training.Trainer, "save_average", lambda trainer: None)
    monkeypatch.setattr(training, "claim_run", lambda *a: None)  # no folder of clips is read
    monkeypatch.setattr(parts, "load_lip_encoder", lambda *a: None)  # no file of weights
    model = training.train_system(preset, tmp_path, "DATA")
    assert set(seen) == set(PARTS) - ({"locator"} if preset.face_backend != "locator" else set())
    assert all(devices == {meta} for devices in seen.values()), seen
    assert {x.device for x in (*model.parameters(), *model.buffers())} == {meta}
    assert {p.stem for p in (tmp_path / "samples").glob("*.wav")} == {
        "hierarchy-000001",
        "decoder-000001",
    }


@pytest.fixture()
def fake(monkeypatch):
    "A mode in which tensors say that they are on a GPU; what is built before is real, on the CPU."
    caches = audio._mel_filters, hierarchy.third_octaves, vocoder._nearest_bands, units._mfcc
    monkeypatch.setattr(lipreading, "packed_rnn", over_the_padded)
    monkeypatch.setattr(eigenlips, "packed_rnn", over_the_padded)
    monkeypatch.setattr(vocoder, "istft", one_hop_a_column)
    monkeypatch.setattr(torch.nn.GRU, "forward", of_its_shape)
    aten = torch.ops.aten
    monkeypatch.setitem(op_implementations_dict, aten.nonzero.default, everywhere)
    monkeypatch.setitem(op_implementations_dict, aten._local_scalar_dense.default, lambda *a: 1)
    for cache in caches:
        cache.cache_clear()
    yield FakeTensorMode(allow_non_fake_inputs=True)
    for cache in caches:
        cache.cache_clear()  # they hold tensors without numbers


def on_gpu(module):
    "What `to` does on a machine with a GPU: every parameter and every buffer moves."
    for m in module.modules():
        for name, x in list(m.named_parameters(recurse=False)):
            setattr(
                m, name, torch.nn.Parameter(torch.empty(x.shape, device="cuda"), x.requires_grad)
            )
        for name, x in list(m.named_buffers(recurse=False)):
            setattr(m, name, torch.empty(x.shape, dtype=x.dtype, device="cuda"))
    return module


@by_name
def test_forward_loss_and_sampling_ask_for_one_device(preset, fake):
    model, b = FacesToVoices(preset.to_json()), collate(list(clips(preset)), augment=1)
    with fake:
        on_gpu(model)
        b = b.to(model.device)
        assert b.mel.device.type == "cuda"
        model.hierarchy.train()
        assert all(x.device.type == "cuda" for x in model.hierarchy.loss(b))
        with torch.no_grad():
            m = model.hierarchy.eval()(*model.hierarchy.inputs(b))
        mask = b.mask.repeat_interleave(4, 1)[:, None]
        assert model.decoder.loss(b.mel, mask, m.mu, m.speaker).device.type == "cuda"
        for guidance in (1.0, 2.0):
            assert (
                model.decoder.sample(m.mu, mask, m.speaker, guidance=guidance).device.type == "cuda"
            )


@pytest.mark.parametrize("preset", PRESETS[::2], ids=lambda p: p.name)
def test_vocoders_and_critics_ask_for_one_device(preset, fake):
    generator = vocoder.make_vocoder(preset)
    critics = (
        vocoder.slim_discriminators() if generator.needs_source else vocoder.full_discriminators()
    )
    contours = [torch.ones(2, 62)] * 2 if generator.needs_source else None
    b = vocoder.segment_batches(
        [0.1 * torch.randn(20_000)] * 2, 2, generator.segment, contours=contours
    )(0)
    with fake:
        b = send_to_device(b, torch.device("cuda"))
        game = vocoder.AdversarialLosses(on_gpu(generator), on_gpu(critics), keep_stft=True)
        assert game.generator_loss(b)["total"].device.type == "cuda"
        assert game.discriminator_loss(b).device.type == "cuda"


def test_voices_units_and_the_locator_ask_for_one_device(fake, monkeypatch):
    model, one = FacesToVoices(TINY.to_json()), clip(TINY, 0, 50)
    mel = audio.MEL.normalize(audio.MEL(one.wav))
    mfcc = units._mfcc("cpu")
    monkeypatch.setattr(units, "_mfcc", lambda device: on_gpu(mfcc))
    with fake:
        on_gpu(model)
        assert model.units(one.wav).device.type == "cuda"
        voices = model.speaker_encoder(mel.to("cuda").expand(4, -1, -1)).unflatten(0, (2, 2))
        assert timbre.ge2e_loss(voices).device.type == "cuda"
        found = model.locator(torch.rand(2, 1, 80, 80, device="cuda"))
        assert all(x.device.type == "cuda" for x in found)
