"Metrics against closed forms and identities; a model without training through the whole card; the tables."
import json, math
import numpy as np
import pytest
import torch
from faces2voices import evaluation as ev, experiments as ex
from faces2voices.audio import MEL, energy, pitch, vowel
from faces2voices.core import TINY, CorpusError, ToolMissingError, test_same as same
from faces2voices.corpora import Clip, Entry, prepare, write_manifest

@pytest.fixture(scope="module")
def voice():
    "Two seconds of a vowel whose pitch and loudness move."
    t = torch.arange(32000)/16000
    return (vowel(130*torch.exp(.15*torch.sin(3*t)))*(.6 + .4*torch.sin(9*t))).float()*.3

def noisy(wav, db): return wav + torch.randn(len(wav), generator=torch.Generator().manual_seed(0))*wav.std()*10**(-db/20)

def test_a_perfect_sound_scores_best_and_noise_makes_it_worse(voice):
    pytest.importorskip("pystoi")
    sounds = [voice, noisy(voice, 20), noisy(voice, 10), noisy(voice, 0)]
    estoi = [ev.stoi(s, voice, extended=True) for s in sounds]
    mcd = [ev.mcd(MEL(s), MEL(voice), energy(voice)) for s in sounds]
    assert abs(estoi[0] - 1) < 1e-3 and estoi == sorted(estoi, reverse=True)
    assert mcd[0] < 1e-5 and mcd == sorted(mcd)

@pytest.mark.parametrize("d", (1, 7, 24))
def test_mcd_of_one_cosine_is_its_closed_form(d):
    mel = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    ripple = .2*torch.cos(torch.pi*d*(torch.arange(80) + .5)/80)[:, None]
    assert math.isclose(ev.mcd(mel + ripple, mel, torch.zeros(6)), 10/math.log(10)*2**.5*.2, rel_tol=1e-4)

def test_mcd_forgets_loudness_and_what_is_finer_than_24_cosines():
    mel = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    ripple = torch.cos(torch.pi*25*(torch.arange(80) + .5)/80)[:, None]
    assert ev.mcd(mel + 3, mel, torch.zeros(6)) < 1e-4 and ev.mcd(mel + ripple, mel, torch.zeros(6)) < 1e-4

def test_mcd_looks_at_speech_alone():
    e, mel = torch.tensor([0., -9., 0.]), torch.zeros(80, 6)
    other = mel.clone(); other[:40, 2:4] = 5.
    assert ev.mcd(other, mel, e) == 0 and ev.mcd(other, mel, torch.zeros(3)) > 1

def test_pitch_scores():
    f0 = 5 + .2*torch.sin(torch.arange(60)/7.)
    a, b = (f0, torch.ones(60)), (f0 + math.log(2)/12, (torch.arange(60) < 40).float())
    assert math.isclose(ev.f0_error(b, a), 100, rel_tol=1e-3)
    assert len(ev.both_voiced(a, b)[0]) == 40 and ev.correlation(*ev.both_voiced(a, b)) > .9999
    assert math.isclose(ev.mean_f0(b), (b[0][:40]).mean().item(), rel_tol=1e-6)
    assert math.isnan(ev.mean_f0((f0, torch.zeros(60))))

def test_correlation_agrees_with_its_definition():
    x, y = np.random.default_rng(0).normal(size=(2, 50)); y = y + x
    want = ((x - x.mean())*(y - y.mean())).mean()/(x.std()*y.std())
    assert math.isclose(ev.correlation(x, y), want, rel_tol=1e-9) and math.isclose(ev.correlation(x, -2*x), -1, rel_tol=1e-9)
    assert math.isnan(ev.correlation(x, 0*x)) and math.isnan(ev.correlation([1, 2], [1, 2]))

def test_energy_ignores_gain_and_silence(voice):
    e = energy(torch.cat([voice, torch.zeros(16000)]))
    assert ev.energy_correlation(e, e) > .9999 and ev.energy_correlation(e, e - .5) > .99
    hiss = torch.where(e < -9, e + 2, e)
    assert ev.energy_correlation(hiss, e) > .9999

def test_word_errors_and_the_micro_average():
    pytest.importorskip("jiwer")
    assert ev.word_errors("a b c", "a b c") == (0, 3) and ev.word_errors("a b c", "") == (3, 3)
    assert ev.word_errors("a b c", "a x c d") == (2, 3)
    assert ev.ratio(np.array([[0, 1], [5, 9]])) == .5   # not the mean of 0 and 5/9

def test_shuffled_texts_score_like_guesses():
    pytest.importorskip("jiwer")
    from faces2voices.talkers import make_sentence
    rng = np.random.default_rng(0)
    texts = [make_sentence(rng) for _ in range(400)]
    v = np.array([ev.word_errors(a, b) for a, b in zip(texts, texts[1:] + texts[:1])])
    assert abs(ev.ratio(v) - ev.guess_wer("talkers")) < .03

def test_the_texts_choose_their_grammar():
    assert ev.grammar_of(["anna found many green boats"]) == "talkers" and ev.grammar_of(["lay white by z zero please"]) == "grid"
    assert ev.grammar_of(["anna found many green boats", "hello"]) == "" and ev.grammar_of([]) == ""
    assert math.isclose(ev.guess_wer("talkers"), 10/11) and .8 < ev.guess_wer("grid") < .82

def test_pocketsphinx_hears_the_world_and_remembers_nothing():
    pytest.importorskip("pocketsphinx"); pytest.importorskip("espeakng_loader")
    from faces2voices.talkers import speak
    texts = ["lucy likes seven heavy rings", "kevin sells nine blue apples"]
    a, b = (speak(t, f0=120).wav for t in texts)
    listen = ev.listener("talkers")
    heard = [listen(a), listen(b), listen(a)]
    assert heard[0] == heard[2] and heard[:2] == texts
    assert isinstance(listen(torch.zeros(16000)), str)

def test_bootstrap_error_of_a_mean():
    v = np.random.default_rng(1).normal(size=(400, 1))
    assert abs(ev.standard_error(v, ev.mean, 400) - .05) < .01

def test_an_absent_package_says_how_to_get_it():
    with pytest.raises(ToolMissingError, match="pip install"): ev.tool("no_such_metric")

def entry(name, speaker, text, split): return Entry(name, name, speaker, text, split)

def test_clips_that_were_trained_on_are_left_out():
    entries = [entry("a", "s1", "x", "train"), entry("b", "s1", "y", "test"), entry("c", "s2", "x", "test"), entry("d", "s2", "z", "test")]
    kept, out = ev.unseen(entries)
    assert [e.name for e in kept] == ["d"] and (out["sentence_trained_on"], out["face_trained_on"], out["faces_are_new"]) == (1, 1, True)
    kept, out = ev.unseen(entries[:2])                      # one speaker: the face cannot be new
    assert [e.name for e in kept] == ["b"] and not out["faces_are_new"]
    assert len(ev.unseen(entries, "train")[0]) == 1
    assert ev.unseen(entries[2:])[1]["faces_are_new"] is None    # a manifest without training clips cannot tell

def made_clip(i, voice, text):
    "A clip whose picture is noise and whose sound is a vowel."
    g = torch.Generator().manual_seed(i)
    wav = (voice if i % 2 else voice.flip(0))[:640*(24 + i)]
    picture = lambda *shape: torch.randint(256, shape, generator=g, dtype=torch.uint8)
    T = len(wav)//640
    return Clip(f"c{i}", f"s{i//2}", text, picture(T, 96, 96), picture(112, 112, 3), torch.rand(T, 1152, generator=g), torch.zeros(0), wav, *pitch(wav), energy(wav))

TEXTS = ["anna found many green boats", "kevin sells nine blue apples", "lucy likes seven heavy rings", "henry wants three small chairs"]

@pytest.fixture(scope="module")
def clips(voice): return [made_clip(i, voice, t) for i, t in enumerate(TEXTS)]

@pytest.fixture(scope="module")
def model():
    from faces2voices.synthesis import FacesToVoices
    torch.manual_seed(0)
    return FacesToVoices(TINY.to_json())

def test_borrowed_faces_and_lips(clips):
    assert ev.wrong_face(clips[0], clips).name == "c2" and ev.wrong_face(clips[3], clips).name == "c0"
    assert ev.wrong_face(clips[0], clips[:2]) is None
    assert ev.wrong_lips(clips[0], clips).name == "c1" and ev.wrong_lips(clips[0], clips[:1]) is None
    longer, shorter = ev.with_lips(clips[3], clips[0].lips), ev.with_lips(clips[0], clips[3].lips)
    assert len(longer.lips) == len(clips[3].lips) and len(shorter.lips) == len(clips[0].lips)
    same(longer.lips[-1], clips[0].lips[-1]); same(shorter.lips, clips[3].lips[:24])

def test_the_rows_of_a_score(clips, model, monkeypatch):
    "Without the slow or optional judges; `original` is perfect, and absent tools are blanks with a reason."
    monkeypatch.setattr(ev, "METRICS", [m for m in ev.METRICS if m.needs in ("", "librosa", "pesq")])
    monkeypatch.setattr(ev, "listener", lambda grammar: lambda wav: "")
    monkeypatch.setitem(__import__("sys").modules, "pesq", None)
    rows, errors, reasons = ev.score(model, clips[:3], steps=1, guidance=1., seed=0)
    assert tuple(rows) == ev.ROWS and "pip install pesq" in reasons["PESQ"] and "PESQ" not in rows["original"]
    first = rows["original"]
    assert first["MCD, dB"] == 0 and first["units heard in speech"] == 1 and first["voice similarity"] > .999 and first["energy, r"] > .999
    assert "unit accuracy" in rows["synthesised"] and "unit accuracy" not in rows["vocoder"]
    assert [r for r in rows if "voice similarity to the borrowed face" in rows[r]] == ["original", "wrong face"]
    assert "2 speakers" in reasons["mean F0, r"] and "mean F0, r" not in first
    card = dict(rows=rows, errors=errors, reasons=reasons, clips=3, speakers=2, seconds_of_speech=3., left_out=dict(of_split=3, sentence_trained_on=0, faces_are_new=True),
        wer_protocol="", command="faces2voices evaluate DATA", seconds=1., machine="here")
    shown = ev.show_card(json.loads(json.dumps(card)))
    assert len({line.count("|") for line in shown.splitlines() if line.startswith("|")}) == 1 and "pip install pesq" in shown

def test_claims_need_two_standard_errors():
    card = lambda borrowed, error: dict(rows={"wrong face": {"mean F0 of the borrowed face, r": borrowed, "mean F0, r": .1}}, errors={"wrong face": {"mean F0 of the borrowed face, r": error}})
    verdict = lambda *a: {claim: holds for claim, holds, _ in ev.claims(card(*a))}
    name = "with another face, mean pitch follows the borrowed face"
    assert verdict(.9, .1)[name] is True and verdict(.9, .5)[name] is False and verdict(.05, 0.)[name] is False
    assert sum(v is not None for v in verdict(.9, .1).values()) == 1
    lips = dict(rows={"wrong lips": {"WER of the borrowed lips": .1, "WER": .9}}, errors={})   # lower is better
    assert ev.claims(lips)[0][1] is True

def test_a_corpus_of_known_sentences_is_an_error(tmp_path):
    entries = [entry("a", "s", "x", "train"), entry("b", "s", "x", "test")]
    write_manifest(entries, tmp_path/"manifest.jsonl")
    with pytest.raises(CorpusError, match="not trained on"): ev.test_clips(tmp_path)

def test_ablation_trains_judges_and_resumes(clips, tmp_path, monkeypatch):
    from dataclasses import replace
    from faces2voices.corpora import ClipDataset
    small = replace(TINY, dim=16, n_blocks=1, lip_width=4, n_units=8, steps=TINY.steps | dict(speaker=1), batch=TINY.batch | dict(hierarchy=2, speaker=2))
    dataset = lambda data, split: ClipDataset(clips if split == "train" else clips[:2])
    monkeypatch.setattr(ex, "ClipDataset", dataset); monkeypatch.setattr(ex, "preset_for", lambda clip: small)
    rows = ex.ablation("data", tmp_path, steps=1)
    assert [r["without"] for r in rows] == list(ex.VARIANTS) and all(np.isfinite(r["prior loss"]) for r in rows)
    flat = rows[-1]
    assert "unit accuracy in speech" not in flat and flat["mean F0 predicted, r"] is None
    monkeypatch.setattr(ex, "fit", None)                    # nothing is trained a second time
    assert ex.ablation("data", tmp_path, steps=1) == rows
    assert ex.show_ablation(rows).count("without ") == 4 and "faces2voices ablate data --steps 1" in ex.show_ablation(rows)

def test_a_perfect_mu_is_judged_perfect(clips, model):
    from faces2voices.corpora import with_targets
    from faces2voices.hierarchy import Mu
    clip = with_targets(clips[0], None, model.speaker_encoder)
    row = ex.judge_mu(lambda *_: Mu(clip.mel[None], torch.zeros(1, 256), None, None), clip, model.speaker_encoder)
    assert row["error, dB"] == 0 and row["voice similarity"] > .999 and row["energy, r"] > .999
    assert math.isclose(row["prior loss"], .5*math.log(2*math.pi), rel_tol=1e-5)

def test_interleaved_takes_turns():
    order = []
    times = ex.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == list("ababab") and set(times) == {"a", "b"}

def test_bench_prints_ratios(model):
    text = ex.bench_vocoder(model, .4, 1, steps=1)
    assert "times as fast as Griffin-Lim" in text and "1 interleaved rounds" in text

def test_ledger_leaves_blank_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ex, "RESULTS", tmp_path)
    rows = {r[0]: r for r in ex.ledger()}
    assert rows["MOS naturalness"][1].startswith("4.49") and all(r[3] == r[4] == "" for r in rows.values())
    card = dict(rows=dict(synthesised={"WER": .25, "ESTOI": .5}, original={"WER": .1}), errors={}, command="faces2voices evaluate X", clips=2, wer_protocol="p")
    (tmp_path/"grid.json").write_text(json.dumps(card))
    rows = {r[0]: r for r in ex.ledger()}
    assert rows["WER"][3:] == ("", "25.0 % (original 10.0 %)") and rows["ESTOI"][4] == "0.50" and rows["UTMOS"][4] == ""
    assert "faces2voices evaluate X" in ex.ledger_markdown()

def test_an_independent_judge_hears_who_speaks(shared):
    pytest.importorskip("resemblyzer", reason="resemblyzer is not installed (extra `judges`)")
    from faces2voices.audio import load_audio
    one, other = (sorted((shared/"grid"/speaker).glob("*.mp4")) for speaker in ("s1", "s4"))
    a, b, c = (ev.Sound(load_audio(path)).voice for path in (one[0], one[1], other[0]))
    same(torch.tensor(float(a @ a)), torch.tensor(1.), atol=1e-4)
    assert a @ b > a @ c
