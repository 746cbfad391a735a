"""Writes every NN_name.ipynb from its NN_name.py: ``python notebooks/sync.py``.

The .py file (jupytext's percent format) is the reviewed source. Edited the notebook instead?
``jupytext --to py:percent notebooks/NN_name.ipynb`` carries that back first.

Outputs are never stored in the notebooks. ``python notebooks/sync.py --run`` runs them (some minutes)
and stores what they print and draw in ``outputs/``, for the documentation site.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat

FOLDER = Path(__file__).parent
OUTPUTS = FOLDER / "outputs"
MOST_LINES = 40
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


def code_digest(code: str) -> str:
    """16 hex digits of a code cell: an output belongs to this code alone."""
    return hashlib.sha256(code.strip().encode()).hexdigest()[:16]


def store_outputs(source: Path) -> None:
    """Runs a notebook and writes ``outputs/NAME.json`` with its pictures beside it."""
    from nbclient import NotebookClient

    notebook = nbformat.reads(notebook_text(source), as_version=4)
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "JAX_PLATFORMS": "cpu"}
    place = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=place)
    client.execute(env={**os.environ, **inline})
    OUTPUTS.mkdir(exist_ok=True)
    for old in OUTPUTS.glob(f"{source.stem}*"):
        old.unlink()
    cells = [
        {"code": code_digest(cell.source), **_stored(cell.outputs, f"{source.stem}-{number}")}
        for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code")
    ]
    text = json.dumps(cells, indent=1, ensure_ascii=False) + "\n"
    (OUTPUTS / f"{source.stem}.json").write_text(text, encoding="utf-8")


def _stored(outputs: list[Any], name: str) -> dict[str, Any]:
    """What a cell printed, and the names of the pictures that were written for it."""
    printed, pictures = [], []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            pictures.append(f"{name}-{len(pictures)}.png")
            (OUTPUTS / pictures[-1]).write_bytes(base64.b64decode(data["image/png"]))
        elif output.get("name") == "stdout" or "text/plain" in data:
            printed.append(output.get("text", "") or data["text/plain"])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", "".join(printed)).strip("\n").splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], "..."]
    return {"text": "\n".join(lines), "pictures": pictures}


if __name__ == "__main__":
    for path in sources():
        path.with_suffix(".ipynb").write_text(notebook_text(path), encoding="utf-8")
        if "--run" in sys.argv[1:]:
            store_outputs(path)
        print(path.with_suffix(".ipynb").name)
