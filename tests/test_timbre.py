"GE2E in closed form, margins, FiLM, retrieval, faces and the link, and what padding must not do."

import json
import math
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from faces2voices.errors import ToolMissingError
from faces2voices.core import GRID, PAPER, TINY, test_same as same
from faces2voices.audio import vowel
from faces2voices.talkers import LINKED, make_talker
from faces2voices.recordings import *
from faces2voices.retrieval import *
from faces2voices.timbre import *
from faces2voices.studies import retrieval_scores
from faces2voices.studies import EnrolledTalkers, search_voices
from faces2voices.tracking import make_backend


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_ge2e_by_hand():
    e = F.normalize(torch.randn(3, 4, 8), dim=-1)
    sim = ge2e_similarity(e, w=3.0, b=-1.0)
    for j in range(3):
        for i in range(4):
            for k in range(3):
                mean = (e[j].sum(0) - e[j, i]) / 3 if k == j else e[k].mean(0)
                cos = e[j, i] @ mean / mean.norm()
                same(sim[j, i, k], 3 * cos - 1, atol=1e-5)
    own = sim.diagonal(dim1=0, dim2=2).T
    same(ge2e_loss(e, 3.0, -1.0), (sim.logsumexp(-1) - own).mean(), atol=1e-5)


@pytest.mark.parametrize("S,w", [(2, 1.0), (5, 10.0), (8, 3.0)])
def test_ge2e_closed_form(S, w):
    e = torch.eye(S)[:, None].expand(S, 3, S)
    same(ge2e_loss(e, w, -4.0), torch.tensor(math.log(1 + (S - 1) * math.exp(-w))), atol=1e-5)
    same(ge2e_loss(e[:1].expand(S, 3, S), w), torch.tensor(math.log(S)), atol=1e-5)


def test_own_utterance_is_left_out():
    e = F.normalize(torch.randn(128, 3, 256), dim=-1)
    own = ge2e_similarity(e, 1.0, 0.0).diagonal(dim1=0, dim2=2)
    assert own.mean().abs() < 0.02


def test_speaker_encoder_ignores_padding():
    encoder = SpeakerEncoder().eval()
    mel = torch.randn(2, 80, 90)
    mask = torch.arange(90) < torch.tensor([[90], [41]])
    with torch.no_grad():
        e = encoder(mel, mask)
        same(e[1:], encoder(mel[1:, :, :41], mask[1:, :41]), atol=1e-5)
    same(e.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_windows_pad_what_is_short():
    mels = [[torch.ones(80, 30)], [torch.ones(80, 200)]]
    mel, mask = draw_windows(mels, 2, 3, 50, torch.Generator().manual_seed(0))
    assert mel.shape == (6, 80, 50) and sorted(mask.sum(1).tolist()) == [30] * 3 + [50] * 3
    same(mel[:, 0], mask.float())


def tone(who, k):
    "A voice that is one ridge in the mel, at a place that depends on who."
    g = torch.Generator().manual_seed(1000 * who + k)
    ridge = (-((torch.arange(80) - 10 - 7 * who) ** 2) / 8.0).exp()[:, None]
    return 2 * ridge + 0.5 * torch.randn(80, 70, generator=g)


def test_training_separates_voices_is_seeded_and_leaves_the_global_seed_alone():
    mels = {f"t{w}": [tone(w, k) for k in range(3)] for w in range(8)}
    state = torch.get_rng_state()
    encoder, losses = train_speaker_encoder(
        mels, steps=25, batch=16, utterances=2, window=40, seed=1
    )
    assert torch.equal(state, torch.get_rng_state())
    assert np.mean(losses[-5:]) < 0.5 * losses[0] and not encoder.training
    again, _ = train_speaker_encoder(mels, steps=25, batch=16, utterances=2, window=40, seed=1)
    for p, q in zip(encoder.parameters(), again.parameters()):
        same(p, q, atol=1e-6)
    mask = torch.ones(1, 70, dtype=torch.bool)

    def embed(k):
        return torch.cat([encoder(tone(w, k)[None], mask) for w in range(8)])

    with torch.no_grad():
        assert rank_voices(embed(7), embed(8)).rank1 > 0.7


@pytest.mark.parametrize("preset", [TINY, GRID])
def test_timbre_encoder(preset):
    timbre = TimbreEncoder(preset).eval()
    face = torch.rand(3, 3, 112, 112)
    identity = F.normalize(torch.randn(3, max(preset.identity_dim, 1)), dim=-1)
    out = timbre(face, identity)
    same(out.detach().norm(dim=-1), torch.ones(3), atol=1e-5)
    other = timbre(face.flip(0), identity)  # looks at one of its inputs only
    assert torch.allclose(out, other) == bool(preset.identity_dim)


def test_film_starts_as_the_layer_norm():
    film, h, s = FiLM(12, 256), torch.randn(2, 5, 12), torch.randn(2, 256)
    same(film(h, s).detach(), F.layer_norm(h, (12,)), atol=1e-6)
    film.to_film.bias.data[:12] = 1.0
    film.to_film.bias.data[12:] = 3.0
    same(film(h, s).detach(), 2 * F.layer_norm(h, (12,)) + 3, atol=1e-5)


def test_a_varied_voice_is_of_unit_norm_and_lies_as_far_off_as_asked():
    two = torch.eye(256)[:2].repeat(2000, 1)  # two voices at a right angle
    same(vary_speaker(two, 0.0), two)
    varied = vary_speaker(two, 0.5)
    same(varied.norm(dim=-1), torch.ones(len(two)), atol=1e-5)
    own, other = varied[::2, 0], varied[::2, 1]
    ratio = other / own  # share / (1 − share) for the half that met the other voice
    assert 0.25 < (ratio > 0.2).float().mean() < 0.42
    assert 0.8 < ratio.quantile(0.99) < 1.3
    rest = varied[:, 2:] / varied[:, :2].norm(dim=-1, keepdim=True)
    assert 0.4 < rest.norm(dim=-1).median() < 0.8  # a step of length 0.5 from a length of 0.7 to 1


def test_retrieval_ranks():
    true = torch.eye(4)
    assert rank_voices(true, true)[:3] == (1.0, 1.0, 0.25)
    assert rank_voices(true.roll(1, 0), true).rank1 == 0
    pred = F.normalize(torch.tensor([[1.0, 2, 3, 0]]), dim=-1).expand(4, 4)
    assert rank_voices(pred, true).ranks.tolist() == [3, 2, 1, 4]


def test_arcface():
    e, w, y = torch.randn(6, 16), torch.randn(5, 16), torch.randint(5, (6,))
    cos = F.normalize(e, dim=-1) @ F.normalize(w, dim=-1).T
    same(arcface_loss(e, w, y, 10.0, 0.0), F.cross_entropy(10 * cos, y), atol=1e-4)
    assert arcface_loss(e, w, y, 10.0, 0.3) > arcface_loss(e, w, y, 10.0, 0.0)
    angles = torch.tensor([0.4, 0.0, 1.3])  # of a face, its class and the other: θ + m = α − θ
    points = torch.stack([angles.cos(), angles.sin()], 1)
    draw = arcface_loss(points[:1], points[1:], torch.tensor([0]), 20.0, 0.5)
    same(draw, torch.tensor(math.log(2)), atol=1e-3)


def test_top_k_accuracy_is_the_mean_over_all_draws_of_candidates():
    ranks, n = [1, 3, 6, 2, 2, 5], 3
    for rank, row in zip(ranks, top_k_accuracy(ranks, n)):
        # the first rank − 1 of the others are nearer
        places = [1 + sum(i < rank - 1 for i in drawn) for drawn in combinations(range(5), n - 1)]
        expected = [np.mean([place <= k for place in places]) for k in (1, 2, 3)]
        same(torch.tensor(row), torch.tensor(expected), atol=1e-9)
    ranks_of_a_guess = torch.arange(1, 41)
    assert top_k_accuracy(ranks_of_a_guess, 20)[:, 0].mean() == pytest.approx(1 / 20)


def test_a_score_has_the_interval_of_what_comes_first():
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    voices = F.normalize(torch.randn(60, 16, generator=first), dim=-1)
    guess = F.normalize(voices + 0.4 * torch.randn(60, 16, generator=second), dim=-1)
    found = retrieval_scores(guess, voices)
    hits = top_k_accuracy(rank_voices(guess, voices).ranks)[:, 0]
    assert found["top1"] == pytest.approx(hits.mean(), abs=1e-4)
    assert found["low"] < found["top1"] < found["high"] <= 1
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * hits.std() / 60**0.5, rel=0.2)


def test_snapshots_and_shapes_follow_the_link():
    talkers = [make_talker(seed) for seed in range(40)]
    faces = snapshots(talkers[:2], 2)
    assert faces.shape == (2, 2, 3, 112, 112) and -1 <= faces.min() < faces.max() <= 1
    assert not torch.equal(faces[:, 0], faces[:, 1])
    same(faces[1, 1], snapshot(talkers[1], 1))
    pitches = np.log([t.f0 for t in talkers])
    brow = list(LINKED).index("brow")  # a low voice, a heavy brow

    def follows(link):
        brows = shapes([make_talker(seed, link) for seed in range(40)])[:, 0, brow]
        return np.corrcoef(pitches, brows)[0, 1]

    assert follows(1.0) < -0.9 and abs(follows(0.0)) < 0.4


def test_shapes_find_voices_at_full_link_and_guess_at_none():
    def voices_of(seeds):
        talkers = [make_talker(seed) for seed in seeds]
        traits = [[9 * (t.vocal_tract_length - 1), 3 * (np.log(t.f0) - 5), 1.0] for t in talkers]
        return F.normalize(F.pad(torch.tensor(traits).float(), (0, 253)), dim=-1)

    seen, new = list(range(200, 320)), list(range(40))
    people = EnrolledTalkers(seen, new, voices_of(seen), voices_of(new), voices_of(new))
    rows = {link: search_voices(people, link, 120, 250, shapes, lr=3e-3) for link in (0.0, 1.0)}
    assert rows[1.0]["top1"] > 0.6 and rows[0.0]["top1"] < 0.2
    assert rows[1.0]["cosine"] > rows[0.0]["cosine"] + 0.1
    assert rows[1.0]["curve"] == sorted(rows[1.0]["curve"]) and rows[1.0]["curve"][-1] == 1


def test_training_a_face_encoder_is_seeded_and_leaves_the_global_seed_alone():
    seen = torch.randn(6, 2, 9)
    voices = F.normalize(torch.randn(6, 256), dim=-1)
    state = torch.get_rng_state()
    one, losses = train_timbre(seen, voices, steps=40, batch=8, lr=1e-2)
    two, _ = train_timbre(seen, voices, steps=40, batch=8, lr=1e-2)
    assert torch.equal(state, torch.get_rng_state())
    assert not one.training and np.mean(losses[-5:]) < 0.3
    for p, q in zip(one.parameters(), two.parameters()):
        same(p, q)


def test_arcface_pulls_pictures_of_one_person_together():
    people = torch.rand(4, 1, 3, 1, 1) * 2 - 1
    faces = (people + 0.3 * torch.randn(4, 4, 3, 112, 112)).clamp(-1, 1)
    encoder, losses = train_arcface(faces, margin=0.3, dim=8, steps=25, batch=8)
    with torch.no_grad():
        identity = F.normalize(encoder(faces.flatten(0, 1)), dim=-1).unflatten(0, (4, 4))
    near, far = pair_angles(identity)
    assert near.shape == (24,) and far.shape == (6,)
    assert losses[-1] < losses[0] and near.mean() < 0.5 * far.mean()


def test_angles_by_hand():
    angles = torch.tensor([[0.0, 10, 30], [90, 95, 80]]).deg2rad()
    near, far = pair_angles(torch.stack([angles.cos(), angles.sin()], -1))
    same(near, torch.tensor([10.0, 30, 20, 5, 10, 15]), atol=1e-3)
    same(far, torch.tensor([90.0]), atol=1e-3)


def test_the_width_of_an_identity_is_read_from_the_model(shared):
    pytest.importorskip("insightface")
    picture = ((snapshot(make_talker(0), 0).permute(1, 2, 0) + 1) * 127.5).byte().numpy()
    identity = make_backend("insightface", shared / "insightface").identity(picture)
    assert identity.shape == (128,) != (PAPER.identity_dim,)
    timbre = TimbreEncoder(replace(PAPER, identity_dim=len(identity))).eval()
    assert timbre(None, torch.from_numpy(identity)[None]).shape == (1, 256)


def test_the_speaker_encoder_of_real_voices():
    pytest.importorskip("resemblyzer", reason="resemblyzer is not installed (extra `judges`)")
    low, high = (resemblyzer_embedding(vowel(torch.full((16000,), hz))) for hz in (110.0, 220.0))
    for e in (low, high):
        assert e.shape == (256,) and e.dtype == torch.float32
        assert e.min() >= 0 and e.norm() == pytest.approx(1, abs=1e-5)
    assert low @ high < 0.95


def test_without_resemblyzer_the_error_names_the_extra(monkeypatch):
    from faces2voices import recordings

    recordings._resemblyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(ToolMissingError, match=r"faces2voices\[judges\]"):
        resemblyzer_embedding(torch.zeros(16000))


def test_the_recorded_link_moves_the_result_as_it_should():
    recorded = Path(__file__).parents[1] / "nbs" / "results" / "timbre.json"
    rows = json.loads(recorded.read_text())["rows"]
    top1 = {(r["eyes"], r.get("link"), r.get("faces")): r["top1"] for r in rows}
    numbers = [faces for _, _, faces in top1 if faces]
    few, many = min(numbers), max(numbers)
    assert top1["snapshots", 0.0, few] <= 0.15
    assert top1["snapshots", 1.0, few] > 3 * top1["snapshots", 0.0, few]
    assert top1["shapes", 1.0, many] > top1["snapshots", 1.0, few]
