"""Builds the MoE block of a published model from its config and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.experts import ExpertFn, FeedForward
from moe_jax.interop import router_settings
from moe_jax.interop.blocks import BlockOptions, MoEBlock
from moe_jax.interop.families import Family, build_router, read
from moe_jax.interop.model_config import HFConfig
from moe_jax.interop.quantization import dequantize
from moe_jax.interop.routing_keys import check_expert_keys, check_router_keys
from moe_jax.interop.rules import (
    DepthRouter,
    JointShared,
    ProductKeys,
    TableState,
    TokenTable,
    ZeroExperts,
)
from moe_jax.interop.tensors import (
    Tensor,
    Tensors,
    expert_params,
    f32,
    linear,
    shared_params,
    shared_stack,
    to_device,
)
from moe_jax.routers import Router
from moe_jax.types import Params


def moe_block_from_hf(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = ""
) -> MoEBlock:
    """Returns the MoE block of a published model, from its config and its tensors.

    Args:
        config: ``config.json`` as a dict, see ``router_from_hf``.
        tensors: name -> array, as in the safetensors files of the Hub (one matrix an expert:
            ``experts.0.w1.weight``, ``experts.0.gate_proj.weight``, ...) or as in transformers 5
            (``experts.gate_up_proj`` [E, 2F, D] or [E, D, 2F]), quantised or not (see
            ``quantization``). JAX arrays work too, traced ones included, so the result can be
            differentiated by the tensors.
        prefix: what the names of this block begin with, e.g. ``"model.layers.0.mlp."``; other names
            are not looked at.

    Returns:
        The block. Router parameters are float32; experts keep the dtype of their tensors, and are
        float32 where those were quantised.

    Raises:
        ValueError: a model type, a value or a tensor that does not fit: unknown, missing, left over,
            of another shape, quantised in a way that is not restored. It is named, with what was
            expected.

    Example: see ``MoEBlock.apply``.
    """
    family, c = read(config)
    what = f"{c.model_type!r} block"
    if c.model_type.startswith("ernie4_5_vl"):
        tensors, prefix = _text_experts(tensors, prefix), ""
    inside = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    if inside:  # Tensors says what to do about a prefix that no name has
        inside = dequantize(inside, config, what=what, prefix=prefix)
        tensors = {prefix + n: t for n, t in inside.items()}
    block = Tensors(tensors, prefix=prefix, what=what)
    if "router.kernel" in block and c.key_of("num_experts") is None:
        # Some configs leave the number of experts to the class default; the tensors know it.
        classes = block.shape("router.kernel")[0]
        if "experts.row_in" in block:
            classes = block.shape("experts.row_in")[0]
        free = c.get("zero_experts") or 0 if "zero_experts" in c.defaults else 0
        free += c.get("shared") if family.shared == "joint" else 0
        c = c.with_value("num_experts", classes - free)
    hashed = "router.table" in block
    if hashed:
        c = c.with_value("vocab_size", block.shape("router.table")[0])
        router = router_settings.hash_router(c)
        check_router_keys(family, c, router)
    else:
        router = build_router(family, c)
    width = c.get("hidden_size") if c.key_of("hidden_size") else None
    params: dict[str, Params] = {"router": _router_params(block, router, family, width)}
    width = params["router"]["down" if isinstance(router, DepthRouter) else "kernel"].shape[0]
    inner = width
    if "latent.in" in block or "latent.in" in family.extras:
        params["latent"] = _latent_params(block, family, width)
        inner = params["latent"]["in"].shape[1]
    params["experts"] = expert_params(
        block,
        experts=router.num_experts,
        width=inner,
        gated=family.gated,
        interleaved=family.interleaved,
        bias="experts.bias" in family.extras,
    )
    if "experts.post_norm" in family.extras:
        norm = f32(block.take("experts.post_norm", (inner,), "D"))
        each = np.broadcast_to if isinstance(norm, np.ndarray) else jnp.broadcast_to
        params["experts"]["post_norm"] = each(norm[None, :], (router.num_experts, inner))
    if _has_shared(block, family, c):
        if isinstance(router, JointShared):
            params["shared"] = shared_stack(block, count=router.num_shared, width=width)
        else:
            gated = family.gated or "shared.gate" in block
            params["shared"] = shared_params(block, width=width, gated=gated)
    if "shared" in params and (family.shared == "gated" or "shared_gate" in block):
        params["shared_gate"] = linear(block.take("shared_gate", (1, width), "1 D"))
    for name in ("output_norm", "output_bias"):
        if name in family.extras:
            params[name] = block.take(name, (width,), "D")
    state = _state(block, router, family, c, hashed=hashed)
    # transformers allocates this bias and never adds it.
    unused = ("router.bias",) if isinstance(router, ZeroExperts) else ()
    block.finish(allowed=unused)
    expert_fn = family.expert(c)
    shared_fn = expert_fn if family.shared_expert is None else family.shared_expert(c)
    average_shared = _averages(c)
    check_expert_keys(family, c, expert_fn)
    return MoEBlock(
        params=_on_device(params),
        state=jax.tree.map(jnp.asarray, state),
        router=router,
        expert_fn=_with_biases_of(params["experts"], expert_fn),
        shared_fn=_with_biases_of(params.get("shared", {}), shared_fn),
        options=BlockOptions(
            output_scale=float(family.output_scale(c)),
            average_shared=average_shared,
            weight_on_input=family.weight_on_input,
            norm_eps=_norm_eps(c) if {"latent", "output_norm"} & set(params) else 0.0,
            per_sequence=family.per_sequence,
        ),
    )


def _on_device(params: dict[str, Params]) -> dict[str, Params]:
    """Returns the parameters as JAX arrays; each host array is freed as soon as it is copied."""
    for name in list(params):
        part: Any = params[name]
        params[name] = _on_device(part) if isinstance(part, dict) else to_device(part)
    return params


def _with_biases_of(params: Params, expert_fn: ExpertFn) -> ExpertFn:
    """The expert, with biases if its parameters have them; few configs say so."""
    if not isinstance(expert_fn, FeedForward):
        return expert_fn
    return dataclasses.replace(expert_fn, use_bias=any(n.endswith("_bias") for n in params))


def _router_params(tensors: Tensors, router: Router, family: Family, width: int | None) -> Params:
    e = router.num_experts
    if isinstance(router, DepthRouter):
        h = router.hidden_size
        params = {"down": linear(f32(tensors.take("depth.down", (h, width), "H D")))}
        for name, shape, axes in (
            ("down_bias", (h,), "H"),
            ("norm", (h,), "H"),
            ("fc1", (h, h), "H H"),
            ("fc1_bias", (h,), "H"),
            ("fc2", (h, h), "H H"),
            ("fc2_bias", (h,), "H"),
            ("kernel", (e + 1, h), "E+1 H"),
        ):
            tensor = f32(tensors.take(f"depth.{name}", shape, axes))
            params[name] = linear(tensor) if len(shape) == 2 else tensor
        if "depth.depth_scale" in tensors:
            params["depth_scale"] = f32(tensors.take("depth.depth_scale", (h,), "H"))
        return params
    classes, axes = e, "E D"
    if isinstance(router, ZeroExperts):
        classes, axes = e + router.num_zero_experts, "E+Z D"
    elif isinstance(router, JointShared):
        classes, axes = e + router.num_shared, "E+S D"
    elif isinstance(router, ProductKeys):
        classes, axes = 2 * router.num_keys, "2n D"
    kernel = f32(tensors.take("router.kernel", (classes, width), axes))
    params = {"kernel": linear(kernel)}
    if router.gate.use_bias:
        params["bias"] = f32(tensors.take("router.bias", (e,), "E"))
    if isinstance(router, JointShared):
        params["global_scale"] = f32(tensors.take("router.global_scale", (1,), "1"))
    if "router.input_scale" in family.extras:
        params["input_scale"] = f32(tensors.take("router.input_scale", (kernel.shape[1],), "D"))
    if "router.expert_scale" in family.extras:
        params["expert_scale"] = f32(tensors.take("router.expert_scale", (e,), "E"))
    return params


def _latent_params(tensors: Tensors, family: Family, width: int) -> Params:
    into = linear(tensors.take("latent.in", (None, width), "L D"))
    inner = into.shape[1]
    params = {"in": into, "out": linear(tensors.take("latent.out", (width, inner), "D L"))}
    if "latent.norm" in family.extras:
        params["norm"] = f32(tensors.take("latent.norm", (inner,), "L"))
    for name, size in (("in_bias", inner), ("out_bias", width)):
        if f"latent.{name}" in tensors:
            params[name] = f32(tensors.take(f"latent.{name}", (size,), "L"))
    return params


def _state(tensors: Tensors, router: Router, family: Family, c: HFConfig, *, hashed: bool) -> Any:
    if hashed:
        assert isinstance(router, TokenTable)
        shape = (router.vocab_size, router.k)
        return TableState(table=jnp.asarray(tensors.take("router.table", shape, "V K"), jnp.int32))
    state = router.init_state()
    has_bias = family.bias == "required"
    if family.bias == "optional":
        stated = c.key_of("selection_bias") is not None
        has_bias = c.get("selection_bias") if stated else "expert_bias" in tensors
    if not has_bias:
        return state
    size = state.expert_bias.shape[0]
    if "expert_bias" in tensors and len(tensors.shape("expert_bias")) == 2:  # Ernie keeps [1, E]
        bias = f32(tensors.take("expert_bias", (1, size), "1 E"))[0]
    else:
        bias = f32(tensors.take("expert_bias", (size,), "E"))
    return dataclasses.replace(state, expert_bias=bias)


def _has_shared(tensors: Tensors, family: Family, c: HFConfig) -> bool:
    if family.shared == "none":
        return False
    present = any(f"shared.{part}" in tensors for part in ("down", "up", "gate", "gate_up"))
    count = c.get("shared") if c.key_of("shared") or "shared" in c.defaults else None
    if family.shared == "optional" or count == 0:
        return present and count != 0
    return True


def _averages(c: HFConfig) -> bool:
    key = "shared_expert_combination_strategy"
    if key not in c.defaults:
        return False
    if c.get(key) not in ("sum", "average"):
        raise ValueError(
            f"config of {c.model_type!r}: expected {key} to be 'sum' or 'average', got "
            f"{c.get(key)!r}. If a model was trained with that, this library has no block for it."
        )
    return c.get(key) == "average"


def _norm_eps(c: HFConfig) -> float:
    stated = c.key_of("norm_eps") is not None or "norm_eps" in c.defaults
    return float(c.get("norm_eps")) if stated else 1e-6


def _text_experts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Ernie 4.5 VL keeps experts for text and for images apart; this block is the text path."""
    inside = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    return {
        n.removeprefix("text_moe."): t for n, t in inside.items() if not n.startswith("vision_moe.")
    }
