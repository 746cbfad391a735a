"""Pruned checkpoints are the pruned blocks, in Hub layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_jax.interop.safetensors import SafetensorsFolder
from moe_jax.models import HubFolder, load_model
from moe_jax.models.prune import (
    Saliency,
    expert_saliency,
    experts_to_keep,
    prune_block,
    pruning_limits,
    write_pruned,
)
from moe_jax.models.streaming import Stream
from tests.models.made import SMALL, block_shapes, make_folder

MODELS = Path(__file__).parents[1] / "goldens" / "models"
IDS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)

pytestmark = pytest.mark.compile_cheaply


def saliency(experts: int, seed: int = 0, hidden: float = 1.0) -> Saliency:
    draw = np.random.default_rng(seed).uniform(1, 2, (3, experts))
    return Saliency(tokens=draw[0], weight=draw[1], reap=draw[2], hidden=hidden)


def test_saliency_is_weight_times_the_norm_of_the_experts_own_output():
    model = load_model(MODELS / "olmoe")
    got = expert_saliency(model, IDS, batch_size=1)
    block, first = model.blocks()[0], got[0]
    # The input of the first block, by hand: attention and norm of layer 0.
    stream = Stream(model, IDS, lanes=("model",), batch_size=2)
    x = next(stream.layers()).inputs("model")
    routing = block.route(x)
    want = np.zeros((3, block.router.num_experts))
    for t in range(len(x)):
        for e, w in zip(routing.expert_indices[t], routing.combine_weights[t], strict=True):
            gate, up, down = (
                np.asarray(block.params["experts"][n][e]) for n in ("gate", "up", "down")
            )
            z = x[t] @ gate
            y = (z / (1 + np.exp(-z)) * (x[t] @ up)) @ down
            want[:, int(e)] += [1, float(w), float(w) * np.linalg.norm(y)]
    np.testing.assert_array_equal(first.tokens, want[0])
    np.testing.assert_allclose(first.weight, want[1], rtol=1e-5)
    np.testing.assert_allclose(first.reap, want[2], rtol=1e-4)
    np.testing.assert_allclose(first.score("reap"), want[2] / np.maximum(want[0], 1), rtol=1e-4)


def grouped(folder: Path) -> Path:
    """A model whose experts are in two routing groups of four, with a selection bias."""
    config = SMALL | {
        "model_type": "dots1",
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    return make_folder(folder, config, dict(block_shapes(config, bias=True)))


@pytest.mark.parametrize("name", ["dots1", "gpt_oss", "granitemoe"])
def test_a_pruned_checkpoint_is_the_model_with_its_pruned_blocks(name, tmp_path):
    source = grouped(tmp_path / "made") if name == "dots1" else MODELS / name
    opened = HubFolder(source)
    least, groups = pruning_limits(opened)
    totals = {layer: opened.num_experts(layer) for layer in opened.config.moe_layers}
    kept = experts_to_keep(
        {n: saliency(e, n) for n, e in totals.items()}, 0.5, least=least, groups=groups
    )
    folder = write_pruned(opened, kept, tmp_path / "small")
    model = load_model(source)
    for layer, block in model.blocks().items():
        model.set_block(layer, prune_block(block, kept[layer]))
    small = load_model(folder)
    half = next(iter(totals.values())) // 2
    assert {b.router.num_experts for b in small.blocks().values()} == {half}
    np.testing.assert_array_equal(small(IDS), model(IDS))
    keys = json.loads((source / "config.json").read_text())
    changed = json.loads((folder / "config.json").read_text())
    assert [k for k in keys if keys[k] != changed[k]] in (
        ["num_local_experts"],
        ["n_routed_experts"],
    )
    tensors, whole = SafetensorsFolder(folder), SafetensorsFolder(source)
    assert {t.dtype for t in tensors.values()} == {t.dtype for t in whole.values()}


def test_layers_that_keep_different_numbers_are_written_as_a_list(tmp_path):
    kept = {0: np.array([1, 2, 3]), 1: np.array([0, 3])}
    folder = write_pruned(MODELS / "mixtral", kept, tmp_path / "small")
    assert json.loads((folder / "config.json").read_text())["num_local_experts"] == [3, 2]
    blocks = load_model(folder).blocks()
    assert [block.router.num_experts for block in blocks.values()] == [3, 2]
    names = [n for n in SafetensorsFolder(folder) if ".experts." in n and ".0." in n]
    assert names


def test_counts_follow_the_layers_sensitivity_and_groups_lose_alike():
    cases = {0: saliency(8, 0, hidden=1.0), 1: saliency(8, 1, hidden=100.0)}
    kept = experts_to_keep(cases, 0.5, counts="sensitivity", least=2)
    assert [len(rows) for rows in kept.values()] == [6, 2], "layer 1 loses less by an expert"
    rows = experts_to_keep(cases, 0.5, groups=2)[0]
    assert len(rows[rows < 4]) == len(rows[rows >= 4]) == 2
    best = np.argsort(-cases[0].score("frequency"))[:4]
    assert set(experts_to_keep(cases, 0.5, method="frequency")[0]) == set(best)
    with pytest.raises(ValueError, match="at least 3 experts"):
        experts_to_keep(cases, 0.25, least=3)
    with pytest.raises(ValueError, match="method"):
        experts_to_keep(cases, 0.5, method="magic")
    with pytest.raises(ValueError, match="keep"):
        experts_to_keep(cases, 0.0)
