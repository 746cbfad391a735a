"""Whole models that transformers wrote: its logits, hidden states, padding and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.interop.safetensors import SafetensorsFolder
from moe_jax.models import CausalLM, DecoderOutput, generate, load_model, save_model

GOLDENS = Path(__file__).parents[1] / "goldens" / "models"
FAMILIES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request) -> tuple[str, CausalLM, dict[str, np.ndarray]]:
    folder = GOLDENS / request.param
    with np.load(folder / "io.npz") as arrays:
        return request.param, load_model(folder), dict(arrays)


def extended(model: CausalLM, ids, mask, answer) -> DecoderOutput:
    """One call without a cache over prompt and answer; its last token is not part of the call.

    Attention is causal. So the logits of the prompt are those of a call with the prompt alone, and the
    others are those of a call after each prefix. One shape serves all tests, so it compiles once.
    """
    ids = np.concatenate([ids, answer[:, :-1]], axis=1)
    mask = np.concatenate([mask, np.ones_like(mask[:, : answer.shape[1] - 1])], axis=1)
    return model.run(ids, mask, return_hidden=True)


def test_logits_hidden_states_and_greedy_tokens_are_those_of_transformers(golden):
    _, model, io = golden
    ids, greedy = io["input_ids"], io["greedy"]
    length = ids.shape[1]
    out = extended(model, ids, np.ones_like(ids), greedy)
    np.testing.assert_allclose(out.logits[:, :length], io["logits"], rtol=0, atol=1e-4)
    assert len(out.hidden) == len(io["hidden"]) == model.config.num_layers + 1
    hidden = np.stack(out.hidden)[:, :, :length]
    np.testing.assert_allclose(hidden, io["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(out.logits[:, length - 1 :], axis=-1), greedy)
    with_cache = generate(model, ids, max_new_tokens=greedy.shape[1])
    np.testing.assert_array_equal(with_cache, greedy)


def test_rows_padded_on_the_left_give_the_same_logits_and_go_on_from_a_cache(golden):
    _, model, io = golden
    ids, mask = io["padded_ids"], io["padded_mask"]
    length, real = ids.shape[1], mask.astype(bool)
    made = generate(model, ids, mask, max_new_tokens=io["greedy"].shape[1])
    logits = extended(model, ids, mask, made).logits
    assert np.isfinite(logits).all(), "padding holds no NaN that a sum could spread"
    padded = np.asarray(logits[:, :length])
    np.testing.assert_allclose(padded[real], io["padded_logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(logits[:, length - 1 :], axis=-1), made)


def test_a_saved_model_has_the_checkpoints_bits(golden, tmp_path):
    name, model, _ = golden
    folder = save_model(model, tmp_path / "saved")
    assert (folder / "config.json").read_text() == (GOLDENS / name / "config.json").read_text()
    theirs, mine = SafetensorsFolder(GOLDENS / name), SafetensorsFolder(folder)
    assert set(theirs) == set(mine)
    for tensor in theirs:
        assert theirs[tensor].dtype == mine[tensor].dtype, tensor
        np.testing.assert_array_equal(
            np.ascontiguousarray(theirs[tensor]).view(np.uint8),
            np.ascontiguousarray(mine[tensor]).view(np.uint8),
            err_msg=tensor,
        )
    again = load_model(folder)
    for left, right in zip(
        jax.tree.leaves(model.params()), jax.tree.leaves(again.params()), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_generation_without_a_cache_gives_the_same_tokens():
    model = load_model(GOLDENS / "mixtral")
    with np.load(GOLDENS / "mixtral" / "io.npz") as io:
        made = generate(model, io["input_ids"], max_new_tokens=2, use_cache=False)
        np.testing.assert_array_equal(made, io["greedy"][:, :2])


def test_bfloat16_is_near_float32_and_is_saved_as_what_it_is(tmp_path):
    model = load_model(GOLDENS / "deepseek_v3", dtype="bfloat16")
    assert model.dtype == "bfloat16"
    assert model.blocks()[1].params["router"]["kernel"].dtype == "float32"
    with np.load(GOLDENS / "deepseek_v3" / "io.npz") as io:
        error = np.abs(model(io["input_ids"]) - io["logits"])
        assert np.median(error) < 0.05 * np.abs(io["logits"]).max()
    folder = save_model(model, tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(folder)
    pairs = zip(jax.tree.leaves(model.params()), jax.tree.leaves(again.params()), strict=True)
    for left, right in pairs:
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_the_table_of_goldens_covers_the_families_it_promises():
    types = {json.loads((GOLDENS / f / "config.json").read_text())["model_type"] for f in FAMILIES}
    assert types >= {
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "granitemoe",
        "phimoe",
    }
