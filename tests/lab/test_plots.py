"""Pictures are written, and a figure is returned where no path is given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moe_jax.lab import plots


def row(rule: str, saving: float, relative: float, *, control: bool = False) -> dict:
    return {
        "rule": rule,
        "label": rule,
        "control": control,
        "achieved_saving": saving,
        "relative": relative,
        "relative_low": 0.8 * relative,
        "relative_high": 1.2 * relative,
    }


def is_picture(path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5_000


@pytest.mark.parametrize("far", [False, True])
def test_frontier(tmp_path, far):
    rows = [row("top-p", s, s * 0.01) for s in (0.1, 0.2)]
    rows += [row("min-p", s, -s * 0.01) for s in (0.1, 0.2)]
    rows += [row("mix", s, s * 0.02, control=True) for s in (0.1, 0.2)]
    if far:
        rows += [row("random", s, s, control=True) for s in (0.1, 0.2)]
    assert is_picture(plots.frontier(rows, tmp_path / "new" / "frontier.png"))


def test_experts_per_token_and_utilisation(tmp_path):
    histogram = np.tile([0.0, 0.2, 0.3, 0.5], (5, 1))
    assert is_picture(plots.experts_per_token(histogram, tmp_path / "k.png"))
    load = np.arange(12.0).reshape(3, 4)
    balanced = np.ones((3, 4))
    assert is_picture(plots.utilisation({"a": load, "b": balanced}, tmp_path / "load.png"))


def test_without_a_path_a_figure_is_returned_for_a_notebook():
    figure = plots.utilisation({"a": np.ones((2, 4))})
    assert type(figure).__name__ == "Figure"
    assert figure.axes


def test_importing_the_module_does_not_load_matplotlib():
    code = "import sys, moe_jax.lab.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
