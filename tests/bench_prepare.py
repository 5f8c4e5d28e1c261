"""Prepared clips a second on one core: ours against the de-facto way, with one detector.

    python tests/bench_prepare.py --faces FOLDER_OF_INSIGHTFACE_MODELS GRID/s1/bbaf*.mp4

The de-facto way, as lip readers prepare LRS3 (auto_avsr): find the face in every frame, warp every
frame whole to 256 x 256 pixels, cut 96 x 96 around the mouth, write an mp4 and a wav. It measures
neither pitch nor identity. Times are processor time of this process, which computes with one
thread; the two take turns, clip by clip, on the same clips.
"""

import argparse
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
import cv2
import numpy as np
import soundfile
import torch
from faces2voices.core import SAMPLE_RATE
from faces2voices.tracking import make_backend
from faces2voices.media import write_video
from faces2voices.video import MEAN_FACE, preprocess, read_video
from faces2voices.corpora import clip_of, save_clip


class Watch:
    "Adds up processor time by the name of the stage."

    def __init__(self):
        self.seconds = Counter()

    @contextmanager
    def __call__(self, stage):
        start = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - start

    @property
    def total(self):
        return sum(self.seconds.values())


class TimedBackend:
    "A face backend whose `detect` and `identity` are timed."

    def __init__(self, backend, watch):
        self.backend, self.watch, self.name = backend, watch, backend.name

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def detect(self, frame):
        with self.watch("detect"):
            return self.backend.detect(frame)

    def identity(self, face):
        with self.watch("identity"):
            return self.backend.identity(face)


def ours(path, out, backend, watch):
    """What `prepare` does with a clip.

    The face is looked for once more in the frames in memory, to know what decoding takes.
    """
    parts, inside, video = Watch(), Watch(), read_video(path)
    with parts("decode"):
        looked = preprocess(path, backend)
    with parts("crop"):
        preprocess(video, TimedBackend(backend, inside))
    watch.seconds += inside.seconds + Counter(
        {
            "decode": parts.seconds["decode"] - parts.seconds["crop"],
            "crop": parts.seconds["crop"] - inside.total,
        }
    )
    with watch("pitch and energy"):
        clip = clip_of(path.stem, looked)
    with watch("write"):
        save_clip(clip, out / f"{path.stem}.npz", backend.name)


def theirs(path, out, backend, watch):
    "The de-facto way."
    with watch("decode"):
        video = read_video(path)
    with watch("detect"):
        points = four_points([backend.detect(f) for f in video.frames])
    with watch("crop"):
        lips = [mouth(f, p) for f, p in zip(video.frames, points)]
    with watch("write"):
        write_video(out / f"{path.stem}.mp4", np.stack(lips))
        soundfile.write(out / f"{path.stem}.wav", video.wav.numpy(), SAMPLE_RATE)


def four_points(faces) -> np.ndarray:  # (T, 4, 2)
    """Eyes, nose and mouth of the largest face of every frame.

    Gaps are filled, and points averaged over six frames to either side.
    """

    def area(face):
        return np.prod(face.box[2:] - face.box[:2])

    seen = {i: max(found, key=area).points for i, found in enumerate(faces) if found}
    known = np.stack([np.vstack([p[:3], p[3:].mean(0)]).ravel() for p in seen.values()])
    frames = np.arange(len(faces))
    points = np.stack([np.interp(frames, list(seen), column) for column in known.T], 1)
    points = points.reshape(-1, 4, 2)
    return np.stack([points[max(0, i - 6) : i + 7].mean(0) for i in range(len(points))])


def mouth(frame, points) -> np.ndarray:  # (96, 96, 3)
    "The whole frame warped to the mean face, and the mouth cut out of it."
    turn, _ = cv2.estimateAffinePartial2D(points, MEAN_FACE, method=cv2.LMEDS)
    warped = cv2.warpAffine(frame, turn, (256, 256), flags=cv2.INTER_LINEAR)
    x, y = (turn @ [*points[3], 1]).round().astype(int).clip(48, 208)
    return warped[y - 48 : y + 48, x - 48 : x + 48]


def table(watches, n):
    "Milliseconds a clip, stage by stage, and clips a second."
    stages = ["decode", "detect", "crop", "identity", "pitch and energy", "write"]
    print(f"\n{'ms a clip':18}" + "".join(f"{name:>10}" for name in watches))
    for s in stages:
        print(f"{s:18}" + "".join(f"{1e3 * w.seconds[s] / n:10.0f}" for w in watches.values()))
    print(f"{'all':18}" + "".join(f"{1e3 * w.total / n:10.0f}" for w in watches.values()))
    rate = {name: n / w.total for name, w in watches.items()}
    print(f"{'clips/s a core':18}" + "".join(f"{r:10.2f}" for r in rate.values()))
    print(f"ratio {rate['ours'] / rate['de facto']:.2f}")


def kilobytes(folder, suffix):
    "Size of the files of one kind."
    return sum(p.stat().st_size for p in Path(folder).glob(f"*{suffix}")) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--faces", help="folder of insightface models (default: $F2V_INSIGHTFACE)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    backend = make_backend("insightface", args.faces)
    watches = {"ours": Watch(), "de facto": Watch()}
    ways = list(zip((ours, theirs), watches.values()))
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "warm").mkdir()
        for way, _ in ways:
            way(args.clips[0], Path(tmp) / "warm", backend, Watch())
        for i, path in enumerate(args.clips):
            for way, watch in ways[:: (-1) ** i]:
                way(path, Path(tmp), backend, watch)
        sizes = {suffix: kilobytes(tmp, suffix) for suffix in ("npz", "mp4", "wav")}
    n = len(args.clips)
    table(watches, n)
    print(
        f"kilobytes a clip: ours {sizes['npz'] / n:.0f} (all that training needs), "
        f"de facto {(sizes['mp4'] + sizes['wav']) / n:.0f} (lips, lossy, and sound)"
    )


if __name__ == "__main__":
    main()
