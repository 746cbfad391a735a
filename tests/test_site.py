"""The documentation site's generated pages, and that versions agree wherever one is written."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import moe_jax
from website import check, pages

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert latest
    assert {project["version"], latest[1], re.search(r"^version: (.*)$", citation, re.M)[1]} == {
        moe_jax.__version__
    }


def test_every_public_symbol_is_on_a_page():
    text = "\n".join(pages.reference_pages().values())
    for name in moe_jax.__all__:
        assert f"::: moe_jax.{name}\n" in text + "\n", name
    documented = set(pages.public_modules())
    assert {"moe_jax", "moe_jax.nn.nnx", "moe_jax.interop", "moe_jax.lab.data"} <= documented
    assert not [module for module in documented if "serving" in module or "cli" in module]


@pytest.mark.parametrize("module", pages.public_modules())
def test_every_public_symbol_exists_and_says_what_it_does(module):
    real = importlib.import_module(module)
    for name in pages.public_symbols(module):
        value = getattr(real, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_fields_of_pytrees_are_listed_with_their_shapes():
    table = pages.fields_table("Routing")
    assert "| `expert_indices` | `Array` | i32[T, K]" in table
    assert pages.fields_table("TopK") == ""


def test_the_check_of_the_built_site_names_what_is_missing(tmp_path):
    missing = check.missing_symbols(tmp_path)
    assert "moe_jax.TopK" in missing
    for module in pages.public_modules():
        page = tmp_path / "api" / f"{module}.html"
        page.parent.mkdir(exist_ok=True)
        anchors = [f'<h2 id="{module}.{name}">' for name in pages.public_symbols(module)]
        page.write_text("\n".join(anchors), encoding="utf-8")
    assert check.missing_symbols(tmp_path) == []


def test_the_catalogue_has_every_rule_with_its_traits():
    page = pages.rules_page()
    for rule in ("TopK", "DynamicK", "ExpertChoiceRouter", "ZeroExperts"):
        assert f"## {rule}\n" in page
    assert "| [ExpertChoiceRouter](#expertchoicerouter) | no | no |" in page
    assert "| `max_k` | required |" in page


@pytest.mark.parametrize(
    ("source", "page", "text", "wanted"),
    [
        ("README.md", "index.md", "[a](docs/scaling.md#x)", "[a](scaling.md#x)"),
        ("README.md", "index.md", "[a](LICENSE)", "a (`LICENSE`)"),
        ("docs/how-to/a.md", "how-to/a.md", "[b](../../README.md)", "[b](../index.md)"),
        ("docs/a.md", "a.md", "[b](../benchmarks/README.md)", "[b](benchmarks.md)"),
        ("docs/a.md", "a.md", "[b](https://b.example/)", "[b](https://b.example/)"),
        ("docs/a.md", "a.md", "```\nx[i](j)\n```", "```\nx[i](j)\n```"),
        ("notebooks/README.md", "notebooks/index.md", "[1](01_a.ipynb)", "[1](01_a.md)"),
    ],
)
def test_links_lead_to_pages_of_the_site(source, page, text, wanted):
    assert pages.with_site_links(text, source=source, page=page, assets={}) == wanted


def test_a_picture_from_elsewhere_is_copied():
    assets: dict[str, str] = {}
    text = pages.with_site_links(
        "![p](results/p.png)", source="benchmarks/README.md", page="benchmarks.md", assets=assets
    )
    assert text == "![p](assets/benchmarks/results/p.png)"
    assert assets == {"assets/benchmarks/results/p.png": "benchmarks/results/p.png"}
