"""Who fires where: the counts, the choices that are shown, and the page that holds them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_jax.models import load_model
from moe_jax.models.experts_page import experts_page
from moe_jax.models.experts_report import CLASSES, experts_report, report_of_choices, token_class
from moe_jax.models.text import TokenizedText

MODELS = Path(__file__).parents[1] / "goldens" / "models"


class Letters:
    """A tokenizer whose ids are letters and digits."""

    def token(self, number: int) -> str:
        return chr(32 + number)


def test_counts_are_those_of_the_models_own_routing():
    ids = np.random.default_rng(0).integers(0, 95, (3, 12)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    mask[2, 5:] = False
    text = TokenizedText(
        input_ids=ids,
        mask=mask,
        file_index=np.zeros(3, np.int32),
        paths=("a",),
        file_bytes=np.array([29]),
        file_tokens=np.array([29]),
    )
    report = experts_report(MODELS / "olmoe", text, Letters(), shown=20, batch_size=3)  # pyright: ignore[reportArgumentType]
    out = load_model(MODELS / "olmoe").run(ids, mask, return_reports=True)
    assert report.layers == (0, 1)
    real = mask.ravel()
    for layer, aux in enumerate(out.reports):
        chosen = np.asarray(aux.routing.expert_indices)[real]
        np.testing.assert_array_equal(report.load[layer], np.bincount(chosen.ravel(), minlength=8))
        np.testing.assert_array_equal(report.choices[layer], chosen[:20])
        assert report.histogram[layer].tolist() == [0, 0, 29]
        assert report.classes[layer].sum(axis=0).tolist() == report.load[layer].tolist()
        pairs = report.together[layer]
        assert np.diag(pairs).tolist() == report.load[layer].tolist()
        assert pairs.sum() == 29 * 4
    assert report.class_tokens.sum() == 29
    assert "".join(report.tokens) == "".join(Letters().token(i) for i in ids[mask][:20])


def test_choices_are_counted_by_class_and_pair():
    report = report_of_choices(np.array([[[0, 2], [2, -1], [0, 2]]]), ["the", "7", " A"], 3)
    assert report.load.tolist() == [[2, 0, 3]]
    assert report.histogram.tolist() == [[0, 1, 2]]
    assert report.together[0].tolist() == [[2, 0, 2], [0, 0, 0], [2, 0, 3]]
    number, capital = CLASSES.index("number"), CLASSES.index("capitalised")
    assert report.classes[0, number].tolist() == [0, 0, 1]
    assert report.classes[0, capital].tolist() == [1, 0, 1]
    assert CLASSES[token_class("\u4e2d")] == "other script"
    with pytest.raises(ValueError, match="one row a token"):
        report_of_choices(np.zeros((1, 2, 1), int), ["a"], 2)


def test_the_page_loads_nothing_and_escapes_what_it_shows(tmp_path):
    tokens = ["</script><script>alert(1)</script>", "<b>", "&", "\n"]
    report = report_of_choices(np.zeros((2, 4, 1), int), tokens, 2, title="<i>t</i>")
    page = experts_page(report, tmp_path / "page.html", note="<img src=x>").read_text("utf-8")
    assert page.count("<script") == 1
    assert "<i>t" not in page
    assert "<img" not in page
    assert not re.search(r"https?:|src=\"|@import|url\(", page)
    held = re.search(r"const data = (.*);\n", page)
    assert held is not None
    data = json.loads(held[1])
    assert data.pop("note") == "<img src=x>"
    assert data == report.to_json()
