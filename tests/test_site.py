"""The site's pages before Quarto, as nbdev and `make_site.py` stage them."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
import av
import pytest
import yaml
from faces2voices.tables import anchor
from nbdev.config import get_config
from PIL import Image
from make_site import OPEN_LINES, blocks, code_of, documented, joined, mend_page, statements

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/engine/*.ipynb")])
PATHS = [path.relative_to(ROOT).as_posix() for path in SOURCES]
LESSONS = [path for path in PATHS if re.match(r"nbs/\d\d_", path)]
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def cells(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def outputs(path: Path) -> list:
    return list(chain.from_iterable(cell.get("outputs", []) for cell in cells(path)))


def texts(path: Path) -> list:
    "The Markdown of a page: of its cells, and of what they show."
    shown = [out.get("data", {}).get("text/markdown", "") for out in outputs(path)]
    written = [cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown"]
    return [text for text in map(joined, [*written, *shown]) if text]


def prose(text: str) -> str:
    "Markdown without its code."
    return re.sub(r"^[ \t]*```.*?^[ \t]*```[^\n]*|`[^`\n]*`", "", text, flags=re.S | re.M)


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    "The pages in _proc, made in a copy of the project."
    root = tmp_path_factory.mktemp("site")
    unused = shutil.ignore_patterns("weights", "__pycache__", ".*", "fairseq", "matcha", "test_*")
    for folder in ("nbs", "faces2voices", "tests", "data_samples"):
        shutil.copytree(ROOT / folder, root / folder, ignore=unused)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, root)
    before = (root / "README.md").read_bytes()
    command = [sys.executable, "tests/make_site.py", "--stage"]
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=560)
    assert (root / "README.md").read_bytes() == before
    return root / "_proc"


# --- sources


@pytest.mark.parametrize("path", PATHS)
def test_title_and_subtitle_stand_alone_in_the_first_cell(path):
    first = joined(cells(ROOT / path)[0]["source"])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first), "nbdev drops what else stands there"


def test_the_configuration_names_files_that_are_there():
    shown = [SITE["website"]["favicon"], SITE["website"]["image"]]
    themes = chain.from_iterable(SITE["format"]["html"]["theme"].values())
    styles = [name for name in themes if name.endswith(".scss")]
    bar = SITE["website"]["navbar"]
    pages = [item["href"] for item in bar["left"] + bar["right"]]
    files = [*shown, *styles, *(page for page in pages if not page.startswith("https:"))]
    assert len(files) >= 9 and not [name for name in files if not (ROOT / name).exists()]


def test_the_root_of_the_site_is_the_index():
    assert SITE["project"]["render"][0] == "nbs/index.ipynb"


def test_a_page_asks_no_other_server_for_fonts_or_formulas():
    html = SITE["format"]["html"]
    assert html["html-math-method"] == "mathml"
    for styles in html["theme"].values():
        own = [(ROOT / name).read_text() for name in styles if name.endswith(".scss")]
        assert any(re.search(r"^\$web-font-path: false;", text, flags=re.M) for text in own)


def test_nothing_overwrites_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^site:.*\n((?:\t.*\n)+)", makefile, flags=re.M)[1]
    assert "make_site.py" in recipe and "nbdev" not in recipe
    settings = get_config(path=ROOT)
    assert not (settings.nbs_path / settings.readme_nb).exists(), "nbdev makes a README of it"


def test_the_sidebar_numbers_the_lessons():
    parts = SITE["website"]["sidebar"]["contents"]
    entries = chain.from_iterable(part.get("contents", [part]) for part in parts)
    told = {entry["href"]: entry["text"] for entry in entries}
    assert set(told) == set(PATHS)
    for path in LESSONS:
        title = joined(cells(ROOT / path)[0]["source"]).split("\n")[0].removeprefix("# ")
        assert told[path] == f"{Path(path).name[:2]} {title}"


# --- the first screen


def test_the_strip_moves_and_is_light():
    strip = ROOT / "nbs/images/strip.gif"
    with Image.open(strip) as image:
        assert image.n_frames > 25 and image.info["loop"] == 0
    assert strip.stat().st_size <= 3_000_000


def streams(name: str) -> tuple:
    "The pictures of a clip, and whether it has sound."
    with av.open(str(ROOT / f"nbs/images/{name}.mp4")) as film:
        pictures = [frame.to_ndarray(format="gray") for frame in film.decode(video=0)]
        return pictures, bool(film.streams.audio)


def test_the_clips_are_what_the_page_says():
    said, sound = streams("said")
    assert sound and not streams("silent")[1]
    assert len(streams("silent")[0]) == len(said)
    for name in ("spoken", "borrowed"):
        pictures, sound = streams(name)
        assert sound and all((a == b).all() for a, b in zip(pictures, said, strict=True))


def test_the_readme_leads_somewhere_and_promises_no_player():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)\s#]+)", prose(text))
    assert len(links) > 50 and not [link for link in links if not (ROOT / link).exists()]
    assert "Press play" not in text and "<video" not in text


# --- pages


def test_every_notebook_is_a_page(staged):
    assert not [path for path in PATHS if not (staged / path).exists()]
    assert (staged / "404.qmd").exists()


@pytest.mark.parametrize("path", PATHS)
def test_no_prose_is_lost(staged, path):
    source = cells(ROOT / path)
    written = [joined(cell["source"]) for cell in source if cell["cell_type"] == "markdown"]
    page = cells(staged / path)
    shown = [joined(cell["source"]) for cell in page if cell["cell_type"] in ("markdown", "raw")]
    front = yaml.safe_load(shown[0].strip().strip("-"))
    shown[0] = f"{front['title']} {front['description']}"
    read = [re.sub(r"\]\([^)\s]*\)", "]", "\n".join(texts)) for texts in (written, shown)]
    words = [Counter(re.findall(r"\w+", text)) for text in read]
    assert not words[0] - words[1]


@pytest.mark.parametrize("path", LESSONS)
def test_a_lesson_has_its_number_and_a_door_to_colab(staged, path):
    page = cells(staged / path)
    front = yaml.safe_load(joined(page[0]["source"]).strip().strip("-"))
    title = joined(cells(ROOT / path)[0]["source"]).split("\n")[0].removeprefix("# ")
    assert front["title"] == f"{Path(path).name[:2]} {title}"
    assert f"/blob/main/{path})" in joined(page[1]["source"])


@pytest.mark.parametrize("path", PATHS)
def test_pictures_have_text_alternatives(staged, path):
    for cell in cells(staged / path):
        shown = cell.get("outputs", [])
        pictures = [any(k.startswith("image/") for k in out.get("data", {})) for out in shown]
        if any(pictures):
            said = re.search(r"^#\| fig-alt: (.*)$", joined(cell["source"]), flags=re.M)
            alts = json.loads(said[1]) if said else ""
            alts = [alts] if isinstance(alts, str) else alts
            assert len(alts) == len(shown), joined(cell["source"])
            assert [bool(alt) for alt in alts] == pictures, joined(cell["source"])
    for text in texts(staged / path):
        assert not re.findall(r"!\[[^\]]*\]\([^)]*\)(?!\{[^}]*fig-alt=)", prose(text))
    for out in outputs(staged / path):
        for tag in re.findall(r"<img\b[^>]*>", joined(out.get("data", {}).get("text/html", ""))):
            assert re.search(r'alt="[^"]+"', tag), tag[:80]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_waits_for_a_kernel(staged, path):
    page = json.loads((staged / path).read_text(encoding="utf-8"))
    kinds = set(chain.from_iterable(out.get("data", {}) for out in outputs(staged / path)))
    assert not [kind for kind in kinds if "widget" in kind] and "image/gif" not in kinds
    assert "widgets" not in page["metadata"]


@pytest.mark.parametrize("path", PATHS)
def test_code_does_not_bury_prose(staged, path):
    described = []
    for cell in cells(staged / path):
        if name := documented(cell):
            described.append(name)
        body = statements(cell)
        folded = "#| code-fold: true" in joined(cell["source"])
        if body and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
            assert folded, "imports"
        assert "code-fold: show" not in joined(cell["source"])
        exported = "Source of" in joined(cell["source"])
        if exported and path in LESSONS:
            assert len(code_of(cell).strip().split("\n")) > OPEN_LINES
    assert len(described) == len(set(described)), "a description that stands twice"


@pytest.mark.parametrize("path", PATHS)
def test_the_title_is_the_one_heading_of_the_first_level(staged, path):
    levels = [2]
    for text in texts(staged / path):
        levels += [len(marks) for marks in re.findall(r"^(#+) \S", prose(text), flags=re.M)]
    assert 1 not in levels
    assert not [b for a, b in zip(levels, levels[1:]) if b > a + 1 and b < 3], "a level left out"


@pytest.mark.parametrize("path", PATHS)
def test_wide_things_scroll_by_themselves(staged, path):
    for text in texts(staged / path):
        for block in blocks(text):
            lines = block.split("\n")
            wide = lines[0].startswith("|") or lines[0].startswith("$$")
            assert not wide, f"not in a container: {lines[0]}"
    for out in outputs(staged / path):
        html = joined(out.get("data", {}).get("text/html", ""))
        assert "<table" not in html or html.startswith('<div class="scroll">')


@pytest.mark.parametrize("path", PATHS)
def test_a_list_begins_after_a_blank_line(staged, path):
    for text in texts(staged / path):
        for block in blocks(prose(text)):
            lines = block.split("\n")
            pairs = zip(lines, lines[1:])
            late = [b for a, b in pairs if re.match(r"- ", b) and not re.match(r"[-*:> ]|\d+\.", a)]
            assert not late, f"not a list for Pandoc: {late}"


@pytest.mark.parametrize("path", PATHS)
def test_links_lead_somewhere(staged, path):
    here = staged / path
    for text in texts(here):
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(text)):
            name, _, place = link.partition("#")
            target = here.parent / name if name else here
            assert target.exists(), link
            if place and target.suffix == ".ipynb":
                heads = re.findall(r"^#+ (.*)$", "\n".join(map(prose, texts(target))), flags=re.M)
                assert place in map(anchor, heads), link


@pytest.fixture(scope="module")
def site(staged) -> dict:  # address of a page → the anchors of the names that it describes
    "All pages as nbdev's links name them."
    found = {}
    for path in PATHS:
        front = yaml.safe_load(joined(cells(staged / path)[0]["source"]).strip().strip("-"))
        told = re.findall(r"^#+ (\S+)|\{#(\S+?)\}", "\n".join(texts(staged / path)), flags=re.M)
        address = f"{Path(path).parent.as_posix()}/{front['output-file']}"
        found[address] = {name.lower() for name in chain.from_iterable(told)}
    return found


@pytest.mark.parametrize("path", PATHS)
def test_links_to_names_lead_to_where_they_are_described(staged, site, path):
    host = re.escape("https://faces2voices.github.io/faces2voices/")
    for text in texts(staged / path):
        for page, name in re.findall(host + r"([^)\s#]+)#?([^)\s]*)", text):
            assert page in site, page
            assert "." in name or not name or name.lower() in site[page], f"{page}#{name}"


@pytest.mark.parametrize("path", PATHS)
def test_a_page_weighs_at_most_a_megabyte_and_a_half(staged, path):
    assert (staged / path).stat().st_size <= 1_500_000


# --- what mends them


def notebook(*sources, **more) -> dict:
    made = [dict(cell_type="raw", metadata={}, source="---\ntitle: A\n---")]
    for source in sources:
        kind = "code" if source.startswith(("#|", "import", "x")) else "markdown"
        made.append(dict(cell_type=kind, metadata={}, source=source, **more))
    return dict(cells=made, metadata=dict(widgets={}))


def test_a_gif_becomes_html_and_keeps_its_alternative():
    picture = {"image/gif": ["AAAA\n"], "text/plain": "<IPython.core.display.Image object>"}
    out = dict(output_type="display_data", data=picture, metadata={"image/gif": {"alt": "Dots"}})
    page = mend_page(notebook("x", outputs=[out]), Path("nbs/index.ipynb"))
    html = page["cells"][1]["outputs"][0]["data"]
    assert html == {
        "text/html": ['<img src="data:image/gif;base64,AAAA" alt="Dots" class="img-fluid">']
    }


def test_a_dead_panel_is_said_and_a_bar_of_progress_is_left_out():
    view = "application/vnd.jupyter.widget-view+json"
    shown = [
        dict(output_type="display_data", metadata={}, data={view: {}, "text/plain": text})
        for text in ("HBox(children=(IntSlider(),))", "net: 0%| | 0/20")
    ]
    page = mend_page(notebook("x", outputs=shown), Path("nbs/index.ipynb"))
    left = page["cells"][1]["outputs"]
    assert len(left) == 1 and "running notebook" in left[0]["data"]["text/markdown"][0]


@pytest.mark.parametrize("path", ["nbs/01_a.ipynb", "nbs/engine/01_a.ipynb"])
def test_a_short_function_of_a_lesson_is_open_and_all_else_folded(path):
    options = '#| code-fold: show\n#| code-summary: "Exported source"\n'
    folded = '#| code-fold: true\n#| code-summary: "Source of {}"\n'.format
    short, long = "def f():\n    pass", "def g():\n" + "    x = 1\n" * OPEN_LINES
    shown = "#| echo: false\nshow_doc({})".format
    nb = notebook(shown("f"), options + short, options + long, shown("g"))
    found = [joined(cell["source"]) for cell in mend_page(nb, Path(path))["cells"]]
    last = [shown("g"), folded("g") + long]
    if "engine" in path:
        assert found[1:] == [shown("f"), folded("f") + short, *last]
    else:
        assert found[2:] == ["[]{#f}", short, *last]


def test_a_list_and_a_title_inside_of_an_output_find_their_place():
    shown = {"text/markdown": "# A card\n\nBlank:\n- a\n- b\n\n## Data"}
    out = dict(output_type="display_data", metadata={}, data=shown)
    page = mend_page(notebook("x", outputs=[out]), Path("nbs/index.ipynb"))
    text = page["cells"][1]["outputs"][0]["data"]["text/markdown"]
    assert text == ["### A card\n\nBlank:\n\n- a\n- b\n\n#### Data"]


def test_code_fences_are_left_as_they_are():
    text = "a\n\n```\n| a |\n\n$$x$$\n```\n\n| a | b |\n|---|---|\n\n$$\nx\n$$"
    page = mend_page(notebook(text), Path("nbs/index.ipynb"))
    assert joined(page["cells"][1]["source"]) == (
        "a\n\n```\n| a |\n\n$$x$$\n```\n\n"
        "::: {.scroll}\n| a | b |\n|---|---|\n:::\n\n::: {.scroll}\n$$\nx\n$$\n:::"
    )
