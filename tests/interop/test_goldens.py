"""Every block against numbers of transformers: experts, weights, outputs, gradients.

``tests/goldens/hf`` was written by somebody else, ``hf_generated`` by ``generate_hf.py`` beside it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop import MoEBlock, moe_block_from_hf, router_from_hf
from moe_jax.types import Routing

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = {p.stem: p for folder in ("hf", "hf_generated") for p in (GOLDENS / folder).glob("*.npz")}
# The block of transformers 5.23 hands a 0/1 mask to code that takes indices, so only its experts 0
# and 1 ever work. Its router is sound.
BROKEN_BLOCKS = ("nllb_moe", "nllb_moe__prioritized")


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(arrays, tensors of the block, config)."""
    with np.load(FILES[name]) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
    if isinstance(meta.get("config"), dict):
        config = meta["config"]
    else:
        config = {**meta["config_scalars"], **meta["used"]}
    if name == "dbrx":  # nested in DBRX's config, and so not among the scalars of the file
        config["ffn_config"] = {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 16}
    return arrays, tensors, {**config, "model_type": meta["arch"]}


def context_of(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array] | None:
    context = {k[8:]: jnp.asarray(v) for k, v in arrays.items() if k.startswith("context/")}
    return context or None


# One compiled function for all: families that are the same computation share its cache entry. The
# numbers are tiny, so compiling well would cost more than it saves.
def accepted_options(**options: Any) -> dict[str, Any]:
    """Those that this version of JAX has; it refuses the others."""
    accepted = {}
    for name, value in options.items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            continue
        accepted[name] = value
    return accepted


QUICK = accepted_options(
    xla_backend_optimization_level=0,
    xla_llvm_disable_expensive_passes=True,
    xla_cpu_use_fusion_emitters=False,
)


@functools.partial(jax.jit, static_argnames="implementation", compiler_options=QUICK)
def run(block: MoEBlock, x, cot, context, implementation="dense"):
    def loss(params, x):
        y = block.apply(params, x, context=context, implementation=implementation)
        return (y * cot).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(block.params, x)
    return block.route(x, context=context), y, grads


def dense_weights(indices: np.ndarray, weights: np.ndarray, experts: int) -> np.ndarray:
    """f64[T, E]: what each expert weighs; indices beyond E (no expert, zero experts) are left out."""
    out = np.zeros((indices.shape[0], experts + 1))
    rows = np.arange(indices.shape[0])[:, None]
    np.add.at(out, (rows, np.minimum(indices, experts)), weights)
    return out[:, :experts]


def expected(
    arrays: dict[str, np.ndarray], experts: int
) -> tuple[list[set[int]], np.ndarray] | None:
    """The experts of each token and their weights, or None where the file has neither."""
    at = "topk_" if "topk_index" in arrays else "derived/topk_"
    if f"{at}index" not in arrays:
        return None
    index, weight = arrays[f"{at}index"], arrays[f"{at}weight"]
    tokens = index.shape[0]
    if index.ndim == 3:  # Switch: one-hot, all zero where the capacity was full
        weights = index.reshape(tokens, -1) * weight.reshape(tokens, 1)
    else:
        weights = dense_weights(index, weight, experts)
    if index.ndim == 3 or (weight == 0).any():  # Zaya says "no expert" by weight 0 on expert 0
        return [set(np.flatnonzero(row)) for row in weights], weights
    return [{int(e) for e in row if e < experts} for row in index], weights


def check_routing(routing: Routing, arrays: dict[str, np.ndarray]) -> None:
    experts = routing.num_experts
    want = expected(arrays, experts)
    if want is None:
        return
    indices = np.asarray(routing.expert_indices)
    assert [{int(e) for e in row if e < experts} for row in indices] == want[0]
    got = dense_weights(indices, np.asarray(routing.combine_weights), experts)
    # LongCat weighs by up to 6, where float32 steps by 4.8e-7: both sides are within 1e-6 of float64.
    size = max(1.0, float(want[1].max()))
    np.testing.assert_allclose(got, want[1], rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("name", sorted(set(FILES) - set(BROKEN_BLOCKS)))
def test_block_equals_transformers(name):
    arrays, tensors, config = load(name)
    block = moe_block_from_hf(config, tensors)
    x = jnp.asarray(arrays["x"])
    cot = jnp.asarray(arrays["cot"]).reshape(x.shape)
    routing, y, (grads, dx) = run(block, x, cot, context_of(arrays))
    check_routing(routing, arrays)
    np.testing.assert_allclose(y, arrays["y"].reshape(x.shape), rtol=0, atol=1e-5)
    close(dx, arrays["grad/x"], "x")
    # Parameters are tensors moved about, so gradients of one are gradients of the other moved alike.
    moved = {n: arrays.get(f"grad/w/{n}", np.zeros_like(t)) for n, t in tensors.items()}
    want = moe_block_from_hf(config, moved).params
    if "post_norm" in want["experts"]:  # one tensor, repeated for every expert
        want["experts"]["post_norm"] = want["experts"]["post_norm"][0]
        grads["experts"]["post_norm"] = grads["experts"]["post_norm"].sum(axis=0)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        w = functools.reduce(lambda tree, key: tree[key.key], path, want)
        close(g, w, jax.tree_util.keystr(path))


def close(got, want, what: str) -> None:
    """Within 1e-4 of the largest entry."""
    want = np.asarray(want)
    size = max(float(np.abs(want).max()), 1e-30)
    assert float(np.abs(np.asarray(got) - want).max()) <= 1e-4 * size, what


@pytest.mark.parametrize("name", BROKEN_BLOCKS)
def test_router_equals_transformers(name):
    arrays, tensors, config = load(name)
    route = jax.jit(moe_block_from_hf(config, tensors).route, compiler_options=QUICK)
    routing = route(jnp.asarray(arrays["x"]))
    indices, weights = np.asarray(routing.expert_indices), np.asarray(routing.combine_weights)
    np.testing.assert_allclose(
        dense_weights(indices, weights, 8), arrays["topk_weight"], rtol=0, atol=1e-6
    )
    assert (indices == 8).any(), "nothing was dropped, so nothing was tested"


def test_gradients_reach_the_tensors_themselves():
    """The conversion is traceable: differentiate by what the checkpoint holds."""
    arrays, tensors, config = load("qwen2_moe")
    x, cot = jnp.asarray(arrays["x"]), jnp.asarray(arrays["cot"])

    def loss(tensors):
        y = moe_block_from_hf(config, tensors)(x, implementation="dense")
        return (y * cot).sum()

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)

    for name, g in grads({n: jnp.asarray(t) for n, t in tensors.items()}).items():
        close(g, arrays[f"grad/w/{name}"], name)


@pytest.mark.parametrize("name", ["mixtral", "llama4__top1", "longcat_flash", "nemotron_h__latent"])
def test_the_chosen_implementation_gives_the_same(name):
    arrays, tensors, config = load(name)
    x, cot = jnp.asarray(arrays["x"]), jnp.asarray(arrays["cot"])
    block = moe_block_from_hf(config, tensors)
    _, y, (_, dx) = run(block, x, cot.reshape(x.shape), None, implementation=None)
    np.testing.assert_allclose(y, arrays["y"].reshape(x.shape), rtol=0, atol=1e-5)
    close(dx, arrays["grad/x"], "x")


@pytest.mark.parametrize("name", sorted(FILES))
def test_router_from_hf_is_the_router_of_the_block(name):
    _, tensors, config = load(name)
    router = moe_block_from_hf(config, tensors).router
    if not name.endswith("__hash"):  # its tensors decide, not the config
        assert router_from_hf(config) == router


def test_a_context_that_the_weights_call_for_is_required():
    """Zaya's router adds the state of the layer before, DeepSeek-V4's hash layers look up token ids."""
    for name, key in (("zaya__depth", "router_states"), ("deepseek_v4__hash", "token_ids")):
        arrays, tensors, config = load(name)
        block = moe_block_from_hf(config, tensors)
        with pytest.raises(ValueError, match=f"context: expected '{key}'"):
            jax.eval_shape(block, jnp.asarray(arrays["x"]))


@pytest.mark.parametrize("name", ["gemma4", "ernie4_5_moe", "inkling_text", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_no_array_of_a_block_is_in_it_twice(name):
    """A training step may donate the block."""
    _, tensors, config = load(name)
    step = jax.jit(lambda b: jax.tree.map(lambda v: v + jnp.ones((), v.dtype), b), donate_argnums=0)
    assert step(moe_block_from_hf(config, tensors)).router.num_experts == 8


def test_inkling_by_the_names_of_its_checkpoints():
    """Gate and up alternate there; transformers parts them (its conversion_mapping)."""
    _, tensors, config = load("inkling_text")

    def alternate(gate, up):
        return np.stack([gate, up], axis=2).reshape(gate.shape[0], -1, gate.shape[2])

    there = dict(tensors)
    half = there["experts.gate_up_proj"].shape[1] // 2
    fused = there.pop("experts.gate_up_proj")
    there["experts.w13_weight"] = alternate(fused[:, :half], fused[:, half:])
    there["experts.w2_weight"] = there.pop("experts.down_proj")
    gate, up = (there.pop(f"shared_experts.{n}_proj") for n in ("gate", "up"))
    there["shared_experts.shared_w13_weight"] = alternate(gate, up)
    there["shared_experts.shared_w2_weight"] = there.pop("shared_experts.down_proj")
    there["gate.bias"] = there.pop("gate.e_score_correction_bias")
    one, two = moe_block_from_hf(config, tensors), moe_block_from_hf(config, there)
    jax.tree.map(np.testing.assert_array_equal, one, two)
