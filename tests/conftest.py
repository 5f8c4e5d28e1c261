"Shared fixtures: where the real test data are, if they are there at all."
import os
from pathlib import Path
import pytest

@pytest.fixture(scope="session")
def shared():
    "Folder with real clips and face models; tests that need it are skipped where it is absent."
    folder = Path(os.environ.get("F2V_SHARED", Path(__file__).resolve().parents[2]/"shared"))/"data"
    if not folder.is_dir(): pytest.skip(f"no test data: set F2V_SHARED to a folder that holds data/grid (looked in {folder.parent})")
    return folder
