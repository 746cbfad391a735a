"""Pruned checkpoints are the pruned blocks, in Hub layout."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.interop.safetensors import SafetensorsFolder, write_safetensors
from moe_jax.models import HubFolder, load_model
from moe_jax.models.expert_saliency import Saliency, expert_saliency
from moe_jax.models.prune import (
    experts_to_keep,
    prune_block,
    pruning_limits,
    write_pruned,
)
from moe_jax.models.streaming import Stream
from tests.models.made import SMALL, block_shapes, make_folder

MODELS = Path(__file__).parents[1] / "goldens" / "models"
IDS = np.random.default_rng(0).integers(0, 96, (2, 12)).astype(np.int32)


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


def in_float8(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """DeepSeek-V3's blocks of 128 x 128: one for each of these small matrices."""
    if "experts." not in name or not name.endswith("proj.weight"):
        return {name: tensor}
    scale = np.full((1, 1), np.abs(tensor).max() / 448, np.float32)
    scaled = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
    return {name: scaled, f"{name}_scale_inv": scale}


def in_mxfp4(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """gpt-oss' groups of 32, of random codes. The golden's width of experts is no multiple of 32."""
    rng = np.random.default_rng(len(name))
    experts = tensor.shape[0]
    shapes = {"gate_up_proj": (128, 1), "down_proj": (32, 2)}
    kind = name.rpartition(".")[2]
    if kind == "gate_up_proj_bias":
        return {name: np.concatenate([tensor, tensor[:, :32]], axis=1)}
    if kind not in shapes:
        return {name: tensor}
    rows, groups = shapes[kind]
    return {
        f"{name}_blocks": rng.integers(0, 256, (experts, rows, groups, 16)).astype(np.uint8),
        f"{name}_scales": rng.integers(118, 124, (experts, rows, groups)).astype(np.uint8),
    }


FLOAT8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("name", "change", "format_", "sizes"),
    [
        ("deepseek_v3", in_float8, FLOAT8, {}),
        ("gpt_oss", in_mxfp4, {"quant_method": "mxfp4"}, {"intermediate_size": 64}),
    ],
)
def test_a_quantised_checkpoint_is_pruned_as_it_is_stored(name, change, format_, sizes, tmp_path):
    config = json.loads((MODELS / name / "config.json").read_text()) | sizes
    tensors: dict[str, np.ndarray] = {}
    for tensor, array in SafetensorsFolder(MODELS / name).items():
        tensors |= change(tensor, np.array(array))
    folder = tmp_path / "quantised"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": format_}))
    specs = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_safetensors(folder / "model.safetensors", specs, tensors.__getitem__)
    opened = HubFolder(folder)
    layer = opened.config.moe_layers[-1]
    _, groups = pruning_limits(opened)
    kept = {
        n: np.arange(opened.num_experts(n)).reshape(groups, -1)[:, 1:].ravel()
        for n in opened.config.moe_layers
    }
    pruned = HubFolder(write_pruned(opened, kept, tmp_path / "pruned"))
    stored = SafetensorsFolder(pruned.folder)
    assert {t.dtype for t in stored.values()} == {t.dtype for t in tensors.values()}
    want = prune_block(opened.layer(layer)["moe"], kept[layer])
    got = pruned.layer(layer)["moe"]
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_constant_experts_are_refused_by_name():
    with pytest.raises(ValueError, match=r"mone: .* no place for it"):
        experts_to_keep({0: saliency(8)}, 0.5, method="mone")


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
