"""Other people's layers in the same table, where they happen to be installed. Never a dependency.

Each peer gets the same sizes and is timed in the same rounds against the same floor. Its own routing
decides its load, which with random weights is near uniform, so a peer is only run for that load.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.experts import FeedForward, ragged
from moe_jax.routing.dispatch import kept_weights, plan_dispatch, to_assignments
from moe_jax.types import Array, Params, Routing

_PACKAGES = {"tokamax": ("tokamax",), "torch mixtral": ("torch", "transformers")}


def installed(module: str) -> bool:
    """Returns whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def missing() -> list[str]:
    """The packages of peers that are not installed, in the words of pip."""
    packages = ("torch", "transformers", "tokamax")
    return [package for package in packages if not installed(package)]


def versions(name: str) -> str | None:
    """The installed versions of what a peer consists of, such as "tokamax 0.0.12"."""
    packages = [p for p in _PACKAGES.get(name, ()) if installed(p)]
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages) or None


def jax_peers(expert_fn: FeedForward) -> dict[str, Callable[[Params, Array, Routing], Array]]:
    """Grouped products of JAX libraries as whole layers: plan, gather, experts, combine."""
    if not installed("tokamax"):
        return {}

    def tokamax_step(params: Params, x: Array, routing: Routing) -> Array:
        import tokamax  # pyright: ignore[reportMissingImports]  # takes seconds: only when used
        from absl import flags  # pyright: ignore[reportMissingImports]

        if not flags.FLAGS.is_parsed():  # else it takes this program's options for its own
            flags.FLAGS.mark_as_parsed()
        plan = plan_dispatch(to_assignments(routing))
        y = ragged.run_with(tokamax.ragged_dot, expert_fn, params, x, plan, kept_weights(plan))
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
    config._experts_implementation = "eager"  # the loop over experts that the class is written as
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


def expansion_bytes(routing: Routing, d_model: int, d_ff: int, *, backward: bool) -> int:
    """Returns the bytes of a grouped product on CPU: E times the rows, float32, hidden and input."""
    rows = routing.expert_indices.size
    return routing.num_experts * rows * (d_model + d_ff) * 4 * (2 if backward else 1)


def free_memory() -> int | None:
    """Bytes of main memory that are free; None where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peer_cases(
    expert_fn: FeedForward,
    params: Params,
    x: Array,
    routing: Routing,
    *,
    d_ff: int,
    k: int,
    backward: bool,
    with_gradients: Callable[[Any], Any],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Thunks by name, of the installed peers that can run this case; and why others cannot."""
    cases: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    tokens, d_model = x.shape
    free = free_memory()
    needed = expansion_bytes(routing, d_model, d_ff, backward=backward)
    for name, step in jax_peers(expert_fn).items():
        if jax.default_backend() == "cpu" and free is not None and needed > 0.7 * free:
            refused[name] = f"would expand to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
            continue
        compiled = jax.jit(with_gradients(step) if backward else step)
        cases[name] = functools.partial(compiled, params, x, routing)
    if expert_fn.gated and expert_fn.activation == "silu":
        dtype = "bf16" if x.dtype == jnp.bfloat16 else "f32"
        thunk = torch_mixtral(
            tokens=tokens,
            d_model=d_model,
            d_ff=d_ff,
            experts=routing.num_experts,
            k=k,
            dtype=dtype,
            backward=backward,
        )
        if thunk is not None:
            cases["torch mixtral"] = thunk
    elif installed("torch"):
        refused["torch mixtral"] = "is gated with silu: pass --gated --activation silu"
    for name, thunk in list(cases.items()):
        try:
            jax.block_until_ready(thunk())
        except Exception as error:  # somebody else's code: its failure is a row, not our end
            refused[name] = f"failed, {type(error).__name__}: {str(error)[:200]}"
            del cases[name]
    return cases, refused
