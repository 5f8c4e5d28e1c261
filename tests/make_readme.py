"""Write README.md from nbs/index.ipynb (`make readme`): prose, code and tables.

Links are made to work from the top folder."""

import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme() -> str:
    "The text of README.md."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.metadata.language_info = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if "#| hide" not in cell.source]
    for cell in nb.cells:
        if "#| echo: false" in cell.source:
            cell.metadata["transient"] = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
        if cell.cell_type == "code":
            cell.source = cell.source.replace('"../', '"')  # as a script of the top folder finds it
            # no sounds, no pictures, no players: a code host shows none
            cell.outputs = [out for out in cell.outputs if "text/markdown" in out.get("data", {})]
            for out in cell.outputs:
                out.data = {"text/markdown": out.data["text/markdown"]}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda m: f"]({_from_root(m[1])})", text)
    head = "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->"
    body = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"{head}\n\n{body}\n"


def _from_root(link: str) -> str:
    "A link of nbs/index.ipynb as seen from the top folder."
    return link.removeprefix("../") if link.startswith("../") else f"nbs/{link}"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
