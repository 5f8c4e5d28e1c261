"GE2E in closed form, margins, FiLM, retrieval, and what padding must not do."
import math
import numpy as np, pytest, torch, torch.nn.functional as F
from faces2voices.core import GRID, TINY, test_same as same
from faces2voices.timbre import *

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def test_ge2e_by_hand():
    e = F.normalize(torch.randn(3, 4, 8), dim=-1)
    sim = ge2e_similarity(e, w=3., b=-1.)
    for j in range(3):
        for i in range(4):
            for k in range(3):
                mean = (e[j].sum(0) - e[j, i])/3 if k == j else e[k].mean(0)
                cos = e[j, i] @ mean/mean.norm()
                same(sim[j, i, k], 3*cos - 1, atol=1e-5)
    own = sim.diagonal(dim1=0, dim2=2).T
    same(ge2e_loss(e, 3., -1.), (sim.logsumexp(-1) - own).mean(), atol=1e-5)

@pytest.mark.parametrize("S,w", [(2, 1.), (5, 10.), (8, 3.)])
def test_ge2e_closed_form(S, w):
    e = torch.eye(S)[:, None].expand(S, 3, S)
    same(ge2e_loss(e, w, -4.), torch.tensor(math.log(1 + (S - 1)*math.exp(-w))), atol=1e-5)
    same(ge2e_loss(e[:1].expand(S, 3, S), w), torch.tensor(math.log(S)), atol=1e-5)

def test_own_utterance_is_left_out():
    e = F.normalize(torch.randn(128, 3, 256), dim=-1)
    own = ge2e_similarity(e, 1., 0.).diagonal(dim1=0, dim2=2)
    assert own.mean().abs() < .02

def test_speaker_encoder_ignores_padding():
    encoder = SpeakerEncoder().eval()
    mel = torch.randn(2, 80, 90)
    mask = torch.arange(90) < torch.tensor([[90], [41]])
    with torch.no_grad():
        e = encoder(mel, mask)
        same(e[1:], encoder(mel[1:, :, :41], mask[1:, :41]), atol=1e-5)
    same(e.norm(dim=-1), torch.ones(2), atol=1e-5)

def test_windows_pad_what_is_short():
    mel, mask = draw_windows([[torch.ones(80, 30)], [torch.ones(80, 200)]], 2, 3, 50, torch.Generator().manual_seed(0))
    assert mel.shape == (6, 80, 50) and sorted(mask.sum(1).tolist()) == [30]*3 + [50]*3
    same(mel[:, 0], mask.float())

def tone(who, k):
    "A voice that is one ridge in the mel, at a place that depends on who."
    g = torch.Generator().manual_seed(1000*who + k)
    ridge = (-(torch.arange(80) - 10 - 7*who)**2/8.).exp()[:, None]
    return 2*ridge + .5*torch.randn(80, 70, generator=g)

def test_training_separates_voices_is_seeded_and_leaves_the_global_seed_alone():
    mels = {f"t{w}": [tone(w, k) for k in range(3)] for w in range(8)}
    state = torch.get_rng_state()
    encoder, losses = train_speaker_encoder(mels, steps=25, batch=16, utterances=2, window=40, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert np.mean(losses[-5:]) < .5*losses[0] and not encoder.training
    again, _ = train_speaker_encoder(mels, steps=25, batch=16, utterances=2, window=40, seed=1)
    for p, q in zip(encoder.parameters(), again.parameters()): same(p, q, atol=1e-6)
    embed = lambda k: torch.cat([encoder(tone(w, k)[None], torch.ones(1, 70, dtype=torch.bool)) for w in range(8)])
    with torch.no_grad(): assert retrieval(embed(7), embed(8)).rank1 > .7

@pytest.mark.parametrize("preset", [TINY, GRID])
def test_timbre_encoder(preset):
    timbre = TimbreEncoder(preset).eval()
    face, identity = torch.rand(3, 3, 112, 112), F.normalize(torch.randn(3, max(preset.identity_dim, 1)), dim=-1)
    out = timbre(face, identity)
    same(out.detach().norm(dim=-1), torch.ones(3), atol=1e-5)
    other = timbre(face.flip(0), identity)          # looks at one of its inputs only
    assert torch.allclose(out, other) == bool(preset.identity_dim)

def test_film_starts_as_the_layer_norm():
    film, h, s = FiLM(12, 256), torch.randn(2, 5, 12), torch.randn(2, 256)
    same(film(h, s).detach(), F.layer_norm(h, (12,)), atol=1e-6)
    film.to_film.bias.data[:12], film.to_film.bias.data[12:] = 1., 3.
    same(film(h, s).detach(), 2*F.layer_norm(h, (12,)) + 3, atol=1e-5)

def test_retrieval_ranks():
    true = torch.eye(4)
    assert retrieval(true, true)[:3] == (1., 1., .25)
    assert retrieval(true.roll(1, 0), true).rank1 == 0
    pred = F.normalize(torch.tensor([[1., 2, 3, 0]]), dim=-1).expand(4, 4)
    assert retrieval(pred, true).ranks.tolist() == [3, 2, 1, 4]

def test_arcface():
    e, w, y = torch.randn(6, 16), torch.randn(5, 16), torch.randint(5, (6,))
    cos = F.normalize(e, dim=-1) @ F.normalize(w, dim=-1).T
    same(arcface_loss(e, w, y, 10., 0.), F.cross_entropy(10*cos, y), atol=1e-4)
    assert arcface_loss(e, w, y, 10., .3) > arcface_loss(e, w, y, 10., 0.)
    point = lambda a: torch.tensor([[math.cos(a), math.sin(a)]])
    same(arcface_loss(point(.4), torch.cat([point(0.), point(1.3)]), torch.tensor([0]), 20., .5), torch.tensor(math.log(2)), atol=1e-3)  # θ + m = α − θ
