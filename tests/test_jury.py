"Who listens when sounds are compared, and to what."

import pytest
import torch
from faces2voices import jury
from faces2voices.errors import CorpusError
from test_ablation import made_clip


def test_every_sound_is_judged_beside_the_recording_of_its_own_clip():
    clips = [made_clip(i) for i in range(3)]
    seated = jury.make_jury(clips, ("energy, r", "mean F0, r", "no such metric"), None)
    assert [metric.name for metric in seated.metrics] == ["energy, r"]
    for clip in clips:
        assert seated.score(clip.wav, clip)["energy, r"] > 0.999
        assert seated.score(clip.wav.flip(0), clip)["energy, r"] < 0.9
    for a, b in zip(clips, clips[1:]):
        n = min(len(a.wav), len(b.wav))
        assert seated.recordings[a.name] is not seated.recordings[b.name]
        assert not torch.equal(a.wav[:n], b.wav[:n])


@pytest.mark.parametrize("n, limit, kept", [(10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (0, 5, [])])
def test_few_are_spread_evenly_over_many(n, limit, kept):
    assert list(jury.spread(range(n), limit)) == kept


def test_a_split_without_clips_is_said(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(CorpusError, match="whose split is `odd`"):
        jury.split_with_sound(tmp_path, "odd")
