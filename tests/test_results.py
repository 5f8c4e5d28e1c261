"No number without its file: recorded results say how they were made, and the README and the site show nothing else."
import json, re
from pathlib import Path
import pytest
from faces2voices.experiments import RESULTS, WEIGHTS, ledger_markdown, model_card
from faces2voices.synthesis import packaged_models

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(RESULTS.glob("*.json"))

def everywhere(x, key) -> list:
    "All values of a key, however deep."
    if isinstance(x, dict): return ([x[key]] if key in x else []) + [v for y in x.values() for v in everywhere(y, key)]
    return [v for y in x for v in everywhere(y, key)] if isinstance(x, list) else []

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_recorded_result_says_how_it_was_made(path):
    found = json.loads(path.read_text())
    for key in ("command", "machine"): assert everywhere(found, key), f"{path.name} has no {key}"

def test_the_readme_shows_the_ledger_of_the_recorded_cards():
    assert ledger_markdown() in (ROOT/"README.md").read_text(), "run lesson `index` again and `make readme`"

def test_no_measure_stands_in_the_readme_outside_the_ledger():
    text = (ROOT/"README.md").read_text().replace(ledger_markdown(), "")
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|Python 3\.\d+|[A-Za-z-]*\d+\.\d+[.-]\w*", "", text, flags=re.S)
    assert not re.findall(r"\d+\.\d+|\d+ ?%", prose)

@pytest.mark.parametrize("name", packaged_models())
def test_a_models_card_is_current(name):
    card = (WEIGHTS/name/"README.md").read_text()
    assert card == model_card(name), "run `make readme`"
    for part in ("## Made by", "## Data", "## Measured", "## Use and limits"): assert card.count(part) == 1
