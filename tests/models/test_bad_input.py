"""What cannot be loaded or run is named, with what to do about it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop.safetensors import SafetensorsFile, write_safetensors
from moe_jax.models import (
    HubFolder,
    Sampling,
    decoder_config,
    generate,
    init_cache,
    load,
    load_model,
    save_model,
    supported_decoders,
)
from moe_jax.models.generate import sample
from moe_jax.models.unsupported import REASONS
from moe_jax.routers import TopP

GOLDENS = Path(__file__).parents[1] / "goldens"
MODELS = GOLDENS / "models"
CONFIGS = sorted([*MODELS.iterdir(), *(GOLDENS / "models_generated").iterdir()])


@pytest.fixture(scope="module")
def model():
    return load_model(MODELS / "mixtral")


def config_of(name: str, **changes) -> dict:
    return json.loads((MODELS / name / "config.json").read_text()) | changes


def copy(name: str, to: Path, **changes) -> Path:
    shutil.copytree(MODELS / name, to)
    (to / "config.json").write_text(json.dumps(config_of(name, **changes)))
    return to


def rewrite(folder: Path, change) -> None:
    """The weights with ``change(name -> array)`` made to them."""
    tensors = {n: np.array(t) for n, t in SafetensorsFile(folder / "model.safetensors").items()}
    change(tensors)
    specs = {n: (t.dtype, t.shape) for n, t in tensors.items()}
    write_safetensors(folder / "model.safetensors", specs, tensors.__getitem__)


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name for p in MODELS.iterdir()))
def test_a_key_that_nobody_reads_is_refused_by_name(name):
    with pytest.raises(ValueError, match="attention_temperature"):
        decoder_config(config_of(name, attention_temperature=2.0))
    assert decoder_config(config_of(name, attention_temperature=None)) == decoder_config(
        config_of(name)
    ), "a key that is null states nothing"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mixtral", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("mixtral", {"sliding_window": 0}, "sliding_window"),
        ("mixtral", {"vocab_size": None}, "vocab_size"),
        ("mixtral", {"hidden_act": "mish"}, "mish"),
        ("mixtral", {"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
        (
            "mixtral",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "wavelength": 3}},
            "wavelength",
        ),
        ("mixtral", {"vision_config": {"depth": 2}}, "vision_config"),
        ("mixtral", {"text_config": {"model_type": "mixtral"}}, "text_config"),
        ("qwen2_moe", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor"),
        (
            "phimoe",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_mscale",
        ),
        ("mixtral", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor"),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(name, changes, said):
    with pytest.raises(ValueError, match=said):
        decoder_config(config_of(name, **changes))


def keys_of(config: dict, before: tuple[str, ...] = ()):
    """The path of every key of a config, those inside objects included."""
    for key, value in config.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


@pytest.mark.parametrize("folder", CONFIGS, ids=lambda folder: folder.name)
def test_a_value_of_another_kind_is_refused_by_name_or_changes_nothing(folder):
    """The text "false" was true, a window of true one token, and 0 in places a ZeroDivisionError."""
    config = json.loads((folder / "config.json").read_text())
    wanted = decoder_config(config)
    for path in keys_of(config):
        for wrong in ("x", "", [], [{}], {}, {"a": 1}, True, float("nan")):
            changed = json.loads(json.dumps(config))
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            stated = inside[path[-1]]
            if stated is None or (type(stated) is type(wrong) and wrong == wrong):
                continue  # a value of the same kind, or a key without one
            inside[path[-1]] = wrong
            try:
                got = decoder_config(changed)
            except ValueError as error:
                got = str(error)
            refused = isinstance(got, str) and path[-1] in got
            assert refused or got == wanted, f"{path} = {wrong!r} is read as {got}"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling"),
        ("deepseek_v3", {"first_k_dense_replace": 0.5}, "first_k_dense_replace"),
        ("mixtral", {"head_dim": 8.0}, "head_dim"),
        ("mixtral", {"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ("mixtral", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
        ("mixtral", {"num_nextn_predict_layers": "x"}, "num_nextn_predict_layers"),
        ("mixtral", {"num_local_experts": [4, "x"]}, "num_local_experts"),  # one a layer
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "high_freq_factor",
        ),
        (
            "mixtral",
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
                "max_position_embeddings": None,
            },
            "original_max_position_embeddings",
        ),
        (
            "mixtral",
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
                "max_position_embeddings": None,
            },
            "max_position_embeddings",
        ),
    ],
)
def test_a_number_that_the_formulas_cannot_take_is_refused_by_name(name, changes, said):
    with pytest.raises(ValueError, match=said):
        decoder_config(config_of(name, **changes))


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_a_key_that_is_missing_is_asked_for(key):
    config = config_of("mixtral")
    config.pop(key)
    with pytest.raises(
        ValueError, match=f"expected {key} to be a whole.*got none. Add it"
    ) as error:
        decoder_config(config)
    assert "nothing else" not in str(error.value)
    with pytest.raises(ValueError, match=r"num_attention_heads=4, got 3\. Correct config"):
        decoder_config(config_of("mixtral", num_key_value_heads=3))


def test_a_null_in_rope_parameters_states_nothing():
    stated = {"rope_theta": 5e5, "mrope_section": None, "factor": None}
    plain = decoder_config(config_of("mixtral", rope_parameters={"rope_theta": 5e5}))
    assert decoder_config(config_of("mixtral", rope_parameters=stated)) == plain


def test_unknown_families_are_refused_and_the_nearest_named():
    with pytest.raises(ValueError, match="qwen3_moe"):
        decoder_config({"model_type": "qwen3_mo"})
    # Experts are read by moe_jax.interop, other layers are not: the message says which.
    for model_type, reason in (
        ("granitemoehybrid", r"state-space \(Mamba\) layers.*load_hf_block"),
        ("bailing_hybrid", "delta rule"),
        ("kimi_linear", "delta rule"),
        ("longcat_flash", "two attention blocks"),
        ("bailing_moe", "published beside its weights only"),
        ("dbrx", "attention that is not implemented"),
        ("llama", "no experts"),
    ):
        with pytest.raises(ValueError, match=f"'{model_type}'.*{reason}"):
            decoder_config({"model_type": model_type})
    assert not set(REASONS) & set(supported_decoders()), "what runs is not refused"
    with pytest.raises(ValueError, match="model_type"):
        decoder_config({})
    with pytest.raises(TypeError, match="dict"):
        decoder_config("mixtral")  # pyright: ignore[reportArgumentType]


def test_kimi_k2_is_read_as_the_model_that_its_checkpoints_name():
    deepseek = config_of("deepseek_v3")
    assert decoder_config(deepseek | {"model_type": "kimi_k2"}) == decoder_config(deepseek)


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_without_config_or_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("mixtral")))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(GOLDENS / "hub" / "mixtral_sharded_bf16", folder)
    shard = sorted(folder.glob("*-of-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        HubFolder(folder)  # before the first layer is read


def test_too_little_memory_for_the_whole_model_is_said_with_what_to_do(monkeypatch):
    monkeypatch.setattr(load, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"free memory.*layer by layer"):
        load_model(MODELS / "mixtral")
    assert (
        HubFolder(MODELS / "mixtral", dtype="bfloat16").size() * 2
        == HubFolder(MODELS / "mixtral").size()
    )


def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path):
    folder = copy("mixtral", tmp_path / "a")
    rewrite(folder, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(ValueError, match=r"layer 1: expected a tensor 'self_attn\.k_proj\.weight'"):
        HubFolder(folder)  # before the first layer is read
    folder = copy("mixtral", tmp_path / "b", num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"k_proj.*float\[32, 32\], got float32\[16, 32\]"):
        load_model(folder)


def test_a_layer_without_tensors_is_named_before_the_first_is_read(tmp_path):
    folder = copy("mixtral", tmp_path / "a", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"expected 3 layers, as num_hidden.*no tensor of layer 2"):
        HubFolder(folder)
    folder = copy("mixtral", tmp_path / "b")
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.1.block")])
    with pytest.raises(ValueError, match="layer 1: expected experts, got none"):
        HubFolder(folder)


def test_layers_beyond_the_last_are_refused_unless_they_predict_further_tokens(tmp_path):
    folder = copy("mixtral", tmp_path / "a", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"expected 1 layers.*tensors of layer 1"):
        HubFolder(folder)
    rewrite(folder, lambda t: t.update({"model.layers.1.eh_proj.weight": np.ones(1, np.float32)}))
    assert HubFolder(folder).config.num_layers == 1


def test_a_broken_generation_config_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json.*JSON"):
        load.end_of_text(tmp_path)


@pytest.mark.parametrize("stated", ["2", [2, "x"], {"a": 1}, True, -1, 2.5, [[1]]])
def test_an_end_of_text_that_is_no_id_is_named(tmp_path, stated):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    with pytest.raises(ValueError, match=r"generation_config\.json.*eos_token_id"):
        load.end_of_text(tmp_path)


def test_tensors_that_the_config_does_not_state_are_refused(tmp_path):
    folder = copy("mixtral", tmp_path / "a")
    extra = "model.layers.0.self_attn.q_norm.weight"
    rewrite(folder, lambda t: t.update({extra: np.ones(8, np.float32)}))
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight"):
        load_model(folder)
    # A layer that the config calls dense, with experts in the file.
    folder = copy("deepseek_v3", tmp_path / "b", first_k_dense_replace=2)
    with pytest.raises(ValueError, match=r"layer 1.*mlp"):
        load_model(folder)


@pytest.mark.parametrize("tensor", ["self_attn.q_proj", "block_sparse_moe.experts.0.w1"])
def test_integers_are_never_read_as_plain_weights(tmp_path, tensor):
    folder = copy("mixtral", tmp_path / "a")
    name = f"model.layers.0.{tensor}.weight"
    rewrite(folder, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=r"int8"):
        load_model(folder)


def test_quantised_weights_are_restored_and_unknown_methods_refused(tmp_path):
    plain, folder = copy("mixtral", tmp_path / "plain"), copy("mixtral", tmp_path / "int8")

    def quantise(tensors, *, keep):
        for name in [
            n for n in tensors if ".layers." in n and "norm" not in n and "gate." not in n
        ]:
            scale = np.abs(tensors[name]).max(axis=1, keepdims=True) / np.float32(127)
            numbers = np.round(tensors[name] / scale).astype(np.int8)
            tensors[name] = numbers if keep else numbers.astype(np.float32) * scale
            if keep:
                tensors[name.replace(".weight", ".weight_scale")] = scale

    rewrite(plain, lambda t: quantise(t, keep=False))
    rewrite(folder, lambda t: quantise(t, keep=True))
    for method in ("compressed-tensors", "gguf"):
        config = config_of("mixtral", quantization_config={"quant_method": method})
        (folder / "config.json").write_text(json.dumps(config))
        if method == "gguf":
            with pytest.raises(ValueError, match="gguf"):
                load_model(folder)
            continue
        restored = load_model(folder)
        wanted = jax.tree.leaves(load_model(plain).params())
        for got, want in zip(jax.tree.leaves(restored.params()), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
        with pytest.raises(ValueError, match="quantised checkpoint"):
            save_model(restored, tmp_path / "saved")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ],
)
def test_float8_without_its_scales_is_never_read_as_plain_weights(tmp_path, tensor):
    folder = copy("mixtral", tmp_path / "a")
    rewrite(folder, lambda t: t.update({tensor: t[tensor].astype(jnp.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=rf"{tensor.split('.')[-2]}.*float8.*scales"):
        load_model(folder)


def test_a_head_of_its_own_is_refused_where_the_config_ties_it_to_the_embedding(tmp_path):
    folder = copy("mixtral", tmp_path / "a", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load_model(folder)
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda t: t.update({"lm_head.weight": t[embedding]}))
    stored_twice = load_model(folder)(jnp.array([[1, 2]]))
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    np.testing.assert_array_equal(load_model(folder)(jnp.array([[1, 2]])), stored_twice)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="float16"):
        load_model(MODELS / "mixtral", dtype="float16")


# --- calls ------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_named(model):
    for bad in (-1, 96):
        with pytest.raises(ValueError, match=rf"0 to 95, got {bad}"):
            model(jnp.array([[1, bad]]))
    with pytest.raises(TypeError, match="input_ids"):
        model(jnp.array([[1.0]]))
    with pytest.raises(ValueError, match="input_ids"):
        model(jnp.array([1, 2]))


def test_an_attention_mask_of_a_wrong_shape_is_named(model):
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 3\].*\[3\]"):
        model(jnp.array([[1, 2, 3]]), jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="attention_mask"):
        model(jnp.array([[1, 2, 3]]), [[1, 1, 1]])


def test_more_tokens_than_a_cache_or_the_positions_hold_are_named(model):
    cache = init_cache(model.config, 1, 2)
    with pytest.raises(ValueError, match="at most 2 tokens"):
        model.run(jnp.array([[1, 2, 3]]), cache=cache)
    changes = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        init_cache(decoder_config(config_of("mixtral", **changes)), 1, 65)


def test_settings_of_generation_are_checked(model):
    ids = jnp.array([[1, 2]])
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, ids, max_new_tokens=0)
    for wrong in (2.5, "2", True):
        with pytest.raises(TypeError, match=r"max_new_tokens: expected an integer"):
            generate(model, ids, max_new_tokens=wrong)
    with pytest.raises(ValueError, match=r"input_ids: expected int\[B, S\]"):
        generate(model, ids[0], max_new_tokens=1)
    with pytest.raises(ValueError, match="key"):
        generate(model, ids, max_new_tokens=1, sampling=Sampling(temperature=1.0))
    for name in ("temperature", "top_p"):
        text: Any = {name: "1"}
        with pytest.raises(TypeError, match=f"{name}: expected a number"):
            Sampling(**text)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=float("nan"))
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0.0)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_tiny_temperature_takes_the_likeliest_token(top_p):
    logits = jnp.array([[0.0, 3.0, -2.0], [50.0, 1.0, 2.0]])
    for temperature in (1e-3, 1e-30, 1e-45):
        sampling = Sampling(temperature=temperature, top_p=top_p)
        assert sample(logits, sampling, jax.random.key(0)).tolist() == [1, 0]


def test_a_model_that_the_hub_layout_cannot_hold_is_not_saved(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="files"):
        save_model(model, tmp_path)
    block = model.blocks()[0]
    changed = load_model(MODELS / "mixtral")
    rule = TopP(num_experts=4, p=0.5, max_k=2)
    changed.set_block(0, dataclasses.replace(block, router=rule, state=rule.init_state()))
    with pytest.raises(ValueError, match=r"layer 0.*TopP"):
        save_model(changed, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="with experts"):
        load_model(MODELS / "qwen3_moe").set_block(0, block)
