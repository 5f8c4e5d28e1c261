"""Build the site in _docs: `make site` (needs Quarto). --stage stops at the pages in _proc.

nbdev stages the notebooks; what Quarto or a reader without a kernel would miss is mended in the
staged copies: text alternatives, folds, containers that scroll, dead widgets. README.md is left
as it is."""

import argparse
import ast
import json
import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path
import yaml
from nbdev.serve import proc_nbs
from nbdev.showdoc import showdoc_nm

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "faces2voices/faces2voices"
LESSON = re.compile(r"\d\d_")
BADGE = re.compile(r"\[!\[([^\]]+)\]\(https?:[^)]+\)\]\(([^)]+)\)")  # a picture from another server
OPEN_LINES = 15  # of exported source that a lesson shows without a fold
WIDGET = "application/vnd.jupyter.widget-view+json"
PANEL = "*Controls stand here in a running notebook; a page cannot move them.*"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


# --- text


def in_scroll(block: str) -> str:
    "A block of Markdown in a container that scrolls sideways."
    return f"::: {{.scroll}}\n{block}\n:::"


def blocks(text: str) -> list:
    "Markdown as its blocks; a fence of code stays one."
    found = [""]
    fence = False
    for line in text.split("\n"):
        fence ^= line.lstrip().startswith("```")
        if not line.strip() and not fence:
            found.append("")
        else:
            found[-1] += "\n" * bool(found[-1]) + line
    return [block for block in found if block.strip()]


def is_table(block: str) -> bool:
    return all(line.startswith("|") for line in block.split("\n"))


def is_display_math(block: str) -> bool:
    return block.startswith("$$") and block.rstrip().endswith("$$") and len(block) > 4


def begin_lists(block: str) -> str:
    "A blank line between a line of text and the list below it: Pandoc asks for one."
    if "```" in block:
        return block
    return re.sub(r"^((?![-*:>| ]|\d+\.).+)\n(?=- )", r"\1\n\n", block, flags=re.M)


def demote(text: str) -> str:
    "Headings below those of a page, where a text has a title of its own."
    if re.search(r"^# ", text, flags=re.M):
        return re.sub(r"^(#+ )", r"##\1", text, flags=re.M)
    return text


def markdown(text: str) -> str:
    "Tables and display math in containers, lists that begin, and pictures that say what they show."
    found = []
    for block in blocks(text):
        block = BADGE.sub(r"[\1](\2)", block)
        if is_table(block) or is_display_math(block):
            block = in_scroll(block)
        elif picture := re.fullmatch(r"!\[([^\]]+)\]\(([^)\s]+)\)", block.strip()):
            alt = picture[1].replace('"', "'")
            block = f'![]({picture[2]}){{fig-alt="{alt}"}}'
        found.append(begin_lists(block))
    return "\n\n".join(found)


# --- outputs


def joined(text) -> str:
    "Text of a notebook's field, which may be a list of lines."
    return text if isinstance(text, str) else "".join(text)


def alternative(output: dict, kind: str) -> str:
    "What an output says for those who do not see it."
    metadata = output.get("metadata", {})
    return metadata.get("alt") or metadata.get(kind, {}).get("alt", "")


def picture_of(output: dict) -> str:
    "The media type of an output's picture, or nothing."
    kinds = [kind for kind in output.get("data", {}) if kind.startswith("image/")]
    return kinds[0] if kinds else ""


def mend_output(output: dict) -> dict | None:
    "An output as a page can show it; None where it cannot."
    data = output.get("data", {})
    if WIDGET in data:
        if "children=" not in joined(data.get("text/plain", "")):
            return None  # a bar of progress
        return dict(output_type="display_data", metadata={}, data={"text/markdown": [PANEL]})
    if "image/gif" in data:
        alt = alternative(output, "image/gif").replace('"', "'")
        source = "data:image/gif;base64," + joined(data["image/gif"]).replace("\n", "")
        html = f'<img src="{source}" alt="{alt}" class="img-fluid">'
        return {**output, "data": {"text/html": [html]}}
    if "text/html" in data:
        data.pop("text/markdown", None)  # the README's copy, for where no player is shown
    if "text/markdown" in data:
        data["text/markdown"] = [markdown(demote(joined(data["text/markdown"])))]
    if html := joined(data.get("text/html", "")):
        if "<table" in html:
            html = f'<div class="scroll">\n{html}\n</div>'
        if alt := alternative(output, "text/html"):
            html = html.replace("<video ", f'<video aria-label="{alt}" ', 1)
        data["text/html"] = [html]
    return output


def mend_outputs(cell: dict):
    "Outputs as a page can show them, and their text alternatives as an option of the cell."
    mended = [mend_output(output) for output in cell.get("outputs", [])]
    cell["outputs"] = [output for output in mended if output]
    alts = [alternative(output, picture_of(output)) for output in cell["outputs"]]
    alts = [alt if picture_of(out) else "" for alt, out in zip(alts, cell["outputs"])]
    if any(alts):
        said = json.dumps(alts if len(alts) > 1 else alts[0], ensure_ascii=False)
        cell["source"] = f"#| fig-alt: {said}\n" + joined(cell["source"])


# --- code


def code_of(cell: dict) -> str:
    "The code of a cell without its options."
    return re.sub(r"^#\|.*\n?", "", joined(cell["source"]), flags=re.M)


def statements(cell: dict) -> list:
    "The statements of a code cell; none where it is not Python."
    try:
        return ast.parse(code_of(cell)).body if cell["cell_type"] == "code" else []
    except SyntaxError:
        return []


def documented(cell: dict) -> str:
    "The name that a `show_doc` cell describes, or nothing."
    called = re.fullmatch(r"show_doc\(([\w.]+)\)", code_of(cell).strip())
    return called[1] if called and cell["cell_type"] == "code" else ""


def is_exported(cell: dict) -> bool:
    return 'code-summary: "Exported source"' in joined(cell["source"])


def unfold(cell: dict):
    "Show a cell's code as it stands."
    code = joined(cell["source"])
    cell["source"] = re.sub(r"^#\| *code-(fold|summary):.*\n", "", code, flags=re.M)


def fold(cell: dict, summary: str):
    "Show a cell's code on demand."
    unfold(cell)
    cell["source"] = f'#| code-fold: true\n#| code-summary: "{summary}"\n{cell["source"]}'


def defined(cell: dict) -> list:
    "Names of the functions and classes that a cell defines, as `show_doc` is called with them."
    return [showdoc_nm(node) for node in statements(cell) if isinstance(node, DEFINITIONS)]


def anchors(names: list) -> dict:
    "A cell without text to which nbdev's links to these names lead."
    marks = "".join(f"[]{{#{name.lower()}}}" for name in names)
    own_id = re.sub(r"\W", "-", "-".join(["at", *names]))[:60]
    return dict(cell_type="markdown", id=own_id, metadata={}, source=marks)


def fold_code(cells: list, lesson: bool) -> list:
    """Fold imports and exported source, so that prose is not buried.

    A lesson's short functions stay open and need no second description; whatever is folded has
    its documentation above it."""
    docs = {name: cell for cell in cells if (name := documented(cell))}
    sources = [cell for cell in cells if is_exported(cell)]
    placed = set(chain.from_iterable(map(defined, sources)))
    found = []
    for cell in cells:
        body = statements(cell)
        if documented(cell) in placed:
            continue  # it comes with its source
        if body and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
            fold(cell, "Imports")
        elif is_exported(cell):
            names = defined(cell)
            described = [name for name in names if name in docs]
            if lesson and len(code_of(cell).strip().split("\n")) <= OPEN_LINES:
                unfold(cell)
                if described:
                    found.append(anchors(described))
            else:
                found += [docs[name] for name in described]
                fold(cell, "Source of " + ", ".join(names) if names else "Source")
        found.append(cell)
    return found


# --- pages


def front_matter(cell: dict, path: Path) -> dict:
    "The title of a page, with a lesson's number, and a door to Colab below it."
    fields = yaml.safe_load(joined(cell["source"]).strip().strip("-"))
    if LESSON.match(path.name) and path.parent.name == "nbs":
        fields["title"] = f"{path.name[:2]} {fields['title']}"
    text = yaml.safe_dump(fields, allow_unicode=True, sort_keys=False)
    return {**cell, "source": f"---\n{text}---"}


def colab(path: Path) -> dict:
    "A line that opens a lesson in Colab."
    url = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/nbs/{path.name}"
    text = f"[Open in Colab]({url}){{.open-in-colab}}"
    return dict(cell_type="markdown", id="open-in-colab", metadata={}, source=text)


def mend_page(nb: dict, path: Path) -> dict:  # path: nbs/….ipynb
    "A staged notebook as Quarto should find it."
    nb["metadata"].pop("widgets", None)  # a page has no kernel to move them
    lesson = bool(LESSON.match(path.name)) and path.parent.name == "nbs"
    cells = fold_code(nb["cells"], lesson)
    for cell in cells:
        if cell["cell_type"] == "code":
            mend_outputs(cell)
        elif cell["cell_type"] == "markdown":
            cell["source"] = markdown(joined(cell["source"]))
    cells[0] = front_matter(cells[0], path)
    if lesson:
        cells.insert(1, colab(path))
    return {**nb, "cells": cells}


def stage() -> Path:
    "All pages as Quarto gets them, in _proc."
    staged = Path(proc_nbs(force=True))
    for file in sorted((staged / "nbs").rglob("*.ipynb")):
        nb = json.loads(file.read_text(encoding="utf-8"))
        page = mend_page(nb, file.relative_to(staged))
        file.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(staged / "nbs/site/404.qmd", staged / "404.qmd")
    return staged


def build():
    "The site, in _docs."
    if not shutil.which("quarto"):
        raise SystemExit("The site needs Quarto 1.9 or newer: https://quarto.org/docs/get-started")
    staged = stage()
    subprocess.run(["quarto", "render", "--no-cache"], cwd=staged, check=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(staged / "_docs", ROOT / "_docs")
    print(f"open {ROOT / '_docs' / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", action="store_true", help="stop before Quarto")
    if parser.parse_args().stage:
        print(stage())
    else:
        build()
