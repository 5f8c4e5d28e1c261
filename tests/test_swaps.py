"One input is taken away: which one, and what is said of the difference."

from types import SimpleNamespace
import numpy as np
import pytest
import torch
from scipy.stats import t as student
from faces2voices import swaps
from faces2voices.core import test_same as same
from faces2voices.errors import CorpusError
from faces2voices.statistics import equivalence
from test_ablation import made_clip


def moving(i, pitch=5.0):
    "A clip in which everything moves."
    g = torch.Generator().manual_seed(i)
    clip = made_clip(i)
    T = len(clip.lips)
    pictures = torch.randint(256, (T, 8, 8), generator=g).byte()
    points = torch.randn(T, 9, 2, generator=g)
    tune = torch.full_like(clip.log_f0, pitch)
    return clip._replace(lips=pictures, mouth=points, log_f0=tune)


def test_each_condition_changes_one_input_and_nothing_else():
    clip, other = moving(0), moving(1)
    same_fields = {}
    for name, seen in swaps.swap_conditions(clip, other).items():
        changed = set()
        for field in clip._fields:
            a, b = getattr(clip, field), getattr(seen, field)
            equal = torch.equal(a, b) if torch.is_tensor(a) else a == b
            changed |= set() if equal else {field}
        same_fields[name] = changed
        for field in changed - {"face", "identity"}:
            same(getattr(seen, field), getattr(clip, field)[:1].expand_as(getattr(clip, field)))
    assert same_fields == {
        "as it is": set(),
        "another face": {"face", "identity"},
        "brows frozen": {"expression"},
        "lips frozen": {"lips", "mouth"},
    }


def test_a_face_is_borrowed_of_who_sounds_least_alike_and_has_lent_least():
    low, near, far = moving(0, 4.6), moving(1, 4.7), moving(3, 5.3)
    twin = moving(2, 5.5)  # the same person as the first
    assert twin.speaker_id == low.speaker_id != near.speaker_id == far.speaker_id
    lenders = swaps.unlike_lenders([low, twin, near, far])
    assert [clip.name for clip in lenders] == [clip.name for clip in (far, near, twin, low)]
    lower = moving(2, 4.5)  # far would lend to both, if it could lend twice
    lenders = swaps.unlike_lenders([low, lower, near, far])
    assert [clip.name for clip in lenders] == [clip.name for clip in (far, near, lower, low)]
    with pytest.raises(CorpusError, match="nobody to lend"):
        swaps.unlike_lenders([low, twin])


def test_each_clip_is_compared_with_its_own_recording_and_with_the_lender_of_its_face(monkeypatch):
    clips = [moving(0, 4.6), moving(1, 5.3)]
    spoken = SimpleNamespace(from_pretrained=lambda name, device: spoken)
    spoken.synthesize_clip = lambda clip, seed: (clip.name, clip.face, seed)
    jury = SimpleNamespace(
        recordings={clip.name: f"recording of {clip.name}" for clip in clips},
        recognisers={"WER": "recogniser"},
    )
    seen = []

    def score(speech, clip, own, borrowed, recognise):
        seen.append((speech, clip.name, own, borrowed, recognise))
        return {"energy, r": 1.0}

    monkeypatch.setattr(swaps, "split_with_sound", lambda data, split: clips)
    monkeypatch.setattr(swaps, "FacesToVoices", spoken)
    monkeypatch.setattr(swaps, "make_jury", lambda clips, metrics, model: jury)
    monkeypatch.setattr(swaps, "score_swap", score)
    found = swaps.swap_study("talkers", "prepared", seed=3)
    assert found["clips"] == 2 and found["words_by"] == "WER"
    assert [len(of["energy, r"]) for of in found["rows"].values()] == [2] * 4
    for (made, face, seed), name, own, borrowed, recognise in seen:
        mine, other = clips if name == clips[0].name else clips[::-1]
        assert made == name and seed == 3 and recognise == "recogniser"
        assert own == f"recording of {mine.name}" and borrowed == f"recording of {other.name}"
        assert any(torch.equal(face, clip.face) for clip in (mine, other))


def test_scores_are_of_the_sound_that_was_made(monkeypatch):
    class Heard:
        def __init__(self, wav, rises=1.0):
            self.voice = torch.nn.functional.normalize(wav[:2], dim=0)
            self.pitch = 5 + rises * torch.linspace(0, 1, 20), torch.ones(20)
            self.energy = -3 + rises * torch.linspace(0, 1, 20)

    monkeypatch.setattr(swaps, "Sound", Heard)
    clip = moving(0)
    speech = SimpleNamespace(wav=torch.tensor([1.0, 0.0]))  # what the model predicted is not asked
    own = Heard(torch.tensor([1.0, 0.0]), rises=-0.5)
    borrowed = Heard(torch.tensor([0.0, 1.0]))
    found = swaps.score_swap(speech, clip, own, borrowed, lambda wav: "bin blue at f two")
    assert found["voice, cosine to the own"] == 1 and found["voice, cosine to the borrowed"] == 0
    assert found["F0 contour, r"] == found["energy, r"] == -1
    assert abs(found["words wrong"] - 1 / 6) < 1e-3


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.06, -0.06])
def test_equivalence_is_two_one_sided_tests(shift):
    d = 0.1 * np.random.default_rng(0).normal(size=50) + shift
    error = d.std(ddof=1) / 50**0.5
    low = student.sf((d.mean() + 0.05) / error, 49)
    high = student.cdf((d.mean() - 0.05) / error, 49)
    assert abs(equivalence(d, 0.05) - max(low, high)) < 1e-12
    assert equivalence(d, 0.05) == pytest.approx(equivalence(-d, 0.05))


def test_what_cannot_be_told_is_not_called_equivalent():
    assert np.isnan(equivalence([0.1], 0.05)) and np.isnan(equivalence([np.nan, 0.0], 0.05))
    assert equivalence([0.3, -0.3, 0.2], 0.05) > 0.05  # their mean is near 0, and says little
    assert equivalence([0.0] * 9, 0.05) == 0 and equivalence([0.05] * 9, 0.05) == 1


def test_the_table_says_the_change_and_whether_words_stay():
    rng = np.random.default_rng(0)
    voice, words = rng.random(20), np.zeros(20)
    rows = {
        "as it is": {"words wrong": words.tolist(), "voice, cosine to the own": voice.tolist()},
        "another face": {
            "words wrong": words.tolist(),
            "voice, cosine to the own": (voice - 0.3).tolist(),
        },
    }
    found = dict(model="m", clips=20, split="test", rows=rows, lenders=["a", "b", "a"])
    table = swaps.show_swaps(found)
    assert "(-0.300" in table and "p < 0.001" in table and "2 different faces" in table
    rows["another face"]["words wrong"] = (words + 0.2).tolist()
    assert "p = 1.000" in swaps.show_swaps(found)
