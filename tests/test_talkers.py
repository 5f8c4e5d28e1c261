"The sound of the synthetic world, and the clips made of it. Faces have tests of their own."
import importlib.util, json
import numpy as np
import pytest
from faces2voices import talkers
from faces2voices.audio import energy, pitch
from faces2voices.core import CorpusError, ToolMissingError, test_same
from faces2voices.talkers import (F0, FPS, GLIDES, GRAMMAR, TRACT, VISEMES, apply_loudness, blinks, draw_voice, expression_track, formant_ratio,
                                  head_motion, jsgf, light_and_noise, make_clip, make_corpus, make_sentence, make_talker, mouth_track, perform, speak, split_of)

needs_espeak = pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed")
SENTENCE = "sophie carried twelve blue books"

def mean_f0(wav):
    log_f0, voiced = pitch(wav[:len(wav)//640*640])
    return log_f0[voiced > 0].exp().mean().item()

def test_the_grammar_has_five_columns_of_eleven_different_words():
    assert [len(words) for words in GRAMMAR.values()] == [11]*5
    assert len({w for words in GRAMMAR.values() for w in words}) == 55
    assert all(a in words for a, words in zip(make_sentence(np.random.default_rng(0)).split(), GRAMMAR.values()))
    assert all(f" {w}" in jsgf() for words in GRAMMAR.values() for w in words)

def test_voices_fill_their_range_and_covary():
    rng = np.random.default_rng(0)
    tract, f0 = np.array([draw_voice(rng) for _ in range(2000)]).T
    for x, (low, high) in ((tract, TRACT), (f0, F0)):
        assert x.min() > low and x.max() < high
        quarters = np.histogram(np.log(x), 4, np.log((low, high)))[0]/len(x)
        np.testing.assert_allclose(quarters, .25, atol=.04)
    assert -.8 < np.corrcoef(np.log(tract), np.log(f0))[0, 1] < -.65

@needs_espeak
@pytest.mark.parametrize("f0, tract", [(85., 1.18), (130., 1.), (240., .85)])
def test_measured_pitch_is_the_pitch_asked_for(f0, tract):
    assert mean_f0(speak(SENTENCE, tract, f0).wav) == pytest.approx(f0, rel=.05)

@needs_espeak
def test_levels_move_the_pitch_by_a_quarter():
    low, high = (mean_f0(speak(SENTENCE, f0=130., levels=[a]*5).wav) for a in (-1, 1))
    assert high/low == pytest.approx(1.25**2, rel=.05)

@needs_espeak
def test_formants_follow_the_tract():
    said = {s: speak(SENTENCE, s, 110.).wav for s in (.85, 1., 1.18)}
    for long, short in ((1., .85), (1.18, 1.), (1.18, .85)):
        assert formant_ratio(said[long], said[short]) == pytest.approx(long/short, rel=.04)
    assert formant_ratio(said[1.], said[1.]) == pytest.approx(1, abs=.01)

@needs_espeak
def test_a_voice_does_not_depend_on_what_was_said_before():
    first = speak(SENTENCE)
    speak("something else", 1.1, 90.)
    test_same(speak(SENTENCE).wav, first.wav)
    assert speak(SENTENCE).phones == first.phones

@needs_espeak
def test_phonemes_and_words_tile_the_sentence():
    said = speak(SENTENCE)
    assert [w for w, _, _ in said.words] == SENTENCE.split()
    for marks in (said.phones, said.words):
        assert all(start < end for _, start, end in marks) and all(a[2] <= b[1] + 1e-9 for a, b in zip(marks, marks[1:]))
        assert 0 <= marks[0][1] and marks[-1][2] <= len(said.wav)/16000 + 1e-3
    known = set(GLIDES) | {p for phones, _, _ in VISEMES.values() for p in phones.split()}
    assert {symbol for symbol, _, _ in said.phones} <= known

@needs_espeak
def test_every_word_of_the_grammar_has_visemes():
    rows = [" ".join(words) for words in zip(*GRAMMAR.values())]
    for row in rows: assert np.isfinite(mouth_track(speak(row).phones, 60)).all()

def test_every_glide_ends_in_known_sounds():
    known = {p for phones, _, _ in VISEMES.values() for p in phones.split()}
    assert {p for pair in GLIDES.values() for p in pair.split()} <= known

@needs_espeak
def test_lips_touch_while_a_p_is_silent():
    said = perform(np.random.default_rng(0), make_talker(1), "bobby moved many purple pumpkins")
    track, rms = mouth_track(said.phones, len(said.expression)), np.abs(said.wav)
    closures = [(start, end) for symbol, start, end in said.phones if symbol in ("p", "b", "m")]
    assert len(closures) >= 8
    for start, end in closures:
        frames = track[int(start*FPS):int(np.ceil(end*FPS))]
        assert frames[:, 0].min() == 0 and frames[:, 5].max() == 1
    for symbol, start, _ in said.phones:
        if symbol == "p": assert rms[int((start + .008)*16000):int((start + .03)*16000)].max() < .01

def test_mouth_is_open_in_a_vowel_and_shut_outside_the_sentence():
    track = mouth_track([("m", .4, .5), ("A:", .5, .8), ("m", .8, .9)], 40)
    assert track.shape == (40, 6) and track.dtype == np.float32
    assert track[16, 0] > .9 and track[[0, 39], 0].max() < .05 and (track[10:12, 0] == 0).all()
    assert track[:, [0, 2, 3, 4, 5]].min() >= 0 and abs(track).max() <= 1

def test_rounding_is_anticipated():
    round_, spread = (mouth_track([("t", .2, .3), (vowel, .3, .5)], 20)[6] for vowel in ("u:", "i:"))
    assert round_[2] > .4 > .1 > spread[2] and round_[1] < 0 < spread[1]

def test_expression_is_smooth_and_passes_near_its_levels():
    words = [("a", .2, .6), ("b", .6, 1.), ("c", 1., 1.4)]
    a = expression_track([-.5, 0, .5], words, 40)
    assert a.shape == (40,) and np.abs(np.diff(a)).max() < .1
    np.testing.assert_allclose(a[[10, 20, 30]], [-.5, 0, .5], atol=.1)

def test_loudness_is_six_decibels_each_way():
    hum = np.sin(np.arange(640*20)/20)
    for a in (-1., 1.): test_same(energy(apply_loudness(hum, np.full(20, a))) - energy(hum), np.full(40, a*6*np.log(10)/20), atol=1e-3)

def test_nuisances_can_be_turned_off():
    rng, frames = np.random.default_rng(0), np.full((3, 8, 8, 3), 100, np.uint8)
    np.testing.assert_array_equal(head_motion(rng, 9, 0.), np.tile([0, 0, 0, 1.], (9, 1)))
    test_same(light_and_noise(rng, frames, 0.), frames)
    assert np.abs(head_motion(rng, 500)[:, :2]).max() < .09 and blinks(rng, 500).max() == 1

@needs_espeak
def test_the_same_seed_gives_the_same_bytes():
    clip, again, other = make_clip(5, make_talker(2)), make_clip(5, make_talker(2)), make_clip(6, make_talker(2))
    test_same(clip.frames, again.frames); test_same(clip.wav, again.wav); test_same(clip.points, again.points)
    assert clip.text == again.text and clip.factors == again.factors and clip.text != other.text
    T = len(clip.frames)
    assert clip.wav.shape == (640*T,) and clip.expression.shape == (T,) and clip.points.shape == (T, 5, 2) and clip.frames.shape == (T, 160, 160, 3)
    assert json.loads(json.dumps(clip.factors))["talker"] == 2

@needs_espeak
def test_ends_are_quiet_but_not_silent():
    wav = perform(np.random.default_rng(3), make_talker(3)).wav
    for end in (wav[:1600], wav[-1600:]): assert 20*np.log10(end.std()) == pytest.approx(-65, abs=1)
    assert np.abs(wav).max() < 1

def test_the_link_changes_the_face_and_not_the_voice():
    tied, free = make_talker(4), make_talker(4, link=0.)
    assert tied[:3] == free[:3] and tied.face != free.face

def test_splits_keep_talkers_apart_and_do_not_move():
    assert [split_of(i) for i in (0, 5, 6, 7, 8, 14, 15)] == ["train", "train", "val", "test", "train", "val", "test"]

@needs_espeak
def test_corpus_is_resumed_and_guards_its_world(tmp_path):
    lines = lambda: [json.loads(x) for x in (tmp_path/"manifest.jsonl").read_text().splitlines()]
    make_corpus(tmp_path, 1, 2, workers=1)
    first, (a, b) = lines(), [tmp_path/line["path"] for line in lines()]
    stamp = a.stat().st_mtime_ns
    b.unlink()
    make_corpus(tmp_path, 1, 2, workers=1)
    assert lines() == first and a.stat().st_mtime_ns == stamp and b.is_file() and not list(tmp_path.rglob(".part-*"))
    with pytest.raises(CorpusError, match="another world"): make_corpus(tmp_path, 1, 2, seed=1, workers=1)

@needs_espeak
def test_the_original_is_understood():
    Decoder = pytest.importorskip("pocketsphinx").Decoder
    d = Decoder(lm=None, loglevel="FATAL")
    d.add_jsgf_string("talkers", jsgf()); d.activate_search("talkers")
    wrong = 0
    for i in range(10):
        said = perform(np.random.default_rng(i), make_talker(60 + i))
        d.start_utt(); d.process_raw((said.wav*32767).astype("<i2").tobytes(), full_utt=True); d.end_utt()
        heard = d.hyp().hypstr.split() if d.hyp() else []
        wrong += sum(a != b for a, b in zip(said.text.split(), heard + [""]*5))
    assert wrong <= 3

def test_a_missing_synthesiser_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(ToolMissingError, match="espeakng-loader"): talkers.Espeak()
