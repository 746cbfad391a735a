"""One name a thing: the library's arguments, and the production guide's words at the edge only."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import moe_jax
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx

PACKAGE = Path(moe_jax.__file__).parent

# Config files, MOE_* variables and archives are written in the guide's words. These read or write them.
EDGE = (
    "config",
    "serving",
    "cli",
    "checkpoint/description.py",
    "bench/http_cost.py",
    "lab/hidden_states.py",
)
GUIDE = {"min_experts", "max_experts", "input_dim", "complexity_estimator", "noise_factor"}
SYNONYMS = {"ffn"}  # expert_fn


def names(tree: ast.AST) -> set[str]:
    """The arguments, keywords, variables and attributes of a module."""
    results = set()
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name) | ast.Name(id=name) | ast.Attribute(attr=name):
                results.add(name)
            case ast.keyword(arg=str(name)):
                results.add(name)
    return results


def test_names_of_the_guide_and_synonyms_are_used_at_the_edge_only():
    used = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        wrong = names(ast.parse(file.read_text()))
        wrong &= SYNONYMS if place.startswith(EDGE) else SYNONYMS | GUIDE
        if wrong:
            used[place] = sorted(wrong)
    assert not used


def test_the_walk_sees_an_argument_and_a_keyword():
    assert names(ast.parse("def f(ffn): g(min_experts=ffn)")) >= {"ffn", "min_experts"}


@pytest.mark.parametrize("name", ["Router", "MoE", "DynamicMoE"])
def test_both_flax_modules_take_the_same_arguments(name: str):
    nnx_class, linen_class = getattr(moe_nnx, name), getattr(moe_linen, name)
    for method in ("__call__", "regularization", "update_router"):
        ours, theirs = (
            [
                (p.name, p.default, p.kind)
                for p in inspect.signature(getattr(c, method)).parameters.values()
            ]
            for c in (nnx_class, linen_class)
        )
        assert ours == theirs, method
    # In nnx, layer options and the rest of MoE's arguments pass through **keywords.
    fields = set(inspect.signature(linen_class).parameters) - {"parent", "name"}
    made = set(inspect.signature(nnx_class.__init__).parameters)
    if name == "DynamicMoE":
        made |= set(inspect.signature(moe_nnx.MoE.__init__).parameters) - {"router"}
    if name != "Router":
        made |= set(inspect.signature(moe_jax.LayerOptions).parameters) - {"platform"}
    # Linen keeps these in its variables.
    assert made - {"self", "rngs", "params", "state", "others", "options"} == fields
