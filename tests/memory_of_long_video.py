"""The memory that a pass over a film takes, at one minute and at ten.

    python tests/memory_of_long_video.py [minutes ...]

A three-second drawn clip is made into a film of each length by repeating its compressed packets.
Each film is tracked and cropped by `track_face` and `crop_in_parts` in a process of its own, which
prints the peak of its resident memory, after the imports and at the end."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
import av
import numpy as np
from faces2voices import media, tracking, video as V


class Middle(tracking.FaceBackend):
    "Takes the middle of every picture for a face: what is measured here is memory, not sight."

    name = "middle"

    def detect(self, frame):
        side = min(frame.shape[:2]) / 2
        corner = np.array([frame.shape[1], frame.shape[0]]) / 2 - side / 2
        return [
            tracking.Face(
                np.concatenate([corner, corner + side]), corner + side * tracking.BOX_POINTS, 1.0
            )
        ]


def drawn(path):
    "Three seconds of a disc with a mouth, 240 × 180."
    y, x = np.mgrid[:180, :240]

    def frame(t):
        picture = np.stack([x * 255 // 240, y * 255 // 180, (x + y + 3 * t) % 256], -1).astype(
            np.uint8
        )
        picture[np.hypot(x - 120, y - 90) < 60] = (235, 200, 170)
        picture[np.hypot((x - 120) / 2, y - 112) < 3 + 5 * np.sin(t / 3) ** 2] = (90, 20, 20)
        return picture

    media.write_video(path, [frame(t) for t in range(75)])


def repeat(src, dst, times: int):
    "Write the packets of `src` over and over; nothing is encoded again."
    with av.open(str(src)) as source, av.open(str(dst), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        once = [p for p in source.demux(stream) if p.dts is not None]
        length = sum(p.duration for p in once)
        for i in range(times):
            for p in once:
                q = av.Packet(bytes(p))
                q.pts = p.pts + i * length
                q.dts = p.dts + i * length
                q.duration = p.duration
                q.time_base = stream.time_base
                q.is_keyframe = p.is_keyframe
                q.stream = copy
                out.mux(q)


def peak() -> float:
    "The largest that this process has been, MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def walk(path):
    "Look at a film part by part; print its frames, and the peak in MB before and after."
    before = peak()
    film = V.Film(path)
    points = tracking.track_face(film, Middle()).points
    T = sum(len(part.lips) for part in V.crop_in_parts(film, points, Middle()))
    print(
        f"{T / V.FPS / 60:5.1f} min {T:6d} frames: peak {peak():.0f} MB",
        f"({before:.0f} MB after the imports);",
        f"all frames at once would be {T * 240 * 180 * 3 / 2**20:5.0f} MB",
    )


def main(minutes):
    with tempfile.TemporaryDirectory() as folder:
        drawn(clip := Path(folder) / "clip.mp4")
        for m in minutes:
            repeat(clip, film := Path(folder) / f"{m} min.mp4", round(20 * m))
            subprocess.run([sys.executable, __file__, "--walk", film], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--walk"]:
        walk(sys.argv[2])
    else:
        main([float(a) for a in sys.argv[1:]] or [1, 10])
