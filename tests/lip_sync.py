"""Does an active-speaker detector hear a late sound? `python tests/lip_sync.py GRID MODEL`

Light-ASD (Liao et al., CVPR 2023) says how likely the face in view is the one that is heard. GRID
is a folder as the corpus unpacks it, MODEL the authors' `finetuning_TalkSet.model` (MIT). Each
clip is scored with its own sound, with that sound moved, with another clip's, and with silence.
The network is written from its state dict: what it cannot say (the order of the two GRUs, how the
picture and the bands are pooled) is taken from the paper."""

import sys
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from tqdm.auto import tqdm
from faces2voices.manifests import read_grid
from faces2voices.records import record
from faces2voices.tracking import make_backend
from faces2voices.video import grey, read_video, warp

OUT = Path(__file__).resolve().parents[1] / "nbs" / "results" / "lip_sync.json"
SPEAKERS = "s1 s2 s3 s4 s26 s30 s31 s32 s33".split()
SHIFTS = -0.4, -0.2, 0.0, 0.2, 0.4  # seconds; positive: the sound comes late
SIZE = 112  # px


class LightASD:
    "Light-ASD with the weights of its authors."

    def __init__(self, path):
        self.weights = torch.load(path, map_location="cpu", weights_only=True)
        self.grus = {way: self.gru(way) for way in ("forward", "backward")}

    def gru(self, way: str):
        "One direction of the recurrence."
        layer = torch.nn.GRU(128, 128, batch_first=True)
        prefix = f"model.GRU.gru_{way}."
        layer.load_state_dict({k: self.weights[prefix + k] for k in layer.state_dict()})
        return layer

    def norm(self, x, name: str):
        "Batch norm by the stored statistics, and a rectifier."
        weights = (f"{name}.{k}" for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *(self.weights[k] for k in weights), eps=1e-3).relu()

    def block(self, x, name: str, first: str, stride: int = 1):
        "Two paths, of width 3 and 5: along space (or bands), then along time; added and mixed."
        conv = F.conv3d if x.ndim == 5 else F.conv2d
        total = 0
        for k in (3, 5):
            across = self.weights[f"{name}.{first}_{k}.weight"]
            along = self.weights[f"{name}.t_{k}.weight"]
            strides = (1, stride, stride)[: x.ndim - 2]
            h = conv(x, across, stride=strides, padding=[n // 2 for n in across.shape[2:]])
            h = self.norm(h, f"{name}.bn_{first}_{k}")
            h = conv(h, along, padding=[n // 2 for n in along.shape[2:]])
            total = total + self.norm(h, f"{name}.bn_t_{k}")
        return self.norm(conv(total, self.weights[f"{name}.last.weight"]), f"{name}.bn_last")

    def see(self, faces):  # (T, 112, 112) of 0 to 255 → (1, T, 128)
        x = (faces / 255 - 0.4161)[None, None] / 0.1688
        for i in (1, 2, 3):
            x = self.block(x, f"model.visualEncoder.block{i}", "s", 2 if i == 1 else 1)
            if i < 3:
                x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        return x.amax((-1, -2)).mT

    def hear(self, mfcc):  # (13, 4T) → (1, T, 128)
        x = mfcc[None, None]
        for i in (1, 2, 3):
            x = self.block(x, f"model.audioEncoder.block{i}", "m")
            if i < 3:
                x = F.max_pool2d(x, (1, 3), (1, 2), (0, 1))
        return x.mean(2).mT

    def score(self, seen, heard) -> float:
        "Mean log odds that this face speaks this sound."
        x = F.gelu(self.grus["forward"](seen + heard)[0])
        x = F.gelu(self.grus["backward"](x.flip(1))[0].flip(1))
        logits = F.linear(x, self.weights["lossAV.FC.weight"], self.weights["lossAV.FC.bias"])
        return float((logits[..., 1] - logits[..., 0]).mean())


def mfcc(wav, frames: int):  # (13, 4T), of 16-bit samples, 25 ms of sound every 10 ms
    "13 cepstra, liftered, the first replaced by the log energy."
    samples = np.asarray(wav, dtype=float) * 32768
    samples = np.append(samples[0], samples[1:] - 0.97 * samples[:-1])
    samples = np.pad(samples, (0, 640 * frames + 400 - len(samples)))
    windows = np.lib.stride_tricks.sliding_window_view(samples, 400)[::160][: 4 * frames]
    power = np.abs(np.fft.rfft(windows, 512)) ** 2 / 512
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    bins = np.floor(513 * 700 * (10 ** (mels / 2595) - 1) / 16000)
    bands = [np.interp(np.arange(257), bins[k : k + 3], [0, 1, 0]) for k in range(26)]
    tiny = np.finfo(float).eps
    cepstra = dct(np.log(power @ np.array(bands).T + tiny), axis=1, norm="ortho")[:, :13]
    cepstra *= 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    cepstra[:, 0] = np.log(power.sum(1) + tiny)
    return torch.tensor(cepstra.T, dtype=torch.float32)


def face_crops(frames, backend):  # (T, 112, 112)
    "The lower middle of the face, 0.7 of its longer side wide, as the authors' demo cuts it."
    numbers = range(0, len(frames), 5)
    found = {i: backend.detect(frames[i]) for i in numbers}
    boxes = {i: max(faces, key=lambda f: f.score).box for i, faces in found.items() if faces}
    corners = np.array(list(boxes.values()))
    side = np.median((corners[:, 2:] - corners[:, :2]).max(1))
    middles = (corners[:, 2:] + corners[:, :2]) / 2 + (0, 0.2 * side)
    scale = SIZE / (0.7 * side)
    crops = []
    for i, frame in enumerate(frames):
        x, y = (np.interp(i, list(boxes), middles[:, k]) for k in (0, 1))
        corner = scale * complex(x, y) - SIZE / 2 * (1 + 1j)
        crops.append(warp(grey(frame).astype(np.float32), scale, 0, corner, (SIZE, SIZE)))
    return torch.tensor(np.stack(crops), dtype=torch.float32)


def moved(wav, seconds: float):
    "The sound later; what falls off at one end comes in at the other, both are silent."
    return np.roll(wav, round(16000 * seconds))


@torch.no_grad()
def measure(model, clips: list, backend) -> list:  # a row for each clip
    "Scores of each clip with its sound, moved, with another clip's sound, and with silence."
    videos = [read_video(e.path) for e in clips]
    sounds = [np.asarray(video.wav) for video in videos]
    rows = []
    for i, video in enumerate(tqdm(videos, unit="clip")):
        frames = len(video.frames)
        seen = model.see(face_crops(video.frames, backend))
        heard = {f"{s:+.1f} s": moved(sounds[i], s) for s in SHIFTS}
        heard |= {"another clip": sounds[i - 1], "silence": np.zeros_like(sounds[i])}
        scores = {
            name: model.score(seen, model.hear(mfcc(wav[: 640 * frames], frames)))
            for name, wav in heard.items()
        }
        rows.append(dict(clip=clips[i].name, **scores))
    return rows


def main(grid: str, model: str):
    clips = []
    for speaker in SPEAKERS:
        entries = read_grid(grid, speaker)
        clips += entries[:: len(entries) // 4][:4]
    rows = measure(LightASD(model), clips, make_backend("insightface"))
    names = [name for name in rows[0] if name != "clip"]
    mean = {name: round(float(np.mean([row[name] for row in rows])), 3) for name in names}
    own = np.array([row["+0.0 s"] for row in rows])
    below = {name: int(sum(own > [row[name] for row in rows])) for name in names}
    found = dict(clips=len(rows), mean=mean, own_sound_scores_higher=below, rows=rows)
    command = f"python tests/lip_sync.py {grid} {model}"
    record(found, command, 0, {}, ("scipy", "insightface"), OUT, overwrite=True)
    print(mean, below)


if __name__ == "__main__":
    main(*sys.argv[1:])
