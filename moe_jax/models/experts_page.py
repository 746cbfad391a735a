"""The page of an ``ExpertsReport``: one HTML file that loads nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_jax.models.experts_report import ExpertsReport

_TEMPLATE = Path(__file__).with_name("experts_page.html")


def experts_page(report: ExpertsReport, path: str | Path, *, note: str = "") -> Path:
    """Writes a self-contained page: the text by k and by expert, load, k, token classes, pairs.

    Args:
        report: from ``experts_report``.
        path: of the page.
        note: a line below the title; may hold any text.

    Returns:
        The path.
    """
    data: dict[str, Any] = report.to_json() | {"note": note}
    # "</script>" in a text would end the script; JSON reads the escape as the same character.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _TEMPLATE.read_text("utf-8").replace("/*DATA*/null", text)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target
