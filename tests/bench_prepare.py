"""Prepared clips a second on one core: ours against the de-facto way, with one detector, on the same clips, in one run.

    python tests/bench_prepare.py --faces FOLDER_OF_INSIGHTFACE_MODELS GRID/s1/bbaf*.mp4

The de-facto way, as lip readers prepare LRS3 (auto_avsr): find the face in every frame, warp every frame whole to
256 x 256 pixels, cut 96 x 96 around the mouth, write an mp4 and a wav. It measures neither pitch nor identity.
Times are processor time of this process, which computes with one thread; the two take turns, clip by clip.
"""

import argparse, tempfile, time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
import cv2
import numpy as np
import soundfile
import torch
from faces2voices import corpora
from faces2voices.core import SAMPLE_RATE
from faces2voices.video import MEAN_FACE, look, make_backend, read_video, write_video


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
    "What `prepare` does with a clip; `look` is run once more on the frames in memory, to know what decoding takes."
    parts, inside, video = Watch(), Watch(), read_video(path)
    with parts("decode"):
        looked = look(path, backend)
    with parts("crop"):
        look(video, TimedBackend(backend, inside))
    watch.seconds += inside.seconds + Counter(
        {
            "decode": parts.seconds["decode"] - parts.seconds["crop"],
            "crop": parts.seconds["crop"] - inside.total,
        }
    )
    with watch("pitch and energy"):
        clip = corpora.clip_of(path.stem, looked)
    with watch("write"):
        corpora.save_clip(clip, out / f"{path.stem}.npz", backend.name)


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
    "Eyes, nose and mouth of the largest face of every frame, gaps filled, averaged over six frames to either side."
    seen = {
        t: max(f, key=lambda f: np.prod(f.box[2:] - f.box[:2])).points
        for t, f in enumerate(faces)
        if f
    }
    known = np.stack([np.vstack([p[:3], p[3:].mean(0)]).ravel() for p in seen.values()])
    points = np.stack(
        [np.interp(np.arange(len(faces)), list(seen), column) for column in known.T], 1
    ).reshape(-1, 4, 2)
    return np.stack([points[max(0, t - 6) : t + 7].mean(0) for t in range(len(points))])


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
    print(
        f"{'clips/s a core':18}"
        + "".join(f"{r:10.2f}" for r in rate.values())
        + f"\nratio {rate['ours'] / rate['de facto']:.2f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--faces", help="folder of insightface models (default: $F2V_INSIGHTFACE)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    backend, watches = (
        make_backend("insightface", args.faces),
        dict(ours=Watch(), **{"de facto": Watch()}),
    )
    ways = list(zip((ours, theirs), watches.values()))
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "warm").mkdir()
        for way, _ in ways:
            way(args.clips[0], Path(tmp) / "warm", backend, Watch())
        for i, path in enumerate(args.clips):
            for way, watch in ways[:: (-1) ** i]:
                way(path, Path(tmp), backend, watch)
        size = {
            s: sum(p.stat().st_size for p in Path(tmp).glob(f"*{s}")) for s in ("npz", "mp4", "wav")
        }
    table(watches, len(args.clips))
    print(
        f"kilobytes a clip: ours {size['npz'] / len(args.clips) / 1e3:.0f} (all that training needs), de facto {(size['mp4'] + size['wav']) / len(args.clips) / 1e3:.0f} (lips, lossy, and sound)"
    )


if __name__ == "__main__":
    main()
