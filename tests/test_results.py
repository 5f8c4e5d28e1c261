"""No number without its file.

The README and the models' cards show what is recorded, and nothing else."""

import re
from pathlib import Path
import pytest
from faces2voices.experiments import ledger_markdown, model_card
from faces2voices.storage import WEIGHTS_DIR, packaged_models

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_shows_the_ledger_of_the_recorded_cards():
    assert ledger_markdown() in (ROOT / "README.md").read_text(), (
        "run lesson `index` again and `make readme`"
    )


def test_no_measure_stands_in_the_readme_outside_the_ledger():
    text = (ROOT / "README.md").read_text().replace(ledger_markdown(), "")
    prose = re.sub(
        r"```.*?```|`[^`]*`|\[!\[[^]]*\]|\]\([^)]*\)|Python 3\.\d+|[A-Za-z-]*\d+\.\d+[.-]\w*",
        "",
        text,
        flags=re.S,
    )
    assert not re.findall(r"\d+\.\d+|\d+ ?%", prose)


@pytest.mark.parametrize("name", packaged_models())
def test_a_models_card_is_current(name):
    card = (WEIGHTS_DIR / name / "README.md").read_text()
    assert card == model_card(name), "run `make readme`"
    for part in ("## Made by", "## Data", "## Measured", "## Use and limits"):
        assert card.count(part) == 1
