"""AV-HuBERT out of fairseq 0.12.2's own parts, saved by its trainer, with what every layer answers.

    .venv-fairseq/bin/python tests/fairseq/official.py FOLDER [small] [base] [large]

writes, for each size, a pre-trained checkpoint and one .npz of inputs and answers, and for the
small size the two fine-tuned layouts in circulation (by CTC, and to a sequence). From fairseq: the
masked-prediction model (normalisation, projection, positional convolution, every transformer block,
training heads), the fine-tuning wrappers, task, dictionary, tokenizer, configuration, trainer. From
python_speech_features: the filter banks. In neither, therefore written here in plain arithmetic:
the picture network and the fusion.

`make test-fairseq` builds the environment (Python 3.10), runs this and compares. The recording
beside this file:

    .venv-fairseq/bin/python tests/fairseq/official.py runs/fairseq small
    (cd runs/fairseq && tar -cJf ../../tests/fairseq/recorded.tar.xz *.pt *.npz)
"""

import logging, sys
from pathlib import Path
from zlib import crc32
import numpy as np, sentencepiece, torch
import torch.nn.functional as F
from torch import nn
from fairseq import options, tasks
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import BaseFairseqModel, register_model
from fairseq.models.hubert.hubert import HubertConfig, HubertModel
from fairseq.models.hubert.hubert_asr import Embedding, HubertEncoder, HubertSeq2SeqConfig
from fairseq.tasks import register_task
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig, HubertPretrainingTask
from fairseq.trainer import Trainer
from python_speech_features import logfbank

SIZES = dict(
    small=(128, 2, 2, 256), base=(768, 12, 12, 3072), large=(1024, 24, 16, 4096)
)  # D, layers, heads, FFN

# --- the picture network, in plain arithmetic under the published names


class Net(nn.Module):
    "Named parts, no forward of its own."

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def numbered(*parts):
    return Net(**{str(i): p for i, p in enumerate(parts)})


def norm(x, bn):
    "Normalise x (N, C, H, W) by the running statistics; in training mode, take them from x first."
    if bn.training:
        bn.running_mean, bn.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3))

    def wide(v):
        return v[:, None, None]

    return (x - wide(bn.running_mean)) / wide(bn.running_var + 1e-5).sqrt() * wide(
        bn.weight
    ) + wide(bn.bias)


def prelu(x, slope):
    return torch.where(x > 0, x, slope.weight[:, None, None] * x)


def block(c_in, c, shrink):
    def conv(a, k):
        return nn.Conv2d(a, c, k, bias=False)

    parts = dict(
        conv1=conv(c_in, 3),
        bn1=nn.BatchNorm2d(c),
        relu1=nn.PReLU(c),
        conv2=conv(c, 3),
        bn2=nn.BatchNorm2d(c),
        relu2=nn.PReLU(c),
    )
    return Net(
        **parts, **(dict(downsample=numbered(conv(c_in, 1), nn.BatchNorm2d(c))) if shrink else {})
    )


def run_block(b, x):
    shrink = hasattr(b, "downsample")
    y = prelu(norm(F.conv2d(x, b.conv1.weight, stride=1 + shrink, padding=1), b.bn1), b.relu1)
    y = norm(F.conv2d(y, b.conv2.weight, padding=1), b.bn2)
    if shrink:
        conv, bn = b.downsample.children()
        x = norm(torch.einsum("oi,nihw->nohw", conv.weight[..., 0, 0], x[..., ::2, ::2]), bn)
    return prelu(x + y, b.relu2)


class Pictures(nn.Module):
    "Lips (B, 1, T, 88, 88) to (B, T, 512)."

    def __init__(self):
        super().__init__()
        self.frontend3D = numbered(
            nn.Conv3d(1, 64, (5, 7, 7), bias=False), nn.BatchNorm3d(64), nn.PReLU(64)
        )
        widths = dict(layer1=(64, 64), layer2=(64, 128), layer3=(128, 256), layer4=(256, 512))
        self.trunk = Net(
            **{
                name: numbered(block(a, c, a != c), block(c, c, False))
                for name, (a, c) in widths.items()
            }
        )

    def forward(self, lips):
        conv, bn, slope = self.frontend3D.children()
        n, x = lips.shape[2], F.pad(lips[:, 0], (0, 0, 0, 0, 2, 2))
        x = sum(
            F.conv2d(
                x[:, k : k + n].flatten(0, 1)[:, None], conv.weight[:, :, k], stride=2, padding=3
            )
            for k in range(5)
        )
        x = F.max_pool2d(prelu(norm(x, bn), slope), 3, 2, 1)
        for layer in self.trunk.children():
            for b in layer.children():
                x = run_block(b, x)
        return x.flatten(2).mean(2).unflatten(0, (-1, n))


# --- the models: fairseq's HuBERT with that front-end, and its fine-tuning wrapper


@register_model("av_hubert", dataclass=HubertConfig)
class AVHubert(HubertModel):
    "fairseq's HuBERT, all but the features it starts from."

    def __init__(self, cfg, task_cfg, dictionaries):
        super().__init__(cfg, task_cfg, dictionaries)
        d = cfg.encoder_embed_dim
        del self.feature_extractor
        self.feature_extractor_audio = Net(proj=nn.Linear(104, d))
        self.feature_extractor_video = Net(resnet=Pictures(), proj=nn.Linear(512, d))
        self.mask_emb = nn.Parameter(torch.rand(104))

    @classmethod
    def build_model(cls, cfg, task):
        return cls(cfg, task.cfg, task.dictionaries)

    def forward_features(self, source):
        eyes, ears = self.feature_extractor_video, self.feature_extractor_audio
        seen = eyes.proj(eyes.resnet(source["video"]))
        heard = (
            ears.proj(source["audio"]) if source["audio"] is not None else torch.zeros_like(seen)
        )
        return torch.cat([heard, seen], -1).transpose(1, 2)


@register_model("av_hubert_seq2seq", dataclass=HubertSeq2SeqConfig)
class Seq2Seq(BaseFairseqModel):
    "fairseq's fine-tuning encoder; of a decoder, the embedding."

    def __init__(self, cfg, task):
        super().__init__()
        self.encoder = HubertEncoder(cfg, task)
        self.decoder = Net(
            embed_tokens=Embedding(len(task.target_dictionary), cfg.decoder_embed_dim, 1)
        )

    @classmethod
    def build_model(cls, cfg, task):
        return cls(cfg, task)


@register_task("av_hubert_pretraining", dataclass=HubertPretrainingConfig)
class Task(HubertPretrainingTask):
    "fairseq's task; fine-tuning keeps the tokenizer beside the dictionary."

    def __init__(self, cfg):
        super().__init__(cfg)
        self.state.add_factory(
            "s2s_tokenizer",
            lambda: SentencepieceBPE(
                SentencepieceConfig(sentencepiece_model=f"{cfg.data}/bpe.model")
            ),
        )


# --- weights, inputs, outputs, files


def randomise(model, width=None):
    """Seeded weights, a draw for each name.

    With `width` every tensor is a window on the same few numbers, a matrix's rows `width` apart:
    all rows differ, and a model is a small file, since a shared storage is saved once."""
    noise = 0.1 * np.random.RandomState(0).randn(21_000)
    gains = np.random.RandomState(1).rand(8_000) + 0.5
    noise, gains = (
        torch.from_numpy(x.astype(np.float16)).float() for x in (noise, gains)
    )  # short mantissas compress
    for name, p in model.named_parameters():
        seed, is_gain = crc32(name.encode()), p.numel() == max(p.shape) and "bias" not in name
        strides = list(torch.empty(p.shape, device="meta").stride())
        if is_gain:
            p.data = gains[seed % 4000 :].as_strided(p.shape, strides)
        elif width:
            p.data = noise[seed % 4000 :].as_strided(
                p.shape, [width, *strides[1:]] if p.dim() > 1 else strides
            )
        else:
            spread = (
                p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            )  # keeps every layer's output near the size of its input
            p.data = torch.from_numpy(spread * np.random.RandomState(seed).randn(*p.shape)).float()


def make_inputs(n=7, short=5):
    """Two clips, the second shorter: pictures and audio features; a wave with its filter banks.

    The pictures are blocks of 8 × 8, which compress well."""
    rng = np.random.RandomState(2)
    lips = (
        rng.randn(2, 1, n, 11, 11).astype(np.float16).repeat(8, -1).repeat(8, -2).astype(np.float32)
    )
    mask = np.arange(n) < np.array([[n], [short]])
    audio = rng.randn(2, n, 104).astype(np.float32)
    wave = (3000 * rng.randn(640 * n)).astype(np.int16)
    return dict(
        lips=lips * mask[:, None, :, None, None],
        audio=audio,
        mask=mask,
        wave=wave,
        banks=logfbank(wave).astype(np.float32),
    )


@torch.no_grad()
def answers(model, lips, audio, mask):
    """What fairseq gives before the first block, at every `output_layer` and at its end.

    The shape is (n_layers + 2, B, T, D)."""
    source, padding = dict(video=torch.from_numpy(lips), audio=audio), torch.from_numpy(~mask)

    def ask(**kw):
        return model.extract_features(source, padding, **kw)[0]

    return torch.stack(
        [
            ask(ret_conv=True),
            *(ask(output_layer=k + 1) for k in range(len(model.encoder.layers))),
            ask(),
        ]
    ).numpy()


def build(data, *args):
    "Configuration, task, model and criterion, by way of fairseq's command line."
    common = [
        "--cpu",
        "--no-save-optimizer-state",
        "--optimizer",
        "adam",
        "--lr",
        "0.001",
        "--label-rate",
        "25",
        "--task",
        "av_hubert_pretraining",
    ]
    cfg = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), [str(data), *common, *args])
    )
    task = tasks.setup_task(cfg.task)
    return cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion)


def save(parts, path):
    Trainer(*parts).save_checkpoint(str(path), {})


def pretrain(size, folder, data, width=None):
    "The pre-trained checkpoint of one size, and the file of inputs and answers."
    d, n, heads, ffn = SIZES[size]
    shape = [
        "--encoder-embed-dim",
        d,
        "--encoder-layers",
        n,
        "--encoder-attention-heads",
        heads,
        "--encoder-ffn-embed-dim",
        ffn,
        "--layer-norm-first",
        "--final-dim",
        256,
        "--conv-feature-layers",
        f"[({2 * d},1,1)]",
    ]
    parts = build(
        data, "--arch", "av_hubert", "--criterion", "hubert", "--labels", "['km']", *map(str, shape)
    )
    inputs = make_inputs()
    model = parts[2]
    lips = inputs["lips"]
    audio = torch.from_numpy(inputs["audio"])
    mask = inputs["mask"]
    randomise(model, width)
    model.train().forward_features(
        dict(video=torch.from_numpy(lips), audio=audio)
    )  # statistics of the normalisations
    answered = dict(
        video=answers(model.eval(), lips, None, mask), both=answers(model, lips, audio, mask)
    )
    save(parts, folder / f"{size}-pretrained.pt")
    np.savez(folder / f"{size}.npz", **inputs, **answered)


def finetune(size, folder, data, width=None):
    "Two fine-tuned checkpoints: fairseq's CTC model and one with a decoder and a tokenizer."
    said = np.load(folder / f"{size}.npz")
    tune = [
        "--fine-tuning",
        "--labels",
        "['wrd']",
        "--w2v-path",
        str(folder / f"{size}-pretrained.pt"),
    ]
    ctc = build(data, *tune, "--arch", "hubert_ctc", "--criterion", "ctc")
    seq2seq = build(
        data,
        *tune,
        "--arch",
        "av_hubert_seq2seq",
        "--decoder-embed-dim",
        "16",
        "--criterion",
        "cross_entropy",
    )
    seq2seq[1].state.s2s_tokenizer  # made when first asked for
    for layout, parts, encoder in (
        ("ctc", ctc, ctc[2].w2v_encoder),
        ("seq2seq", seq2seq, seq2seq[2].encoder),
    ):
        model = encoder.w2v_model.eval()
        np.testing.assert_allclose(
            answers(model, said["lips"], None, said["mask"]), said["video"], atol=1e-4
        )
        randomise(model, width)  # the same numbers, in shared storage again
        save(parts, folder / f"{size}-{layout}.pt")


def main(folder, *sizes):
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    folder, data = Path(folder), Path(folder) / "data"
    data.mkdir(parents=True, exist_ok=True)
    for label in ("km", "wrd"):
        (data / f"dict.{label}.txt").write_text("".join(f"{i} 1\n" for i in range(20)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["bin blue at a one now"] * 9),
        model_prefix=str(data / "bpe"),
        vocab_size=17,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    for size in sizes or ("small",):
        pretrain(size, folder, data, width=23 if size == "small" else None)
        if size == "small":
            finetune(size, folder, data, width=23)


if __name__ == "__main__":
    main(*sys.argv[1:])
