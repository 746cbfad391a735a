"""The tables of docs/composition.md: what of JAX and Flax goes through which implementation and rule.

``python -m tests.composition --write`` brings the document up to date; ``tests/test_composition.py``
fails where it is not. A cell is traced (``jax.eval_shape``), which runs all rules of differentiation,
batching and sharding; lowered, where only that proves it; or run, where values decide. Values behind
the other cells are tested in tests/experts, tests/nn and tests/parallel. tests/composition_flax.py has
the tools of Flax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax.experts import IMPLEMENTATIONS
from moe_jax.interop.rules.null_experts import NullExperts
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx
from tests import composition_flax
from tests.experts import test_derivatives

DOCUMENT = Path(__file__).parents[1] / "docs" / "composition.md"
START, END = "<!-- python -m tests.composition --write -->", "<!-- end of the tables -->"

E, D, F, T = 4, 4, 6, 8
FFN = moe_jax.FeedForward(activation="silu", gated=True)
GATE = moe_jax.Gate(noise=0.1)  # so that a key is used
TOP2 = moe_jax.TopK(num_experts=E, k=2, gate=GATE)
# A rule of each family: a budget, mass of probability, a learned threshold, experts that choose, a
# batch that shares experts, and one of a single published model.
RULES = {
    "DynamicK": moe_jax.DynamicK(num_experts=E, min_k=1, max_k=2, gate=GATE),
    "TopP": moe_jax.TopP(num_experts=E, gate=GATE),
    "ExpertThreshold": moe_jax.ExpertThreshold(num_experts=E, target_k=2, gate=GATE),
    "ExpertChoiceRouter": moe_jax.ExpertChoiceRouter(num_experts=E, gate=GATE),
    "Piggyback": moe_jax.Piggyback(num_experts=E, k=2, gate=GATE),
    "NullExperts": NullExperts(num_experts=E, num_null_experts=2, k=2, gate=GATE),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A column: ``layer(params, x, key)`` and the shapes of its parameters."""

    layer: Callable[..., Any]
    params: Any

    def loss(self, params: Any, x: Any) -> Any:
        return jnp.square(self.layer(params, x).astype(jnp.float32)).sum()

    def grad(self, params: Any, x: Any) -> Any:
        return jax.grad(self.loss)(params, x)

    def product(self, params: Any, x: Any) -> Any:
        return jax.jvp(lambda p: self.loss(p, x), (params,), (params,))[1]


def subjects() -> dict[str, Subject]:
    """The columns by name. Layers are jitted, so that the rows share what is traced."""
    columns: dict[str, Subject] = {}
    for name in IMPLEMENTATIONS:
        columns[name] = _subject(TOP2, implementation=name)
    for name, rule in RULES.items():
        columns[name] = _subject(rule, implementation="dense")
    params = columns["dense"].params
    graph, held, rest = nnx.split(nnx.eval_shape(_module), nnx.Param, ...)
    rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest)
    columns["nnx.MoE"] = Subject(
        jax.jit(lambda p, x, key=None: nnx.merge(graph, p, rest)(x, key=key)), held
    )
    linen = moe_linen.MoE(TOP2, d_model=D, d_ff=F, expert_fn=FFN)
    state = {"router_state": {"state": TOP2.init_state()}}
    columns["linen.MoE"] = Subject(
        jax.jit(lambda p, x, key=None: linen.apply({"params": p, **state}, x, key=key)), params
    )
    return columns


def _module() -> moe_nnx.MoE:
    return moe_nnx.MoE(TOP2, d_model=D, d_ff=F, expert_fn=FFN, rngs=nnx.Rngs(0))


def _subject(rule: moe_jax.Router, **options: Any) -> Subject:
    chosen, state = moe_jax.LayerOptions(**options), rule.init_state()

    def layer(params: Any, x: Any, key: Any = None) -> Any:
        return moe_jax.moe_layer(rule, FFN, params, state, x, key=key, options=chosen)[0]

    def init() -> Any:
        return moe_jax.init_moe_layer(rule, FFN, jax.random.key(0), d_model=D, d_ff=F)

    return Subject(jax.jit(layer), jax.eval_shape(init))


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


X = array(T, D)


def like(tree: Any, *lead: int, dtype: Any = None) -> Any:
    """The shapes of a tree with more leading axes, or another dtype for its floats."""
    return jax.tree.map(lambda a: array(*lead, *a.shape, dtype=dtype or a.dtype), tree)


def trace(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.eval_shape(function, *arguments)


# --- transformations


def _checkpoint(s: Subject) -> None:
    trace(jax.grad(lambda p, x: jnp.square(jax.checkpoint(s.layer)(p, x)).sum()), s.params, X)


def _scan(s: Subject) -> None:
    def loss(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (s.layer(p, x), None), x, None, length=2)[0].sum()

    trace(jax.grad(loss), s.params, X)


def _while(s: Subject) -> None:
    def run(p: Any, x: Any) -> Any:
        return jax.lax.while_loop(
            lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, s.layer(p, carry[1])), (0, x)
        )

    trace(run, s.params, X)


def _cond(s: Subject) -> None:
    trace(lambda p, x: jax.lax.cond(x.sum() > 0, s.layer, lambda p, x: x, p, x), s.params, X)


def _donated(s: Subject) -> None:
    # The result has the shape and dtype of x, so its memory can be the result's.
    traced = jax.jit(s.layer, donate_argnums=1).trace(s.params, X)
    [x], _ = traced.args_info[0][1:], traced.args_info[1]
    assert x.donated
    assert (traced.out_info.shape, traced.out_info.dtype) == (X.shape, X.dtype)


def _exported(s: Subject) -> None:
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, D), jnp.float32)
    jax.export.export(jax.jit(s.layer))(s.params, x)


TRANSFORMATIONS: dict[str, Callable[[Subject], Any]] = {
    "`jit` with a donated argument": _donated,
    "`grad` of parameters and tokens": lambda s: trace(
        jax.grad(s.loss, argnums=(0, 1)), s.params, X
    ),
    "`jvp`": lambda s: trace(s.product, s.params, X),
    "`linearize`": lambda s: trace(
        lambda p, x: jax.linearize(lambda x: s.loss(p, x), x)[1](x), s.params, X
    ),
    "`jvp` of `grad`": lambda s: trace(
        lambda p, x: jax.jvp(lambda p: s.grad(p, x), (p,), (p,))[1], s.params, X
    ),
    "`grad` of `grad`": lambda s: trace(
        jax.grad(lambda p, x: sum(jnp.square(g).sum() for g in jax.tree.leaves(s.grad(p, x)))),
        s.params,
        X,
    ),
    "`grad` of `jvp`": lambda s: trace(jax.grad(s.product), s.params, X),
    "`vmap` over tokens": lambda s: trace(
        jax.vmap(s.layer, in_axes=(None, 0)), s.params, array(2, T, D)
    ),
    "`vmap` over parameters": lambda s: trace(
        jax.vmap(s.layer, in_axes=(0, None)), like(s.params, 2), X
    ),
    "`vmap` of `grad`": lambda s: trace(
        jax.vmap(s.grad, in_axes=(None, 0)), s.params, array(2, T, D)
    ),
    "`checkpoint`, `grad`": _checkpoint,
    "`scan`, `grad`": _scan,
    "`while_loop`": _while,
    "`cond`": _cond,
    "`jax.export`, symbolic batch": _exported,
}


# Rows whose values are compared with the oracle's, by implementation: these need no second trace.
VALUES = {
    **{
        f"`{name}`".replace(" of ", "` of `"): test_derivatives.COMPARED
        for name in test_derivatives.FIRST
    },
    **{
        f"`{name}`".replace(" of ", "` of `"): tuple(
            n for n in test_derivatives.COMPARED if n != "active"
        )
        for name in test_derivatives.HIGHER
    },
}


# --- devices


def _mesh(kind: AxisType) -> AbstractMesh:
    return AbstractMesh((2,), ("data",), axis_types=(kind,))


def _split(function: Callable[..., Any], s: Subject, kind: AxisType) -> None:
    mesh = _mesh(kind)
    x = jax.ShapeDtypeStruct((T, D), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    with jax.sharding.use_abstract_mesh(mesh):
        trace(function, s.params, x)


def _shard_map(s: Subject, *, check_vma: bool) -> None:
    mapped = jax.shard_map(
        s.layer,
        mesh=_mesh(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    trace(jax.grad(lambda p, x: jnp.square(mapped(p, x)).sum()), s.params, X)


DEVICES: dict[str, Callable[[Subject], Any]] = {
    "mesh with Auto axes": lambda s: _split(s.layer, s, AxisType.Auto),
    "mesh with Explicit axes, `grad`": lambda s: _split(s.grad, s, AxisType.Explicit),
    "your `shard_map`, `check_vma=True`, `grad`": lambda s: _shard_map(s, check_vma=True),
    "your `shard_map`, `check_vma=False`": lambda s: _shard_map(s, check_vma=False),
    "`pmap`": lambda s: trace(jax.pmap(s.layer, in_axes=(None, 0)), s.params, array(1, T, D)),
}


# --- settings of JAX, dtypes and keys


def _x64(s: Subject) -> None:
    with jax.enable_x64(True):
        trace(s.grad, s.params, X)
        double = trace(s.layer, like(s.params, dtype=jnp.float64), array(T, D, dtype=jnp.float64))
    assert double.dtype == jnp.float64


def _standard(s: Subject) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trace(s.layer, s.params, X)


def _debug_nans(s: Subject) -> None:
    params = jax.tree.map(lambda a: jnp.full(a.shape, 0.1, a.dtype), s.params)
    with jax.debug_nans(True):
        jax.block_until_ready(s.layer(params, jnp.ones((T, D))))


def _dtype(s: Subject, weights: Any, tokens: Any) -> None:
    x = array(T, D, dtype=tokens)
    assert trace(s.layer, like(s.params, dtype=weights), x).dtype == tokens


def _int8(s: Subject) -> None:
    def cast(path: Any, a: Any) -> Any:
        experts = "experts" in jax.tree_util.keystr(path)
        return array(*a.shape, dtype=jnp.int8 if experts else a.dtype)

    trace(s.layer, jax.tree_util.tree_map_with_path(cast, s.params), X)


SETTINGS: dict[str, Callable[[Subject], Any]] = {
    "x64, tokens of 32 and 64 bits": _x64,
    "standard promotion (all others: strict)": _standard,
    "`debug_nans`, run": _debug_nans,
    "typed keys": lambda s: trace(s.layer, s.params, X, jax.eval_shape(jax.random.key, 0)),
    "raw keys": lambda s: trace(s.layer, s.params, X, array(2, dtype=jnp.uint32)),
    "float16": lambda s: _dtype(s, jnp.float16, jnp.float16),
    "bfloat16": lambda s: _dtype(s, jnp.bfloat16, jnp.bfloat16),
    "float8 weights, bfloat16 tokens": lambda s: _dtype(s, jnp.float8_e4m3fn, jnp.bfloat16),
    "int8 experts, float32 tokens": _int8,
}

TABLES = {"transformation": TRANSFORMATIONS, "devices": DEVICES, "setting": SETTINGS}


def cell(check: Callable[[], Any]) -> str:
    """ "yes", or the sentence of the refusal; what is no refusal of the library is raised."""
    try:
        check()
    except (TypeError, ValueError, NotImplementedError) as error:
        sentence = " ".join(str(error).split())
        if "expected" not in sentence:  # not a refusal of this library
            raise
        return sentence
    return "yes"


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """The promotion under which every cell is computed that does not say otherwise."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def tables() -> str:
    """The tables in Markdown: a line a transformation, a column an implementation, rule or module."""
    with strict():
        columns = subjects()
        parts = []
        for title, rows in TABLES.items():
            lines = [f"| {title} | " + " | ".join(f"`{name}`" for name in columns) + " |"]
            lines.append("|---|" + "---|" * len(columns))
            for name, check in rows.items():
                cells = [
                    "values" if column in VALUES.get(name, ()) else cell(lambda c=check, s=s: c(s))
                    for column, s in columns.items()
                ]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        lines = ["| tool of Flax | `nnx.MoE` | `linen.MoE` |", "|---|---|---|"]
        for name, checks in composition_flax.TOOLS.items():
            cells = ["" if check is None else cell(check) for check in checks]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n\n".join([*parts, "\n".join(lines)])


def document() -> str:
    """docs/composition.md with the tables of this tree."""
    text = DOCUMENT.read_text()
    head, rest = text.split(START)
    return f"{head}{START}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        DOCUMENT.write_text(document())
    else:
        print(tables())
