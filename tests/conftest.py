"Shared fixtures: the real test data, if they are there at all, a model, a clip, a folder of clips."

import os
from pathlib import Path
import pytest


@pytest.fixture(scope="session")
def shared():
    "Folder with real clips and face models; tests that need it are skipped where it is absent."
    top = Path(os.environ.get("F2V_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (top / "data").is_dir():
        wanted = "set F2V_SHARED to a folder that holds data/grid"
        pytest.skip(f"no test data: {wanted} (looked in {top})")
    return top / "data"


@pytest.fixture(scope="module")
def f2v():
    "The model of drawn talkers."
    from faces2voices.synthesis import FacesToVoices

    return FacesToVoices.from_pretrained("talkers", device="cpu")


@pytest.fixture(scope="module")
def clip(f2v):
    "Lips and expression of the first sample, in memory."
    first = min((Path(__file__).parents[1] / "data_samples").glob("*.mp4"))
    c, _ = f2v.preprocess(first)
    return c._replace(lips=c.lips[:], expression=c.expression[:], mouth=c.mouth[:])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder of four prepared sample clips.

    Two are of each of two people, so that voices can be told apart."""
    from faces2voices.manifests import read_manifest
    from faces2voices.preparing import prepare
    from faces2voices.synthesis import FacesToVoices

    out = tmp_path_factory.mktemp("prepared")
    entries = read_manifest(Path(__file__).parents[1] / "data_samples" / "manifest.jsonl")[:4]
    entries = [e._replace(split="train", speaker_id=f"t{i % 2}") for i, e in enumerate(entries)]
    eyes = FacesToVoices.from_pretrained("talkers", device="cpu").face_backend
    prepare(entries, out, eyes, progress=False)
    return out


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_the_repository():
    "Tests write to folders of their own."

    def there():
        return {p.name for p in Path(__file__).parents[1].iterdir() if not p.name.startswith(".")}

    before = there()
    yield
    assert there() <= before
