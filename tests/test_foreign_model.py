"""A model of google-tunix takes the library's layers: examples/foreign_model.py runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

with_tunix = pytest.mark.skipif(
    importlib.util.find_spec("tunix") is None,
    reason="examples/foreign_model.py did not run: pip install google-tunix",
)


def test_the_page_shows_lines_of_the_example():
    page = (ROOT / "docs" / "how-to" / "foreign-model.md").read_text()
    example = (ROOT / "examples" / "foreign_model.py").read_text().splitlines()
    shown = re.findall(r"```python\n(.*?)```", page, re.S)
    assert shown
    for line in "".join(shown).splitlines():
        assert line in example


# In a process of its own, as a user runs it: tunix has warnings of its own, which are errors here.
@with_tunix
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_model_of_another_package_holds_a_budget_trains_and_comes_back(kind: str):
    done = subprocess.run(
        [sys.executable, "examples/foreign_model.py", kind],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert float(rows["k = 4, largest change of the logits"]) < 1e-5
    for layer in range(2):  # to within one of 256 tokens, printed to three places
        k = float(rows[f"layers/{layer}/mlp, experts per token"])
        assert k == pytest.approx(2.5, abs=1 / 256 + 5e-4)
    assert float(rows["loss after 2 steps"]) < float(rows["loss after 0 steps"])
    assert rows["restored model gives the same logits"] == "True"
