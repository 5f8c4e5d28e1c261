"""Hundreds of broken video and audio files, each read in a process of its own.

    python tests/fuzz_media.py --n 200 --seed 0

A good file is drawn in each of several formats and then spoilt: cut, beheaded, bits flipped, header
words made absurd, stretches blanked or doubled, two files spliced, the name changed. Between them
come files that were made strange on purpose (`STRANGE`). Every reader is tried on each of them
under a limit of memory and of processor time. A reader may succeed or raise a typed error
(`errors.F2VError`); anything else is counted as crash, hang or memory, the file is kept where
`--keep` says, and the exit status is 1."""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import traceback
from collections import Counter
from fractions import Fraction
from pathlib import Path
import av
import numpy as np
import soundfile
import torch
from faces2voices.soundfiles import load_audio
from faces2voices.errors import F2VError
from faces2voices import media, video as V
from memory_of_long_video import Middle, peak

CPU_SECONDS = 30  # limits for one file
WALL_SECONDS = 180
MEMORY = 3 * 2**30  # bytes above what the parent has

# --- good files


def picture(t, height=96, width=128):
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x * 255 // width, y * 255 // height, (x + y + 9 * t) % 256], -1).astype(
        np.uint8
    )
    frame[np.hypot(x - width / 2, y - height / 2) < min(height, width) / 3] = (235, 200, 170)
    return frame


def encode(
    path,
    frames,
    times=None,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=25,
    base=1000,
    aspect=None,
    sound=True,
    format=None,
):
    "Write frames at `times` (seconds; none: one by one), with a second of noise."
    with av.open(str(path), "w", format=format) as out:
        height, width = frames[0].shape[:2] if len(frames) else (96, 128)
        s = out.add_stream(codec, rate=rate, width=width, height=height, pix_fmt=pix_fmt)
        s.codec_context.thread_count = 1
        if times is not None:
            s.codec_context.time_base = Fraction(1, base)
        sounds = (
            out.add_stream(
                {"webm": "libopus", "avi": "mp3"}.get(out.format.name, "aac"),
                rate=48000,
                layout="mono",
            )
            if sound
            else None
        )
        if aspect:
            s.codec_context.sample_aspect_ratio = aspect
        for i, frame in enumerate(frames):
            f = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                f.pts, f.time_base = round(times[i] * base), Fraction(1, base)
            for packet in s.encode(f):
                out.mux(packet)
        for packet in s.encode(None):
            out.mux(packet)
        if sound:
            add_noise(out, sounds)


def add_noise(out, stream):
    "A second of it."
    noise = (0.1 * np.random.default_rng(0).standard_normal((1, 48000))).astype(np.float32)
    f = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
    f.sample_rate, f.time_base, f.pts = 48000, Fraction(1, 48000), 0
    fifo = av.AudioFifo()
    fifo.write(f)
    while part := fifo.read(stream.frame_size or 1024, partial=True):
        for packet in stream.encode(part):
            out.mux(packet)
    for packet in stream.encode(None):
        out.mux(packet)


def good_files(folder) -> list:
    "One small file of each format."
    frames = [picture(t) for t in range(25)]
    for suffix, codec in dict(
        mp4="libx264", mkv="libx264", mov="mpeg4", webm="libvpx", avi="mpeg4", ts="libx264"
    ).items():
        encode(folder / f"good.{suffix}", frames, codec=codec)
    wav = 0.1 * np.random.default_rng(0).standard_normal(16000)
    for suffix in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(folder / f"good.{suffix}", wav, 16000)
    return sorted(folder.glob("good.*"))


# --- spoilt files: (bytes, generator) → bytes


def stretch(data, rng):
    a, b = np.sort(rng.integers(0, len(data), 2))
    return a, b


def cut(data, rng):
    return data[: rng.integers(1, len(data))]


def behead(data, rng):
    return data[rng.integers(1, len(data)) :]


def blank(data, rng):
    a, b = stretch(data, rng)
    return data[:a] + bytes(b - a) + data[b:]


def double(data, rng):
    a, b = stretch(data, rng)
    return data[:b] + data[a:]


def leave_out(data, rng):
    a, b = stretch(data, rng)
    return data[:a] + data[b:]


def flip(data, rng):
    spoilt = np.frombuffer(data, np.uint8).copy()
    spoilt[rng.integers(0, len(data), rng.integers(1, 200))] ^= np.uint8(1 << rng.integers(0, 8))
    return spoilt.tobytes()


def absurd_header(data, rng):
    "Some four-byte words near the beginning become 0, 1 or the largest or smallest of numbers."
    spoilt = bytearray(data)
    for at in rng.integers(0, min(len(data) - 4, 3000), rng.integers(1, 12)):
        spoilt[at : at + 4] = [
            bytes(4),
            b"\0\0\0\1",
            b"\xff" * 4,
            b"\x7f\xff\xff\xff",
            b"\x80\0\0\0",
        ][rng.integers(5)]
    return bytes(spoilt)


def noise_inside(data, rng):
    a, b = stretch(data, rng)
    return data[:a] + rng.bytes(int(b - a)) + data[b:]


SPOIL = [cut, behead, flip, absurd_header, blank, double, leave_out, noise_inside]


def spoilt(good, k, seed, folder) -> tuple:
    """File number `k` of the spoilt ones, and what was done to it.

    Some get another's ending or another's tail too."""
    rng = np.random.default_rng([seed, k])
    source, how = good[rng.integers(len(good))], SPOIL[k % len(SPOIL)]
    data, suffix, name = how(source.read_bytes(), rng), source.suffix, how.__name__
    if rng.random() < 0.15:
        data, name = data + good[rng.integers(len(good))].read_bytes(), name + " + splice"
    if rng.random() < 0.15:
        suffix, name = good[rng.integers(len(good))].suffix, name + " + wrong ending"
    path = folder / f"{k:04d} {how.__name__}{suffix}"
    path.write_bytes(data)
    return path, name


# --- strange files, made on purpose


def joined(*sizes):
    "Two streams, one after the other: the times begin anew."

    def make(path):
        data = b""
        for size in sizes:
            encode(
                path,
                [picture(t, *size) for t in range(20)],
                sound=False,
                codec="mpeg2video",
                format="mpegts",
            )
            data += path.read_bytes()
        path.write_bytes(data)

    return make


def stamped(*times):
    return lambda path: encode(path, [picture(t) for t in range(len(times))], times, base=1000)


def sized(height, width, n=12, **kw):
    return lambda path: encode(path, [picture(t, height, width) for t in range(n)], **kw)


def written(content):
    return lambda path: path.write_bytes(content)


def wav_of(samples, rate=16000, **kw):
    return lambda path: soundfile.write(path, samples, rate, **kw)


def good_times(n=25):
    return np.arange(n) / 25


STRANGE = {
    "zero bytes.mp4": written(b""),
    "one byte.mp4": written(b"\0"),
    "text.mp4": written(b"This is not a film.\n" * 50),
    "page.mp4": written(b"<!doctype html><video src=x.mp4>"),
    "random.mp4": written(np.random.default_rng(0).bytes(20_000)),
    "random.wav": written(np.random.default_rng(1).bytes(20_000)),
    "playlist.mp4": written(
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://192.0.2.1/film.ts\n"
    ),
    "list.mp4": written(b"ffconcat version 1.0\nfile /etc/hostname\n"),
    "no frames.mp4": lambda p: encode(p, []),
    "one frame.mp4": sized(96, 128, 1),
    "no frames.mkv": lambda p: encode(p, [], sound=False),
    "1 x 1.mkv": sized(1, 1, codec="ffv1", pix_fmt="bgr0"),
    "1 x 1000.avi": sized(1000, 1, codec="rawvideo", pix_fmt="bgr24", sound=False),
    "2 x 6000.mp4": sized(6000, 2),
    "8000 x 8000.mp4": sized(8000, 8000, 1, codec="mjpeg", pix_fmt="yuvj420p", sound=False),
    "4000 x 4000.mp4": sized(4000, 4000, 10, codec="mjpeg", pix_fmt="yuvj420p", sound=False),
    "flat pixels.mkv": sized(96, 128, aspect=Fraction(60000, 1)),
    "tall pixels.mkv": sized(96, 128, aspect=Fraction(1, 60000)),
    "alpha.mkv": sized(96, 128, codec="ffv1", pix_fmt="bgra"),
    "9 bits.mkv": sized(96, 128, codec="ffv1", pix_fmt="yuv420p9"),
    "grey.mkv": sized(96, 128, codec="ffv1", pix_fmt="gray"),
    "sizes.ts": joined((96, 128), (64, 64)),
    "times begin anew.ts": joined((96, 128), (96, 128)),
    "no times.h264": sized(96, 128, sound=False, format="h264"),
    "all at once.mkv": stamped(*[0.0] * 25),
    "huge times.mkv": stamped(*(good_times() + 2e6)),
    "a jump of a month.mkv": stamped(*good_times(12), *(good_times(12) + 2.6e6)),
    "a jump at first.mkv": stamped(0.0, *(good_times() + 1e6)),
    "before time.mkv": stamped(*(good_times() - 3e4)),
    "2 frames a day.mkv": stamped(*np.arange(12) * 43200.0),
    "1000 fps.mp4": lambda p: encode(
        p, [picture(t) for t in range(60)], np.arange(60) / 1000, base=90000
    ),
    "gif.gif": lambda p: encode(
        p, [picture(t) for t in range(12)], codec="gif", pix_fmt="rgb8", sound=False
    ),
    "still.png": sized(96, 128, 1, codec="png", pix_fmt="rgb24", sound=False, format="image2"),
    "one sample.wav": wav_of(np.zeros(1)),
    "no sample.wav": wav_of(np.zeros(0)),
    "not a number.wav": wav_of(np.full(16000, np.nan), subtype="FLOAT"),
    "huge.wav": wav_of(np.full(16000, 1e30), subtype="FLOAT"),
    "32 channels.wav": wav_of(np.zeros((4000, 32))),
    "1 Hz.wav": wav_of(np.zeros(100), 1),
    "2 GHz.wav": wav_of(np.zeros(100), 2**31 - 1),
    "half an hour of nothing.flac": lambda p: soundfile.write(
        p, np.zeros(16000 * 1800, np.int16), 16000
    ),
}


def strange(name, folder) -> tuple:
    "A strange file; its making may fail half-way, which leaves a file that is stranger still."
    try:
        STRANGE[name](folder / name)
    except (av.FFmpegError, soundfile.SoundFileError, ValueError, OverflowError):
        (folder / name).touch()
    return folder / name, "strange"


# --- judging

READERS = dict(
    preprocess=lambda p: V.preprocess(p, Middle()),
    read_video=lambda p: V.read_video(p, max_seconds=4),
    load_audio=load_audio,
    dub=lambda p: media.dub(p, torch.zeros(8000), p.with_name("dubbed.mp4"), overwrite=True),
)


def attempt(path, pipe):
    """Try every reader within the limits.

    Sends the worst outcome (ok, if one reader got something), its words, and the peak in MB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
    said = [outcome(read, path) for read in READERS.values()]
    worst = next((o for o in ("crash", "memory", "ok") if o in dict(said)), "typed error")
    pipe.send(
        (
            worst,
            "\n".join(f"{reader}: {words}" for reader, (_, words) in zip(READERS, said)),
            peak(),
        )
    )


def outcome(read, path) -> tuple:
    "What came of one reader, and its words."
    try:
        read(path)
    except F2VError as e:
        return "memory" if isinstance(
            e.__cause__, MemoryError
        ) else "typed error", f"{type(e).__name__}: {e.reason}"
    except MemoryError as e:
        return "memory", repr(e)
    except BaseException as e:
        return "crash", "".join(traceback.format_exception(e))[-900:]
    return "ok", ""


ORDER = ["ok", "typed error", "memory", "hang", "crash"]


def judge(path) -> tuple:
    "Outcome, words and peak memory of one file, read in a process of its own."
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    child = fork.Process(target=attempt, args=(path, there))
    child.start()
    there.close()
    try:
        if here.poll(WALL_SECONDS):
            return here.recv()
        return "hang", f"longer than {WALL_SECONDS} s", 0.0
    except EOFError:
        child.join()
        return (
            ("hang", f"over {CPU_SECONDS} s of processor time", 0.0)
            if child.exitcode in (-24, -9)
            else ("crash", f"ended by signal {-child.exitcode}", 0.0)
        )
    finally:
        child.kill()
        child.join()


def fuzz(n: int, seed: int, keep=None, names=None, say=lambda *a: None) -> tuple:
    """Judge `names` of the strange files (all, if none are named) and spoilt ones up to `n`.

    A table kind → Counter of outcomes, the failures, and the peak in MB."""
    table, failures, most = {}, [], 0.0
    names = list(STRANGE) if names is None else names
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        good = good_files(folder)
        for k in range(n):
            path, kind = (
                strange(names[k], folder) if k < len(names) else spoilt(good, k, seed, folder)
            )
            came, words, memory = judge(path)
            table.setdefault(kind.split(" + ")[0], Counter())[came] += 1
            most = max(most, memory)
            say(
                f"{k:4d} {came:12s} {memory:5.0f} MB  {path.name}  ({kind})",
                *("\n     " + line for line in words.splitlines()),
            )
            if came not in ("ok", "typed error"):
                failures.append(f"{path.name} ({kind}): {came}: {words}")
                if keep:
                    (Path(keep) / path.name).write_bytes(path.read_bytes())
            path.unlink(missing_ok=True)
    return table, failures, most


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--n", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep", help="folder for the files that failed")
    p.add_argument("-v", action="store_true", help="say what became of each file")
    args = p.parse_args()
    if args.keep:
        Path(args.keep).mkdir(parents=True, exist_ok=True)
    av.logging.set_level(None)
    table, failures, most = fuzz(
        args.n, args.seed, args.keep, say=print if args.v else lambda *a: None
    )
    print(f"{'':16s}" + "".join(f"{o:>13s}" for o in ORDER))
    for kind, count in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{kind:16s}" + "".join(f"{count[o]:13d}" for o in ORDER))
    print(f"largest process {most:.0f} MB", *failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
