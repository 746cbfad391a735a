"""A checkpoint of published blocks says what its layers are: inspected, exported, run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import archive, open_checkpoint, save
from moe_jax.checkpoint.description import describe_checkpoint
from moe_jax.experts import FeedForward
from moe_jax.interop import moe_block_from_hf
from moe_jax.layer import moe_layer
from moe_jax.models import block_checkpoint
from moe_jax.models.block_checkpoint import block_spec
from moe_jax.routers import MinP

E, D, F = 4, 8, 6
EXPERTS = {
    "gate.weight": (E, D),
    "experts.gate_up_proj": (E, 2 * F, D),
    "experts.down_proj": (E, D, F),
}
SHARED = {
    "shared_expert.gate_proj.weight": (F, D),
    "shared_expert.up_proj.weight": (F, D),
    "shared_expert.down_proj.weight": (D, F),
    "shared_expert_gate.weight": (1, D),
}


def block_of(config, shapes):
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return moe_block_from_hf(config, tensors)


PLAIN = block_of({"model_type": "mixtral", "num_local_experts": E}, EXPERTS)
GATED = block_of(
    {"model_type": "qwen2_moe", "num_experts": E, "num_experts_per_tok": 2}, EXPERTS | SHARED
)
SCALED = dataclasses.replace(
    PLAIN, options=dataclasses.replace(PLAIN.options, output_scale=2.0)
)  # `moe_layer` has no such factor


def test_inspection_and_export_open_a_checkpoint_of_blocks_and_moe_layer_computes_them(tmp_path):
    blocks = {"layer_0": PLAIN, "layer_1": GATED, "layer_2": SCALED}
    rule = MinP(num_experts=E, max_k=3)
    blocks["layer_3"] = dataclasses.replace(PLAIN, router=rule, state=rule.init_state())
    folder = save(tmp_path / "blocks", block_checkpoint(blocks, metadata={"source": "test"}))

    opened = open_checkpoint(folder)
    described = describe_checkpoint(opened)
    assert {name: r["config"] for name, r in described["routers"].items()} == {
        name: block.router.to_json() for name, block in blocks.items()
    }
    assert described["metadata"] == {"source": "test"}
    assert archive.export(tmp_path / "export", folder)["files"]

    assert {opened.layer(name).width for name in blocks} == {D}
    assert opened.layer("layer_2").layer is None, "its outputs are not those of moe_layer"
    x = jax.random.normal(jax.random.key(0), (5, D), jnp.float32)
    ruled, gated = opened.layer("layer_3"), opened.layer("layer_1")
    want = blocks["layer_3"].route(x).expert_indices
    np.testing.assert_array_equal(ruled.route(x).expert_indices, want)
    assert gated.experts is not None
    assert gated.layer is not None
    y, _ = moe_layer(gated.router, gated.experts, gated.layer, gated.state, x)
    np.testing.assert_allclose(y, GATED(x), rtol=1e-5, atol=1e-5)


def test_a_block_of_which_moe_layer_computes_less_is_described_by_its_router_alone():
    bare = block_spec(SCALED, ("a",))
    assert (bare.router, bare.layer, bare.experts) == (("a", "router"), None, None)
    other = dataclasses.replace(
        GATED, shared_fn=FeedForward(activation="silu", gated=True, use_bias=True)
    )
    assert block_spec(other, ("a",)).layer is None
    latent = dataclasses.replace(PLAIN, params={**PLAIN.params, "latent": {}})
    assert block_spec(latent, ("a",)).layer is None


def test_a_checkpoint_without_blocks_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        block_checkpoint({})
