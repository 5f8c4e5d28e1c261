"""Films of any length in windows, the three dials, and what is written.

Against the whole clip, by ear of the pitch tracker, and by weight.
"""

import html
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from faces2voices import films, files, report, synthesis as S
from faces2voices.soundfiles import load_audio, save_wav
from faces2voices.audio import MEL, pitch
from faces2voices.figures import players
from faces2voices.errors import F2VError, MediaError, NoFaceError
from faces2voices.core import GRID, TEMPERATURE, TINY, test_same as same
from faces2voices.corpora import collate
from faces2voices.media import write_video
from faces2voices.video import read_video
from faces2voices.streaming import vocode_stream
from faces2voices.vocoder import excitation

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = sorted((ROOT / "data_samples").glob("*.mp4"))


@pytest.fixture()
def film(clip):
    "The clip swung to and fro: 12 seconds without a splice."

    def swing(x):
        return torch.cat([x, x.flip(0)] * 3)[:300]

    return clip._replace(lips=swing(clip.lips), expression=swing(clip.expression))


@pytest.fixture()
def small(monkeypatch):
    "Windows of 6 seconds."
    for name, n in dict(WINDOW_FRAMES=150, CONTEXT_FRAMES=30).items():
        monkeypatch.setattr(films, name, n)


@pytest.mark.parametrize("T", [1, 499, 500, 501, 999, 45_000])
def test_windows_keep_every_frame_once(T):
    ws = S.windows(T)
    assert ws[0].keep_start == 0 and ws[-1].keep_stop == T
    assert all(a.keep_stop == b.keep_start for a, b in zip(ws, ws[1:]))
    for w in ws:
        assert 0 <= w.start <= w.keep_start < w.keep_stop <= w.stop <= T
        assert w.stop - w.start <= films.WINDOW_FRAMES
    for w in ws[1:]:
        assert min(w.keep_start - w.start, films.CONTEXT_FRAMES) == films.CONTEXT_FRAMES


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rows_come_back(dtype):
    rows, x = S.DiskBackedTensor(), (torch.rand(30, 4, 5) * 200).to(dtype)
    for part in x.split(7):
        rows.append(part)
    assert len(rows) == 30
    for span in (slice(None), slice(3, 29), slice(25, 99)):
        same(rows[span], x[span])


@torch.no_grad()
def test_one_window_is_the_whole_clip(f2v, clip):
    "What the windows add to the hierarchy, the decoder's sampler and the vocoder: nothing."
    b = collate([clip])
    out = f2v.hierarchy(*f2v.hierarchy.inputs(b))
    x = f2v.decoder.sample(
        out.mu, speaker=out.speaker, temperature=TEMPERATURE, steps=3, guidance=1.5, seed=9
    )
    mel = MEL.denormalize(x).clamp(min=float(np.log(MEL.floor)), max=3.0)
    wav = f2v.vocoder(
        mel,
        excitation(out.prosody.log_f0[0], out.prosody.voiced_logit[0].sigmoid().round(), 9)[None],
    )[0]
    speech = f2v.synthesize_clip(clip, steps=3, guidance=1.5, seed=9)
    same(speech.mel, mel[0], atol=1e-5)
    same(speech.wav, wav, atol=1e-5)
    same(speech.log_f0, out.prosody.log_f0[0], atol=1e-6)
    same(speech.units, out.content.logits[0].argmax(-1))


@torch.no_grad()
def says_in_a_window_what_it_says_of_the_whole(model, clip):
    b = collate([clip])
    with torch.no_grad():
        mu = model.hierarchy(*model.hierarchy.inputs(b)).mu
    same(
        model.synthesize_clip(clip, steps=0).mel,
        MEL.denormalize(mu)[0].clamp(min=float(np.log(MEL.floor)), max=3.0),
        atol=1e-4,
    )


NARROW = dict(dim=32, decoder_channels=(32, 32), vocoder_channels=32)


def test_what_is_believed_of_words_is_spoken(clip):
    "A model with a head for words says in a window what its hierarchy says."
    torch.manual_seed(0)
    preset = replace(TINY, lip_width=8, words=("bin", "blue"), **NARROW)
    wordy = S.FacesToVoices(preset.to_json()).eval()
    torch.nn.init.normal_(wordy.hierarchy.pronounce.embed.weight)
    says_in_a_window_what_it_says_of_the_whole(wordy, clip)


def test_the_words_of_a_reader_are_spoken(clip):
    torch.manual_seed(0)
    sizes = dict(eigenlips=8, lip_memory=8, reader_dim=16, identity_dim=0)
    small = dict(expression_dim=clip.expression.shape[1], **sizes, **NARROW)
    reads = S.FacesToVoices(replace(GRID, **small).to_json()).eval()
    lips = reads.hierarchy.lips
    lips.fit(collate([clip]).lips, collate([clip]).mask)
    lips.strange.fill_(torch.inf)
    torch.nn.init.normal_(reads.hierarchy.pronounce.embed.weight)
    swung = clip._replace(mouth=torch.randn(len(clip.lips), 9, 2).cumsum(0))
    says_in_a_window_what_it_says_of_the_whole(reads, swung)


def test_a_film_in_windows_is_near_the_whole(f2v, film, small, monkeypatch):
    parts = list(f2v.stream_clip(film))
    ours = S.Speech.join(parts)
    monkeypatch.setattr(films, "WINDOW_FRAMES", 10**6)
    whole = f2v.synthesize_clip(film)
    assert len(parts) > 2 and len(ours.wav) == 640 * 300 == 160 * ours.mel.shape[1]
    assert (
        MEL.normalize(ours.mel) - MEL.normalize(whole.mel)
    ).square().mean().sqrt() < 0.1  # of a standard deviation of 1
    assert (ours.log_f0 - whole.log_f0).abs().mean() < 0.01 and (
        ours.units == whole.units
    ).float().mean() > 0.9


@torch.no_grad()
def test_the_sound_of_a_film_has_no_seams(f2v, film, small):
    "Parts, joined, are what the vocoder makes of the joined mel at once."
    ours = S.Speech.join(list(f2v.stream_clip(film, seed=5)))
    ((_, whole),) = vocode_stream(
        f2v.vocoder, [ours.mel], ours.log_f0, ours.voiced.round(), 5, context=0
    )
    same(ours.wav, whole, atol=1e-5)


def test_faded_mels_follow_each_other(small):
    ws = S.windows(400)
    ramp = torch.arange(1600.0)[None]
    out = torch.cat(
        list(S.cross_fade(ws, [ramp[:, 4 * w.start : 4 * w.stop].clone() for w in ws])), 1
    )
    same(out, ramp, atol=1e-3)


def mean_hz(wav):
    log_f0, voiced = pitch(wav)
    return log_f0[voiced > 0].mean().exp().item()


def test_another_voice_says_the_same_words(f2v, clip):
    own = f2v.synthesize_clip(clip)
    low = f2v.synthesize_clip(clip, speaker=f2v.voice_like(face=SAMPLES[4]))
    high = f2v.synthesize_clip(clip, speaker=f2v.voice_like(reference=SAMPLES[20]))
    same(low.units, own.units)
    same(high.units, own.units)
    assert mean_hz(low.wav) < 110 < 150 < mean_hz(high.wav)


def test_a_picture_serves_as_well_as_its_video(f2v, tmp_path):
    from PIL import Image

    Image.fromarray(read_video(SAMPLES[4]).frames[20]).save(tmp_path / "face.png")
    assert f2v.voice_like(face=tmp_path / "face.png") @ f2v.voice_like(face=SAMPLES[4]) > 0.8


def test_expression_scales_what_the_brows_do(f2v, clip):
    rest, seen, twice = (f2v.synthesize_clip(clip, expression=e) for e in (0.0, 1.0, 2.0))
    same(twice.log_f0 - rest.log_f0, 2 * (seen.log_f0 - rest.log_f0), atol=1e-4)
    assert (seen.log_f0 - rest.log_f0).std() > 0.005
    same(rest.units, twice.units)


def test_bad_voices_are_named(f2v, tmp_path):
    from PIL import Image

    (tmp_path / "notes.jpg").write_text("no picture")
    save_wav(tmp_path / "quiet.wav", torch.zeros(16000))
    save_wav(tmp_path / "short.wav", torch.ones(800) * 0.1)
    Image.new("RGB", (200, 200), (120, 120, 120)).save(tmp_path / "blank.png")
    whole = io.BytesIO()
    Image.fromarray(read_video(SAMPLES[0]).frames[0]).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    for error, kw, name in [
        (MediaError, dict(face=tmp_path / "nobody.jpg"), "nobody"),
        (MediaError, dict(face=tmp_path / "notes.jpg"), "notes"),
        (MediaError, dict(face=tmp_path / "cut.png"), "cut"),
        (NoFaceError, dict(face=tmp_path / "blank.png"), "blank"),
        (MediaError, dict(reference=tmp_path / "quiet.wav"), "silent"),
        (MediaError, dict(reference=tmp_path / "short.wav"), "0.05 s"),
        (F2VError, dict(face=SAMPLES[0], reference=SAMPLES[1]), "not both"),
    ]:
        with pytest.raises(error, match=name):
            f2v.voice_like(**kw)


def test_a_long_file_is_written_part_by_part(f2v, tmp_path, small):
    frames = read_video(SAMPLES[0]).frames
    frames = np.concatenate([frames, frames[::-1]] * 2)[:220]
    write_video(tmp_path / "film.mp4", frames)
    sections = []
    done = files.synthesize_file(f2v, tmp_path / "film.mp4", tmp_path / "out", True, sections)
    assert not done.error and done.speech_seconds == 220 / 25
    assert len(load_audio(tmp_path / "out" / "film.wav")) == 640 * 220
    assert (
        len(read_video(tmp_path / "out" / "film.dubbed.mp4").frames) == 220
        and "of 9 s" in sections[0].facts
    )


def test_a_part_that_fails_leaves_nothing(tmp_path):
    def parts():
        yield S.Speech(torch.zeros(640), *[None] * 6)
        raise NoFaceError("film.mp4", "lost")

    with pytest.raises(NoFaceError):
        files.write_parts(tmp_path / "a.wav", parts())
    assert not list(tmp_path.iterdir())


def units_kept(f2v, take, own):
    return (f2v.units(take.wav) == f2v.units(own.wav)).float().mean()


def test_a_muted_stage_says_nothing(f2v, clip):
    own = f2v.synthesize_clip(clip)
    how = f2v.synthesize_clip(clip, muted=["how"])
    what = f2v.synthesize_clip(clip, muted=["what"])
    again = f2v.synthesize_clip(clip, muted=["who"])
    same(again.wav, own.wav)  # whose voice it is, is told from outside
    assert how.log_f0.std() < 1e-4 < 0.02 < own.log_f0.std() and how.energy.std() < 1e-4
    same(how.voiced, own.voiced)
    same(what.log_f0, own.log_f0)
    same(what.energy, own.energy)
    assert units_kept(f2v, what, own) < 0.5 * units_kept(f2v, how, own)


def test_a_mean_of_rows_is_that_of_all(small):
    x, rows = torch.rand(400, 3), S.DiskBackedTensor()
    for part in x.split(90):
        rows.append(part)
    same(S.mean_row(rows), x.mean(0), atol=1e-6)
    same(S.mean_row(x[:150]), x[:150].sum(0) / 150)


def test_players_hold_the_sound(f2v, clip):
    import soundfile
    from base64 import b64decode

    take = f2v.synthesize_clip(clip)
    page = players({"a <b>": take.wav, "c": take.wav}).data
    mp3 = b64decode(page.split("base64,")[1].split("'")[0])
    wav, rate = soundfile.read(io.BytesIO(mp3))
    assert "a &lt;b&gt;" in page and page.count("<audio") == 2 and rate == 16000
    assert abs(len(wav) - len(take.wav)) < 3000 and len(mp3) < 20_000


def parts_of(widget):
    "The controls of a panel, what is heard, and the picture."
    import soundfile

    box, picture = widget.children
    *controls, sound = box.children
    return (
        controls,
        lambda: torch.from_numpy(soundfile.read(io.BytesIO(sound.value), dtype="float32")[0]),
        picture,
    )


def test_the_widget_follows_its_dials(f2v, clip):
    pytest.importorskip("ipywidgets")
    own = f2v.predict_speaker(clip.face, clip.identity)
    voices = dict(own=own, other=f2v.voice_like(face=SAMPLES[4]))
    (voice, expression), heard, picture = parts_of(report.dials_widget(f2v, clip, voices))
    before, drawn = heard(), picture.value
    voice.value = "other"
    assert mean_hz(heard()) < 0.8 * mean_hz(before) and picture.value != drawn
    low = heard()
    expression.value = 3.0
    assert (heard() - low).abs().max() > 0.01


def test_the_switches_mute(f2v, clip):
    pytest.importorskip("ipywidgets")
    widget = report.mute_widget(f2v, clip, f2v.voice_like(face=SAMPLES[4]))
    (who, how, what), heard, picture = parts_of(widget)
    before, drawn = heard(), picture.value
    who.value = False
    assert mean_hz(heard()) < 0.8 * mean_hz(before) and picture.value != drawn
    who.value = True
    how.value = False
    log_f0, voiced = pitch(heard())
    assert log_f0[voiced > 0].std() * 17.3 < 0.5  # semitones
    how.value = True
    same(heard(), before)


FILM = '''
import resource, sys, torch
from dataclasses import replace
from memory_of_long_video import Middle
from faces2voices import films, files, synthesis as S, video as V
from faces2voices.core import TINY
films.WINDOW_FRAMES, films.CONTEXT_FRAMES, films.FADE_FRAMES, V.KEEP_BYTES = 50, 10, 4, 0
torch.manual_seed(0)
small = dict(lip_width=8, dim=32, decoder_channels=(32, 32), vocoder_channels=32)
model = S.FacesToVoices(replace(TINY, **small).to_json())
model.face_backend = Middle()
folder = sys.argv[1]
for i, name in enumerate(("short", "short", "long")):
    done = files.synthesize_file(model, f"{folder}/{name}.mp4", f"{folder}/{i}", True, [], steps=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(done.error or round(done.speech_seconds), peak)
'''


def test_names_do_not_change_a_page(tmp_path):
    "Whatever a model or a file is called stands there as it is, once, and nothing else moves."
    one = report.ReportSection("<b>&MODEL.mp4", "3 s {{ model }}", ["loud"], ["<p>x</p>"], [])
    for model in ("BODY", "{{ clip }}", "<script>alert(1)</script>"):
        path = tmp_path / f"{len(model)}.html"
        report.write_report(path, [one, one._replace(name="two")], model)
        page = path.read_text()
        assert page.count("<h2>") == page.count("<p>x</p>") == page.count("class=note") == 2
        assert f"<code>{html.escape(model)}</code>" in page and "<script" not in page
        assert "<h2>&lt;b&gt;&amp;MODEL.mp4</h2>" in page and "3 s {{ model }}" in page


def test_memory_does_not_grow_with_the_film(tmp_path):
    """From the file to its dubbed copy, at ten times the length.

    The pictures of the long film would fill 138 MB, its crops 25.
    """
    from memory_of_long_video import repeat

    for name, times in dict(short=3, long=30).items():
        repeat(SAMPLES[0], tmp_path / f"{name}.mp4", times)
    out = subprocess.run(
        [sys.executable, "-c", FILM, tmp_path],
        cwd=ROOT / "tests",
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    (_, _), (seven, short), (seventy, long) = [line.split() for line in out.splitlines()]
    assert (seven, seventy) == ("7", "72") and int(long) - int(short) < 20, out
