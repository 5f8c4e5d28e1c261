"""Words that are read from the lips: where, how surely, and from which confidence on they count.

By beliefs that are made, so that what must be read is known.
"""

import html
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from faces2voices import cli, films, files, reading as R, report, synthesis as S
from faces2voices.content import WORD_SMOOTHING, word_loss
from faces2voices.core import TINY
from faces2voices.corpora import Clip
from faces2voices.figures import image_bytes
from faces2voices.manifests import Word
from faces2voices.media import write_video
from faces2voices.video import read_video

LETTERS = ("a", "b", "c")
STEP = 60  # of grey, from a class to the next
SMALL = dict(lip_width=8, dim=32, decoder_channels=(32, 32), vocoder_channels=32)
SAMPLE = min((Path(__file__).parents[1] / "data_samples").glob("*.mp4"))


def beliefs(labels, n: int = 1 + len(LETTERS)):
    "What a reader says that has learned these labels as well as training lets it."
    one = torch.nn.functional.one_hot(torch.as_tensor(labels).long(), n).double()
    return ((1 - WORD_SMOOTHING) * one + WORD_SMOOTHING / n).log().float()


@pytest.fixture()
def reader(monkeypatch):
    "A model of three words, which reads the word of a frame off the grey of its lips."
    for name, n in dict(WINDOW_FRAMES=50, CONTEXT_FRAMES=10, FADE_FRAMES=4).items():
        monkeypatch.setattr(films, name, n)
    torch.manual_seed(0)
    model = S.FacesToVoices(replace(TINY, words=LETTERS, **SMALL).to_json())
    seen = {}

    def look(module, inputs):
        grey = (inputs[0][:, 0, :, 40, 40] * 0.165 + 0.421) * 255
        seen["labels"] = (grey / STEP).round().long()

    def say(module, inputs, content):
        return content._replace(word_logits=beliefs(seen["labels"]).repeat_interleave(2, 1))

    model.hierarchy.lips.register_forward_pre_hook(look)
    model.hierarchy.content.register_forward_hook(say)
    return model


def film_of(labels, preset=TINY) -> Clip:
    "A clip whose lips are as grey as the word that is said."
    T = len(labels)
    lips = (torch.tensor(labels)[:, None, None] * STEP).byte().expand(T, 96, 96)
    face = torch.zeros(112, 112, 3, dtype=torch.uint8)
    return S.silent_clip("", lips, face, torch.zeros(T, preset.expression_dim), torch.zeros(0))


# --- what is read


def test_who_has_learned_all_that_training_asks_for_is_sure():
    "The logits that minimise the loss of words are read with confidence 1."
    labels = torch.tensor([0] * 6 + [2] * 8 + [0] * 6)
    logits = torch.zeros(1, 20, 4, requires_grad=True)
    opt = torch.optim.Adam([logits], 0.1)
    for _ in range(400):
        opt.zero_grad()
        word_loss(logits, labels[None]).backward()
        opt.step()
    [word] = R.read_words(logits.detach()[0], LETTERS)
    assert word[:3] == ("b", 0.12, 0.28) and word.confidence == pytest.approx(1, abs=0.01)


def test_who_knows_nothing_is_not_sure():
    "A word that is no likelier than all others has a confidence near 0 with many classes."
    logits = torch.zeros(20, 52)
    logits[:, 3] = 0.5
    [word] = R.read_words(logits, [str(i) for i in range(51)])
    assert word.text == "2" and word.confidence < 0.05


def test_the_confidence_is_the_probability_of_the_word_while_it_is_said():
    p = torch.full((10, 4), 0.1)
    p[:4, 1], p[4:, 1] = 0.7, 0.6
    p[:4, 0], p[4:, 0] = 0.1, 0.2
    [word] = R.read_words(p.log(), LETTERS)
    mean = (4 * 0.7 + 6 * 0.6) / 10
    assert word.confidence == pytest.approx((mean - 0.025) / 0.9, abs=1e-5)


def test_blocks_do_not_change_what_is_read(monkeypatch):
    g = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(300, 4, generator=g)
    whole = R.read_words(logits, LETTERS)
    monkeypatch.setattr(R, "_BLOCK", 7)
    assert R.read_words(logits, LETTERS) == whole and len(whole) > 3


def test_words_on_a_seam_are_read_once(reader):
    "A film in four windows and many parts: every word in its place, none twice, none lost."
    labels = [0] * 9 + [1] * 26 + [2] * 30 + [0] * 5 + [3] * 10 + [1] * 20 + [3] * 15 + [0] * 5
    film = film_of(labels)
    seams = [w.keep_stop for w in S.windows(len(labels))[:-1]]
    assert len(seams) == 3 and all(labels[s] == labels[s - 1] != 0 for s in seams[:2])
    parts = list(reader.stream_clip(film, steps=1))
    assert len(parts) > 2
    for part in parts:
        assert all(0 <= w.start < part.duration for w in part.words)
    said = S.Speech.join(parts).words
    expected = [("a", 9, 35), ("b", 35, 65), ("c", 70, 80), ("a", 80, 100), ("c", 100, 115)]
    assert [(w.text, round(25 * w.start, 3), round(25 * w.end, 3)) for w in said] == expected
    assert all(w.confidence == pytest.approx(1, abs=1e-4) for w in said)


def test_a_muted_content_says_no_words(reader):
    film = film_of([0] * 5 + [2] * 30)
    assert [w.text for w in reader.synthesize_clip(film, steps=1).words] == ["b"]
    assert [w.text for w in reader.synthesize_clip(film, steps=1, muted=["how"]).words] == ["b"]
    assert reader.synthesize_clip(film, steps=1, muted=["what"]).words == []


def test_a_model_without_a_vocabulary_reads_none(f2v, clip):
    assert list(f2v.synthesize_clip(clip, steps=1).words) == []


def test_a_file_keeps_the_words_of_all_its_parts(f2v, tmp_path, monkeypatch):
    "Counted from the beginning of the film."
    _, looked = f2v.preprocess(SAMPLE)
    said = [R.ReadWord("a", 0.1, 0.3, 0.9), R.ReadWord("b", 0.5, 1.2, 0.4)]
    part = S.Speech(torch.zeros(16000), *[None] * 6, entropy=torch.zeros(50), words=said)

    def stream(path, **options):
        yield from (replace(part, preprocessed=looked) for _ in range(3))

    monkeypatch.setattr(f2v, "stream", stream)
    done = files.synthesize_file(f2v, SAMPLE, tmp_path, dubbed=False)
    assert [w.text for w in done.words] == ["a", "b"] * 3
    assert [w.start for w in done.words] == pytest.approx([0.1, 0.5, 1.1, 1.5, 2.1, 2.5])


# --- how far it is to be believed


def readings(quality, rng):
    "A clip of six words for each quality: words right as often, and as sure, as it says."
    found = []
    for q in quality:
        sure = rng.uniform(max(0, 2 * q - 1), min(1, 2 * q), 6)  # of mean q
        right = rng.uniform(size=6) < sure
        found.append(R.Reading(list(sure), list(right), 1 - right.mean()))
    return found


def test_the_threshold_separates_best():
    "No other one has a larger Youden index, and it is where clips turn from good to bad."
    found = readings(np.random.default_rng(0).uniform(size=500), np.random.default_rng(1))
    limit = R.choose_threshold(found)

    def index(limit):
        rates = R.threshold_rates(found, limit)
        return rates["found"] - rates["doubted"]

    assert index(limit) >= max(index(t) for t in np.linspace(0, 1, 51)) - 0.02
    assert 0.55 < limit < 0.85  # 3 of 6 wrong at 0.5, 1 of 6 at 0.83


def test_a_threshold_needs_clips_of_both_kinds():
    good, bad = R.Reading([0.9] * 6, [], 0.0), R.Reading([0.2] * 6, [], 1.0)
    assert R.choose_threshold([good] * 50 + [bad] * 4) is None
    assert R.choose_threshold([good] * 4 + [bad] * 50) is None
    assert R.choose_threshold([good] * 5 + [bad] * 5) == 0.55
    assert R.choose_threshold([]) is None
    assert R.choose_threshold([good._replace(wrong=1.0)] * 9 + [good] * 9) is None  # all as sure


def test_calibration_is_that_which_was_made():
    rng = np.random.default_rng(0)
    found = readings(rng.uniform(size=2000), rng)
    bins = R.calibration_bins(found)
    assert sum(n for *_, n in bins) == 12000 and R.calibration_error(bins) < 0.02
    timid = [r._replace(confidences=[c / 2 for c in r.confidences]) for r in found]
    assert R.calibration_error(R.calibration_bins(timid)) == pytest.approx(0.25, abs=0.02)
    [line, curve] = R.plot_calibration({"timid": R.calibration_bins(timid)}).axes[0].lines
    assert (curve.get_ydata() > curve.get_xdata()).all()  # better than it says


def test_a_word_is_right_where_it_is_said():
    said = [Word(0.0, 0.5, "a"), Word(0.5, 1.0, "b")]
    late = R.ReadWord("a", 0.4, 0.8, 0.9)  # mostly in the b
    found = R.judge_reading([late, R.ReadWord("b", 0.6, 0.9, 0.8)], said)
    assert found.right == [False, True] and found.wrong == 0.5
    assert R.judge_reading([late._replace(start=1.0, end=1.2)], said).right == [False]


def test_held_pictures_are_held_in_all_that_is_looked_at():
    "Every field of a clip that has a row a frame, also such as are added one day."
    T = 77
    made = Clip._make([torch.arange(T)] * len(Clip._fields))
    made = made._replace(face=None, identity=None, wav=torch.arange(640 * T), word_times=())
    faster = ("log_f0", "voiced", "energy", "mel", "units", "words", "voice")
    made = made._replace(**dict.fromkeys(faster), name="", speaker_id="", text="")
    held = R.hold_frames(made, 5)
    changed = {k for k, x in held._asdict().items() if torch.is_tensor(x) and len(x) == T}
    assert {"lips", "expression"} <= changed
    for name in changed:
        assert getattr(held, name).tolist() == [t // 5 * 5 for t in range(T)], name


def test_training_measures_the_limit_of_a_model_with_words(reader):
    "Clips read well as they are; held still, they are read badly."
    labels = [0] * 3 + [1, 1, 1, 2, 2, 2, 3, 3, 3] * 3 + [0] * 3
    times = [Word((3 + 3 * i) / 25, (6 + 3 * i) / 25, LETTERS[i % 3]) for i in range(9)]
    clip = film_of(labels)._replace(wav=0.1 * torch.randn(640 * len(labels)), word_times=times)
    plain = reader.judge_readings([clip, clip._replace(word_times=())])
    assert len(plain) == 1 and plain[0].wrong == 0 and all(plain[0].right)
    held = reader.judge_readings([clip], R.HELD_FRAMES)
    assert [r.wrong >= R.BAD_SHARE for r in held] == [False, True, True]
    found = reader.measure_statistics([clip] * 5)
    assert "entropy" not in found and "confidence" not in found  # as sure as ever: no limit


def test_the_limit_is_kept_where_there_is_one(reader, monkeypatch):
    "It lies between clips as they are and clips whose pictures are held."
    sure = {1: R.Reading([0.9] * 6, [], 0.0), 3: R.Reading([0.2] * 6, [], 1.0)}

    def judged(self, clips, held):
        return [sure[n] for n in held if n in sure] * 5

    monkeypatch.setattr(S.FacesToVoices, "judge_readings", judged)
    clip = film_of([0, 1])._replace(wav=0.1 * torch.randn(1280))
    assert reader.measure_statistics([clip])["confidence"] == 0.55


def test_other_models_are_measured_by_their_units(f2v, clip):
    found = f2v.measure_statistics([clip._replace(wav=0.1 * torch.randn(640 * len(clip.lips)))])
    assert set(found) == {"loudness", "entropy"} and 0 < found["entropy"] < 1


# --- what is said of it


def words_of(**sure) -> list:
    return [R.ReadWord(w, i / 5, (i + 1) / 5, c) for i, (w, c) in enumerate(sure.items())]


@pytest.fixture(scope="module")
def looked(f2v):
    return f2v.preprocess(SAMPLE)[1]


def test_unsure_words_are_one_line_that_names_the_least_sure(reader, looked):
    reader.info["usual"] = dict(confidence=0.6)
    unsure = words_of(a=0.9, b=0.2, c=0.5)
    [note] = reader.quality_notes(looked, -20.0, 1.0, unsure)
    assert "0.53" in note and "0.60" in note and "b 0.20, c 0.50" in note and "3 words" in note
    assert "\n" not in note
    assert reader.quality_notes(looked, -20.0, 1.0, words_of(a=0.9, b=0.31)) == []
    [note] = reader.quality_notes(looked, -20.0, 1.0, [])
    assert "finds none" in note
    reader.info["usual"] = {}
    assert reader.quality_notes(looked, -20.0, 1.0, unsure) == []  # no limit was measured


def test_one_number_tells_of_the_reader(f2v, looked, reader):
    "Words where there are some, units where there are none; never both."
    reader.info["usual"] = dict(entropy=0.1, confidence=0.6)
    assert reader.quality_notes(looked, -20.0, 1.0, words_of(a=0.9)) == []
    [note] = f2v.quality_notes(looked, -20.0, 1.0, [])
    assert "entropy" in note


def overlapping(texts) -> list:
    boxes = [text.get_window_extent() for text in texts]
    return [i for i, (a, b) in enumerate(zip(boxes, boxes[1:])) if a.overlaps(b)]


@pytest.mark.parametrize("seconds, n", [(3.0, 6), (3.0, 20), (20.0, 60)])
def test_words_stand_in_their_place_under_the_mel(f2v, clip, seconds, n):
    speech = f2v.synthesize_clip(clip, steps=1)
    T = round(50 * seconds)
    rows = dict(log_f0=torch.full((T,), 5.0), voiced=torch.ones(T), energy=torch.zeros(T))
    sound = dict(wav=torch.zeros(320 * T), mel=torch.zeros(80, 2 * T))
    step = seconds / n
    said = [R.ReadWord("please", i * step, (i + 1) * step, i / n) for i in range(n)]
    speech = replace(speech, **rows, **sound, words=said)
    fig = speech.plot()
    image_bytes(fig)
    contours, mel, words = fig.axes[:3]
    assert not contours.texts and not mel.texts and len(words.texts) == n
    assert words.get_position().y1 < mel.get_position().y0
    assert mel.get_xlim() == pytest.approx(words.get_xlim())
    for bar, text, word in zip(words.patches, words.texts, said):
        place = bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()
        assert place == pytest.approx(word[1:])
        assert text.get_text() == "please"
        assert text.get_position()[0] == pytest.approx((word.start + word.end) / 2)
    assert overlapping(words.texts) == []
    frame = fig.get_window_extent()
    for text in words.texts:
        box = text.get_window_extent()
        assert box.y1 <= words.get_window_extent().y1 + 1 and box.x0 >= frame.x0
    colors = {bar.get_facecolor() for bar, w in zip(words.patches, said) if w.confidence < 0.5}
    assert len(colors) == 1 and words.patches[-1].get_facecolor() not in colors


def test_speech_without_words_has_no_place_for_them(f2v, clip):
    fig = f2v.synthesize_clip(clip, steps=1).plot()
    assert not any(ax.texts for ax in fig.axes)


def test_the_page_tells_what_the_model_knows_and_what_it_read(tmp_path, f2v, looked):
    speech = f2v.synthesize_clip(f2v.preprocess(SAMPLE)[0], steps=1)
    said = words_of(**{"a<b": 0.96, "now": 0.34})
    speech = replace(speech, preprocessed=looked, words=said)
    section = report.report_section(speech, speech.plot(), speech.duration, 0.5, [])
    report.write_report(tmp_path / "page.html", [section], "m", ["a<b", "now", "soon"])
    page = (tmp_path / "page.html").read_text()
    assert "only these 3 words" in page and "a&lt;b, now, soon" in page
    assert html.escape("a<b 96%, now 34%") in page and "sure of 1 of 2" in page
    plain = report.report_section(replace(speech, words=()), speech.plot(), 3.0, 0.5, [])
    report.write_report(tmp_path / "plain.html", [plain], "m")
    page = (tmp_path / "plain.html").read_text()
    assert "only these" not in page and "Read from the lips" not in page


def test_a_real_clip_is_believed_and_one_that_jerks_is_not(tmp_path, shared, monkeypatch):
    "The clip of a face that the model knows; and as a camera of three pictures a second sees it."
    monkeypatch.setenv("F2V_INSIGHTFACE", str(shared / "insightface"))
    monkeypatch.setenv("F2V_MEDIAPIPE", str(shared / "mediapipe" / "face_landmarker.task"))
    frames = read_video(shared / "grid" / "s1" / "bbaf3s.mp4").frames
    write_video(tmp_path / "plain.mp4", frames)
    write_video(tmp_path / "jerky.mp4", frames[np.arange(len(frames)) // 8 * 8])
    clips = [str(tmp_path / f"{name}.mp4") for name in ("plain", "jerky")]
    call = ["synthesize", *clips, "-o", str(tmp_path / "out"), "--model", "grid", "--no-dub"]
    result = CliRunner().invoke(cli.app, [*call, "--steps", "2"], env=dict(COLUMNS="1000"))
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "jerky.mp4: the reader is unsure of its words" in said
    assert "plain.mp4: the reader" not in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "only these 51 words" in page and page.count("Read from the lips") == 2
    assert "please, soon." in page
