"""Checkpoints that transformers wrote: a layer's block is found by its number and gives its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.interop import load_hf_block, router_from_hf
from moe_jax.interop.safetensors import SafetensorsFolder

HUB = Path(__file__).parents[1] / "goldens" / "hub"
FOLDERS = sorted(p.name for p in HUB.iterdir() if p.is_dir())


def blocks():
    for name in FOLDERS:
        with np.load(HUB / name / "blocks.npz") as arrays:
            for key in arrays:
                if key.endswith("/y"):
                    yield name, int(key.split("/")[0])


CASES = list(blocks())


def test_the_three_families_are_there_whole_sharded_and_in_bfloat16():
    types = {json.loads((HUB / f / "config.json").read_text())["model_type"] for f in FOLDERS}
    assert types == {"mixtral", "olmoe", "deepseek_v3"}
    indexed = [f for f in FOLDERS if (HUB / f / "model.safetensors.index.json").is_file()]
    assert indexed == ["deepseek_v3_sharded", "mixtral_sharded_bf16"]
    assert (
        SafetensorsFolder(HUB / "mixtral_sharded_bf16")["lm_head.weight"].dtype.name == "bfloat16"
    )


@pytest.mark.parametrize(("folder", "layer"), CASES, ids=[f"{f}-{n}" for f, n in CASES])
def test_a_block_read_from_disk_equals_transformers(folder, layer):
    with np.load(HUB / folder / "blocks.npz") as arrays:
        want = {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(f"{layer}/")}
    block = load_hf_block(HUB / folder, layer)
    x = want["x"]
    y, routing = jax.jit(lambda b, x: (b(x, implementation="dense"), b.route(x)))(block, x)
    np.testing.assert_allclose(y, want["y"], rtol=0, atol=1e-5)
    order = np.argsort(want["topk_index"], axis=-1)
    mine = np.argsort(routing.expert_indices, axis=-1)
    for got, theirs in (
        (routing.expert_indices, want["topk_index"]),
        (routing.combine_weights, want["topk_weight"]),
    ):
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(got), mine, axis=-1),
            np.take_along_axis(theirs, order, axis=-1),
            rtol=0,
            atol=1e-6,
        )


def test_the_dense_layer_is_named_and_the_config_gives_the_router():
    with pytest.raises(ValueError, match=r"experts in layer 0, got none.*Layers with experts: 1\."):
        load_hf_block(HUB / "deepseek_v3_sharded", 0)
    config = json.loads((HUB / "deepseek_v3_sharded" / "config.json").read_text())
    assert load_hf_block(HUB / "deepseek_v3_sharded", 1).router == router_from_hf(config)
