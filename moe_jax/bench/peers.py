"""Other people's layers in the same table, where they happen to be installed. Never a dependency.

Each peer gets the same sizes and is timed in the same rounds against the same floor. Its own routing
decides its load, which with random weights is near uniform, so a peer is only run for that load.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.dispatch import kept_weights, plan_dispatch, to_assignments
from moe_jax.experts import FeedForward, ragged
from moe_jax.types import Array, Params, Routing


def installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def jax_peers(ffn: FeedForward) -> dict[str, Callable[[Params, Array, Routing], Array]]:
    """Grouped products of JAX libraries as whole layers: plan, gather, experts, combine."""
    if not installed("tokamax"):
        return {}

    def tokamax_step(params: Params, x: Array, routing: Routing) -> Array:
        import tokamax  # pyright: ignore[reportMissingImports]  # takes seconds: only when used

        plan = plan_dispatch(to_assignments(routing))
        y = ragged.run_with(tokamax.ragged_dot, ffn, params, x, plan, kept_weights(plan))
        return y.astype(x.dtype)

    return {"tokamax": tokamax_step}


def torch_mixtral(
    *, tokens: int, d_model: int, d_ff: int, experts: int, k: int, dtype: str, backward: bool
) -> Callable[[], Any] | None:
    """The Mixtral block of transformers on torch, router included; None where not installed."""
    if not (installed("torch") and installed("transformers")):
        return None
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import MixtralConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.mixtral import (  # pyright: ignore[reportMissingImports]
        modeling_mixtral as modeling,
    )

    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_local_experts=experts,
        num_experts_per_tok=k,
    )
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    block = modeling.MixtralSparseMoeBlock(config).to(kind)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.02)
    x = torch.randn(1, tokens, d_model).to(kind)

    def forward() -> Any:
        with torch.no_grad():
            return block(x)

    def both() -> Any:
        block.zero_grad(set_to_none=True)
        grown = x.clone().requires_grad_(True)
        y = block(grown)
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        return grown.grad

    return both if backward else forward


def peer_cases(
    ffn: FeedForward,
    params: Params,
    x: Array,
    routing: Routing,
    *,
    d_ff: int,
    k: int,
    backward: bool,
    with_gradients: Callable[[Any], Any],
) -> dict[str, Callable[[], Any]]:
    """Thunks by name, of the peers that are installed and can run this case."""
    cases: dict[str, Callable[[], Any]] = {}
    for name, step in jax_peers(ffn).items():
        compiled = jax.jit(with_gradients(step) if backward else step)
        cases[name] = functools.partial(compiled, params, x, routing)
    if ffn.gated and ffn.activation == "silu":
        dtype = "bf16" if x.dtype == jnp.bfloat16 else "f32"
        tokens, d_model = x.shape
        thunk = torch_mixtral(
            tokens=tokens, d_model=d_model, d_ff=d_ff, experts=routing.num_experts, k=k,
            dtype=dtype, backward=backward,
        )  # fmt: skip
        if thunk is not None:
            cases["torch mixtral"] = thunk
    return cases
