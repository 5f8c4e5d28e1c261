"The vocabulary that everything else uses: the strict comparison first of all."

import json
import pickle
import random
import numpy as np
import pytest
import torch
from faces2voices.errors import (
    CheckpointError,
    CorpusError,
    F2VError,
    MediaError,
    NoFaceError,
    ToolMissingError,
    atomic_path,
)
from faces2voices.core import (
    FPS,
    MEL_RATE,
    MELS_PER_FRAME,
    NOTATION,
    PRESETS,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    UNIT_RATE,
    UNITS_PER_FRAME,
    Preset,
    pick_device,
    seed_everything,
    test_same,
)


@pytest.mark.parametrize(
    "a, b, why",
    [
        (np.zeros((3, 1)), np.zeros(3), "shapes differ"),  # `==` would broadcast
        ([1, 2, 3], [1, 2], "shapes differ"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "kinds differ"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.complex64), "kinds differ"),
        ([np.nan], [np.nan], "NaN"),
        (torch.tensor([complex(0, np.nan)]), torch.tensor([complex(0, np.nan)]), "NaN"),
        ([0.0], [1e-3], "largest difference 0.001"),
        ([np.inf], [-np.inf], "largest difference inf"),
        ([True], [False], "largest difference 1"),
    ],
)
def test_what_the_strict_comparison_refuses(a, b, why):
    with pytest.raises(AssertionError, match=why):
        test_same(a, b)
    with pytest.raises(AssertionError, match=why):
        test_same(b, a)


def test_what_the_strict_comparison_accepts():
    test_same([1, 2], torch.tensor([1, 2], dtype=torch.uint8))  # one kind, whatever the width
    test_same(np.float32([0.5, np.inf]), np.float64([0.5, np.inf]))
    test_same(torch.zeros(0, 3), torch.zeros(0, 3))
    test_same([0.0], [1e-3], atol=1e-2)


def test_complex_numbers_are_compared_as_complex():
    a = torch.tensor([1 + 2j, 3j])
    test_same(a, a.clone())
    test_same(a.numpy(), a)
    with pytest.raises(AssertionError, match="largest difference 6"):
        test_same(a, a.conj())  # equal real parts
    test_same(a, a + (3e-4 + 4e-4j), atol=6e-4)  # a distance, not two
    with pytest.raises(AssertionError):
        test_same(a, a + (3e-4 + 4e-4j), atol=4.5e-4)


def test_clocks_divide_exactly():
    assert UNIT_RATE == FPS * UNITS_PER_FRAME
    assert MEL_RATE == FPS * MELS_PER_FRAME
    assert SAMPLE_RATE == FPS * SAMPLES_PER_FRAME


def test_notation_names_what_a_batch_holds():
    from faces2voices.corpora import Batch

    names = ",".join(names for _, names, *_ in NOTATION)
    said = {name.strip() for name in names.split(",")}
    assert set(Batch._fields) - said == {"names", "identity", "mask"}  # not quantities of the model
    assert len({symbol for symbol, *_ in NOTATION}) == len(NOTATION)


@pytest.mark.parametrize(
    "kind", [MediaError, NoFaceError, CheckpointError, CorpusError, ToolMissingError]
)
def test_errors_say_which_what_and_how_and_cross_processes(kind):
    e = pickle.loads(pickle.dumps(kind("a:b.mp4", "has no sound", "Record it again")))
    assert type(e) is kind and isinstance(e, F2VError)
    assert str(e) == "a:b.mp4: has no sound. Record it again"


def test_outputs_are_whole_or_not_there(tmp_path):
    target = tmp_path / "deep" / "x.txt"
    with pytest.raises(RuntimeError):
        with atomic_path(target) as p:
            p.write_text("half")
            raise RuntimeError
    assert not list(target.parent.iterdir())
    with atomic_path(target) as p:
        p.write_text("whole")
    with pytest.raises(F2VError, match="already exists"):
        with atomic_path(target):
            pass
    with atomic_path(target, overwrite=True) as p:
        p.write_text("new")
    assert [f.name for f in target.parent.iterdir()] == ["x.txt"] and target.read_text() == "new"


def test_seed_covers_the_three_global_generators():
    def draw():
        seed_everything(2**33 + 5)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_presets_survive_json(preset):
    assert Preset.from_json(json.loads(json.dumps(preset.to_json()))) == preset
    with pytest.raises(CheckpointError, match="unknown preset keys.*wings"):
        Preset.from_json(preset.to_json() | dict(wings=2))
