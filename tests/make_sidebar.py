"""Write the sidebar of the site, in _quarto.yml, from the folders of notebooks (`make prepare`)."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # title → numbers of its lessons
    "I  Signals": range(1, 5),
    "II  The hierarchy": range(5, 11),
    "III  Flow": range(11, 15),
    "IV  The system": range(15, 21),
}
OTHERS = "For teachers and newcomers"


def pages(pattern: str) -> list:
    "Notebooks as the site knows them, in the order of their names."
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern))


def named(path: str) -> str:
    "An entry: a lesson with its number, any other page by its title alone."
    cells = json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]
    title = "".join(cells[0]["source"]).split("\n")[0].removeprefix("# ")
    number = re.match(r"nbs/(\d\d)_", path)
    text = f"{number[1]} {title}" if number else title
    return f'{{text: "{text}", href: {path}}}'


def section(title: str, paths: list) -> list:
    "Lines of the sidebar: a title with its pages."
    listed = [f"          - {named(path)}" for path in paths]
    return [f'      - section: "{title}"', "        contents:", *listed]


def sidebar() -> str:
    "All pages: the lessons by part, the engine rooms, and the rest."
    lessons = pages("nbs/[0-9][0-9]_*.ipynb")
    first = ["nbs/index.ipynb", "nbs/00_core.ipynb"]
    lines = [f"      - {named(path)}" for path in first]
    for title, numbers in PARTS.items():
        lines += section(title, [p for p in lessons if int(Path(p).name[:2]) in numbers])
    lines += section("Engine rooms", pages("nbs/engine/*.ipynb"))
    lines += section(OTHERS, [p for p in pages("nbs/*.ipynb") if p not in [*first, *lessons]])
    return "\n".join(lines) + "\n"


def configuration() -> str:
    "_quarto.yml with its sidebar as it should be."
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    return re.sub(r"(?<=    contents:\n)( {6,}.*\n)+\Z", sidebar(), text)


if __name__ == "__main__":
    text = configuration()
    (ROOT / "_quarto.yml").write_text(text, encoding="utf-8")
