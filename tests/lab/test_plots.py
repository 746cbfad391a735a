"""Pictures are written, and the page of source is safe and says what it shows."""

from __future__ import annotations

import html.parser
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


class Page(html.parser.HTMLParser):
    """Collects the text of the coloured bytes and their data-k."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.ks, self.classes, self.tags = "", [], [], set()
        self._inside = False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "b":
            self._inside = True
            self.ks.append(dict(attrs)["data-k"])
            self.classes.append(dict(attrs)["class"])

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "b"

    def handle_data(self, data):
        if self._inside:
            self.text += data


def test_source_page_escapes_what_it_shows(tmp_path):
    data = b"<script>alert('x')</script> & \"\n"
    counts = np.ones((2, len(data)), np.int8)
    path = plots.source_page(
        data, counts, tmp_path / "s.html", max_k=4, title="<i>t</i>", note="<img src=x>"
    )
    text = path.read_text(encoding="utf-8")
    assert text.count("<script>") == 1  # the page's own
    assert "<i>t" not in text
    assert "<img" not in text
    page = Page()
    page.feed(text)
    assert page.text.replace("\u21b5", "") == data.decode()
    assert "http" not in text  # self-contained


def test_source_page_colours_by_the_number_of_experts(tmp_path):
    counts = np.array([[1, 2, 4, 4, 4], [1, 2, 4, 1, 1]], np.int8)
    path = plots.source_page("abc\u00e9".encode(), counts, tmp_path / "s.html", max_k=4)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.ks == ["1 1", "2 2", "4 4", "4 1"]  # the two bytes of an accented letter are one
    levels = [int(c.removeprefix("g")) for c in page.classes]
    assert levels[0] == 0
    assert levels == [0, 3, 8, 4]


def test_source_page_takes_any_bytes_but_not_another_length(tmp_path):
    data = b"\xff\x00\r\n"
    plots.source_page(data, np.ones((1, 4), np.int8), tmp_path / "s.html", max_k=2)
    with pytest.raises(ValueError, match=r"expected int\[layers, 4\].*got int8\[1, 3\]"):
        plots.source_page(data, np.ones((1, 3), np.int8), tmp_path / "s.html", max_k=2)


def test_importing_the_module_does_not_load_matplotlib():
    code = "import sys, moe_jax.lab.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
