"The sound of the synthetic world, and the clips made of it. Faces have tests of their own."

from itertools import chain
import importlib.util
import io
import json
import math
from pathlib import Path
import numpy as np
import pytest
from faces2voices import speaking
from faces2voices.soundfiles import load_audio
from faces2voices.audio import energy, pitch
from faces2voices.errors import CorpusError, ToolMissingError
from faces2voices.core import test_same, FPS
from faces2voices.speaking import GLIDES, VISEMES, formant_ratio, mouth_track, speak
from faces2voices.drawing import draw_face
from faces2voices.talkers import (
    CAUSES,
    F0,
    GRAMMAR,
    VOCAL_TRACT_LENGTH,
    Nuisance,
    apply_loudness,
    blinks,
    dials_of,
    draw_shapes,
    draw_voice,
    expression_track,
    head_motion,
    jsgf,
    light_and_noise,
    link_correlation,
    make_clip,
    make_corpus,
    make_sentence,
    make_talker,
    perform,
    sketch,
    split_of,
    talker_widget,
    voice_of,
    write_clip,
)

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed"
)
SENTENCE = "sophie carried twelve blue books"
REST, FRONT = (0,) * 6, (0, 0, 0, 1)


def mean_f0(wav):
    log_f0, voiced = pitch(wav[: len(wav) // 640 * 640])
    return log_f0[voiced > 0].exp().mean().item()


def test_the_grammar_has_five_columns_of_eleven_different_words():
    assert [len(words) for words in GRAMMAR.values()] == [11] * 5
    assert len(set(chain.from_iterable(GRAMMAR.values()))) == 55
    assert all(
        a in words
        for a, words in zip(make_sentence(np.random.default_rng(0)).split(), GRAMMAR.values())
    )
    assert all(f" {w}" in jsgf() for w in chain.from_iterable(GRAMMAR.values()))


def test_voices_fill_their_range_and_covary():
    rng = np.random.default_rng(0)
    length, f0 = np.array([draw_voice(rng) for _ in range(2000)]).T
    for x, (low, high) in ((length, VOCAL_TRACT_LENGTH), (f0, F0)):
        assert x.min() > low and x.max() < high
        quarters = np.histogram(np.log(x), 4, np.log((low, high)))[0] / len(x)
        np.testing.assert_allclose(quarters, 0.25, atol=0.04)
    assert -0.8 < np.corrcoef(np.log(length), np.log(f0))[0, 1] < -0.65


@needs_espeak
@pytest.mark.parametrize(
    "f0, length",
    [(85.0, 1.18), (85.0, 0.9), (110.0, 1.05), (130.0, 1.0), (180.0, 1.1), (240.0, 0.85)],
)
def test_measured_pitch_is_the_pitch_asked_for(f0, length):
    assert mean_f0(speak(SENTENCE, length, f0).wav) == pytest.approx(f0, rel=0.05)


@needs_espeak
def test_pitch_of_a_performance_follows_talker_and_arousal():
    "Mean F0 of the voiced frames, against the talker's own times 1.25 ** arousal."
    ratios = []
    for i in range(5):
        talker = make_talker(100 + i)
        said = perform(np.random.default_rng(i), talker)
        log_f0, voiced = (x.numpy() for x in pitch(said.wav))
        due = talker.f0 * 1.25 ** np.repeat(said.expression, 2)
        ratios.append(np.exp(log_f0)[voiced > 0].mean() / due[voiced > 0].mean())
    assert abs(np.mean(ratios) - 1) < 0.03 and np.abs(np.array(ratios) - 1).max() < 0.07


@needs_espeak
def test_each_word_has_its_own_pitch():
    levels = [-1, 0.5, -0.3, 1, 0]
    said, plain = speak(SENTENCE, f0=130.0, levels=levels), speak(SENTENCE, f0=130.0)
    (a, va), (b, vb) = (
        (x.numpy() for x in pitch(s.wav[: len(s.wav) // 640 * 640])) for s in (said, plain)
    )
    for (_, start, end), level in zip(said.words, levels):
        here = slice(int(start * 50), int(end * 50))
        assert np.exp(a[here][va[here] > 0].mean() - b[here][vb[here] > 0].mean()) == pytest.approx(
            1.25**level, rel=0.06
        )


@needs_espeak
def test_brows_rise_with_the_pitch():
    "Brows painted green, found in the pixels; the pitch found in the sound of the same arousal."
    face = make_talker(3).face._replace(
        hair="bald",
        beard=0.0,
        moustache=0.0,
        glasses=0.0,
        hair_colour=(0.0, 1.0, 0.0),
        skin=(0.6, 0.5, 0.5),
        clothes=(0.5,) * 3,
        background=(0.5,) * 6,
        iris=(0.3, 0.2, 0.2),
    )

    def height(a):
        picture = draw_face(face, REST, a, FRONT)[:75].astype(int)
        return -np.nonzero(picture[..., 1] - picture[..., 0] > 40)[0].mean()

    dial = np.linspace(-1, 1, 5)
    brows = [height(a) for a in dial]
    log_f0 = [math.log(mean_f0(speak(SENTENCE, f0=130.0, levels=[a] * 5).wav)) for a in dial]
    assert (
        (np.diff(brows) > 1).all()
        and (np.diff(log_f0) > 0.05).all()
        and np.corrcoef(brows, log_f0)[0, 1] > 0.98
    )


@needs_espeak
def test_levels_move_the_pitch_by_a_quarter():
    low, high = (mean_f0(speak(SENTENCE, f0=130.0, levels=[a] * 5).wav) for a in (-1, 1))
    assert high / low == pytest.approx(1.25**2, rel=0.05)


@needs_espeak
def test_formants_follow_the_tract():
    said = {s: speak(SENTENCE, s, 110.0).wav for s in (0.85, 1.0, 1.18)}
    for long, short in ((1.0, 0.85), (1.18, 1.0), (1.18, 0.85)):
        assert formant_ratio(said[long], said[short]) == pytest.approx(long / short, rel=0.04)
    assert formant_ratio(said[1.0], said[1.0]) == pytest.approx(1, abs=0.01)


@needs_espeak
def test_a_voice_does_not_depend_on_what_was_said_before():
    first = speak(SENTENCE)
    speak("something else", 1.1, 90.0)
    test_same(speak(SENTENCE).wav, first.wav)
    assert speak(SENTENCE).phones == first.phones


@needs_espeak
def test_phonemes_and_words_tile_the_sentence():
    said = speak(SENTENCE)
    assert [w for w, _, _ in said.words] == SENTENCE.split()
    for marks in (said.phones, said.words):
        assert all(start < end for _, start, end in marks) and all(
            a[2] <= b[1] + 1e-9 for a, b in zip(marks, marks[1:])
        )
        assert 0 <= marks[0][1] and marks[-1][2] <= len(said.wav) / 16000 + 1e-3
    known = set(GLIDES) | set(" ".join(phones for phones, _, _ in VISEMES.values()).split())
    assert {symbol for symbol, _, _ in said.phones} <= known


@needs_espeak
def test_every_word_of_the_grammar_has_visemes():
    rows = [" ".join(words) for words in zip(*GRAMMAR.values())]
    for row in rows:
        assert np.isfinite(mouth_track(speak(row).phones, 60)).all()


def test_every_glide_ends_in_known_sounds():
    known = set(" ".join(phones for phones, _, _ in VISEMES.values()).split())
    assert set(" ".join(GLIDES.values()).split()) <= known


@needs_espeak
def test_lips_touch_while_a_p_is_silent():
    said = perform(np.random.default_rng(0), make_talker(1), "bobby moved many purple pumpkins")
    track, rms = mouth_track(said.phones, len(said.expression)), np.abs(said.wav)
    closures = [(start, end) for symbol, start, end in said.phones if symbol in ("p", "b", "m")]
    assert len(closures) >= 8
    for start, end in closures:
        frames = track[int(start * FPS) : int(np.ceil(end * FPS))]
        assert frames[:, 0].min() == 0 and frames[:, 5].max() == 1
    for symbol, start, _ in said.phones:
        if symbol == "p":
            assert rms[int((start + 0.008) * 16000) : int((start + 0.03) * 16000)].max() < 0.01


@needs_espeak
def test_closed_lips_begin_and_end_with_the_sound():
    "Every p, b and m: first and last closed frame lie within a frame of the phoneme's times."
    seen = 0
    for i in range(4):
        said = perform(np.random.default_rng(i), make_talker(i), "bobby moved many purple pumpkins")
        track = mouth_track(said.phones, len(said.expression))
        closed = (track[:, 0] == 0) & (track[:, 5] == 1)
        for symbol, start, end in said.phones:
            if symbol not in ("p", "b", "m"):
                continue
            middle, seen = min(int((start + end) / 2 * FPS), len(closed) - 1), seen + 1
            assert (
                closed[
                    max(0, round(start * FPS)) : max(round(start * FPS) + 1, round(end * FPS))
                ].all()
                or closed[middle]
            )
            first = round(start * FPS) if closed[round(start * FPS)] else middle
            last = round(end * FPS) - 1 if closed[round(end * FPS) - 1] else middle
            assert abs(first - start * FPS) <= 1 and abs(last + 1 - end * FPS) <= 1
    assert seen >= 32


@needs_espeak
def test_the_drawn_mouth_opens_with_the_sound():
    "The dark between the lips, counted in pixels, goes with the opening asked for, at once."
    talker = make_talker(3)
    clip = make_clip(
        1,
        talker._replace(face=talker.face._replace(beard=0.0, moustache=0.0)),
        "bobby moved many purple pumpkins",
        nuisance=0,
    )

    def aperture(frame, points):
        (x0, y0), (x1, _) = points[3:].astype(int)
        return (frame[y0 - 12 : y0 + 30, x0 + 4 : x1 - 3].max(-1) < 75).sum()

    seen = np.array([aperture(f, p) for f, p in zip(clip.frames, clip.points)])
    due = mouth_track(clip.phones, len(seen))[:, 0]
    match = {lag: np.corrcoef(np.roll(seen, -lag)[5:-5], due[5:-5])[0, 1] for lag in range(-4, 5)}
    assert max(match, key=match.get) == 0 and match[0] > 0.7


def test_mouth_is_open_in_a_vowel_and_shut_outside_the_sentence():
    track = mouth_track([("m", 0.4, 0.5), ("A:", 0.5, 0.8), ("m", 0.8, 0.9)], 40)
    assert track.shape == (40, 6) and track.dtype == np.float32
    assert track[16, 0] > 0.9 and track[[0, 39], 0].max() < 0.05 and (track[10:12, 0] == 0).all()
    assert track[:, [0, 2, 3, 4, 5]].min() >= 0 and abs(track).max() <= 1


def test_rounding_is_anticipated():
    round_, spread = (
        mouth_track([("t", 0.2, 0.3), (vowel, 0.3, 0.5)], 20)[6] for vowel in ("u:", "i:")
    )
    assert round_[2] > 0.4 > 0.1 > spread[2] and round_[1] < 0 < spread[1]


def test_expression_is_smooth_and_passes_near_its_levels():
    words = [("a", 0.2, 0.6), ("b", 0.6, 1.0), ("c", 1.0, 1.4)]
    a = expression_track([-0.5, 0, 0.5], words, 40)
    assert a.shape == (40,) and np.abs(np.diff(a)).max() < 0.1
    np.testing.assert_allclose(a[[10, 20, 30]], [-0.5, 0, 0.5], atol=0.1)


def test_loudness_is_six_decibels_each_way():
    hum = np.sin(np.arange(640 * 20) / 20)
    for a in (-1.0, 1.0):
        test_same(
            energy(apply_loudness(hum, np.full(20, a))) - energy(hum),
            np.full(40, a * 6 * np.log(10) / 20),
            atol=1e-3,
        )


def test_nuisances_can_be_turned_off():
    rng, frames = np.random.default_rng(0), np.full((3, 8, 8, 3), 100, np.uint8)
    np.testing.assert_array_equal(head_motion(rng, 9, 0.0), np.tile([0, 0, 0, 1.0], (9, 1)))
    test_same(light_and_noise(rng, frames, 0.0, 0.0), frames)
    assert (
        np.abs(head_motion(rng, 500)[:, :2]).max() < 0.09
        and blinks(rng, 500).max() == 1
        and blinks(rng, 500, 0.0).max() == 0
    )
    assert (
        np.ptp(light_and_noise(rng, frames, 1.0, 0.0)[:, 0, 0])
        == 0
        < np.ptp(light_and_noise(rng, frames, 0.0, 1.0))
    )  # light stands still, grain does not
    assert (blinks(np.random.default_rng(0), 5000, 3.0) > 0).mean() > 2 * (
        blinks(np.random.default_rng(0), 5000, 1.0) > 0
    ).mean()


@needs_espeak
def test_each_nuisance_has_its_own_dial_and_none_is_heard():
    def clip(nuisance):
        return make_clip(1, make_talker(3), "anna", nuisance)

    usual, still, bare = clip(1.0), clip(Nuisance(motion=0)), clip(0)
    test_same(usual.frames, clip(Nuisance()).frames)
    for c in (still, bare):
        test_same(c.wav, usual.wav)
        assert c.factors == usual.factors
    assert (
        np.ptp(still.points[:, :2], axis=0).max() == 0 < np.ptp(usual.points[:, :2], axis=0).max()
    )  # eyes that do not wander
    assert (still.frames != bare.frames).any()
    test_same(
        bare.frames[0],
        draw_face(
            make_talker(3).face,
            mouth_track(bare.phones, len(bare.frames))[0],
            bare.expression[0],
            FRONT,
        ),
    )


@needs_espeak
def test_the_same_seed_gives_the_same_bytes():
    clip = make_clip(5, make_talker(2))
    again = make_clip(5, make_talker(2))
    other = make_clip(6, make_talker(2))
    test_same(clip.frames, again.frames)
    test_same(clip.wav, again.wav)
    test_same(clip.points, again.points)
    assert clip.text == again.text and clip.factors == again.factors and clip.text != other.text
    T = len(clip.frames)
    assert (
        clip.wav.shape == (640 * T,)
        and clip.expression.shape == (T,)
        and clip.points.shape == (T, 5, 2)
        and clip.frames.shape == (T, 160, 160, 3)
    )
    assert json.loads(json.dumps(clip.factors))["talker"] == 2


@needs_espeak
def test_ends_are_quiet_but_not_silent():
    wav = perform(np.random.default_rng(3), make_talker(3)).wav
    for end in (wav[:1600], wav[-1600:]):
        assert 20 * np.log10(end.std()) == pytest.approx(-65, abs=1)
    assert np.abs(wav).max() < 1


def test_the_link_changes_the_face_and_not_the_voice():
    tied, free = make_talker(4), make_talker(4, link=0.0)
    assert tied[:3] == free[:3] and tied.face != free.face


def test_voice_and_dials_are_inverse():
    for length, f0 in ((0.85, 85.0), (1.0, 143.0), (1.18, 240.0)):
        voice = length, math.log(f0)
        np.testing.assert_allclose(voice_of(*dials_of(*voice)), voice)


@pytest.mark.parametrize("link", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_link_is_its_closed_form(link):
    "Talkers as they are met: a feature follows its own dial, and the other through the voice."
    met = [make_talker(seed, link) for seed in range(1200)]
    log_f0, formants, brow, chin = np.array(
        [(np.log(t.f0), 1 / t.vocal_tract_length, t.face.brow, t.face.chin) for t in met]
    ).T
    r, due = np.corrcoef([log_f0, formants, brow, chin]), link_correlation(link)
    assert r[0, 2] == pytest.approx(-due, abs=0.08) and r[1, 3] == pytest.approx(-due, abs=0.08)
    assert r[0, 3] == pytest.approx(-due * r[0, 1], abs=0.08) and r[0, 1] > 0.65


def test_setting_the_pitch_does_not_move_the_chin():
    lengths, log_f0, faces = draw_shapes(1200, link=1.0)
    r = np.corrcoef([log_f0, 1 / lengths, [f.brow for f in faces], [f.chin for f in faces]])
    assert abs(r[0, 3]) < 0.1 and abs(r[1, 2]) < 0.1 and r[0, 2] < -0.98 and r[1, 3] < -0.98


def test_the_graph_has_no_cycle_and_ends_in_sound_and_picture():
    def ends(node):
        return {node} if node not in CAUSES else set().union(*map(ends, CAUSES[node]))

    assert [ends(s) for s in ("what", "who", "how")] == [{"sound", "picture"}] * 3 and ends(
        "chance"
    ) == {"picture"}


@needs_espeak
def test_a_drawn_face_has_its_voice():
    (small, high), (large, low) = (sketch(d, d, text=SENTENCE) for d in (-1, 1))
    assert mean_f0(high) == pytest.approx(math.exp(voice_of(-1, -1)[1]), rel=0.05) and mean_f0(
        low
    ) == pytest.approx(math.exp(voice_of(1, 1)[1]), rel=0.05)
    calm, keen = (sketch(brows=a, text=SENTENCE)[1] for a in (-1, 1))
    assert mean_f0(keen) / mean_f0(calm) == pytest.approx(
        1.25**2, rel=0.05
    ) and keen.std() / calm.std() == pytest.approx(10**0.6, rel=0.1)
    longer, shorter = (sketch(length=d, text=SENTENCE)[1] for d in (1, -1))
    assert formant_ratio(longer, shorter) == pytest.approx(1.18 / 0.85, rel=0.04)
    assert small.shape == large.shape == (160, 160, 3) and (small != large).any()


@needs_espeak
def test_the_widget_follows_its_sliders():
    pytest.importorskip("ipywidgets")
    import matplotlib.pyplot as plt
    import soundfile

    controls, picture = talker_widget(text=SENTENCE).children
    *dials, sound = controls.children

    def shown():
        face = plt.imread(io.BytesIO(picture.value), format="jpeg").astype(int)
        return face, soundfile.read(io.BytesIO(sound.value))[0]

    assert [d.description for d in dials] == ["length", "weight", "brows"] and not sound.autoplay
    _, before = shown()
    for dial, value in zip(dials, (0.5, -1.0, 1.0)):
        dial.value = value
    face, wav = shown()
    assert (
        np.abs(face - sketch(0.5, -1.0, 1.0, text=SENTENCE)[0]).mean()
        < 4
        < np.abs(face - sketch(text=SENTENCE)[0]).mean()
    )
    assert sound.autoplay and mean_f0(wav) / mean_f0(before) == pytest.approx(
        math.exp(0.52) * 1.25, rel=0.06
    )


def test_splits_keep_talkers_apart_and_do_not_move():
    assert [split_of(i) for i in (0, 5, 6, 7, 8, 14, 15)] == [
        "train",
        "train",
        "val",
        "test",
        "train",
        "val",
        "test",
    ]


@needs_espeak
def test_corpus_is_resumed_and_guards_its_world(tmp_path):
    def lines():
        return [json.loads(x) for x in (tmp_path / "manifest.jsonl").read_text().splitlines()]

    make_corpus(tmp_path, 1, 2, workers=1)
    first, (a, b) = lines(), [tmp_path / line["path"] for line in lines()]
    stamp = a.stat().st_mtime_ns
    b.unlink()
    make_corpus(tmp_path, 1, 2, workers=1)
    assert (
        lines() == first
        and a.stat().st_mtime_ns == stamp
        and b.is_file()
        and not list(tmp_path.rglob(".part-*"))
    )
    with pytest.raises(CorpusError, match="another world"):
        make_corpus(tmp_path, 1, 2, seed=1, workers=1)


@needs_espeak
def test_a_corpus_knows_its_nuisances(tmp_path):
    def world():
        return json.loads((tmp_path / "world.json").read_text())

    make_corpus(tmp_path, 1, 1, nuisance=Nuisance(noise=0), workers=1)
    assert (
        world()["nuisance"]
        == dict(motion=1, light=1, noise=0, blinks=1)
        == json.loads((tmp_path / "manifest.jsonl").read_text())["nuisance"]
    )
    make_corpus(tmp_path, 1, 1, nuisance=Nuisance(noise=0), workers=1)
    with pytest.raises(CorpusError, match="another world"):
        make_corpus(tmp_path, 1, 1, workers=1)


@needs_espeak
def test_the_sample_clips_are_what_their_command_makes(tmp_path):
    "Factors and sound to the last bit; pixels as far as H.264 keeps them."
    from faces2voices.video import read_video

    samples, number = Path(__file__).parents[1] / "data_samples", 4
    line = {
        x["name"]: x for x in map(json.loads, (samples / "manifest.jsonl").read_text().splitlines())
    }[f"t{number:04d}_000"]
    assert json.loads((samples / "world.json").read_text()) == dict(seed=1, link=1.0, nuisance=1.0)
    clip = make_clip((1, number, 0), make_talker(10_000 + number))
    assert clip.text == line["text"] and json.loads(json.dumps(clip.factors)) == {
        k: line[k] for k in clip.factors
    }
    write_clip(clip, tmp_path / "again.mp4")
    test_same(load_audio(tmp_path / "again.mp4"), load_audio(samples / line["path"]), atol=1e-6)
    error = read_video(samples / line["path"]).frames.astype(float) - clip.frames
    assert 10 * np.log10(255**2 / (error**2).mean()) > 33


@needs_espeak
def test_the_original_is_understood():
    Decoder = pytest.importorskip("pocketsphinx").Decoder
    d = Decoder(lm=None, loglevel="FATAL")
    d.add_jsgf_string("talkers", jsgf())
    d.activate_search("talkers")
    wrong = 0
    for i in range(10):
        said = perform(np.random.default_rng(i), make_talker(60 + i))
        d.start_utt()
        d.process_raw((said.wav * 32767).astype("<i2").tobytes(), full_utt=True)
        d.end_utt()
        heard = d.hyp().hypstr.split() if d.hyp() else []
        wrong += sum(a != b for a, b in zip(said.text.split(), heard + [""] * 5))
    assert wrong <= 3


def test_a_missing_synthesiser_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(ToolMissingError, match="espeakng-loader"):
        speaking.Espeak()
