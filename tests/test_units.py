"Units: counts, nearest centroids, meaning, and what they must not depend on."

from functools import partial
import pytest
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from faces2voices.audio import MEL, vowel
from faces2voices.errors import CheckpointError, ToolMissingError
from faces2voices.core import PRESETS, test_same as same
from faces2voices.units import (
    UnitQuantizer,
    cepstra,
    contingency,
    hubert_features,
    make_quantizer,
    neighbours,
    phone_labels,
    fit_phone_classifier,
    purity,
    predict_phones,
)


def noise(N, seed=0):
    return 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(seed))


FORMANTS = [
    ((750, 90), (1250, 110), (2600, 160)),
    ((280, 90), (2300, 110), (3000, 160)),
    ((310, 90), (700, 110), (2400, 160)),
]


def four_sounds(seed, pitch=120.0):
    "Two thirds of a second each of a hiss and three vowels, in a random order, and which is which."
    order, n = torch.randperm(4, generator=torch.Generator().manual_seed(seed)), 320 * 32
    return torch.cat(
        [noise(n, seed) if k == 3 else vowel(torch.full((n,), pitch), FORMANTS[k]) for k in order]
    ) + 1e-3 * noise(4 * n, seed), order.repeat_interleave(32)


@pytest.fixture(scope="module")
def sounds():
    return [four_sounds(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def quantizer(sounds):
    return UnitQuantizer(16).fit([w for w, _ in sounds], seed=0)


@pytest.mark.parametrize("T", [1, 2, 3, 25, 74, 75])
def test_two_units_a_frame(T, quantizer):
    assert cepstra(noise(640 * T)).shape == (2 * T, 39)
    units = quantizer(torch.stack([noise(640 * T), noise(640 * T, 1)]))
    assert (
        units.shape == (2, 2 * T)
        and units.dtype == torch.long
        and 0 <= units.min() <= units.max() < 16
    )
    same(units[0], quantizer(noise(640 * T)))


def test_frame_k_is_centred_on_sample_320k_plus_160():
    wav = noise(6400)
    mfcc = torchaudio.transforms.MFCC(
        16000, 13, log_mels=True, melkwargs=dict(n_fft=640, hop_length=320, n_mels=40, center=False)
    )
    by_hand = torch.stack([mfcc(wav[320 * k - 160 : 320 * k + 480])[:, 0] for k in range(1, 19)])
    same(cepstra(wav, normalise=False)[1:19, :13], by_hand, atol=1e-3)


def test_units_are_the_nearest_centroids(quantizer, sounds):
    x = (cepstra(sounds[0][0]) - quantizer.mean) / quantizer.scale
    brute = torch.stack([((x - c) ** 2).sum(-1) for c in quantizer.centroids], -1)
    chosen = brute.gather(1, quantizer(sounds[0][0])[:, None])[:, 0]
    same(chosen, brute.amin(-1), atol=1e-3)


def test_centroids_are_means_of_their_members(sounds):
    "The fixed point of k-means, reached on data that is well separated."
    q = UnitQuantizer(4).fit([w for w, _ in sounds], seed=0)
    x = torch.cat([(cepstra(w) - q.mean) / q.scale for w, _ in sounds])
    units = q.nearest(x)
    for k in range(4):
        assert (x[units == k].mean(0) - q.centroids[k]).norm() < 0.25 * q.centroids[k].norm()


def test_different_sounds_get_different_units(quantizer, sounds):
    units = torch.cat([quantizer(w) for w, _ in sounds])
    labels = torch.cat([label for _, label in sounds])
    away = torch.tensor(([False] * 3 + [True] * 26 + [False] * 3) * 4)  # from the boundaries
    inside = away.repeat(len(sounds))
    assert purity(units[inside], labels[inside]) > 0.97
    held, true = four_sounds(99)  # a sound that was not seen
    named = contingency(units, labels)[quantizer(held)].argmax(1)
    assert (named == true)[away].float().mean() > 0.95


def test_loudness_and_channel_do_not_matter_much(quantizer, sounds):
    wav = sounds[1][0]
    assert (quantizer(0.3 * wav) == quantizer(wav)).float().mean() > 0.9
    dull = torchaudio.functional.lfilter(
        wav, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.4]), clamp=False
    )
    assert (quantizer(dull) == quantizer(wav)).float().mean() > 0.75


def test_silence_and_a_constant_do_not_break(quantizer):
    for wav in (torch.zeros(6400), torch.ones(6400) * 0.1):
        assert cepstra(wav).isfinite().all() and quantizer(wav).shape == (20,)


def test_normalisation_makes_voices_share_units():
    pairs = [four_sounds(seed, 100.0) for seed in range(6)]
    pairs += [four_sounds(seed, 230.0) for seed in range(6)]
    who = (torch.arange(12) >= 6).long().repeat_interleave(128)
    wavs = [w for w, _ in pairs]
    leak = {}
    for normalise in (True, False):
        q = UnitQuantizer(8, partial(cepstra, normalise=normalise)).fit(wavs)
        leak[normalise] = purity(torch.cat([q(w) for w in wavs]), who)
    assert leak[True] <= leak[False] + 0.02


def test_a_seed_repeats(sounds, quantizer):
    again = UnitQuantizer().fit([w for w, _ in sounds], 16, seed=0)
    for k, v in quantizer.state_dict().items():
        same(v, again.state_dict()[k])
    assert (
        UnitQuantizer().fit([w for w, _ in sounds], 16, seed=1).centroids != quantizer.centroids
    ).any()


def test_round_trip_through_safetensors(tmp_path, sounds, quantizer):
    save_file(quantizer.state_dict(), tmp_path / "q.safetensors")
    twin = UnitQuantizer(16)
    twin.load_state_dict(load_file(tmp_path / "q.safetensors"))
    same(twin(sounds[2][0]), quantizer(sounds[2][0]))
    same(twin.unit_mels, quantizer.unit_mels)


def test_units_to_mel_is_the_mean_mel(sounds, quantizer):
    wavs = [w for w, _ in sounds]
    units, mels = torch.cat([quantizer(w) for w in wavs]), torch.cat([MEL(w) for w in wavs], -1)
    k = int(units.mode().values)
    columns = (units == k).repeat_interleave(2)
    assert quantizer.units_to_mel(torch.tensor([k, 0, k])).shape == (80, 6)
    same(quantizer.units_to_mel(torch.tensor([k]))[:, 0], mels[:, columns].mean(-1), atol=1e-3)


def test_purity_by_hand():
    assert purity(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 0])) == 0.8
    same(
        contingency(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 0])),
        torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]]),
    )


def test_phone_labels_by_hand():
    same(
        phone_labels([("b", 0.02, 0.06), ("a", 0.1, 0.2)], 8, ["a", "b"]),
        torch.tensor([-1, 1, 1, -1, -1, 0, 0, 0]),
    )
    with pytest.raises(ValueError):
        phone_labels([("c", 0.0, 0.1)], 8, ["a", "b"])


def test_neighbours_by_hand():
    same(neighbours(torch.tensor([5, 6, 7]), 1), torch.tensor([[-1, 5, 6], [5, 6, 7], [6, 7, -1]]))


def test_a_phone_can_be_read_from_the_units_around_it():
    "The phone is the unit before: a reader of single units could not know it."
    units = [torch.randint(6, (40,), generator=torch.Generator().manual_seed(i)) for i in range(20)]
    phones = [torch.cat([torch.tensor([-1]), u[:-1]]) for u in units]
    reader = fit_phone_classifier(units[:15], phones[:15])
    for u, p in zip(units[15:], phones[15:]):
        same(predict_phones(reader, u)[1:], p[1:])
    assert predict_phones(reader, torch.tensor([99, 1])).shape == (2,)  # a unit that was never seen


@pytest.mark.parametrize("T", [1, 2, 3, 75])
def test_hubert_gives_two_features_a_frame(T):
    model = torchaudio.models.wav2vec2_model(
        "group_norm", None, False, 32, 0.0, 16, 4, 3, 2, 0.0, 64, 0.0, 0.0, False, 0.0, None
    ).eval()
    one = hubert_features(noise(640 * T), model, 1)
    two = hubert_features(noise(640 * T)[None].repeat(2, 1), model, 2)
    assert one.shape == (2 * T, 32) and two.shape == (2, 2 * T, 32)
    same(
        hubert_features(noise(640 * T), model, 2),
        model.extract_features(torch.nn.functional.pad(noise(640 * T), (40, 40))[None])[0][1][0],
        atol=1e-5,
    )


def test_units_of_real_speech_follow_its_words(shared):
    "Frames of one GRID word share units far more than chance would have it."
    from faces2voices.soundfiles import fit_length, load_audio
    from faces2voices.manifests import read_grid, grid_words

    entries = read_grid(shared / "grid", "s4")[:20]
    wavs = [fit_length(load_audio(e.path), 48000) for e in entries]
    names = ["sil", *sorted(set(" ".join(e.text for e in entries).split()))]
    labels = torch.zeros(20, 150, dtype=torch.long)
    for row, e in zip(labels, entries):
        for w in grid_words(e):
            row[int(w.start * 50) : int(w.end * 50)] = names.index(w.text)
    units, labels = UnitQuantizer(60).fit(wavs)(torch.stack(wavs)).flatten(), labels.flatten()
    said = labels > 0
    mixed = labels[said][
        torch.randperm(int(said.sum()), generator=torch.Generator().manual_seed(0))
    ]
    assert purity(units[said], labels[said]) > 1.6 * purity(units[said], mixed)


@pytest.fixture(scope="module")
def hubert_file(tmp_path_factory):
    "Random weights under the names of the published file: its weight norm is of an older torch."
    torch.manual_seed(0)
    model = torchaudio.models.hubert_base().eval()
    old = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }

    def name(k):
        for new, was in old.items():
            k = k.replace(new, was)
        return k

    path = tmp_path_factory.mktemp("hubert") / "hubert_fairseq_base_ls960.pth"
    torch.save({name(k): v for k, v in model.state_dict().items()}, path)
    assert any(k.endswith("weight_g") for k in torch.load(path, weights_only=True))
    return path, model


def test_published_hubert_files_are_read(hubert_file, monkeypatch):
    path, model = hubert_file
    monkeypatch.setenv("F2V_HUBERT", str(path))
    wav = noise(6400)
    q = make_quantizer(PRESETS["paper"])
    assert q.centroids.shape == (200, 768) and not list(q.parameters())
    same(q.features(wav), hubert_features(wav, model, 6), atol=1e-5)
    assert q.fit([wav], 4).forward(wav).shape == (20,)


def test_hubert_files_are_untrusted(tmp_path, monkeypatch):
    for name, write in dict(
        text=lambda p: p.write_text("not weights"),
        other=lambda p: torch.save({"a": torch.zeros(2)}, p),
        code=lambda p: torch.save({"a": print}, p),
        empty=lambda p: p.write_bytes(b""),
    ).items():
        write(tmp_path / name)
        monkeypatch.setenv("F2V_HUBERT", str(tmp_path / name))
        with pytest.raises(CheckpointError, match=name):
            make_quantizer(PRESETS["paper"]).features(noise(640))
    monkeypatch.setenv("F2V_HUBERT", str(tmp_path / "nowhere"))
    with pytest.raises(ToolMissingError, match="torchaudio.pipelines"):
        make_quantizer(PRESETS["paper"]).features(noise(640))
