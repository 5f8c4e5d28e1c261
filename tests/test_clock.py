"""Sound and picture on one clock: flashes and clicks at known times, in twenty-five containers.

Each film is made whole, cut between packets, cut between bytes, and with sound packets lost. What
is read must show a flash within 20 ms of its click; a dub must show every frame at its old time."""

from itertools import product
from fractions import Fraction
import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from faces2voices import media, video as V
from faces2voices.soundfiles import load_audio
from faces2voices.errors import MediaError

T, FLASHES, GROUP = 72, (14, 29, 44, 59), 24  # frames; those that flash; frames from key to key
GAP = (0.7, 1.0)  # seconds in which sound packets are lost
RATE = 48000
CLICK = 0.5 * np.sin(2 * np.pi * 2000 * np.arange(RATE // 50) / RATE)  # 20 ms

# name: (ending, picture codec, its options, sound codec, sampling rate)
B_FRAMES = dict(bf="3", g=str(GROUP), sc_threshold="0", preset="veryfast")
OLD_B = dict(bf="2", g=str(GROUP), sc_threshold="1000000000", qmin="2", qmax="6")
FAST_VP = {"g": str(GROUP), "cpu-used": "8"}
CONTAINERS = {
    "mp4": ("mp4", "libx264", B_FRAMES, "aac", RATE),
    "hevc.mp4": (
        "mp4",
        "libx265",
        {"x265-params": f"bframes=3:keyint={GROUP}:log-level=none", "preset": "ultrafast"},
        "aac",
        RATE,
    ),
    "mov": ("mov", "libx264", B_FRAMES, "pcm_s16le", RATE),
    "mkv": ("mkv", "libx264", B_FRAMES, "aac", RATE),
    "webm": ("webm", "libvpx-vp9", FAST_VP, "libopus", RATE),
    "h264.avi": ("avi", "libx264", B_FRAMES, "pcm_s16le", RATE),
    "mpeg4.avi": ("avi", "mpeg4", OLD_B, "pcm_s16le", RATE),
    "mp3.avi": ("avi", "libx264", B_FRAMES, "libmp3lame", 16000),
    "ts": ("ts", "libx264", B_FRAMES, "aac", RATE),
    "mpg": ("mpg", "mpeg2video", OLD_B, "mp2", RATE),
    "flv": ("flv", "libx264", B_FRAMES, "aac", 44100),
    "3gp": ("3gp", "mpeg4", OLD_B | dict(bf="0"), "aac", RATE),
    "ogv": ("ogv", "libvpx", FAST_VP | dict(deadline="realtime"), "libopus", RATE),
    "wmv": ("wmv", "wmv2", OLD_B | dict(bf="0"), "wmav2", RATE),
    "nut": ("nut", "libx264", B_FRAMES, "mp3", RATE),
    "mxf": ("mxf", "mpeg2video", OLD_B, "pcm_s16le", RATE),
    "aac.avi": ("avi", "libx264", B_FRAMES, "aac", RATE),
    "aac 16.avi": ("avi", "libx264", B_FRAMES, "aac", 16000),
    "flac.avi": ("avi", "libx264", B_FRAMES, "flac", RATE),
    "ac3.avi": ("avi", "mpeg4", OLD_B, "ac3", RATE),
    "mpeg4 flac.avi": ("avi", "mpeg4", OLD_B, "flac", RATE),
    "wma.avi": ("avi", "libx264", B_FRAMES, "wmav2", 16000),
    "plain aac.avi": ("avi", "mpeg4", OLD_B | dict(bf="0"), "aac", RATE),
    "h264.asf": ("asf", "libx264", B_FRAMES, "wmav2", RATE),
    "h264.mxf": ("mxf", "libx264", B_FRAMES, "pcm_s16le", RATE),
}


def picture(k):
    "Frame `k` of a clock, white below its digits if it flashes."
    frame = V.clock_frame(k, k / 25)
    if k in FLASHES:
        frame[16:] = 255
    else:
        frame[16:] = frame[16:] // 2
    return frame


def clicks(rate):
    "(1, N) sound with a click at the beginning of each flash."
    sound = np.zeros(round(T / 25 * rate), np.float32)
    for k in FLASHES:
        at = round(k / 25 * rate)
        sound[at : at + len(CLICK)] = CLICK
    return sound[None]


def encoded_sound(stream, rate):
    "Packets of the clicks."
    fifo = av.AudioFifo()
    frame = av.AudioFrame.from_ndarray(clicks(rate), format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
    fifo.write(frame)
    resample = av.AudioResampler(stream.format.name, "mono", rate)
    while part := fifo.read(stream.frame_size or 1024, partial=True):
        for piece in resample.resample(part):
            yield from stream.encode(piece)
    yield from stream.encode(None)


def encoded_picture(stream):
    "Packets of the clock."
    for k in range(T):
        frame = av.VideoFrame.from_ndarray(picture(k), format="rgb24")
        frame.pts, frame.time_base = k, Fraction(1, 25)
        yield from stream.encode(frame)
    yield from stream.encode(None)


CUTS = {  # which packets are kept of the picture, of the sound; seconds the clock is set back
    "whole": (lambda t: True, lambda t: True, 0),
    "copied": (lambda t: t >= 0.95, lambda t: t >= 1.12, 1.12),  # as `ffmpeg -ss 1.12 -c copy` does
    "within": (lambda t: t >= 0.95, lambda t: t >= 1.09, 1.09),  # 30 ms before the next picture
    "between": (lambda t: t >= 0.6, lambda t: t >= 0.6, 0.6),  # does not begin with a key frame
    "early": (lambda t: t >= 0.95, lambda t: True, 0),  # sound, long before the picture
    "gap": (lambda t: True, lambda t: not GAP[0] <= t < GAP[1], 0),
}
CUT_BYTES = {
    "head": lambda data: data[len(data) * 4 // 10 :],
    "tail": lambda data: data[: len(data) * 7 // 10],
}
NO_TIMES = "AVI stores no times of such sound: what is lost is not missed"
NO_START = "AVI stores no beginnings: pictures from before the sound move to it"
BLOCKS = "AVI counts sound in whole packets, here of 64 or 96 ms"
INVENTED = "the decoder invents a picture, and no time tells"
AT_END = "its index stands at the end"
KEY_FIRST = "MXF begins with a key frame, and its sound with it"
CANNOT = {
    ("mpeg4.avi", "early"): INVENTED,
    ("mpeg4.avi", "between"): INVENTED,
    ("ac3.avi", "early"): INVENTED,
    ("ac3.avi", "between"): INVENTED,
    ("mpeg4 flac.avi", "early"): INVENTED,
    ("plain aac.avi", "between"): INVENTED,
    ("mpeg4 flac.avi", "copied"): BLOCKS,
    ("mpeg4 flac.avi", "within"): BLOCKS,
    ("flac.avi", "within"): BLOCKS,
    ("flac.avi", "between"): BLOCKS,
    ("aac 16.avi", "between"): BLOCKS,
    ("mov", "gap"): "PCM in mov is counted, not timed",
    ("ogv", "gap"): "Ogg times pages of a second, not packets",
    ("ogv", "copied"): "Ogg holds no times before zero",
    ("ogv", "within"): "Ogg holds no times before zero",
    ("mxf", "tail"): AT_END,
    ("mp4", "tail"): AT_END,
    ("hevc.mp4", "tail"): AT_END,
    ("mov", "tail"): AT_END,
    ("3gp", "tail"): AT_END,
}
for name in ("h264.avi", "mpeg4.avi", "mp3.avi", "aac.avi", "aac 16.avi"):
    CANNOT |= {(name, "gap"): NO_TIMES, (name, "copied"): NO_START, (name, "within"): NO_START}
for name in ("ac3.avi", "plain aac.avi", "wma.avi"):
    CANNOT |= {(name, "gap"): NO_TIMES, (name, "copied"): NO_START, (name, "within"): NO_START}
for name in ("mxf", "h264.mxf"):
    CANNOT |= {(name, cut): KEY_FIRST for cut in ("copied", "within", "between")}
    CANNOT |= {
        (name, "early"): "MXF begins with its picture",
        (name, "gap"): "MXF stores sound beside each picture",
    }


def seconds(packet):
    "When a packet is decoded."
    return float((packet.pts if packet.dts is None else packet.dts) * packet.time_base)


PACKETS = {}  # name of a container: its encoded packets, kept to be muxed again


def again(packet, stream, shift):
    "The same packet for another file, with its times set back by `shift` seconds."
    copy, fine = av.Packet(bytes(packet)), packet.time_base / 1000
    back = round(shift / fine)
    copy.time_base, copy.stream, copy.duration = fine, stream, 1000 * packet.duration
    copy.pts, copy.dts = 1000 * packet.pts - back, 1000 * packet.dts - back
    copy.is_keyframe = packet.is_keyframe
    return copy


def film(path, name, cut="whole"):
    "The film in a container, as it is encoded or without some of its packets."
    ending, codec, options, sound, rate = CONTAINERS[name]
    see, hear, back = CUTS[cut]
    with av.open(str(path), "w") as out:
        video = out.add_stream(
            codec, rate=25, width=160, height=96, pix_fmt="yuv420p", options=options
        )
        if "qmin" in options:
            video.codec_context.bit_rate = 2_000_000
        audio = out.add_stream(sound, rate=rate, layout="mono")
        audio.codec_context.bit_rate = 96_000
        out.start_encoding()
        if name not in PACKETS:
            PACKETS[name] = [*encoded_picture(video)], [*encoded_sound(audio, rate)]
        pictures, sounds = PACKETS[name]
        stored = pictures[0].dts if ending == "avi" else None  # AVI has slots, from 0 on
        kept = [
            (p, video)
            for p in pictures
            if see(float((p.pts if stored is None else p.dts - stored) * p.time_base))
        ]
        kept += [(p, audio) for p in sounds if hear(seconds(p))]
        for packet, stream in sorted(kept, key=lambda pair: seconds(pair[0])):
            out.mux(again(packet, stream, back))


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    "Every film, made when it is first asked for."
    folder = tmp_path_factory.mktemp("films")

    def made(name, cut):
        ending = CONTAINERS[name][0]
        path = folder / f"{name} {cut}.{ending}"
        if not path.exists() and cut in CUT_BYTES:
            path.write_bytes(CUT_BYTES[cut](made(name, "whole").read_bytes()))
        elif not path.exists():
            film(path, name, cut)
        return path

    return made


def flashes(frames):
    "The ticks at which a picture begins to flash."
    bright = np.array([frame[30:].mean() > 200 for frame in frames])
    return np.flatnonzero(bright & ~np.r_[False, bright[:-1]]) / 25


def click_times(wav):
    "When the clicks begin, seconds."
    loud = np.flatnonzero(np.abs(np.asarray(wav)) > 0.12)
    return loud[np.r_[True, np.diff(loud) > 1600]] / 16000 if len(loud) else loud


def assert_in_step(video, least):
    "Every flash has its click within 20 ms, and there are enough of them."
    seen, heard = flashes(video.frames), click_times(video.wav)
    between = (seen > min(heard, default=9) - 0.1) & (seen < max(heard, default=0) + 0.1)
    seen = seen[between]  # what is cut may begin or end with pictures alone
    assert len(seen) >= least, (seen, heard)
    late = [heard[abs(heard - t).argmin()] - t for t in seen]
    assert max(map(abs, late)) <= 0.02, (seen, heard)


def shown(path):
    "Time and number of each frame that can be decoded, with nothing of the package but the digits."
    found = []
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        for packet in source.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for f in decoded:
                number = V.clock_number(f.to_ndarray(format="rgb24"))
                found.append((float((f.pts or 0) * stream.time_base), number))
    return np.array(found)


CASES = [*product(CONTAINERS, (*CUTS, "tail")), ("ts", "head"), ("mpg", "head")]
LEAST = dict(whole=4, gap=4, early=3, copied=2, within=2, between=2, tail=1, head=1)


def possible(name, cut):
    "Skip what cannot exist."
    if (name, cut) in CANNOT:
        pytest.skip(CANNOT[name, cut])


@pytest.mark.parametrize("name, cut", CASES, ids=[f"{n}-{c}" for n, c in CASES])
def test_flash_and_click_are_read_together(films, name, cut):
    possible(name, cut)
    video = V.read_video(films(name, cut))
    assert_in_step(video, LEAST[cut])
    if cut in ("whole", "gap"):
        assert [V.clock_number(f) for f in video.frames] == list(range(T))


@pytest.mark.parametrize("name, cut", CASES, ids=[f"{n}-{c}" for n, c in CASES])
def test_a_dub_shows_every_frame_at_its_old_time(films, tmp_path, name, cut):
    possible(name, cut)
    path = films(name, cut)
    video = V.read_video(path)
    made = media.dub(path, video.wav, tmp_path / "dubbed.mp4")
    before, after = shown(path), shown(made.path)
    assert len(after) == len(before) and after[:, 1].tolist() == before[:, 1].tolist()
    if cut == "between":  # from the key frame on; some decoders invent what was before
        after = after[after[:, 1].tolist().index(GROUP) :]
    times, numbers = after[: -2 if cut == "tail" else None].T
    assert abs(times - times[0] - (numbers - numbers[0]) / 25).max() < 0.02, after
    assert_in_step(V.read_video(made.path), LEAST[cut])


def remuxed(path, dst, moved, **options):
    "The packets of a film, each at its time and `moved(packet)` milliseconds."
    with av.open(str(path)) as source, av.open(str(dst), "w", options=options) as out:
        into = [out.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.size:
                later = round(moved(packet) / 1000 / packet.time_base)
                packet.pts += later
                packet.dts = packet.pts if packet.dts is None else packet.dts + later
                packet.stream = into[packet.stream_index]
                out.mux(packet)
    return dst


@pytest.mark.parametrize("off, shown_twice", [(5, 0), (48, 1)])
def test_a_first_picture_out_of_step_does_not_delay_the_others(films, tmp_path, off, shown_twice):
    "A cut without encoding, or fragments, may leave it early."

    def moved(packet):
        return 0 if packet.stream.type == "video" and packet.pts == 0 else off

    path = remuxed(films("mp4", "whole"), tmp_path / "film.nut", moved)
    video = V.read_video(path)
    assert_in_step(video, 4)
    assert [V.clock_number(f) for f in video.frames] == [*[0] * shown_twice, *range(T)]


def test_a_film_may_begin_before_zero(films, tmp_path):
    "Matroska gives such pictures no time."
    path = remuxed(
        films("mp4", "whole"),
        tmp_path / "film.mkv",
        lambda packet: -720,
        avoid_negative_ts="disabled",
    )
    with av.open(str(path)) as source:
        assert next(source.decode(video=0)).pts is None
    video = V.read_video(path)
    assert_in_step(video, 4)
    assert [V.clock_number(f) for f in video.frames] == list(range(T))
    made = media.dub(path, video.wav, tmp_path / "dubbed.mp4")
    assert made.copied and len(shown(made.path)) == T
    assert_in_step(V.read_video(made.path), 4)


TELLING_THE_ORDER = "h264.avi", "aac.avi", "aac 16.avi", "mp3.avi", "h264.mxf", "flac.avi"
COPIES = list(product(TELLING_THE_ORDER, ("mp4", "mov", "mkv")))
COPIES.remove(("flac.avi", "mov"))  # a mov holds no FLAC


@pytest.mark.parametrize("name, ending", COPIES)
def test_a_copy_that_took_the_order_for_times_is_seen_through(films, tmp_path, name, ending):
    "Copied without thought, each picture is said to be shown when it is decoded."
    path = tmp_path / f"film.{ending}"
    with av.open(str(films(name, "whole"))) as source, av.open(str(path), "w") as out:
        into = [out.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.size:
                packet.pts = packet.dts
                packet.stream = into[packet.stream_index]
                out.mux(packet)
    video = V.read_video(path)
    assert [V.clock_number(f) for f in video.frames] == list(range(T))
    assert_in_step(video, 4)
    made = media.dub(path, video.wav, tmp_path / "dubbed.mp4")
    after = shown(made.path)
    assert made.copied and after[:, 1].tolist() == list(range(T))
    assert abs(after[:, 0] - after[0, 0] - after[:, 1] / 25).max() < 0.02
    assert_in_step(V.read_video(made.path), 4)


def test_what_is_prepared_is_in_step(films):
    "Lost sound packets do not pair lips with later speech; early sound does not either."
    from faces2voices.corpora import clip_of
    from memory_of_long_video import Middle

    for name, cut in [("mkv", "gap"), ("ts", "between")]:
        looked = V.preprocess(films(name, cut), Middle())
        wav = clip_of(name, looked).wav
        assert_in_step(V.Video(np.stack(list(looked.video.frames)), wav, ""), 2)
        heard = media.film_sound(films(name, cut), T=len(wav) // 640).clamp(-1, 1)
        assert torch.equal(heard, wav)


# --- sound by its own times


def tone(path, times, codec="pcm_s16le", layout="mono", parts=None, n=1000):
    "A tone of 441 Hz, cut into frames of `n` samples that are stamped as told (seconds)."
    t = np.arange(len(times) * n) / RATE
    sound = (
        parts if parts is not None else 0.4 * np.sin(2 * np.pi * 441 * t)[None].astype(np.float32)
    )
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=RATE, layout=layout)
        resample = av.AudioResampler(stream.format.name, layout, RATE)
        for k, at in enumerate(times):
            part = np.ascontiguousarray(sound[:, k * n : k * n + n], np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), k * n
            for packet in stream.encode(resample.resample(frame)[0]):
                packet.pts = round(at / packet.time_base)
                packet.dts = packet.pts
                out.mux(packet)


def test_time_stamps_that_wobble_make_no_click(tmp_path):
    "Stamps that are off by up to 8 ms, to and fro, leave the tone as smooth as it was."
    wobble = np.random.default_rng(0).uniform(-0.004, 0.004, 96)
    wobble[0] = 0
    tone(tmp_path / "tone.mkv", np.maximum.accumulate(np.arange(96) / 48 + wobble))
    wav = load_audio(tmp_path / "tone.mkv").numpy()
    assert len(wav) == 2 * 16000
    want = 0.4 * np.sin(2 * np.pi * 441 * np.arange(32000) / 16000)
    assert abs(wav - want)[200:-200].max() < 0.02


def test_gaps_are_silent_and_what_comes_twice_is_cut(tmp_path):
    at = np.arange(96) / 48
    tone(tmp_path / "gap.mkv", np.where(at < 1, at, at + 0.25))
    gap = load_audio(tmp_path / "gap.mkv").numpy()
    assert abs(len(gap) - 2.25 * 16000) < 32
    assert not gap[16100:19900].any() and abs(gap[20050:]).max() > 0.3
    tone(tmp_path / "tone.ts", np.arange(96) * 1152 / RATE, codec="mp2", n=1152)
    data = (tmp_path / "tone.ts").read_bytes()
    half = len(data) // 376 * 188
    (tmp_path / "twice.ts").write_bytes(data[: half + 40 * 188] + data[half:])
    lengths = [len(load_audio(tmp_path / f"{name}.ts")) for name in ("tone", "twice")]
    assert abs(lengths[1] - lengths[0]) < 32


def test_a_clock_that_begins_anew_goes_on(tmp_path):
    "Two films in one, as broadcasts are joined: the second is not thrown away."
    for name in "ab":
        tone(tmp_path / f"{name}.ts", np.arange(96) / 48, codec="mp2", n=1152)
    joined = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(joined)
    one, both = len(load_audio(tmp_path / "a.ts")), len(load_audio(tmp_path / "both.ts"))
    assert abs(both - 2 * one) < 1600


def test_a_damaged_packet_is_passed_over(tmp_path):
    tone(tmp_path / "tone.mkv", np.arange(96) * 1024 / RATE, codec="aac", n=1024)
    data = bytearray((tmp_path / "tone.mkv").read_bytes())
    with av.open(str(tmp_path / "tone.mkv")) as source:
        packet = [p for p in source.demux() if p.size][40]
        inside = data.index(bytes(packet)) + 4
    data[inside : inside + packet.size - 4] = np.random.default_rng(0).bytes(packet.size - 4)
    (tmp_path / "hurt.mkv").write_bytes(data)
    with pytest.raises(av.FFmpegError), av.open(str(tmp_path / "hurt.mkv")) as source:
        list(source.decode(audio=0))
    wav = load_audio(tmp_path / "hurt.mkv")
    assert len(wav) > 1.9 * 16000 and wav[-8000:].abs().max() > 0.3


@pytest.mark.parametrize("noise", [0, 0.01])
def test_opposite_channels_are_heard(tmp_path, noise):
    t = np.arange(96000) / RATE
    left = 0.4 * np.sin(2 * np.pi * 441 * t)
    hiss = noise * np.random.default_rng(0).standard_normal((2, len(t)))
    for name, parts in dict(opposite=[left, -left], alone=[left, 0 * left]).items():
        sound = np.stack(parts) + hiss
        tone(tmp_path / f"{name}.mkv", np.arange(96) / 48, layout="stereo", parts=sound)
    assert load_audio(tmp_path / "opposite.mkv").abs().max() > 0.35
    assert abs(load_audio(tmp_path / "alone.mkv").abs().max() - 0.2) < 0.03  # the mean, as ever


def mux_tracks(path, tracks):
    "Tracks of (codec, width, frames shown, disposition) or (codec, None, level of a tone, …)."
    with av.open(str(path), "w") as out:
        packets = []
        for codec, width, what, flags in tracks:
            if width is None:
                stream = out.add_stream(codec, rate=RATE, layout="mono")
                frames = [
                    av.AudioFrame.from_ndarray(
                        np.full((1, 48000), what, np.float32), format="fltp", layout="mono"
                    )
                ]
                frames[0].sample_rate, frames[0].pts = RATE, 0
                frames[0].time_base = Fraction(1, RATE)
                frames = av.AudioResampler(stream.format.name, "mono", RATE).resample(frames[0])
            else:
                stream = out.add_stream(
                    codec,
                    rate=25,
                    width=width,
                    height=96,
                    pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
                )
                frames = []
                for k in what:
                    wide = np.pad(picture(k), ((0, 0), (0, width - 160), (0, 0)))
                    frame = av.VideoFrame.from_ndarray(wide, format="rgb24")
                    frame.pts, frame.time_base = k, Fraction(1, 25)
                    frames.append(frame)
            stream.disposition = flags
            packets.append((stream, frames))
        for stream, frames in packets:
            for frame in [*frames, None]:
                for packet in stream.encode(frame):
                    out.mux(packet)


DEFAULT, NONE = Disposition.default, Disposition(0)
FILM, PREVIEW = range(40), range(2)


@pytest.mark.parametrize(
    "ending, tracks, width",
    [
        ("mkv", [("mpeg4", 320, PREVIEW, DEFAULT), ("libx264", 160, FILM, NONE)], 160),
        ("mkv", [("mpeg4", 160, FILM, NONE), ("libx264", 160 + 32, FILM, DEFAULT)], 192),
        ("mkv", [("mpeg4", 320, FILM, NONE), ("libx264", 160, FILM, DEFAULT)], 160),
        ("mp4", [("mpeg4", 160, FILM, DEFAULT), ("libx264", 320, FILM, DEFAULT)], 320),
        (
            "mp4",
            [
                ("mjpeg", 320, PREVIEW[:1], Disposition.attached_pic),
                ("libx264", 160, FILM, DEFAULT),
            ],
            160,
        ),
        ("mp4", [("libx264", 320, PREVIEW, DEFAULT), ("libx264", 160, FILM, NONE)], 160),
    ],
)
def test_the_pictures_that_people_see_are_read(tmp_path, ending, tracks, width):
    mux_tracks(tmp_path / f"film.{ending}", tracks)
    video = V.read_video(tmp_path / f"film.{ending}")
    assert video.frames.shape[:3] == (40, 96, width)
    made = media.dub(tmp_path / f"film.{ending}", torch.zeros(25600), tmp_path / "dubbed.mp4")
    assert V.read_video(made.path).frames.shape[:3] == (40, 96, width)


@pytest.mark.parametrize(
    "flags, level",
    [
        ([NONE, DEFAULT], 0.25),
        ([DEFAULT, NONE], 0.125),
        ([NONE, NONE], 0.125),
        ([Disposition.comment | DEFAULT, DEFAULT], 0.25),
    ],
)
def test_the_sound_that_people_hear_is_read(tmp_path, flags, level):
    tracks = [("pcm_s16le", None, 0.125, flags[0]), ("pcm_s16le", None, 0.25, flags[1])]
    mux_tracks(tmp_path / "film.mkv", [("libx264", 160, FILM, DEFAULT), *tracks])
    for wav in (load_audio(tmp_path / "film.mkv"), V.read_video(tmp_path / "film.mkv").wav):
        assert abs(wav[1000:15000].mean() - level) < 0.01


# --- dubs


def only_pictures(path, codec, pix_fmt="yuv420p", size=(160, 96), options=None, n=40, **look):
    "The clock alone; `look` may hold a turn, the shape of a pixel and colours."
    width, height = size
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            codec, rate=25, width=width, height=height, pix_fmt=pix_fmt, options=options or {}
        )
        if "turn" in look:
            stream.set_display_rotation(look["turn"])
        if "matrix" in look:
            stream.set_display_matrix(look["matrix"])
        if "aspect" in look:
            stream.codec_context.sample_aspect_ratio = look["aspect"]
        for k in range(n):
            wide = np.pad(picture(k), ((0, height - 96), (0, width - 160), (0, 0)))
            frame = av.VideoFrame.from_ndarray(wide, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = k, Fraction(1, 25)
            for tag, value in look.get("colours", {}).items():
                setattr(frame, tag, value)
                setattr(stream.codec_context, tag, value)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)


def appearance(path):
    "What is told of the pictures, beside the pixels."
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        f = next(source.decode(stream))
        colours = f.color_primaries, f.color_trc, f.colorspace
        return f.width, f.height, f.rotation, stream.sample_aspect_ratio or 1, colours


def dubbed(path, ending="mp4"):
    "What `dub` makes, and before and after as they are read."
    before = V.read_video(path)
    made = media.dub(
        path, torch.zeros(640 * len(before.frames)), path.with_name(f"dubbed.{ending}")
    )
    return made, before, V.read_video(made.path)


MIRRORS = {  # where a step to the right and a step down go, and the picture that is then seen
    "as it is": ((1, 0), (0, 1), lambda p: p),
    "left and right": ((-1, 0), (0, 1), lambda p: p[:, ::-1]),
    "up and down": ((1, 0), (0, -1), lambda p: p[::-1]),
    "half a turn": ((-1, 0), (0, -1), lambda p: p[::-1, ::-1]),
    "diagonal": ((0, 1), (1, 0), lambda p: p.swapaxes(0, 1)),
    "a quarter": ((0, 1), (-1, 0), lambda p: np.rot90(p, -1)),
    "a quarter back": ((0, -1), (1, 0), lambda p: np.rot90(p)),
    "other diagonal": ((0, -1), (-1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "prores_ks"])
@pytest.mark.parametrize("name", MIRRORS)
def test_pictures_are_turned_and_mirrored_as_they_are_shown(tmp_path, name, codec):
    right, down, seen = MIRRORS[name]
    matrix = [*right, 0, *down, 0, 0, 0, 1 << 14]
    matrix = [x << 16 for x in matrix]
    path = tmp_path / "film.mov" if codec == "prores_ks" else tmp_path / "film.mp4"
    pixels = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    only_pictures(path, codec, pixels, n=12, matrix=matrix)
    plain = path.with_stem("plain")
    only_pictures(plain, codec, pixels, n=12)
    made, before, after = dubbed(path)
    want = np.stack([seen(frame) for frame in V.read_video(plain).frames])
    assert np.array_equal(before.frames, want)
    assert after.frames.shape == want.shape and abs(after.frames.astype(int) - want).mean() < 2
    assert made.copied == (codec != "prores_ks")


BARE = {
    "h264": ("libx264", B_FRAMES),
    "hevc": ("libx265", CONTAINERS["hevc.mp4"][2]),
    "m2v": ("mpeg2video", OLD_B),
    "m4v": ("mpeg4", OLD_B),
    "m1v": ("mpeg1video", OLD_B),
}


@pytest.mark.parametrize("ending", BARE)
def test_a_bare_stream_keeps_every_picture(tmp_path, ending):
    "It tells no times at all, and its pictures are stored out of order."
    codec, options = BARE[ending]
    form = dict(m1v="mpeg1video", m2v="mpeg2video").get(ending, ending)
    with av.open(str(tmp_path / f"film.{ending}"), "w", format=form) as out:
        stream = out.add_stream(
            codec, rate=25, width=160, height=96, pix_fmt="yuv420p", options=options
        )
        for packet in encoded_picture(stream):
            out.mux(packet)
    made, before, after = dubbed(tmp_path / f"film.{ending}")
    assert made.copied and [V.clock_number(f) for f in after.frames] == list(range(T))
    assert np.array_equal(before.frames, after.frames)


LOOKS = {
    "prores.mov": dict(
        codec="prores_ks",
        pix_fmt="yuv422p10le",
        turn=90,
        aspect=Fraction(4, 3),
        colours=dict(color_primaries=9, color_trc=16, colorspace=9),
    ),
    "odd prores.mov": dict(codec="prores_ks", pix_fmt="yuv422p10le", size=(163, 97), turn=-90),
    "dv.dv": dict(codec="dvvideo", size=(720, 576), aspect=Fraction(16, 15), n=12),
    "vp8.webm": dict(
        codec="libvpx",
        size=(163, 97),
        options=FAST_VP,
        turn=180,
        colours=dict(color_primaries=5, color_trc=6, colorspace=5),
    ),
    "vp8.mkv": dict(codec="libvpx", options=FAST_VP, turn=90, aspect=Fraction(3, 2)),
    "ffv1.mkv": dict(codec="ffv1", size=(163, 97), colours=dict(color_range=2)),
    "rgb.mov": dict(codec="qtrle", pix_fmt="rgb24", size=(161, 96)),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_is_encoded_again_looks_as_before(tmp_path, name):
    only_pictures(tmp_path / name, **LOOKS[name])
    made, before, after = dubbed(tmp_path / name)
    assert not made.copied and appearance(made.path) == appearance(tmp_path / name)
    assert before.frames.shape == after.frames.shape
    assert abs(before.frames.astype(int) - after.frames).mean() < 2


@pytest.mark.parametrize("ending", ["mkv", "webm", "mp4"])
def test_av1_is_copied(tmp_path, ending):
    only_pictures(tmp_path / f"film.{ending}", "libsvtav1", options=dict(preset="12"))
    made, before, after = dubbed(tmp_path / f"film.{ending}")
    assert made.copied and np.array_equal(before.frames, after.frames)


@pytest.mark.parametrize("ending", ["mkv", "mov", "ts"])
def test_other_containers_are_copied_into(films, tmp_path, ending):
    path = films("mp4", "whole")
    made = media.dub(path, torch.zeros(640 * T), tmp_path / f"dubbed.{ending}")
    assert made.copied and np.array_equal(V.read_video(path).frames, V.read_video(made.path).frames)


def test_pictures_that_were_cut_off_stay_hidden(films, tmp_path):
    "An edit list hides pictures that others hang on; mp4 can say so, Matroska cannot."
    path = films("mp4", "copied")
    for ending, copied in dict(mp4=True, mov=True, mkv=False).items():
        made = media.dub(path, torch.zeros(640 * T), tmp_path / f"dubbed.{ending}")
        assert made.copied == copied
        assert [V.clock_number(f) for f in V.read_video(made.path).frames] == list(range(28, T))


@pytest.mark.parametrize("ending", ["mkv", "ts"])
def test_an_open_group_begins_with_its_first_whole_picture(tmp_path, ending):
    "Pictures that are shown before the first key frame hang on what was cut off."
    path = tmp_path / f"film.{ending}"
    options = B_FRAMES | {"x264-params": "open-gop=1:b-adapt=0"}
    with av.open(str(path), "w") as out:
        video = out.add_stream(
            "libx264", rate=25, width=160, height=96, pix_fmt="yuv420p", options=options
        )
        audio = out.add_stream("aac", rate=RATE, layout="mono")
        out.start_encoding()
        pictures = list(encoded_picture(video))
        key = [k for k, p in enumerate(pictures) if p.is_keyframe][1]
        kept = [*pictures[key:], *(p for p in encoded_sound(audio, RATE) if seconds(p) >= 0.8)]
        for packet in sorted(kept, key=seconds):
            out.mux(packet)
    first = round(pictures[key].pts * pictures[key].time_base * 25)
    assert any(p.pts < pictures[key].pts for p in pictures[key + 1 :])
    made, before, after = dubbed(path)
    assert made.copied and V.clock_number(before.frames[0]) == first
    assert_in_step(before, 2)
    assert np.array_equal(before.frames, after.frames)


def test_a_refusal_names_its_cause_and_leaves_nothing(films, tmp_path):
    path, sound = films("mp4", "whole"), torch.zeros(640 * T)
    causes = {"a.webm": "does not support", "a.xyz": "output format", "a.avi": "other times"}
    for name, cause in causes.items():
        with pytest.raises(MediaError, match=cause) as e:
            media.dub(path, sound, tmp_path / name)
        assert "ends in .mp4" in e.value.cure
    assert not list(tmp_path.iterdir())


def test_a_dub_is_counted(films, tmp_path, monkeypatch):
    "A copy that loses a picture is encoded again; an encoding that does is an error."
    path, moved, frames = films("mkv", "whole"), media._moved_packets, media._moved_frames
    monkeypatch.setattr(media, "_moved_packets", lambda *a: [*moved(*a)][1:])
    assert not media.dub(path, torch.zeros(640 * T), tmp_path / "again.mp4").copied
    assert len(shown(tmp_path / "again.mp4")) == T
    monkeypatch.setattr(media, "_moved_frames", lambda *a: [*frames(*a)][1:])
    with pytest.raises(MediaError, match=f"would show {T - 1} pictures of {T}"):
        media.dub(path, torch.zeros(640 * T), tmp_path / "lost.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["again.mp4"]
