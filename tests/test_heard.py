"Variants of the ablation through to speech: one ear for all, and a flow of their own."

import json
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from faces2voices import heard
from faces2voices.ablation import AblationRun
from faces2voices.ears import make_ear
from faces2voices.core import test_same as same
from faces2voices.errors import CheckpointError
from faces2voices.hierarchy import Mu
from faces2voices.variants import build_variant
from test_ablation import FEATURED, LIPS, made_clip, seen  # noqa: F401


class Said(torch.nn.Module):
    "A variant with a μ, a speaker and contours of its own choice."

    def __init__(self, mu, speaker=None, log_f0=None):
        super().__init__()
        self.mu, self.speaker, self.log_f0 = mu, speaker, log_f0

    def inputs(self, batch):
        return ()

    def forward(self):
        contours = SimpleNamespace(log_f0=self.log_f0, voiced_logit=self.log_f0)
        return Mu(self.mu, self.speaker, None, None if self.log_f0 is None else contours)


def test_no_variant_gains_by_contours_that_it_predicts(seen, monkeypatch):
    spoken = []
    monkeypatch.setattr(heard, "vocode_mel", lambda *told: spoken.append(told) or torch.zeros(640))
    clip = seen.splits["test"][0]
    mu = torch.randn(1, *clip.mel.shape)
    ear = make_ear(seen.splits["train"])
    wrong = torch.zeros(1, len(clip.log_f0))
    for model in (Said(mu), Said(mu, torch.ones(1, 256), wrong)):
        heard.speak_run(model, None, clip, seen, ear, "vocoder")
    for a, b in zip(spoken[0][1:], spoken[1][1:]):
        same(a, b)
    same(spoken[0][2], ear.tune(mu[0])[0])


def test_the_ear_hears_voice_and_pitch_where_a_mel_tells_them():
    g = torch.Generator().manual_seed(0)
    clips = []
    for i in range(20):
        clip = made_clip(i)
        voiced = (torch.rand(len(clip.voiced), generator=g) < 0.5).float()
        mel = 0.1 * torch.randn(80, 2 * len(voiced), generator=g)
        mel[10] += voiced.repeat_interleave(2)
        mel[20] += clip.log_f0.repeat_interleave(2) - 5
        clips.append(clip._replace(mel=mel, voiced=voiced))
    ear = make_ear(clips[:15])
    for clip in clips[15:]:
        log_f0, voiced = ear.tune(clip.mel)
        assert (voiced == clip.voiced).float().mean() > 0.95
        known = clip.voiced > 0
        assert np.corrcoef(log_f0[known], clip.log_f0[known])[0, 1] > 0.85


@pytest.mark.parametrize("name", ["whole", "no-timbre", "flat"])
def test_a_flow_learns_from_the_mu_and_the_speaker_of_its_own_variant(seen, name):
    torch.manual_seed(0)
    model = build_variant(name, FEATURED, LIPS).eval()
    clips = seen.splits["train"][:3]
    examples = heard.flow_examples(model, clips, seen)
    for clip, example in zip(clips, examples):
        alone = heard.flow_examples(model, [clip], seen)[0]
        same(example.mu, alone.mu)
        same(example.x1, clip.mel)
        assert example.mask.all() and example.mask.shape == (1, clip.mel.shape[1])
        assert example.speaker.any().item() == (name == "whole")
    assert not torch.equal(examples[0].mu, examples[1].mu[:, : examples[0].mu.shape[1]])


def test_a_flow_is_trained_once_and_from_its_own_seed(seen, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = build_variant("flat", FEATURED, LIPS).eval()
    monkeypatch.setattr(heard, "load_run", lambda run, seen, out: model)
    run = AblationRun("flat", 1.0, 4, 0)
    first = heard.train_flow(run, seen, tmp_path, 2)
    files = {path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"}
    assert files == {"flat-100-4-0-flow-2.safetensors"}
    with monkeypatch.context() as stop:
        stop.setattr(heard, "fit", lambda *a, **k: pytest.fail("trained again"))
        again = heard.train_flow(run, seen, tmp_path, 2)
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
    other = heard.train_flow(run._replace(seed=1), seen, tmp_path, 2)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))


def test_what_others_judged_is_judged_again(tmp_path):
    path, judges = tmp_path / "heard.json", dict(ear_clips=12, metrics=["ESTOI"])
    assert heard._judged_before(path, judges) is None
    path.write_text(json.dumps(judges | dict(scores={"ESTOI": [0.5]})))
    assert heard._judged_before(path, judges) == {"ESTOI": [0.5]}
    assert heard._judged_before(path, judges | dict(ear_clips=4)) is None
    assert heard._judged_before(path, judges | dict(metrics=["ESTOI", "WER"])) is None
    path.write_text(json.dumps({"ESTOI": [0.5]}))
    assert heard._judged_before(path, judges) is None


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"ear_clips": 12, "metrics": []}'])
def test_a_damaged_judgement_is_said_by_its_name(tmp_path, text):
    path = tmp_path / "heard.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="heard.json: is damaged"):
        heard._judged_before(path, dict(ear_clips=12, metrics=[]))


def rows_of(gaps):
    "Three seeds and forty clips, which differ more than the variants do."
    rng = np.random.default_rng(0)
    hard = rng.normal(size=40)
    rows = []
    for variant, gap in gaps.items():
        for seed in (0, 1, 2):
            values = hard + gap + 0.05 * rng.normal(size=40)
            rows.append(dict(variant=variant, seed=seed, scores={"ESTOI": values.tolist()}))
    return dict(rows=rows, clips=list(range(40)), split="test", bounds={})


def test_speech_is_compared_within_seed_and_clip_and_corrected():
    found = rows_of({"whole": 0.0, "flat": -0.2, "no-prosody": 0.0})
    changed = heard.compare_heard(found)
    assert set(changed) == {("flat", "ESTOI"), ("no-prosody", "ESTOI")}
    worse = changed["flat", "ESTOI"]
    assert abs(worse.interval.estimate + 0.2) < 0.03 and worse.p < 0.05
    assert changed["no-prosody", "ESTOI"].p > 0.05
    table = heard.show_heard(found).splitlines()
    assert [line.count("**") for line in table[2:5]] == [0, 2, 0]


def test_a_clip_without_a_number_is_left_out_and_none_at_all_is_blank():
    found = rows_of({"whole": 0.0, "flat": -0.2})
    found["rows"][0]["scores"]["ESTOI"][3] = None
    assert heard.compare_heard(found)["flat", "ESTOI"].p < 0.05
    for row in found["rows"]:
        row["scores"]["ESTOI"] = [None] * 40
    assert heard.compare_heard(found) == {}
    assert "nan" not in heard.show_heard(found)
