"No measured number stands in a sentence without its evidence: CONTRIBUTING, *Numbers in prose*."

import ast
import json
import math
import re
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import pytest

from faces2voices.core import FPS, MEL_RATE, SAMPLE_RATE, UNIT_RATE

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

# what counts as a measured number: one with a decimal point, or with one of these units

UNITS = {
    "%": 0.01,
    "points": 0.01,
    "ms": 1e-3,
    "s": 1,
    "seconds": 1,
    "minutes": 60,
    "hours": 3600,
    "kHz": 1e3,
    "Hz": 1,
    "dB": 1,
    "cents": 1,
    "semitones": 1,
    "nats": 1,
    "×": 1,
    "times": 1,
    "clips": 1,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "M": 1e6,
    "million": 1e6,
}
UNIT = "|".join(re.escape(u) for u in sorted(UNITS, key=len, reverse=True))
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
QUOTED = re.compile(
    rf"(?<![\w.,/^])(?P<sign>(?<!\d )[−+])?(?P<number>(?<![\d.,/]){NUMBER})(?![\d/]|\.\d|\w*_)"
    rf"(?:[ -]?(?P<unit>{UNIT})(?!\w| \d))?"
)
RANGE = re.compile(
    rf"\s*(?:to|and|or|±|–|·|against|instead of|of|,)\s*{NUMBER}[ -]?(?P<unit>{UNIT})(?!\w)"
)
VERSION = re.compile(r"\b(?:Python|torch|pip|nbdev|fairseq)(?: up to| before)? \d+(?:\.\d+)+")
RATES = FPS, UNIT_RATE, MEL_RATE, SAMPLE_RATE, SAMPLE_RATE / 2  # Hz: the clocks of lesson 0

# somebody else's number: a link that leaves the site, an arXiv number, or authors and a year
CITED = re.compile(
    r"https?://|arXiv|\b\d{4}\.\d{5}\b|"
    r"\b[A-Z][\w-]+(?: et al\.| and [A-Z]\w+)?,? \(?(?:19|20)\d\d\b"
)

# pages whose numbers are decided and not measured
EXCEPTIONS = {"syllabus": "hours of lectures and shares of marks, which a teacher sets"}


class Quote(NamedTuple):
    "A measured number in prose."

    cell: int
    sentence: str
    sign: str  # "−" or "+" where one is written
    number: str
    unit: str  # "" where none is written

    @property
    def value(self) -> float:
        return float(self.number)

    @property
    def scale(self) -> float:
        "What one of the unit is in the basic unit."
        return UNITS.get(self.unit, 1)

    @property
    def decimals(self) -> int:
        return len(self.number.partition(".")[2])


# reading a notebook


def text_of(cell) -> str:
    return "".join(cell["source"])


def prose(text: str) -> str:
    "Markdown without blocks of code, formulas, headings and pictures."
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.S)
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|^#+ .*$", "", text, flags=re.M)


def sentences(text: str) -> list:
    "Sentences; a row of a table, a list item and a callout's line end one."
    ends = r"(?<=[.!?])(?<!\d\.)(?<!al\.)(?<!e\.g\.)[)*_\"]*\s+|\n+"
    return [s.strip() for s in re.split(ends, prose(text)) if s.strip()]


def bare(sentence: str) -> str:
    "Without code, the addresses of links, and versions of programs."
    return VERSION.sub("", re.sub(r"``?[^`]+``?|(?<=\])\([^)]*\)", "", sentence))


def quotes(notebook) -> list:
    "Every measured number of every markdown cell."
    found = []
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "markdown":
            continue
        for sentence in sentences(text_of(cell)):
            text = bare(sentence)
            for m in QUOTED.finditer(text):
                unit = m["unit"]
                if unit is None and (r := RANGE.match(text, m.end())):
                    unit = r["unit"]
                if unit or "." in m["number"]:
                    number = m["number"].replace(",", "")
                    found.append(Quote(i, sentence, m["sign"] or "", number, unit or ""))
    return found


# reading evidence

UNSEEN = r"<style.*?</style>|<script.*?</script>|<path.*?/>|base64,[^\"']*"  # in HTML and SVG


def shown(cell) -> str:
    "All that a code cell's stored outputs say in words, also in a figure's alt text."
    said = []
    for out in cell.get("outputs", []):
        data, meta = out.get("data", {}), out.get("metadata", {})
        said.append("".join(out.get("text", "")))
        said += ["".join(data.get(k, "")) for k in ("text/plain", "text/markdown")]
        html = "".join(data.get("text/html", "")) + "".join(data.get("image/svg+xml", ""))
        said.append(re.sub(rf"{UNSEEN}|</?[A-Za-z][^>]*>", " ", html, flags=re.S))
        said += [m["alt"] for m in (meta, *meta.values()) if isinstance(m, dict) and "alt" in m]
    return re.sub(r"<Figure size.*?>", "", "\n".join(said))


def values(text: str) -> list:
    "The numbers of a text: (value, decimals), and of a percentage its share too."
    found = []
    for m in re.finditer(r"((?<!\w)[-−])?(\d[\d,_]*(?:\.\d*)?|\.\d+)(e[-+]?\d+)?( ?%)?", text):
        digits = m[2].rstrip(",_.").replace(",", "").replace("_", "")
        decimals = len(digits.partition(".")[2]) if not m[3] else 9
        value = float(digits + (m[3] or "")) * (-1 if m[1] else 1)
        found.append((value, decimals))
        if m[4]:
            found.append((value / 100, decimals + 2))
    return found


def carries(said: list, quote: Quote) -> bool:
    "Whether a value, rounded as the sentence rounds it, is the quoted number."
    for value, decimals in said:
        if quote.sign == "−" and value > 0 or quote.sign == "+" and value < 0:
            continue
        for scale in {1, quote.scale}:
            exact = decimals + round(math.log10(scale)) < quote.decimals
            near = 1e-9 if exact else 0.5 * 10**-quote.decimals + 1e-9
            if abs(abs(value) / scale - quote.value) <= near:
                return True
    return False


def is_clock(quote: Quote) -> bool:
    "Whether the number is a rate of lesson 0, or its period."
    x = quote.value * quote.scale
    if quote.unit in ("Hz", "kHz"):
        return x in RATES
    return quote.unit in ("ms", "s") and any(abs(x * rate - 1) < 1e-9 for rate in RATES)


def is_set(numbers, quote: Quote, *scales) -> bool:
    "Whether one of these settings is the number, in one of these units."
    wanted = [quote.value * scale for scale in scales]
    pairs = product(map(abs, numbers), wanted)
    return any(math.isclose(x, w, rel_tol=1e-9, abs_tol=1e-9) for x, w in pairs)


def in_code(cell) -> str:
    "Code without its assertions, whose bounds are neither set nor measured."
    return re.sub(r"^\s*assert .*$", "", text_of(cell), flags=re.M)


def setting_nodes(node) -> list:
    "What a constant in capitals, the defaults of parameters or a field of a class are set to."
    if isinstance(node, ast.Assign):
        name = ast.unparse(node.targets[0])
        return [node.value] if re.fullmatch(r"\(?[A-Z_, ]+\)?", name) else []
    if isinstance(node, ast.arguments):
        return [*node.defaults, *filter(None, node.kw_defaults)]
    return [node.value] if isinstance(node, ast.AnnAssign) and node.value else []


@cache
def settings(source: str) -> list:
    "The numbers that code gives a name to."
    tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))
    parts = chain.from_iterable(map(setting_nodes, ast.walk(tree)))
    inner = chain.from_iterable(map(ast.walk, parts))
    constants = [n.value for n in inner if isinstance(n, ast.Constant)]
    return [x for x in constants if type(x) in (int, float)]


CORE = settings((ROOT / "faces2voices" / "core.py").read_text())


def is_heading(cell) -> bool:
    return cell["cell_type"] == "markdown" and re.match(r"#{1,2} ", text_of(cell)) is not None


def section(cells, i) -> list:
    "The code cells between the `##` headings around cell i, and its nearest ones."
    start = max((j for j in range(i + 1) if is_heading(cells[j])), default=0)
    end = min((j for j in range(i + 1, len(cells)) if is_heading(cells[j])), default=len(cells))
    code = [j for j, c in enumerate(cells) if c["cell_type"] == "code"]
    inside = [j for j in code if start <= j < end]
    inside += [j for j in code if j < i][-1:] + [j for j in code if j > i][:1]
    return sorted(set(inside))


def beside(cells, i) -> list:
    "Of the section of cell i, the nearest cells that show something: two before, and one after."
    speaking = [j for j in section(cells, i) if shown(cells[j]).strip()]
    return [j for j in speaking if j < i][-2:] + [j for j in speaking if j > i][:1]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def linked(sentence: str, cells, folder: Path) -> list:
    "Values in what the sentence links to: a lesson, a section, a recorded result."
    found = []
    for target in re.findall(r"\]\(([^):]+)\)", sentence):
        file, _, place = target.partition("#")
        path = folder / file
        if path.suffix == ".json":
            found += values(path.read_text())
        elif path.suffix == ".ipynb" or not file:
            there = json.loads(path.read_text())["cells"] if file else cells
            found += values("\n".join(map(shown, in_place(there, place))))
    return found


def in_place(cells, place: str) -> list:
    "The code cells of the section with this anchor; all where there is none."
    for i, cell in enumerate(cells):
        headings = re.findall(r"^#+ (.*)$", text_of(cell), flags=re.M)
        if cell["cell_type"] == "markdown" and place in map(anchor, headings):
            return [cells[j] for j in section(cells, i)]
    return [c for c in cells if c["cell_type"] == "code"]


def founded(quote: Quote, notebook, folder: Path) -> bool:
    "Whether anything carries the quoted number."
    cells, i = notebook["cells"], quote.cell
    if CITED.search(quote.sentence) or is_clock(quote):
        return True
    said = values("\n".join(shown(cells[j]) for j in beside(cells, i)))
    code = [text_of(c) for c in cells if c["cell_type"] == "code"]
    named = list(chain.from_iterable(map(settings, code)))
    written = [x for x, _ in values("\n".join(in_code(cells[j]) for j in section(cells, i)))]
    steps = [rate * quote.scale for rate in RATES] if quote.unit in ("ms", "s", "seconds") else []
    return (
        carries(said + linked(quote.sentence, cells, folder), quote)
        or is_set(CORE + named, quote, quote.scale)
        or is_set(named, quote, *steps)
        or is_set(written, quote, 1, quote.scale, *steps)
    )


def unfounded(notebook, folder=NBS) -> list:
    "The quotes that nothing carries."
    return [q for q in quotes(notebook) if not founded(q, notebook, folder)]


def report(name: str, found: list) -> str:
    lines = (f"{name}[{q.cell}]: {q.sign}{q.number} {q.unit} in: {q.sentence}" for q in found)
    return "\n".join(lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_number_in_prose_has_its_evidence(path):
    if path.stem in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[path.stem])
    found = unfounded(json.loads(path.read_text()), path.parent)
    assert not found, report(path.stem, found)


# the checker itself


def cell(kind: str, source: str, said: str = "") -> dict:
    outputs = [dict(output_type="stream", name="stdout", text=[said])] if said else []
    return dict(cell_type=kind, source=[source]) | (dict(outputs=outputs) if kind == "code" else {})


def page(sentence: str, said: str = "", code: str = "f()") -> dict:
    "A section with one cell of code and one sentence, and a section before it that says 7.77."
    return dict(
        cells=[
            cell("markdown", "## Before"),
            cell("code", "g()", "7.77 77 %"),
            cell("code", "h()"),
            cell("markdown", "## Here"),
            cell("code", code, said),
            cell("markdown", sentence),
        ]
    )


def bad_numbers(*args, **kw) -> list:
    return [q.number for q in unfounded(page(*args, **kw))]


@pytest.mark.parametrize(
    "sentence, said",
    [
        ("It falls to 0.53.", "score 0.5321"),
        ("It falls to 0.53.", "score .53"),
        ("It falls by 0.05.", "-0.0512"),
        ("It is −0.35.", "[-0.351]"),
        ("It is +0.01.", "+0.008"),
        ("15 % are right.", "0.149 right"),
        ("15 % are right.", "15% right"),
        ("It gains 0.09 ± 0.03.", "0.091 0.028"),
        ("From 11.2 to 14.8 % are wrong.", "0.112 0.148"),
        ("It takes 20 ms.", "0.0203 s"),
        ("A voice at 141 Hz.", "140.9"),
        ("1,234 clips were heard.", "1234"),
        ("2.5 million weights.", "2512345"),
    ],
)
def test_a_number_that_an_output_shows_is_founded(sentence, said):
    assert bad_numbers(sentence, said) == []


@pytest.mark.parametrize(
    "sentence, said",
    [
        ("It falls to 0.53.", "score 0.5361"),
        ("It falls to 0.53.", "score 0.5"),
        ("It is −0.35.", "0.351"),
        ("It is +0.01.", "-0.008"),
        ("15 % are right.", "0.139 right"),
        ("It takes 20 ms or 3 s, 30 ms.", "20 ms, 3 s"),
        ("A voice at 141 Hz.", "140.2"),
        ("It falls to 7.77.", "score 0.5"),
        ("| a | 0.53 |", "0.54"),
        ("- it is 0.53", "0.54"),
        ("832 clips were heard.", "831"),
    ],
)
def test_a_number_that_no_output_shows_is_found(sentence, said):
    assert len(bad_numbers(sentence, said)) == 1


@pytest.mark.parametrize(
    "sentence",
    [
        "Units tick at 50 Hz, every 20 ms.",
        "The sound has 16 kHz.",
        "It was 0.53 (Hsu et al., 2021).",
        "They report [0.53](https://example.org).",
        "Set `x = 0.53`.",
        "So $x = 0.53$.",
        "```\nx = 0.53\n```",
        "It needs Python 3.10.",
        "The crop has 88 × 88 pixels.",
        "Lesson 12 has three parts.",
        "Five of 12 people came.",
    ],
)
def test_what_is_no_measurement_is_let_through(sentence):
    assert bad_numbers(sentence) == []


@pytest.mark.parametrize(
    "sentence, code",
    [
        ("A window of 20 seconds.", "WINDOW = 500"),
        ("0.999 by default.", "def ema(decay=.999): pass"),
        ("Noise at 0.3.", "x = y + .3*z"),
        ("Dropped at 0.2.", "class Preset:\n    drop: float = .2"),
    ],
)
def test_a_setting_is_no_measurement(sentence, code):
    assert bad_numbers(sentence, code=code) == []


def test_a_setting_of_another_section_must_have_a_name():
    nb = page("It is 0.123.", code="f()")
    nb["cells"][1]["source"] = ["g(.123)"]
    assert [q.number for q in unfounded(nb)] == ["0.123"]
    nb["cells"][1]["source"] = ["LEVEL = .123"]
    assert unfounded(nb) == []


def test_a_link_brings_what_it_leads_to(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text('{"wer": 0.1121}')
    (tmp_path / "b.ipynb").write_text(json.dumps(page("", "0.2718")))
    linked_to = "results/a.json", "b.ipynb", "b.ipynb#here", "b.ipynb#before", "#before"
    for target, number in zip(linked_to, ("0.112", "0.272", "0.272", "7.77", "7.77")):
        assert unfounded(page(f"It is [{number}]({target})."), tmp_path) == []
        assert len(unfounded(page(f"It is [0.444]({target})."), tmp_path)) == 1
    assert len(unfounded(page("It is [0.272](b.ipynb#before)."), tmp_path)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_wrong_digit_in_a_copy_of_a_lesson_is_found(path):
    "A number that the lesson shows is quoted beside it, right and with its last digit changed."
    cells = json.loads(path.read_text())["cells"]
    long = []
    for i, c in enumerate(cells):
        said = values(shown(c)) if c["cell_type"] == "code" else []
        long += [(i, f"{value:.{n}f}") for value, n in said if 3 <= n <= 6 and value > 0]
    if not long:
        pytest.skip("the lesson shows no number with three decimals")
    i, number = max(long, key=lambda found: len(found[1]))
    wrong = number[:-1] + str((int(number[-1]) + 5) % 10)
    quoted = [cell("markdown", f"Planted: {x}.") for x in (number, wrong)]
    notebook = dict(cells=[*cells[: i + 1], *quoted, *cells[i + 1 :]])
    found = unfounded(notebook, path.parent)
    planted = [q.number for q in found if q.sentence.startswith("Planted")]
    assert planted == [wrong]
