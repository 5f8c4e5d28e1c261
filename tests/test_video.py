"Reading, writing, dubbing, tracking and cropping video: every claim against an oracle."

import gc
import subprocess
import sys
import time
import weakref
from fractions import Fraction
from itertools import islice
import av
import numpy as np
import pytest
import torch
from faces2voices.errors import F2VError, MediaError, NoFaceError, ToolMissingError
from faces2voices.core import test_same
from faces2voices.soundfiles import SYNTHETIC_TAG
from faces2voices import media, tracking, video as V


def encode(path, frames, times, rate=25, base=1000, codec="libx264", rotation=0, sound_at=None):
    "Write `frames` at `times` (seconds), with a click track that begins at `sound_at` seconds."
    with av.open(str(path), "w") as out:
        s = out.add_stream(
            codec, rate=rate, width=frames[0].shape[1], height=frames[0].shape[0], pix_fmt="yuv420p"
        )
        if rotation:
            s.set_display_rotation(rotation)
        s.codec_context.time_base = Fraction(1, base)
        a = (
            None
            if sound_at is None
            else out.add_stream("aac", rate=16000, layout="mono", format="fltp")
        )
        for frame, t in zip(frames, times):
            f = av.VideoFrame.from_ndarray(frame, format="rgb24")
            f.pts, f.time_base = round(t * base), Fraction(1, base)
            out.mux(s.encode(f))
        out.mux(s.encode(None))
        if a:
            noise = (0.2 * np.random.default_rng(0).standard_normal((1, 16384))).astype(np.float32)
            for k in range(0, 16384, 1024):
                f = av.AudioFrame.from_ndarray(
                    noise[:, k : k + 1024].copy(), format="fltp", layout="mono"
                )
                f.sample_rate = 16000
                f.time_base = Fraction(1, 16000)
                f.pts = k + round(sound_at * 16000)
                out.mux(a.encode(f))
            out.mux(a.encode(None))


def clock(times):
    return [V.clock_frame(k, t) for k, t in enumerate(times)]


def numbers(frames):
    return [V.clock_number(f) for f in frames]


def newest(times, T):
    return (
        np.searchsorted(np.asarray(times) - times[0], np.arange(T) / 25 + 1e-3, side="right") - 1
    ).tolist()


WOBBLY = np.round(np.cumsum(np.random.default_rng(3).uniform(0.008, 0.07, 70)), 3)


@pytest.mark.parametrize(
    "times",
    [
        np.arange(48) / 24,
        np.arange(50) / 25,
        np.arange(60) * 1001 / 30000,
        np.arange(120) / 60,
        WOBBLY,
    ],
    ids=["24", "25", "29.97", "60", "variable"],
)
def test_timestamps_decide(tmp_path, times):
    encode(tmp_path / "film.mp4", clock(times), times, rate=60, base=30000)
    got = V.read_video(tmp_path / "film.mp4").frames
    assert abs(len(got) / 25 - (times[-1] - times[0] + np.median(np.diff(times)))) <= 0.06
    assert numbers(got) == newest(times, len(got))


@pytest.mark.parametrize("ending, late", [("avi", 2), ("h264", 0)])
def test_times_that_do_not_rise_are_not_believed(tmp_path, ending, late):
    "AVI and bare streams tell no true times: still every frame, in its place or nearly."
    encode(tmp_path / f"film.{ending}", clock(np.arange(50) / 25), np.arange(50) / 25, base=25)
    got = np.array(numbers(V.read_video(tmp_path / f"film.{ending}").frames))
    assert (
        50 <= len(got) <= 50 + late and len(set(got.tolist())) >= 49 and (np.diff(got) >= 0).all()
    )
    assert abs(got - np.arange(len(got))).max() <= late


def test_part_of_a_film(tmp_path):
    times = np.arange(90) / 30
    encode(tmp_path / "film.mp4", clock(times), times, rate=30, base=30000, sound_at=0)
    whole = V.read_video(tmp_path / "film.mp4")
    part = V.read_video(tmp_path / "film.mp4", start=0.8, max_seconds=1)
    test_same(part.frames, whole.frames[20:45])
    test_same(part.wav, whole.wav[20 * 640 : 45 * 640])
    assert not part.note


@pytest.mark.parametrize("late", [0.0, 0.4])
def test_late_sound_stays_late(tmp_path, late):
    times = np.arange(50) / 25
    encode(tmp_path / "film.mkv", clock(times), times, sound_at=late)
    wav = V.read_video(tmp_path / "film.mkv").wav
    assert wav.shape == (50 * 640,) and wav.dtype == torch.float32
    noise = 0.2 * np.random.default_rng(0).standard_normal(16384)
    lag = np.correlate(wav.numpy(), noise[2000:6000], "valid").argmax() - 2000
    assert abs(lag - late * 16000) <= 20  # the container counts in milliseconds


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation(tmp_path, rotation):
    frame = np.full((64, 96, 3), 30, np.uint8)
    frame[:16, :16] = 230  # a mark at the top left
    encode(tmp_path / "film.mp4", [frame] * 12, np.arange(12) / 25, rotation=rotation)
    seen = V.read_video(tmp_path / "film.mp4").frames[0]
    want = np.rot90(frame, rotation // 90)  # counter-clockwise, as the container says
    assert seen.shape == want.shape and abs(seen.astype(int) - want).mean() < 3


def test_squeezed_pixels_are_stretched(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as out:
        s = out.add_stream("libx264", rate=25, width=64, height=64, pix_fmt="yuv420p")
        s.codec_context.sample_aspect_ratio = Fraction(3, 2)
        for f in np.zeros((12, 64, 64, 3), np.uint8):
            out.mux(s.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(s.encode(None))
    assert V.read_video(tmp_path / "film.mp4").frames.shape == (12, 64, 96, 3)


def test_large_pictures_are_scaled(tmp_path):
    media.write_video(tmp_path / "film.mp4", np.zeros((10, 200, 400, 3), np.uint8))
    video = V.read_video(tmp_path / "film.mp4", max_side=160)
    assert video.frames.shape == (10, 80, 160, 3) and "scaled down from 400 × 200" in video.note


def test_too_long_for_memory(tmp_path, monkeypatch):
    media.write_video(tmp_path / "film.mp4", clock(np.arange(30) / 25))
    monkeypatch.setattr(V, "MAX_BYTES", 20 * 96 * 160 * 3)
    with pytest.raises(MediaError, match="in parts"):
        V.read_video(tmp_path / "film.mp4")
    assert len(V.read_video(tmp_path / "film.mp4", max_seconds=0.8).frames) == 20


@pytest.mark.parametrize(
    "name",
    [
        "two words.mp4",
        "it's \"here\".mp4",
        "глаза 顔 ü.mp4",
        "-dash.mp4",
        "100%d #1.mp4",
        "a:b.mp4",
        "caps.MP4",
    ],
)
@pytest.mark.parametrize("shape", [(49, 63), (50, 64)])
def test_odd_names_and_sizes(tmp_path, name, shape):
    frames = (
        np.random.default_rng(0).integers(0, 40, (12, *shape, 3)).astype(np.uint8)
        + np.arange(12, dtype=np.uint8)[:, None, None, None] * 15
    )
    media.write_video(tmp_path / name, frames, crf=10)
    got = V.read_video(tmp_path / name).frames
    assert got.shape == (12, shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
    assert abs(got[:, : shape[0], : shape[1]].mean((1, 2, 3)) - frames.mean((1, 2, 3))).max() < 4
    assert media.dub(tmp_path / name, torch.zeros(640 * 12), tmp_path / ("dubbed " + name)).copied


def test_same_frames_same_bytes_and_no_overwriting(tmp_path):
    film = clock(np.arange(20) / 25)
    wav = torch.randn(20 * 640, generator=torch.Generator().manual_seed(0)) * 0.1
    for name in "ab":
        media.write_video(tmp_path / f"{name}.mp4", film, wav)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with pytest.raises(F2VError, match="already exists"):
        media.write_video(tmp_path / "a.mp4", film)
    with pytest.raises(MediaError, match="cannot be written"):
        media.write_video(tmp_path / "a.nonsense", film)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


# --- a film of any length


def whole_and_part(path, T=60):
    media.write_video(path, clock(np.arange(T) / 25), torch.zeros(640 * T))
    return V.read_video(path).frames


def test_a_stream_is_the_video(tmp_path):
    whole = whole_and_part(tmp_path / "film.mp4")
    test_same(np.stack(list(V.stream_frames(tmp_path / "film.mp4"))), whole)
    test_same(
        np.stack(list(V.stream_frames(tmp_path / "film.mp4", max_seconds=0.6, start=0.4))),
        whole[10:25],
    )


@pytest.mark.parametrize("room, kept", [(60, 60), (59, 0)])
def test_a_film_is_kept_only_if_it_is_short(tmp_path, monkeypatch, room, kept):
    whole = whole_and_part(tmp_path / "film.mp4")
    monkeypatch.setattr(V, "KEEP_BYTES", room * 96 * 160 * 3)
    film = V.Film(tmp_path / "film.mp4")
    for _ in range(2):
        test_same(np.stack(list(film)), whole)
    assert len(film.kept) == kept


class Passing:
    "Frames to walk through again and again, and the largest number that was ever alive."

    def __init__(self, T):
        self.T, self.alive, self.most = T, weakref.WeakSet(), 0

    def __iter__(self):
        for t in range(self.T):
            holder = V.clock_frame(t, t / 25).view(Counted)
            self.alive.add(holder)
            self.most = max(self.most, len(self.alive))
            yield holder


class Counted(np.ndarray):
    "An array that a set can hold weakly."

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Middle(tracking.FaceBackend):
    "A face in the middle of every frame."

    name = "middle"

    def detect(self, frame):
        return [
            tracking.Face(
                np.array([50.0, 20, 110, 80]), np.array([50.0, 20]) + 60 * tracking.BOX_POINTS, 1.0
            )
        ]


def test_frames_come_and_go():
    "Tracking holds two frames, cropping a part and a few for the best face, whatever the length."
    film = Passing(200)
    track = tracking.track_face(film, Middle())
    assert len(track.points) == 200 and film.most <= 3
    film.most = 0
    for part in V.crop_in_parts(film, track.points, Middle(), seconds=0.8):
        assert len(part.lips) == 20
    gc.collect()
    assert film.most <= 20 + 8 + 3


@pytest.mark.parametrize("seconds", [0.04, 0.4, 1.32, 60])
def test_parts_joined_are_the_whole(tmp_path, seconds):
    whole_and_part(tmp_path / "film.mp4")
    whole = V.preprocess(tmp_path / "film.mp4", Middle()).crops
    film = V.Film(tmp_path / "film.mp4")
    points = tracking.track_face(film, Middle()).points
    parts = list(V.crop_in_parts(film, points, Middle(), seconds=seconds))
    test_same(np.concatenate([p.lips for p in parts]), whole.lips)
    test_same(np.concatenate([p.expression for p in parts]), whole.expression)
    test_same(parts[-1].face, whole.face)
    test_same(whole.face, V.best_face(V.Film(tmp_path / "film.mp4"), points))
    assert all(p.face is None and p.identity is None for p in parts[:-1])
    assert len(parts) == -(-60 // round(seconds * 25))


def test_a_file_and_its_video_look_the_same(tmp_path):
    whole_and_part(tmp_path / "film.mp4")
    a = V.preprocess(tmp_path / "film.mp4", Middle())
    b = V.preprocess(V.read_video(tmp_path / "film.mp4"), Middle())
    for x, y in zip(a.crops, b.crops):
        test_same(x, y)
    test_same(a.video.wav, b.video.wav)
    assert a.video.path == b.video.path and "100%" in V.crops_figure(a)._suptitle.get_text()


def test_frames_at_keeps_the_order():
    assert [int(f) for f in V.frames_at((np.array(k) for k in range(50)), [7, 3, 7])] == [7, 3, 7]


# --- bad files


def test_bounds(tmp_path, monkeypatch):
    "What a header promises is believed only so far."
    film = clock(np.arange(20) / 25)
    encode(tmp_path / "still.mkv", film, [*np.arange(12) / 25, *(3000 + np.arange(8) / 25)])
    media.write_video(tmp_path / "dot.mp4", [f[:8, :40] for f in film])
    media.write_video(tmp_path / "film.mp4", film)
    with pytest.raises(MediaError, match="stands still for 3000 s"):
        V.read_video(tmp_path / "still.mkv")
    assert len(V.read_video(tmp_path / "still.mkv", max_seconds=0.44).frames) == 11
    with pytest.raises(MediaError, match="only 40 × 8 px"):
        V.read_video(tmp_path / "dot.mp4")
    monkeypatch.setattr(media, "MAX_PIXELS", 96 * 160 - 1)
    with pytest.raises(MediaError, match="160 × 96 are too large"):
        V.read_video(tmp_path / "film.mp4")


def test_times_that_run_backwards():
    assert list(
        islice(V.at_25fps([(-5.0, "a"), (-4.96, "b"), (-7.0, "c"), (-4.9, "d"), (-4.84, None)]), 9)
    ) == ["a", "c", "c", "d"]


def test_sound_that_comes_a_month_later(tmp_path):
    encode(tmp_path / "film.mkv", clock(np.arange(20) / 25), np.arange(20) / 25, sound_at=2.6e6)
    assert not V.read_video(tmp_path / "film.mkv").wav.any()


def test_bad_files(tmp_path):
    import soundfile

    whole = tmp_path / "whole.mp4"
    media.write_video(whole, clock(np.arange(75) / 25))
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "headless.mp4").write_bytes(whole.read_bytes()[2000:])
    (tmp_path / "header only.mp4").write_bytes(whole.read_bytes()[:400])
    media.write_video(tmp_path / "short.mp4", clock(np.arange(9) / 25))
    soundfile.write(tmp_path / "sound.wav", np.zeros(16000), 16000)
    for name, reason in {
        "missing.mp4": "no such file",
        ".": "is a folder",
        "text.mp4": "cannot be opened",
        "empty.mp4": "is empty",
        "noise.mp4": "cannot be opened",
        "headless.mp4": "",
        "header only.mp4": "",
        "short.mp4": "holds only",
        "sound.wav": "no moving picture",
    }.items():
        with pytest.raises(MediaError) as e:
            V.read_video(tmp_path / name)
        assert reason in e.value.reason and e.value.cure and str(tmp_path) in str(e.value)
        with pytest.raises(MediaError):
            media.dub(tmp_path / name, torch.zeros(640), tmp_path / "out.mp4")
            if name == "short.mp4":
                raise MediaError(name, "short films may be dubbed")
        (tmp_path / "out.mp4").unlink(missing_ok=True)
    assert not list(tmp_path.glob(".part-*"))


def test_cut_off_file_gives_what_it_holds(tmp_path):
    times = np.arange(75) / 25
    media.write_video(tmp_path / "whole.mp4", clock(times), torch.zeros(48000))
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) * 6 // 10])
    half = V.read_video(tmp_path / "half.mp4")
    assert 10 <= len(half.frames) < 75 and "cut off" in half.note
    assert numbers(half.frames) == list(range(len(half.frames)))


def durations(path):
    with av.open(str(path)) as c:
        return [
            float(s.duration * s.time_base) for s in (c.streams.video[0], c.streams.audio[0])
        ], dict(c.metadata)


def decoded(path):
    with av.open(str(path)) as c:
        return np.stack([f.to_ndarray(format="rgb24") for f in c.decode(video=0)])


@pytest.mark.parametrize(
    "rate, times", [(25, np.arange(50) / 25), (60, WOBBLY)], ids=["25", "variable"]
)
def test_dub_keeps_every_bit(tmp_path, rate, times):
    encode(tmp_path / "film.mp4", clock(times), times, rate=rate, base=30000, sound_at=0)
    T = len(V.read_video(tmp_path / "film.mp4").frames)
    wav = torch.randn(640 * T, generator=torch.Generator().manual_seed(0)) * 0.1
    made = media.dub(tmp_path / "film.mp4", wav, tmp_path / "dubbed.mp4")
    assert made.copied
    test_same(decoded(tmp_path / "film.mp4"), decoded(made.path))
    assert numbers(V.read_video(made.path).frames) == numbers(
        V.read_video(tmp_path / "film.mp4").frames
    )
    (picture, sound), tags = durations(made.path)
    assert abs(picture - sound) < 0.07 and SYNTHETIC_TAG in (tags["title"], tags["comment"])
    heard = V.read_video(made.path).wav
    assert np.correlate(heard.numpy(), wav.numpy()[4000:9000], "valid").argmax() == 4000
    with pytest.raises(F2VError, match="already exists"):
        media.dub(tmp_path / "film.mp4", wav, tmp_path / "film.mp4")


@pytest.mark.parametrize("cut", [1, 640, 1024, 5000, 10**6])
def test_sound_in_stretches_is_the_sound(cut):
    wav = torch.randn(7000, generator=torch.Generator().manual_seed(0))
    blocks = list(media.in_blocks(wav.split(cut)))
    assert [len(b) for b in blocks] == 6 * [1024] + [7000 - 6 * 1024]
    test_same(np.concatenate(blocks), wav.clamp(-1, 1).numpy())
    for a, b in zip(blocks, media.in_blocks(wav.double().numpy()), strict=True):
        test_same(a, b)


def test_dub_from_stretches_gives_the_same_bytes(tmp_path):
    media.write_video(tmp_path / "film.mp4", clock(np.arange(50) / 25))
    wav = torch.randn(32000, generator=torch.Generator().manual_seed(0)) * 0.1
    for name, sound in dict(whole=wav, stretches=iter(wav.split(777)), array=wav.numpy()).items():
        media.dub(tmp_path / "film.mp4", sound, tmp_path / f"{name}.mp4")
    assert (
        (tmp_path / "whole.mp4").read_bytes()
        == (tmp_path / "stretches.mp4").read_bytes()
        == (tmp_path / "array.mp4").read_bytes()
    )


def test_a_sound_that_fails_half_way_leaves_nothing(tmp_path):
    media.write_video(tmp_path / "film.mp4", clock(np.arange(50) / 25))

    def failing():
        yield torch.zeros(5000)
        raise NoFaceError("film.mp4", "lost")

    with pytest.raises(NoFaceError):
        media.dub(tmp_path / "film.mp4", failing(), tmp_path / "dubbed.mp4")
    assert [f.name for f in tmp_path.iterdir()] == ["film.mp4"]


DUB = '''
import resource, sys, torch
from faces2voices.media import dub
for minutes in (1, 1, 10):
    sound = (torch.zeros(16000) for _ in range(60 * minutes))
    dub(f"{sys.argv[1]}/{minutes}.mp4", sound, f"{sys.argv[1]}/dubbed.mp4", overwrite=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)
'''


def test_memory_does_not_grow_with_a_dubbed_film(tmp_path):
    "Ten minutes of sound alone would take 38 MB."
    from memory_of_long_video import repeat

    media.write_video(tmp_path / "clip.mp4", clock(np.arange(75) / 25), crf=40)
    for minutes in (1, 10):
        repeat(tmp_path / "clip.mp4", tmp_path / f"{minutes}.mp4", 20 * minutes)
    out = subprocess.run(
        [sys.executable, "-c", DUB, tmp_path], check=True, capture_output=True, text=True
    ).stdout
    _, one, ten = map(int, out.split())
    assert ten - one < 20, out


def test_dub_keeps_rotation(tmp_path):
    frame = np.full((64, 96, 3), 30, np.uint8)
    frame[:16, :16] = 230
    encode(tmp_path / "film.mp4", [frame] * 12, np.arange(12) / 25, rotation=90)
    media.dub(tmp_path / "film.mp4", torch.zeros(640 * 12), tmp_path / "dubbed.mp4")
    test_same(
        V.read_video(tmp_path / "film.mp4").frames.copy(),
        V.read_video(tmp_path / "dubbed.mp4").frames.copy(),
    )


def test_dub_says_when_it_had_to_encode_again(tmp_path):
    times = np.arange(50) / 25
    encode(tmp_path / "film.webm", clock(times), times, codec="libvpx")
    made = media.dub(tmp_path / "film.webm", torch.zeros(640 * 50), tmp_path / "dubbed.mp4")
    assert not made.copied and numbers(V.read_video(made.path).frames) == list(range(50))


# --- faces


class Marks(tracking.FaceBackend):
    "Finds bright squares and takes each for a face."

    name = "marks"

    def detect(self, frame):
        from scipy import ndimage

        labels, _ = ndimage.label(frame[..., 0] > 150)
        boxes = [
            (s[1].start, s[0].start, s[1].stop, s[0].stop) for s in ndimage.find_objects(labels)
        ]
        return [
            tracking.Face(
                np.array(b, float), np.array(b[:2]) + tracking.BOX_POINTS * (b[2] - b[0]), 1.0
            )
            for b in boxes
        ]


def squares(T, *tracks, size=(120, 240)):
    "Frames with a bright square for each track: a function of the frame to (x, y, side) or None."
    frames = np.zeros((T, *size, 3), np.uint8)
    for t in range(T):
        for track in tracks:
            if place := track(t):
                x, y, side = place
                frames[t, y : y + side, x : x + side] = 200
    return frames


def test_the_same_one_of_two_is_followed():
    "The right face is larger at first and smaller later: it is followed all the same."
    frames = squares(60, lambda t: (20, 30, 30 + t // 2), lambda t: (150, 30, 50 - t // 3))
    track = tracking.track_face(frames, Marks())
    assert track.found.all() and (track.points[:, 2, 0] > 140).all()


def test_another_person_can_be_named():
    """Counted from the left at first sight, and followed whoever grows larger.

    The count waits until there are so many."""

    def grows(t):
        return 20, 30, 30 + t // 2

    def shrinks(t):
        return 150, 30, 50 - t // 3

    tracks = grows, shrinks
    places = [
        tracking.track_face(squares(60, *tracks), Marks(), person=k).points[:, 2, 0] for k in (0, 1)
    ]
    assert (places[0] < 80).all() and (places[1] > 140).all()
    late = squares(60, grows, lambda t: None if t < 12 else shrinks(t))
    assert (tracking.track_face(late, Marks(), person=1).points[:, 2, 0] > 140).all()
    for k in (2, -1):
        with pytest.raises(NoFaceError, match="no frame of 60"):
            tracking.track_face(squares(60, *tracks), Marks(), person=k)


def test_a_track_says_what_it_saw():
    whole = tracking.track_face(squares(50, lambda t: (40, 30, 50)), Marks())
    assert repr(whole) == "face seen in 100% of 50 frames, longest gap 0.00 s, mean score 1.00"
    holes = tracking.Track(whole.points, np.arange(50) % 25 < 15, 0.5)
    assert holes.gap == 0.4 and "60% of 50 frames, longest gap 0.40 s, mean score 0.50" in repr(
        holes
    )


def test_gaps():

    def hole(a, b):
        return squares(75, lambda t: None if a <= t < b else (40 + t, 30, 50))

    short = tracking.track_face(hole(31, 44), Marks())
    x = short.points[:, 2, 0]
    assert (
        short.found.sum() < 75 and abs(np.diff(x)[2:-2] - 1).max() < 0.2
    )  # a straight line over the gap
    with pytest.raises(NoFaceError, match="holiday.mp4: the face is lost for 1"):
        tracking.track_face(hole(16, 46), Marks(), path="holiday.mp4")
    with pytest.raises(NoFaceError, match="only"):
        tracking.track_face(hole(0, 50), Marks())
    with pytest.raises(NoFaceError, match="no face found"):
        tracking.track_face(hole(0, 75), Marks())


def test_similarity_and_warp_agree_with_skimage():
    from skimage.transform import estimate_transform, warp

    rng = np.random.default_rng(0)
    points = V.MEAN_FACE * 1.3 + 20 + rng.normal(0, 3, (4, 2))
    ours = V.similarity(points[None], V.MEAN_FACE)
    theirs = estimate_transform("similarity", points, V.MEAN_FACE).params
    test_same(
        np.array([ours[0][0].real, ours[0][0].imag, ours[1][0].real, ours[1][0].imag]),
        np.array([theirs[0, 0], theirs[1, 0], theirs[0, 2], theirs[1, 2]]),
        atol=1e-9,
    )
    picture = rng.random((300, 320)).astype(np.float32)
    want = warp(picture, np.linalg.inv(theirs), output_shape=(256, 256), order=1, mode="edge")
    test_same(
        V.warp(picture, ours[0][0], ours[1][0], 80 + 60j, (96, 96)),
        want[60:156, 80:176].astype(np.float32),
        atol=1e-4,
    )


def test_a_face_seen_larger_gives_the_same_crop():
    "Shrinking by blocks keeps the place: a picture enlarged 4 times gives the same crop."
    from scipy import ndimage

    small = ndimage.gaussian_filter(
        np.random.default_rng(0).integers(0, 255, (15, 256, 256)).astype(float), (0, 4, 4)
    )
    small = (255 * (small - small.min()) / np.ptp(small)).astype(np.uint8)
    points = np.repeat(
        np.array([[[102.0, 94], [156, 94], [129, 136], [112, 158], [147, 158]]]), 15, 0
    )
    frames = np.repeat(small[..., None], 3, -1)
    large = frames.repeat(4, 1).repeat(4, 2)
    for f in (V.lip_crops, V.brow_strip):
        a, b = f(frames, points).astype(float), f(large, points * 4 + 1.5).astype(float)
        assert abs(a - b).mean() < 0.01 * np.ptp(a)


def test_lips_are_centred_and_upright():
    "A dot at the mouth ends in the middle of the crop, whatever the head's tilt."
    T = 40
    z = (
        (V.MEAN_FACE @ [1, 1j] - 128 - 128j)[None]
        * np.exp(1j * np.linspace(-0.3, 0.3, T))[:, None]
        * 0.8
        + 120
        + 100j
    )
    points = np.stack([z[:, [0, 1, 2, 3, 3]].real, z[:, [0, 1, 2, 3, 3]].imag], -1)
    frames = np.zeros((T, 220, 240, 3), np.uint8)
    y, x = np.mgrid[:220, :240]
    for t in range(T):
        frames[t][np.hypot(x - z[t, 3].real, y - z[t, 3].imag) < 4] = 255
    lips = V.lip_crops(frames, points)
    from scipy import ndimage

    middle = np.array([ndimage.center_of_mass(mouth) for mouth in lips[8:-8]])
    assert lips.shape == (T, 96, 96) and lips.dtype == np.uint8 and abs(middle - 47.5).max() < 1.2
    strip = V.brow_strip(frames, points)
    assert (
        strip.shape == (T, 1152)
        and strip.dtype == np.float32
        and 0 <= strip.min()
        and strip.max() <= 1
    )


def no_models_named(monkeypatch, home):
    for name in ("F2V_INSIGHTFACE", "F2V_MEDIAPIPE", "F2V_MOBILEFACENET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))


def test_backends_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ToolMissingError, match="download faces --pack"):
        tracking.make_backend("insightface", tmp_path)
    with pytest.raises(ToolMissingError, match="drawn talkers"):
        tracking.make_backend("locator")
    with pytest.raises(ToolMissingError, match="Choose"):
        tracking.make_backend("wizard")
    with pytest.raises(ToolMissingError, match="download faces --pack"):
        tracking.make_backend("auto", tmp_path)  # what is named must serve
    no_models_named(monkeypatch, tmp_path)
    assert tracking.make_backend("auto").name == "cascade"
    for name in ("cascade+cascade", "wizard+mediapipe", "mediapipe+wizard"):
        with pytest.raises(ToolMissingError):
            tracking.make_backend(name)
    pytest.importorskip("insightface")
    pack = tmp_path / "models" / "broken"
    pack.mkdir(parents=True)
    for name in ("a.onnx", "b.onnx"):
        (pack / name).write_bytes(b"nothing of use")
    with pytest.raises(ToolMissingError, match="can be loaded"):
        tracking.make_backend("insightface", tmp_path)


class Teller(Marks):
    "Tells the number of the first frame, and a mouth at the left eye."

    name = "teller"

    def motion(self, frames, points, start=0):
        n = len(frames)
        mouth = points[start : start + n, :1].repeat(9, 1)
        return tracking.Motion(np.full((n, 3), start, np.float32), mouth)

    def identity(self, face):
        return np.ones(1, np.float32)


def test_each_of_two_backends_tells_its_part():
    film = squares(140, lambda t: (40 + t, 30, 50))
    both = tracking.CombinedBackend(Marks(), motion=Teller())
    points = tracking.track_face(film, both).points
    crops = V.crop(film, points, both)
    assert both.name == "marks+teller" and crops.expression.shape == (140, 3)
    assert crops.expression[:, 0].tolist() == [0] * 125 + [125] * 15
    test_same(crops.mouth[:, 4], points[:, 0])
    assert crops.identity.shape == (0,)
    other = tracking.CombinedBackend(Marks(), identity=Teller())
    crops = V.crop(film, points, other)
    assert other.name == "marks+teller" and crops.expression.shape == (140, 1152)
    assert crops.identity.tolist() == [1]


class Telling(Marks):
    "Tells the motion as it finds: the place of the face, and a mouth at its corner."

    name = "telling"
    finds_motion = True
    looks = 0

    def detect(self, frame):
        self.looks += 1
        return [
            f._replace(expression=f.box[:2], mouth=f.box[None, :2].repeat(9, 0))
            for f in super().detect(frame)
        ]


@pytest.mark.parametrize("seconds", [0.04, 0.4, 1.32, 60])
def test_a_finder_that_tells_the_motion_looks_once_at_each_frame(seconds):
    "The person that is followed moves as told, in parts as in one piece; a gap is at rest."

    def seen(t):
        return None if 20 <= t < 33 else (20, 30, 40)

    film = squares(60, seen, lambda t: (130 + t // 3, 40, 50 - t // 2))
    backend = Telling()
    for person, x in ((0, np.full(60, 20)), (1, 130 + np.arange(60) // 3)):
        backend.looks = 0
        track = tracking.track_face(film, backend, person=person)
        whole = V.crop(film, track.points, backend, track.motion)
        assert backend.looks == 60
        there = [seen(t) is not None or person == 1 for t in range(60)]
        test_same(whole.expression[there, 0], x[there].astype(np.float32))
        assert np.isnan(whole.mouth[~np.array(there)]).all()
        assert not whole.expression[~np.array(there)].any()
        parts = list(
            V.crop_in_parts(film, track.points, backend, seconds=seconds, motion=track.motion)
        )
        for name in ("lips", "expression", "mouth"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            test_same(np.nan_to_num(joined), np.nan_to_num(getattr(whole, name)))
    quiet = tracking.CombinedBackend(backend, motion=tracking.FaceBackend())
    assert tracking.track_face(film, quiet).motion is None and quiet.name == "telling+strip"


def test_of_two_in_the_cut_the_nearer_one_tells_the_motion():
    class TwoSeen(tracking.MediaPipeBackend):
        "Sees a far face first and the true one second, without any model."

        def __init__(self):
            self.cuts = []

        def detect(self, cut):
            self.cuts.append(cut.shape)
            five = 20 * tracking.BOX_POINTS + [28, 24]  # in the cut around the face below
            return [
                tracking.Face(np.zeros(4), five + x, 1.0, np.full(52, x), np.full((9, 2), x))
                for x in (25, 1)
            ]

    frames = np.zeros((3, 120, 160, 3), np.uint8)
    five = 20 * tracking.BOX_POINTS + [60, 50]
    told = TwoSeen().motion(frames, np.stack([five] * 5), start=2)
    assert told.expression.shape == (3, 52) and (told.expression == 1).all()
    assert (told.mouth == 1).all()


def test_two_threads_keep_the_order_and_few_frames():
    film = Passing(60)

    def look(frame):
        k = V.clock_number(np.asarray(frame))
        time.sleep(0.004 * (k % 2))
        return k

    assert list(tracking._each_in_threads(look, film, 2)) == list(range(60))
    assert film.most <= 5


def test_without_a_mesh_brows_are_pixels_and_the_mouth_has_no_points():
    film = squares(30, lambda t: (40, 30, 50))
    crops = V.crop(film, tracking.track_face(film, Marks()).points, Marks())
    assert crops.expression.shape == (30, 1152) and crops.mouth.shape == (30, 0, 2)


@pytest.mark.parametrize(
    "there, chosen",
    [
        (("insightface", "mediapipe", "mobilefacenet"), "mediapipe+mobilefacenet"),
        (("insightface", "mediapipe"), "mediapipe+insightface"),
        (("insightface", "mobilefacenet"), "insightface+mobilefacenet"),
        (("insightface",), "insightface"),
        (("mediapipe",), "mediapipe"),
        (("mobilefacenet",), "cascade+mobilefacenet"),
        ((), "cascade"),
    ],
)
def test_auto_takes_the_best_at_hand(tmp_path, monkeypatch, there, chosen):
    monkeypatch.setattr(tracking, "find_spec", lambda name: name in there or None)
    no_models_named(monkeypatch, tmp_path)
    pack = tmp_path / ".insightface" / "models" / "pack"
    pack.mkdir(parents=True)
    (tmp_path / ".mediapipe").mkdir()
    (tmp_path / ".mobilefacenet").mkdir()
    task, weights = ".mediapipe/face_landmarker.task", ".mobilefacenet/mobilefacenet.pt"
    for file in ("a.onnx", "b.onnx"):
        (pack / file).touch()
    (tmp_path / task).touch()
    if "mobilefacenet" in there:
        (tmp_path / weights).touch()
    assert tracking._best() == chosen
    assert tracking._best(tmp_path).endswith("insightface")  # what is named comes first


def test_the_cut_around_a_face_stays_inside():
    frame, five = np.zeros((60, 80, 3), np.uint8), 10 * tracking.BOX_POINTS
    for corner in [(0, 0), (70, 50), (-40, -40), (200, 200), (30, 20)]:
        cut, (x, y) = tracking._around(frame, five + corner)
        assert cut.ndim == 3 and cut.shape[0] <= 60 and cut.shape[1] <= 80
        test_same(cut, frame[y : y + len(cut), x : x + cut.shape[1]])


# --- real faces


@pytest.fixture(scope="module")
def insight(shared):
    pytest.importorskip("insightface")
    return tracking.make_backend("insightface", shared / "insightface")


def test_real_clip(shared, insight, capfd):
    assert insight.name == "insightface"
    looked = V.preprocess(sorted((shared / "grid/s1").glob("*.mp4"))[0], insight)
    video, track, crops = V.read_video(looked.video.path), looked.track, looked.crops
    test_same(video.wav, looked.video.wav)
    assert video.frames.shape == (75, 288, 360, 3) and video.wav.shape == (48000,)
    assert track.found.all() and track.score > 0.6
    assert (
        crops.lips.shape == (75, 96, 96)
        and crops.face.shape == (112, 112, 3)
        and crops.expression.shape == (75, 1152)
    )
    assert abs(np.linalg.norm(crops.identity) - 1) < 1e-5 and capfd.readouterr().out == ""
    cv2 = pytest.importorskip("cv2")
    from insightface.utils import face_align

    theirs = face_align.norm_crop(video.frames[30], track.points[30].astype(np.float32))
    assert abs(V.align_face(video.frames[30], track.points[30]).astype(int) - theirs).mean() < 1.5


def test_identity_tells_people_apart(shared, insight):
    one, other = [sorted((shared / "grid" / s).glob("*.mp4"))[:2] for s in ("s1", "s4")]
    who = np.stack(
        [
            V.preprocess(V.read_video(p, max_seconds=0.6), insight).crops.identity
            for p in one + other
        ]
    )
    alike = who @ who.T
    assert alike[0, 1] > 0.7 and alike[2, 3] > 0.7 and abs(alike[:2, 2:]).max() < 0.5


def test_cascade_agrees_roughly(shared, insight):
    frames = V.read_video(sorted((shared / "grid/s1").glob("*.mp4"))[1], max_seconds=0.8).frames
    good, rough = (
        tracking.track_face(frames, b).points for b in (insight, tracking.CascadeBackend())
    )
    eyes = np.linalg.norm(good[:, 1] - good[:, 0], axis=-1).mean()
    assert np.linalg.norm(good - rough, axis=-1).mean() < 0.25 * eyes
    assert tracking.CascadeBackend().identity(np.zeros((112, 112, 3), np.uint8)).shape == (0,)


def test_two_real_faces(shared, insight):
    a, b = (
        V.read_video(sorted((shared / "grid" / s).glob("*.mp4"))[0], max_seconds=0.8).frames
        for s in ("s1", "s4")
    )
    sides = np.concatenate([a[:20], b[:20]], 2)
    areas = [max(np.prod(f.box[2:] - f.box[:2]) for f in insight.detect(x[0])) for x in (a, b)]
    x = tracking.track_face(sides, insight).points[:, 2, 0]
    assert ((x > 360) == (areas[1] > areas[0])).all()


def test_the_same_person_is_followed(shared, insight):
    """Two speakers side by side, one of them shown ever smaller.

    The face at the end is still that of the person at the start."""
    from skimage.transform import resize

    a, b = (
        V.read_video(sorted((shared / "grid" / s).glob("*.mp4"))[0], max_seconds=0.8).frames
        for s in ("s1", "s4")
    )

    def smaller(frame, t):
        size = 288 - 6 * t, 360 - 7 * t
        out = np.zeros_like(frame)
        out[: size[0], : size[1]] = 255 * resize(frame, size, anti_aliasing=True)
        return out

    sides = np.stack([np.concatenate([smaller(x, t), y], 1) for t, (x, y) in enumerate(zip(a, b))])
    alone = [V.preprocess(V.Video(x, None, "alone"), insight).crops.identity for x in (a, b)]
    for person in (0, 1):
        track = tracking.track_face(sides, insight, person=person)
        last = insight.identity(V.align_face(sides[-1], track.points[-1]))
        assert track.found.all() and last @ alone[person] > last @ alone[1 - person] + 0.2


# --- MediaPipe


@pytest.fixture(scope="module")
def mesh(shared):
    pytest.importorskip("mediapipe")
    backend = tracking.MediaPipeBackend(shared / "mediapipe" / "face_landmarker.task")
    yield backend
    backend.close()


def test_mediapipe_points_agree(shared, insight, mesh):
    for speaker in ("s1", "s4"):
        frames = V.read_video(
            sorted((shared / "grid" / speaker).glob("*.mp4"))[0], max_seconds=0.6
        ).frames
        ours, theirs = (tracking.track_face(frames, b).points for b in (mesh, insight))
        eyes = np.linalg.norm(theirs[:, 1] - theirs[:, 0], axis=-1).mean()
        assert np.linalg.norm(ours - theirs, axis=-1).mean() < 0.1 * eyes
        assert [f.score for f in mesh.detect(frames[0])] == [1.0]


def test_mediapipe_tells_an_expression(shared, insight, mesh):
    """52 numbers in [0, 1] a frame, the same in parts; nobody in view gives a face at rest.

    The jaw opens when the mouth is seen to open."""
    both = tracking.CombinedBackend(insight, motion=mesh)
    _, track, crops = V.preprocess(sorted((shared / "grid/s1").glob("*.mp4"))[0], both)
    assert (
        both.name == "insightface+mediapipe"
        and crops.expression.shape == (75, 52)
        and crops.expression.dtype == np.float32
    )
    assert (
        0 <= crops.expression.min()
        and crops.expression.max() <= 1
        and crops.identity.shape == (128,)
    )
    frames = V.read_video(sorted((shared / "grid/s1").glob("*.mp4"))[0]).frames
    part = mesh.motion(frames[40:50], track.points, start=40)
    test_same(part.expression, crops.expression[40:50])
    test_same(part.mouth, crops.mouth[40:50])
    dark = (crops.lips[:, 38:70, 28:68] < 60).mean((1, 2))
    assert np.corrcoef(dark, crops.expression[:, 25])[0, 1] > 0.5  # jawOpen
    nothing = mesh.motion(np.zeros_like(frames[:2]), track.points)
    assert not nothing.expression.any() and np.isnan(nothing.mouth).all()
    assert mesh.detect(np.zeros_like(frames[0])) == [] and mesh.identity(crops.face).shape == (0,)


def mouth_opening(mouth):
    "Height of the open mouth, in frames."
    return mouth[:, 3, 1] - mouth[:, 2, 1]


def test_the_mouth_lies_where_others_measured_it(shared, mesh):
    "The nine points against those that a public project measured on the same clips."
    measured = np.load(shared / "grid/landmarks/s1.npz")
    clip = next(
        p for p in sorted((shared / "grid/s1").glob("*.mp4")) if p.stem in measured["names"]
    )
    theirs = measured["points"][list(measured["names"]).index(clip.stem)].astype(float)
    theirs[theirs == -32768] = np.nan
    theirs /= 64
    crops = V.preprocess(clip, mesh).crops
    assert crops.mouth.shape == (75, 9, 2) and crops.mouth.dtype == np.float32
    assert crops.expression.shape == (75, 52) and crops.expression.dtype == np.float32
    apart = np.linalg.norm(crops.mouth - theirs, axis=-1)
    assert np.nanmedian(apart) < 2 and np.nanmax(apart) < 8  # px of 360
    known = ~np.isnan(theirs[:, 0, 0])
    ours, others = mouth_opening(crops.mouth)[known], mouth_opening(theirs)[known]
    assert np.corrcoef(ours, others)[0, 1] > 0.9


def test_found_or_cut_out_the_mouth_is_the_same(shared, insight, mesh):
    "In one look, in a cut around what another found, and in a picture twice as large."
    frames = V.read_video(sorted((shared / "grid/s4").glob("*.mp4"))[0], max_seconds=0.6).frames
    one = tracking.track_face(frames, mesh)
    two = mesh.motion(frames, tracking.track_face(frames, insight).points)
    assert np.linalg.norm(one.motion.mouth - two.mouth, axis=-1).mean() < 1.5
    large = tracking.track_face(frames.repeat(2, 1).repeat(2, 2), mesh)
    assert np.linalg.norm(one.motion.mouth - large.motion.mouth / 2, axis=-1).mean() < 1


def test_the_mesh_follows_each_of_two_people(shared, mesh):
    a, b = (
        V.read_video(sorted((shared / "grid" / s).glob("*.mp4"))[0], max_seconds=0.8).frames
        for s in ("s1", "s4")
    )
    sides = np.concatenate([a, b], 2)
    for person, alone in enumerate((a, b)):
        told = tracking.track_face(sides, mesh, person=person)
        expected = tracking.track_face(alone, mesh)
        assert told.found.all()
        apart = np.linalg.norm(told.motion.mouth - expected.motion.mouth, axis=-1)
        assert apart.mean() < 1.5, apart.mean()
        cut = mesh.motion(sides, told.points)
        assert np.linalg.norm(cut.mouth - expected.motion.mouth, axis=-1).mean() < 1.5


def test_mediapipe_is_loaded_late_and_quietly(shared):
    "Importing the package loads no face library, and MediaPipe prints nothing of its own."
    pytest.importorskip("mediapipe")
    script = f"""
import sys
import numpy as np
import faces2voices.cli, faces2voices.synthesis, faces2voices.training
from faces2voices.tracking import MediaPipeBackend
assert not {{"mediapipe", "insightface", "onnxruntime"}} & set(sys.modules)
mesh = MediaPipeBackend({str(shared / "mediapipe" / "face_landmarker.task")!r})
assert list(mesh.detect_each(np.zeros((5, 90, 90, 3), np.uint8))) == [[]] * 5
print("said", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "said\n")


def test_mobilefacenet_is_the_published_network(shared, insight, monkeypatch, tmp_path):
    """The published weights, as insightface runs them, in our network: the same identity.

    In the ONNX file each norm is folded into its convolution; here it stands as the norm's bias."""
    onnx = pytest.importorskip("onnx")
    file = onnx.load(shared / "insightface/models/research/MobileFaceNet.onnx")
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in file.graph.initializer}
    folded = [[arrays[k] for k in n.input[1:]] for n in file.graph.node if n.op_type == "Conv"]
    net = tracking.MobileFaceNet().eval()
    ours = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(ours) == len(folded) == len(norms) == 51
    with torch.no_grad():
        for conv, norm, (weight, bias) in zip(ours, norms, folded):
            conv.weight.copy_(torch.tensor(weight))
            norm.running_var.fill_(1 - norm.eps)
            norm.bias.copy_(torch.tensor(bias))
            if conv.bias is not None:
                conv.bias.zero_()
    torch.save(net.state_dict(), tmp_path / "mobilefacenet.pt")
    monkeypatch.setenv("F2V_MOBILEFACENET", str(tmp_path / "mobilefacenet.pt"))
    backend = tracking.make_backend("mobilefacenet")
    picture = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    for face in (picture, picture // 3):
        test_same(backend.identity(face), insight.identity(face), atol=1e-5)
    (tmp_path / "mobilefacenet.pt").write_bytes(b"nothing of use")
    with pytest.raises(ToolMissingError, match="does not hold"):
        tracking.make_backend("mobilefacenet")
    torch.save({"a": torch.zeros(1)}, tmp_path / "mobilefacenet.pt")
    with pytest.raises(ToolMissingError, match="does not hold"):
        tracking.make_backend("mobilefacenet")
    (tmp_path / "mobilefacenet.pt").unlink()
    with pytest.raises(ToolMissingError, match="download faces"):
        tracking.make_backend("mobilefacenet")


def test_mediapipe_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("F2V_MEDIAPIPE", str(tmp_path / "face_landmarker.task"))
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ToolMissingError, match="not installed"):
        tracking.make_backend("mediapipe")


def test_mediapipe_without_its_model(tmp_path, monkeypatch):
    pytest.importorskip("mediapipe")
    monkeypatch.setenv("F2V_MEDIAPIPE", str(tmp_path / "face_landmarker.task"))
    with pytest.raises(ToolMissingError, match="face_landmarker.task.*faces2voices download faces"):
        tracking.make_backend("mediapipe")
    (tmp_path / "face_landmarker.task").write_text("not a model")
    with pytest.raises(ToolMissingError, match="can be loaded"):
        tracking.make_backend("mediapipe")


def test_dub_mpeg1(shared, tmp_path):
    src = sorted((shared / "grid/original/s1").glob("*.mpg"))[0]
    made = media.dub(src, torch.zeros(48000), tmp_path / "dubbed.mp4")
    assert made.copied
    test_same(decoded(src), decoded(made.path))
    (picture, sound), _ = durations(made.path)
    assert abs(picture - sound) < 0.07
