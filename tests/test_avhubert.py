"AV-HuBERT: padding, identities, the published layout, and files that must not be trusted."

import os
import pickle
import subprocess
import sys
import tarfile
import types
from collections import OrderedDict
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lips import batch
from faces2voices.avhubert import (
    AVHUBERT_SIZES,
    AVHubert,
    FrozenAVHubert,
    convert_avhubert,
    filter_banks,
    load_avhubert,
    official_weights,
    torch_layer,
)
from faces2voices.core import seed_everything, test_same
from faces2voices.errors import CheckpointError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0)


def small(**kw):
    return AVHubert(**(dict(dim=128, n_layers=2, ffn=256) | kw)).eval()


# --- AV-HuBERT


def official_shapes(D, n, ffn):
    "Names and shapes of the official encoder's tensors, written out from the published layout."

    def norm(name, c):
        return {f"{name}.weight": (c,), f"{name}.bias": (c,)}

    def bn(name, c):
        counts = {f"{name}.num_batches_tracked": ()}
        return norm(name, c) | counts | {f"{name}.running_{k}": (c,) for k in ("mean", "var")}

    def lin(name, o, i):
        return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}

    r = "feature_extractor_video.resnet."
    s = {r + "frontend3D.0.weight": (64, 1, 5, 7, 7), r + "frontend3D.2.weight": (64,)}
    s |= bn(r + "frontend3D.1", 64)
    for i, (c_in, c) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
        for j in (0, 1):
            b = f"{r}trunk.layer{i}.{j}."
            s |= {b + "conv1.weight": (c, c if j else c_in, 3, 3)}
            s |= {b + "conv2.weight": (c, c, 3, 3)}
            s |= {b + "relu1.weight": (c,), b + "relu2.weight": (c,)}
            s |= bn(b + "bn1", c) | bn(b + "bn2", c)
        if i > 1:
            b = f"{r}trunk.layer{i}.0.downsample."
            s |= {b + "0.weight": (c, c_in, 1, 1)} | bn(b + "1", c)
    s |= lin("feature_extractor_video.proj", D, 512) | lin("feature_extractor_audio.proj", D, 104)
    s |= norm("layer_norm", 2 * D) | lin("post_extract_proj", D, 2 * D)
    s |= {
        "encoder.pos_conv.0.bias": (D,),
        "encoder.pos_conv.0.weight_g": (1, 1, 128),
        "encoder.pos_conv.0.weight_v": (D, D // 16, 128),
    }
    for i in range(n):
        b = f"encoder.layers.{i}."
        for p in "qkv":
            s |= lin(f"{b}self_attn.{p}_proj", D, D)
        s |= lin(b + "self_attn.out_proj", D, D)
        s |= norm(b + "self_attn_layer_norm", D) | norm(b + "final_layer_norm", D)
        s |= lin(b + "fc1", ffn, D) | lin(b + "fc2", D, ffn)
    return s | norm("encoder.layer_norm", D)


@pytest.mark.parametrize("size,published", [("base", 102.8), ("large", 324.9)])
def test_names_shapes_and_count_are_the_published_ones(size, published):
    cfg = AVHUBERT_SIZES[size]
    with torch.device("meta"):
        net = AVHubert(**cfg)
    shapes = {k: tuple(v.shape) for k, v in official_weights(net).items()}
    assert shapes == official_shapes(cfg["dim"], cfg["n_layers"], cfg["ffn"])
    head = cfg["dim"] * 256 + 256
    assert round((sum(p.numel() for p in net.parameters()) + head) / 1e6, 1) == published


@torch.no_grad()
def test_every_layer_equals_torchs_pre_ln_transformer():
    net, (lips, mask) = AVHubert(dim=128, n_layers=12, ffn=512).eval(), batch()
    for p in net.encoder.parameters():
        p.mul_(1.5)  # away from the tame initial weights
    states = net(lips, mask, layers=range(13))
    w, conv = official_weights(net), net.encoder.pos_conv[0]
    g, v = w["encoder.pos_conv.0.weight_g"], w["encoder.pos_conv.0.weight_v"]
    pos = F.conv1d(
        states[0].mT, g * v / v.norm(dim=(0, 1), keepdim=True), conv.bias, padding=64, groups=16
    )[..., :9]
    x = states[0] + F.gelu(pos).mT
    for i, layer in enumerate(net.encoder.layers, 1):
        x = torch_layer(layer)(x, src_key_padding_mask=~mask)
        test_same(states[i][mask], x[mask], atol=1e-4)
    test_same(net(lips, mask)[mask], net.encoder.layer_norm(x)[mask], atol=1e-4)


@torch.no_grad()
def test_avhubert_does_not_feel_padding():
    net, (lips, mask) = small(), batch()
    together, alone = net(lips, mask), net(lips[1:, :, :5], mask[1:, :5])
    test_same(together[1, :5], alone[0], atol=1e-4)
    assert not together[1, 5:].any()


@torch.no_grad()
def test_no_audio_is_zeros_and_audio_comes_first():
    net, (lips, mask) = small(), batch()
    net.feature_extractor_audio.proj.weight.zero_()
    net.feature_extractor_audio.proj.bias.fill_(3.0)
    assert (net(lips, mask) - net(lips, mask, torch.zeros(2, 9, 104))).abs().max() > 1e-3
    net.layer_norm.weight[:128] = 0
    net.layer_norm.bias[:128] = 0  # deaf in the first half
    net.feature_extractor_audio.proj.bias.zero_()
    test_same(net(lips, mask), net(lips, mask, torch.randn(2, 9, 104)), atol=1e-6)


def test_frozen_keeps_its_statistics_and_learns_only_its_weights():
    net, (lips, mask) = FrozenAVHubert(small()), batch()
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    out = net.train()(lips, mask)
    out.square().sum().backward()
    torch.optim.SGD((p for p in net.parameters() if p.requires_grad), 0.1).step()
    for k, v in net.net.state_dict().items():
        test_same(v, before[k])
    assert net.weights.abs().sum() > 0 and not net.net.training


@torch.no_grad()
def test_weighted_sum_can_be_one_layer():
    net, (lips, mask) = FrozenAVHubert(small()), batch()
    net.weights[1] = 60.0
    test_same(
        net(lips, mask),
        F.layer_norm(net.net(lips, mask, layers=[1])[0], (128,)) * mask[..., None],
        atol=1e-5,
    )


# --- checkpoints


def foreign(monkeypatch, path, **state):
    "An instance of a class that is called `path` and that exists only now."
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    cls = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, cls)
    obj = cls()
    obj.__dict__.update(state)
    return obj


def official_file(monkeypatch, net):
    words = foreign(
        monkeypatch, "fairseq.data.dictionary.Dictionary", symbols=["<s>", "0"], indices={"0": 1}
    )
    heads = {
        "mask_emb": torch.zeros(104),
        "label_embs_concat": torch.zeros(9, 256),
        "final_proj.weight": torch.zeros(256, 128),
    }
    return dict(
        cfg=dict(model=dict(layer_norm_first=True)),
        model=OrderedDict(official_weights(net) | heads),
        task_state=dict(dictionaries=[words]),
    )


def check_same(a, b):
    lips, mask = batch()
    with torch.no_grad():
        test_same(a(lips, mask), b(lips, mask), atol=1e-6)


def test_pretrained_layout_and_conversion(tmp_path, monkeypatch):
    net = small()
    torch.save(official_file(monkeypatch, net), tmp_path / "official.pt")
    monkeypatch.undo()
    check_same(load_avhubert(tmp_path / "official.pt"), net)
    convert_avhubert(tmp_path / "official.pt", tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    check_same(load_avhubert(tmp_path / "folder"), net)


@pytest.mark.parametrize("pre", ["encoder.w2v_model.", "w2v_encoder.w2v_model."])
def test_finetuned_layout(tmp_path, monkeypatch, pre):
    net = small()
    weights = {pre + k: v for k, v in official_weights(net).items()} | {
        "decoder.embed_tokens.weight": torch.zeros(3, 3)
    }
    bpe = foreign(monkeypatch, "sentencepiece.SentencePieceProcessor", proto=b"\x00\xff bytes")
    torch.save(
        dict(cfg={}, model=weights, task_state=dict(s2s_tokenizer=bpe)), tmp_path / "finetuned.pt"
    )
    monkeypatch.undo()
    check_same(load_avhubert(tmp_path / "finetuned.pt"), net)


def test_half_precision_is_read_as_float32(tmp_path):
    torch.save(
        dict(
            model={
                k: v.half() if v.is_floating_point() else v
                for k, v in official_weights(small()).items()
            }
        ),
        tmp_path / "half.pt",
    )
    assert {p.dtype for p in load_avhubert(tmp_path / "half.pt").parameters()} == {torch.float32}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused(tmp_path, legacy):
    torch.save(
        dict(model=official_weights(small()), task_state=Evil(tmp_path / "harm")),
        tmp_path / "evil.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    for read in (load_avhubert, lambda p: convert_avhubert(p, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="posix.system"):
            read(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_unknown_classes_are_refused(tmp_path, monkeypatch):
    torch.save(
        dict(model={}, task_state=foreign(monkeypatch, "fairseq.data.dictionary.Evil")),
        tmp_path / "x.pt",
    )
    with pytest.raises(CheckpointError, match="fairseq.data.dictionary.Evil"):
        load_avhubert(tmp_path / "x.pt")


def test_broken_files_are_named(tmp_path):
    good = official_weights(small())
    post = dict(layer_norm_first=False)
    torch.save(dict(model=good), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    torch.save([1, 2], tmp_path / "list.pt")
    files = {
        "missing.pt": dict(model={k: v for k, v in good.items() if "q_proj" not in k}),
        "headless.pt": dict(model={k: v for k, v in good.items() if "encoder.layers" not in k}),
        "post.pt": dict(model=good, cfg=dict(model=post)),
        "tuned.pt": dict(model=good, cfg=dict(model=dict(w2v_args=dict(model=post)))),
        "numbers.pt": dict(model={1: 2} | good),
        "deep.pt": dict(model=good | {"encoder.layers.999999999.x": good["layer_norm.bias"]}),
        "wide.pt": dict(
            model=good | {"encoder.layers.0.fc1.weight": torch.zeros(1).expand(10**6, 10**6)}
        ),
    }
    for name, file in files.items():
        torch.save(file, tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name in ("cut.pt", "text.pt", "list.pt", *files, "empty", "absent.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_avhubert(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            convert_avhubert(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("seed", range(4))
def test_broken_bytes_never_escape(tmp_path, seed):
    torch.save(
        dict(model={k: v for k, v in official_weights(small()).items() if v.numel() < 300}),
        tmp_path / "good.pt",
        _use_new_zipfile_serialization=False,
    )
    rng, good = np.random.RandomState(seed), np.fromfile(tmp_path / "good.pt", np.uint8)
    for _ in range(50):
        bad = good.copy()
        bad[rng.randint(0, 20_000, 3)] = rng.randint(0, 256, 3)
        bad.tofile(tmp_path / "bad.pt")
        with pytest.raises(CheckpointError):
            load_avhubert(tmp_path / "bad.pt")


# --- beside fairseq 0.12.2 (fairseq/official.py: what is its own, what is written a second time)


def python_3_10() -> bool:
    "Whether a Python 3.10 can be run here."
    command = os.environ.get("PYTHON310", "python3.10")
    try:
        return not subprocess.run(
            [command, "-c", ""], env=os.environ | {"PYENV_VERSION": "3.10"}, capture_output=True
        ).returncode
    except OSError:
        return False


@pytest.fixture(scope="module", params=["recorded", "live"])
def fairseq_files(request, tmp_path_factory) -> Path:
    """Checkpoints and answers of fairseq.

    The recorded ones; those that FAIRSEQ_FILES names, or new ones where fairseq's environment is.
    """
    folder, env = tmp_path_factory.mktemp("fairseq"), HERE.parent / ".venv-fairseq"
    if request.param == "recorded":
        with tarfile.open(HERE / "fairseq" / "recorded.tar.xz") as recording:
            recording.extractall(folder, filter="data")
        return folder
    if "FAIRSEQ_FILES" in os.environ:
        return Path(os.environ["FAIRSEQ_FILES"])
    if not (env / ".ready").exists():
        found = "no Python 3.10 here for `make test-fairseq`"
        if python_3_10():
            found = "Python 3.10 is here, fairseq is not: `make test-fairseq` installs it"
        pytest.skip(f"compared with recorded answers of fairseq 0.12.2 only; {found}")
    subprocess.run(
        [env / "bin" / "python", HERE / "fairseq" / "official.py", folder, "small"],
        check=True,
        capture_output=True,
    )
    return folder


def answers(file) -> dict:
    return {k: torch.from_numpy(v) for k, v in np.load(file).items()}


@pytest.mark.parametrize("layout", ["pretrained", "ctc", "seq2seq"])
@torch.no_grad()
def test_every_layer_equals_fairseq(fairseq_files, layout):
    files = sorted(fairseq_files.glob(f"*-{layout}.pt"))
    assert files
    for file in files:
        net, said = load_avhubert(file), answers(fairseq_files / f"{file.stem.split('-')[0]}.npz")
        lips, mask = said["lips"], said["mask"]
        for audio, theirs in ((None, said["video"]), (said["audio"], said["both"])):
            layers = net(lips, mask, audio, layers=range(net.n_layers + 1))
            ours = torch.cat([layers, net(lips, mask, audio)[None]])
            test_same(ours[:, mask], theirs[:, mask], atol=1e-4)


def test_files_of_fairseq_are_more_than_weights_and_convert(fairseq_files, tmp_path):
    for file in fairseq_files.glob("small-*.pt"):
        with pytest.raises(pickle.UnpicklingError, match="fairseq.data.dictionary.Dictionary"):
            torch.load(file, weights_only=True)
        convert_avhubert(file, tmp_path / file.stem)
        read, converted = (load_avhubert(p).state_dict() for p in (file, tmp_path / file.stem))
        for k, v in read.items():
            test_same(converted[k], v)


def test_filter_banks_equal_python_speech_features_beside_fairseq(fairseq_files):
    said = answers(fairseq_files / "small.npz")
    stacked = np.concatenate([said["banks"], np.zeros((1, 26), np.float32)]).reshape(-1, 104)
    deviation = np.sqrt(stacked.var(1, keepdims=True) + 1e-5)
    by_hand = (stacked - stacked.mean(1, keepdims=True)) / deviation
    test_same(filter_banks(said["wave"] / 32768), torch.from_numpy(by_hand), atol=1e-4)
