"""Every family of the table without a whole golden in ``models/``: what transformers computes.

Weights are a function of their names, so a folder in ``models_generated/`` holds only shapes, the
config, and transformers' results. ``tests/goldens/generate_models.py`` wrote them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_jax.interop.safetensors import SafetensorsFolder, write_safetensors
from moe_jax.models import init_cache, load_model, save_model, supported_decoders
from moe_jax.models.config_reader import decoder_config
from tests.goldens.weights import draw
from tests.models.made import SMALL

GOLDENS = Path(__file__).parents[1] / "goldens"
GENERATED = GOLDENS / "models_generated"
NAMES = sorted(path.name for path in GENERATED.iterdir() if path.is_dir())


def written(name: str, folder: Path) -> Path:
    """The checkpoint of a golden, its weights drawn."""
    folder.mkdir()
    shutil.copy(GENERATED / name / "config.json", folder)
    shapes = json.loads((GENERATED / name / "shapes.json").read_text())
    specs = {n: (np.dtype(np.float32), tuple(shape)) for n, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", specs, lambda n: draw(n, shapes[n]))
    return folder


def test_every_family_has_a_golden():
    types = {json.loads(p.read_text())["model_type"] for p in GOLDENS.glob("models*/*/config.json")}
    assert types == set(supported_decoders())


@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_what_transformers_does_and_is_saved_with_its_bits(name, tmp_path):
    folder = written(name, tmp_path / "made")
    model = load_model(folder)
    with np.load(GENERATED / name / "io.npz") as arrays:
        io = dict(arrays)
    out = model.run(io["input_ids"], return_hidden=True)
    np.testing.assert_allclose(out.logits, io["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.stack(out.hidden), io["hidden"], rtol=0, atol=1e-4)
    real = io["padded_mask"].astype(bool)
    padded = model(io["padded_ids"], io["padded_mask"])
    np.testing.assert_allclose(padded[real], io["padded_logits"][real], rtol=0, atol=1e-4)
    # One token a call, the prompt too: a call of many tokens with a cache is in `test_goldens`, and
    # would be one more program for each family.
    ids, cache = io["input_ids"], init_cache(model.config, 2, 16)
    made = []
    for i in range(ids.shape[1] + io["greedy"].shape[1] - 1):
        token = ids[:, i : i + 1] if i < ids.shape[1] else made[-1]
        step = model.run(token, cache=cache)
        cache = step.cache
        made.append(np.argmax(step.logits, axis=-1).astype(np.int32))
    answer = np.concatenate(made[ids.shape[1] - 1 :], axis=1)
    np.testing.assert_array_equal(answer, io["greedy"])
    saved = SafetensorsFolder(save_model(model, tmp_path / "saved"))
    tensors = SafetensorsFolder(folder)
    assert set(saved) == set(tensors)
    for tensor in tensors:
        np.testing.assert_array_equal(saved[tensor], tensors[tensor], err_msg=tensor)


def test_layers_have_the_windows_and_positions_that_transformers_gives_them():
    def layers(model_type, **more):
        config = SMALL | {
            "model_type": model_type,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
        }
        counts = {"num_experts": 4, "num_experts_per_tok": 2}
        return decoder_config(config | counts | more).layers

    kinds = [(x.window, x.rope is not None) for x in layers("exaone_moe", sliding_window=8)]
    assert kinds == [(8, True), (8, True), (8, True), (None, False), (8, True)]
    kinds = [(x.window, x.rope is not None) for x in layers("kolibri1", sliding_window=8)]
    assert kinds == [(8, True)] * 4 + [(None, False)]
    kinds = [(x.window, x.experts) for x in layers("flint", sliding_window=8)]
    assert kinds == [(None, False), (None, False), (8, True), (8, True), (None, True)]
    kinds = [x.experts for x in layers("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[1])]
    assert kinds == [False, False, False, True, False]
    windows = [
        x.window
        for x in layers("qwen2_moe", use_sliding_window=True, sliding_window=4, max_window_layers=3)
    ]
    assert windows == [4, None, 4, None, None]
    assert [x.window for x in layers("mixtral", sliding_window=4)] == [4] * 5
    whole = layers("gpt_oss", layer_types=["full_attention"] * 5, sliding_window=8)
    assert [x.window for x in whole] == [None] * 5
