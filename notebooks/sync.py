"""Writes every NN_name.ipynb from its NN_name.py: ``python notebooks/sync.py``.

The .py file (jupytext's percent format) is the reviewed source. Outputs are never stored. Edited the
notebook instead? ``jupytext --to py:percent notebooks/NN_name.ipynb`` carries that back first.
"""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    """The text halves of all pairs, in reading order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def notebook_text(source: Path) -> str:
    """The .ipynb that belongs to a .py, the same bytes on every machine."""
    read = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [
        new[cell.cell_type](cell.source, id=f"cell-{number:02}")
        for number, cell in enumerate(read.cells)
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA, nbformat_minor=5)
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1) + "\n"


if __name__ == "__main__":
    for path in sources():
        path.with_suffix(".ipynb").write_text(notebook_text(path), encoding="utf-8")
        print(path.with_suffix(".ipynb").name)
