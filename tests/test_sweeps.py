"What is drawn, what is heard of it, and what is said of the difference."

from pathlib import Path
import numpy as np
import pytest
import torch
from faces2voices import draws, sweeps
from faces2voices.audio import MEL
from faces2voices.core import test_same as same
from faces2voices.decoder import mel_noise
from faces2voices.corpora import clip_of
from faces2voices.draws import (
    DrawSetting,
    calls_for_gain,
    draw_settings,
    make_draws,
    predict_clip,
    score_draws,
)
from faces2voices.errors import ToolMissingError
from faces2voices.synthesis import FacesToVoices
from faces2voices.video import preprocess

TRUTH = "its mel, by the vocoder"
SAMPLE = Path(__file__).parents[1] / "data_samples" / "t0022_000.mp4"


@pytest.fixture(scope="module")
def talkers():
    return FacesToVoices.from_pretrained("talkers", device="cpu")


@pytest.fixture(scope="module")
def clip(talkers):
    return clip_of("t0022_000", preprocess(SAMPLE, talkers.face_backend))


class Listener:
    def __init__(self):
        self.heard = []

    def tune(self, mel):
        self.heard.append(mel)
        return "pitch", "voicing"


def test_every_row_goes_through_one_vocoder_at_its_own_pitch(talkers, clip, monkeypatch):
    spoken = []

    def speak(vocoder, mel, log_f0, voiced):
        spoken.append((mel, log_f0, voiced))
        return torch.zeros(640)

    monkeypatch.setattr(sweeps, "vocode_mel", speak)
    spectrum = torch.full((80, 129), 0.04)
    few = [DrawSetting(2, temperature=0.3)]
    ear = Listener()
    rows = dict(sweeps.ways_to_speak(talkers, clip, few, spectrum, ear, 0))
    told = dict(zip(list(rows)[1:], spoken))
    own = [name for name in told if name.endswith(", its own tune")]
    assert own == [f"{n}, its own tune" for n in (TRUTH, "μ", "μ + white noise")]
    for name, heard in zip(own, ear.heard, strict=True):
        mel, *tune = told.pop(name)
        assert mel is heard and tune == ["pitch", "voicing"]
    means = "mean of draws", "mean of draws + white noise"
    assert list(told) == [TRUTH, "μ", "μ + white noise", "μ + shaped noise", few[0].name, *means]
    same(rows["recording"], clip.wav)
    known = predict_clip(talkers, clip)
    (mel, log_f0, voiced), (mu, *tune), *others = told.values()
    same(mel, MEL.normalize(MEL(clip.wav)), atol=1e-4)
    same(log_f0, clip.log_f0)
    same(voiced, clip.voiced)
    same(mu, known.mu)
    for _, *predicted in [(mu, *tune), *others]:
        same(predicted[0], known.log_f0)
        same(predicted[1], known.voiced)
    assert (known.log_f0 - clip.log_f0).abs().max() > 0.01
    noise = others[0][0] - known.mu
    assert abs(noise.std() - 0.2) < 0.01


class KnownFlow(torch.nn.Module):
    "A decoder that knows what the truth has more than μ, alike all over each patch or white."

    device = "cpu"

    def __init__(self, alike: bool):
        super().__init__()
        self.alike = alike
        self.decoder = self

    def sample(self, mus, x0, **how):
        if self.alike:
            x0 = x0[:, :1, ::8].repeat_interleave(8, 2).expand_as(x0)
        return mus + 0.3 + 0.2 * x0


@pytest.mark.parametrize("alike", [False, True], ids=["white", "a number a patch"])
def test_a_control_tells_a_better_mean_from_structure(alike):
    "The truths are one more draw each, so the flow is perfect; what it gains is known in kind."
    flow = KnownFlow(alike)
    energies = {}
    for seed in range(24):
        mu = torch.zeros(80, 64)
        truth = flow.sample(mu[None], x0=mel_noise(64, [9000 + seed]))[0]
        known = draws.Known(truth, mu, torch.zeros(256), None, None)
        spectrum = torch.full((80, 129), 0.2**2 + 0.3**2)
        rows = make_draws(flow, known, [DrawSetting(6)], spectrum, 4, 100 * seed)
        for name, made in rows:
            energies.setdefault(name, []).append(score_draws(made, truth, mu)["energy"])
    flow = energies[DrawSetting(6).name]
    over_mu = draws.energy_gain(flow, energies["μ + white noise"])
    over_mean = draws.energy_gain(flow, energies["mean of draws + white noise"])
    assert over_mu.low > 0.1
    assert over_mean.low > 0.05 if alike else abs(over_mean.estimate) < 0.005


def test_a_higher_temperature_draws_more_widely(talkers, clip):
    known = predict_clip(talkers, clip)
    taus = 0.3, 0.6, 1.0, 1.4
    settings = [DrawSetting(6, "midpoint", temperature=tau) for tau in taus]
    made = dict(make_draws(talkers, known, settings, torch.ones(80, 129), 4, 0))
    variety = [score_draws(made[s.name], known.mel, known.mu)["variety"] for s in settings]
    assert variety == sorted(variety) and variety[-1] > 4 * variety[0]
    again = dict(make_draws(talkers, known, settings[:1], torch.ones(80, 129), 4, 0))
    assert torch.equal(again[settings[0].name], made[settings[0].name])


def test_the_octaves_hold_all_the_power_of_a_residual_and_each_its_own():
    "Parseval; and a wave of 6 Hz stands in the octave of 4 to 8 Hz alone."
    mu = torch.zeros(80, 200)
    seconds = torch.arange(200) / 100
    for x in (torch.randn(80, 200), torch.sin(2 * torch.pi * 6 * seconds).expand(80, 200)):
        power = score_draws(x[None], mu, mu)
        octaves = {name: power[name] for name in draws.OCTAVES}
        assert abs(sum(octaves.values()) - x.square().mean().item()) < 1e-3
    assert octaves.pop("4 to 8 Hz") > 0.49
    assert sum(octaves.values()) < 1e-3


def test_settings_have_names_of_their_own():
    for settings in (draw_settings(), sweeps.sweep_settings()):
        names = [s.name for s in settings]
        assert len(set(names)) == len(names)
        assert {s.temperature for s in settings} >= {0.3, 0.6, 1.0, 1.2}


def test_the_fewest_calls_are_found_and_no_gain_is_said():
    assert calls_for_gain({2: 4.5, 6: 4.02, 30: 4.0}, 5.0) == 6
    assert calls_for_gain({2: 4.5, 6: 4.2, 30: 4.0}, 5.0) == 30
    assert calls_for_gain({2: 4.5, 30: 5.0}, 5.0) is None


def test_without_whisper_a_sweep_has_no_distances(monkeypatch):
    def absent(wav):
        raise ToolMissingError("Whisper", "no model is at hand", "Install one")

    assert sweeps._states_of({}) == {}
    monkeypatch.setattr(sweeps, "whisper_states", absent)
    assert sweeps._states_of({"μ": torch.zeros(1600)}) is None
    rows = {name: {"ESTOI": [0.1, 0.2, 0.3]} for name in ("μ", "draws")}
    head, _, mu, *_ = sweeps.show_sweep(
        dict(rows=rows, model="m", clips=3, split="val", distances={"draws": 0.25})
    ).splitlines()
    assert head.split("|")[-2].strip() == "Fréchet, Whisper ↓" and not mu.split("|")[-2].strip()


def test_rows_are_compared_with_mu_within_clips():
    hard = np.linspace(0, 10, 12)  # clips differ more than rows
    jitter = np.tile([0.01, -0.01], 6)
    rows = {
        "μ": {"ESTOI": hard.tolist()},
        "better": {"ESTOI": (hard + 0.1 + jitter).tolist()},
        "alike": {"ESTOI": (hard + jitter).tolist()},
    }
    changed = sweeps.compare_with_mu(dict(rows=rows))
    assert set(changed) == {("better", "ESTOI"), ("alike", "ESTOI")}
    better, alike = changed["better", "ESTOI"], changed["alike", "ESTOI"]
    assert abs(better.interval.estimate - 0.1) < 1e-9 and better.p < 0.01
    assert alike.p > 0.5
    rows["unheard"] = {"ESTOI": [float("nan"), *hard[1:].tolist()]}
    table = sweeps.show_sweep(dict(rows=rows, model="m", clips=12, split="val"))
    assert "nan" not in table
    assert "**5.100**" in table and "**5.000**" not in table
