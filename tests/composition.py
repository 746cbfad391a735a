"""The table of docs/composition.md: what of JAX goes through which implementation, rule and module.

``python -m tests.composition --write`` brings the document up to date; ``tests/test_composition.py``
fails where it is not. Every cell is traced (``jax.eval_shape``), which runs all rules of
differentiation and batching, or lowered (``jax.export``); the values behind the cells are tested in
tests/experts, tests/nn and tests/parallel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx

import moe_jax
from moe_jax.experts import IMPLEMENTATIONS
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx

DOCUMENT = Path(__file__).parents[1] / "docs" / "composition.md"
START, END = "<!-- python -m tests.composition --write -->", "<!-- end of the tables -->"

E, D, F, T = 4, 4, 6, 5
FFN = moe_jax.FeedForward(activation="silu", gated=True)
TOP2 = moe_jax.TopK(num_experts=E, k=2)
Layer = Callable[[Any, Any], Any]  # (parameters, x) -> y

RULES = {
    "TopK": TOP2,
    "DynamicK": moe_jax.DynamicK(num_experts=E, min_k=1, max_k=2),
    "TopP": moe_jax.TopP(num_experts=E),
    "ExpertThreshold": moe_jax.ExpertThreshold(num_experts=E, target_k=2),
    "ExpertChoiceRouter": moe_jax.ExpertChoiceRouter(num_experts=E),
}


def _loss(layer: Layer, params: Any, x: Any) -> Any:
    return jnp.square(layer(params, x)).sum()


def _product(layer: Layer, params: Any, x: Any) -> Any:
    return jax.jvp(lambda p: _loss(layer, p, x), (params,), (params,))[1]


def _grad(layer: Layer, params: Any, x: Any) -> Any:
    return jax.grad(lambda p: _loss(layer, p, x))(params)


def _jvp_of_grad(layer: Layer, params: Any, x: Any) -> Any:
    return jax.jvp(lambda p: _grad(layer, p, x), (params,), (params,))[1]


def _grad_of_grad(layer: Layer, params: Any, x: Any) -> Any:
    def norm(p: Any) -> Any:
        return sum(jnp.square(g).sum() for g in jax.tree.leaves(_grad(layer, p, x)))

    return jax.grad(norm)(params)


def _vmap_of_grad(layer: Layer, params: Any, x: Any) -> Any:
    return jax.vmap(lambda x: _grad(layer, params, x))(jnp.stack([x, x]))


def _checkpoint(layer: Layer, params: Any, x: Any) -> Any:
    return jax.grad(lambda p: jnp.square(jax.checkpoint(layer)(p, x)).sum())(params)


def _scan(layer: Layer, params: Any, x: Any) -> Any:
    def loss(p: Any) -> Any:
        return jax.lax.scan(lambda x, _: (layer(p, x), None), x, None, length=2)[0].sum()

    return jax.grad(loss)(params)


def _cond(layer: Layer, params: Any, x: Any) -> Any:
    return jax.lax.cond(x.sum() > 0, layer, lambda p, x: x, params, x)


TRANSFORMATIONS: dict[str, Callable[[Layer, Any, Any], Any]] = {
    "`grad`": _grad,
    "`jvp`": _product,
    "`jvp` of `grad`": _jvp_of_grad,
    "`grad` of `grad`": _grad_of_grad,
    "`grad` of `jvp`": lambda layer, p, x: jax.grad(lambda p: _product(layer, p, x))(p),
    "`vmap` of `grad`, over tokens": _vmap_of_grad,
    "`checkpoint`, `grad`": _checkpoint,
    "`scan`, `grad`": _scan,
    "`cond`": _cond,
}


def subjects() -> dict[str, tuple[Layer, Any]]:
    """(layer, its parameters) by the name of its column."""
    params = moe_jax.init_moe_layer(TOP2, FFN, jax.random.key(0), d_model=D, d_ff=F)
    columns: dict[str, tuple[Layer, Any]] = {}
    for name in IMPLEMENTATIONS:
        columns[name] = (_layer(TOP2, implementation=name), params)
    for name, rule in RULES.items():
        if rule is not TOP2:
            made = moe_jax.init_moe_layer(rule, FFN, jax.random.key(0), d_model=D, d_ff=F)
            columns[name] = (_layer(rule, implementation="dense"), made)
    module = moe_nnx.MoE(TOP2, d_model=D, d_ff=F, expert_fn=FFN, params=params)
    graph, held, rest = nnx.split(module, nnx.Param, ...)
    columns["nnx.MoE"] = (lambda p, x: nnx.merge(graph, p, rest)(x), held)
    linen = moe_linen.MoE(TOP2, d_model=D, d_ff=F, expert_fn=FFN)
    state = {"router_state": {"state": TOP2.init_state()}}
    columns["linen.MoE"] = (lambda p, x: linen.apply({"params": p, **state}, x), params)
    return columns


def _layer(rule: moe_jax.Router, **options: Any) -> Layer:
    chosen = moe_jax.LayerOptions(**options)
    return lambda p, x: moe_jax.moe_layer(rule, FFN, p, rule.init_state(), x, options=chosen)[0]


def cell(check: Callable[[], Any]) -> str:
    """ "yes", or the sentence of the refusal."""
    try:
        check()
    except (TypeError, ValueError, NotImplementedError) as error:
        return " ".join(str(error).split())
    return "yes"


def _exported(layer: Layer, params: Any) -> Any:
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, D), jnp.float32)
    return jax.export.export(jax.jit(layer))(params, x)


def table() -> str:
    """The table in Markdown: a line a transformation, a column an implementation, rule or module."""
    columns = subjects()
    x = jax.random.normal(jax.random.key(1), (T, D))
    lines = ["| | " + " | ".join(f"`{name}`" for name in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for title, transform in TRANSFORMATIONS.items():
        cells = [
            cell(lambda t=transform, s=s: jax.eval_shape(lambda p, x: t(s[0], p, x), s[1], x))
            for s in columns.values()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    cells = [cell(lambda s=s: _exported(*s)) for s in columns.values()]
    lines.append(f"| `jax.export`, symbolic batch | {' | '.join(cells)} |")
    return "\n".join(lines)


def document() -> str:
    """docs/composition.md with the table of this tree."""
    text = DOCUMENT.read_text()
    head, rest = text.split(START)
    return f"{head}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        DOCUMENT.write_text(document())
    else:
        print(table())
