"""Quantised blocks: restored as their format defines, against hand-written decoders, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax.interop import load_hf_block, moe_block_from_hf
from tests.interop.test_safetensors import write

E, D, F = 4, 8, 6
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
CONFIG = {"model_type": "mixtral", "num_local_experts": E, "hidden_size": D}
RNG = np.random.default_rng(0)
SHAPES = {"w1": (F, D), "w3": (F, D), "w2": (D, F)}


def numbers(shape, dtype=E4M3):
    """Small numbers of the given dtype, every one of them exact."""
    return RNG.integers(-7, 8, size=shape).astype(dtype)


def scales(shape):
    return RNG.uniform(0.01, 0.1, size=shape).astype(np.float32)


def one_by_one(dtype, scale_shape, ending):
    """A Mixtral block with one quantised matrix an expert, and what its weights are worth."""
    router = RNG.normal(size=(E, D)).astype(np.float32)
    tensors, plain = {"gate.weight": router}, {"gate.weight": router}
    for e in range(E):
        for part, (rows, columns) in SHAPES.items():
            name = f"experts.{e}.{part}"
            q, s = numbers((rows, columns), dtype), scales(scale_shape(rows, columns))
            tensors |= {f"{name}.weight": q, f"{name}.{ending}": s}
            plain[f"{name}.weight"] = by_hand(q, s)
    return tensors, plain


def by_hand(q, s, block=(2, 4)):
    """float8 and int8: every number times the scale of its tensor, row or block."""
    out = np.zeros(q.shape, np.float32)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            if s.size == 1:
                scale = s.reshape(-1)[0]
            elif s.shape in ((q.shape[0], 1), (q.shape[0],)):
                scale = s.reshape(-1)[i]
            else:
                scale = s[i // block[0], j // block[1]]
            out[i, j] = np.float32(q[i, j]) * scale
    return out


def same(config, tensors, plain):
    got = moe_block_from_hf(config, tensors)
    want = moe_block_from_hf(CONFIG, plain)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


PER_CHANNEL = {"quant_method": "compressed-tensors", "format": "float-quantized"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [2, 4], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("dtype", "scale_shape", "ending", "settings"),
    [
        (E4M3, lambda r, c: (), "weight_scale", {"quant_method": "fp8"}),
        (E4M3, lambda r, c: (1,), "weight_scale", {"quant_method": "modelopt"}),
        (E4M3, lambda r, c: (r, 1), "weight_scale", PER_CHANNEL),
        (np.int8, lambda r, c: (r, 1), "weight_scale", PER_CHANNEL),
        (np.int8, lambda r, c: (r,), "weight_scale", None),
        (E4M3, lambda r, c: (-(-r // 2), -(-c // 4)), "weight_scale_inv", BLOCKS),
    ],
)
def test_scales_of_tensor_channel_and_block(dtype, scale_shape, ending, settings):
    tensors, plain = one_by_one(dtype, scale_shape, ending)
    config = CONFIG if settings is None else {**CONFIG, "quantization_config": settings}
    same(config, tensors, plain)


def test_blocks_of_128_are_the_default_and_the_last_ones_may_be_cut_off():
    width, hidden = 200, 130
    q = {n: numbers(s) for n, s in (("up", (E, 2 * hidden, width)), ("down", (E, width, hidden)))}
    s = {"up": scales((E, 3, 2)), "down": scales((E, 2, 2))}
    names = {"up": "experts.gate_up_proj", "down": "experts.down_proj"}
    router = RNG.normal(size=(E, width)).astype(np.float32)
    tensors, plain = {"gate.weight": router}, {"gate.weight": router}
    for part, name in names.items():
        tensors |= {name: q[part], f"{name}_scale_inv": s[part]}
        rows, columns = (np.arange(n) // 128 for n in q[part].shape[1:])
        plain[name] = q[part].astype(np.float32) * s[part][:, rows][:, :, columns]
    config = {**CONFIG, "hidden_size": width}
    got, want = moe_block_from_hf(config, tensors), moe_block_from_hf(config, plain)
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_zero_points_power_of_two_scales_and_activation_scales():
    tensors, plain = one_by_one(np.int8, lambda r, c: (r, 1), "weight_scale")
    name = "experts.2.w2"
    zero = RNG.integers(-3, 4, size=(D, 1)).astype(np.int8)
    tensors |= {f"{name}.weight_zero_point": zero, f"{name}.input_scale": np.float32(0.5)}
    shifted = tensors[f"{name}.weight"].astype(np.float32) - zero.astype(np.float32)
    plain[f"{name}.weight"] = shifted * tensors[f"{name}.weight_scale"]
    power = np.array([0.25], np.float32)
    tensors["experts.1.w1.weight_scale"] = power.astype(E8M0)
    plain["experts.1.w1.weight"] = tensors["experts.1.w1.weight"].astype(np.float32) * 0.25
    same(CONFIG, tensors, plain)


def test_bitsandbytes_int8():
    tensors, plain = one_by_one(np.int8, lambda r, c: (r,), "SCB")
    tensors["experts.0.w1.weight_format"] = np.uint8(0)
    for name in [n for n in plain if n.startswith("experts.")]:
        q, largest = tensors[name], tensors[name.replace("weight", "SCB")]
        plain[name] = q.astype(np.float32) * (largest[:, None] / np.float32(127))
    same({**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}, tensors, plain)


# --- MXFP4 ------------------------------------------------------------------------------------

FP4 = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0}


def mxfp4_by_hand(blocks, exponents):
    """OCP Microscaling: sign, two exponent bits, one mantissa bit; low four bits first."""
    out = np.zeros((*blocks.shape[:-1], 32), np.float32)
    for at in np.ndindex(*blocks.shape):
        for half, code in enumerate((int(blocks[at]) & 15, int(blocks[at]) >> 4)):
            number = (-1 if code & 8 else 1) * FP4[code & 7]
            out[(*at[:-1], 2 * at[-1] + half)] = number * 2.0 ** (int(exponents[at[:-1]]) - 127)
    return out.reshape(*blocks.shape[:-2], -1)


@pytest.mark.parametrize(("width", "hidden"), [(32, 64), (64, 64)])  # gpt-oss itself is square
def test_mxfp4_as_gpt_oss_has_it(width, hidden):
    shapes = {"experts.gate_up_proj": (2 * hidden, width), "experts.down_proj": (width, hidden)}
    rest = {
        "router.weight": RNG.normal(size=(E, width)).astype(np.float32),
        "router.bias": RNG.normal(size=E).astype(np.float32),
        "experts.gate_up_proj_bias": RNG.normal(size=(E, 2 * hidden)).astype(np.float32),
        "experts.down_proj_bias": RNG.normal(size=(E, width)).astype(np.float32),
    }
    tensors, plain = dict(rest), dict(rest)
    for name, (rows, columns) in shapes.items():
        blocks = RNG.integers(0, 256, size=(E, rows, columns // 32, 16)).astype(np.uint8)
        exponents = RNG.integers(120, 130, size=blocks.shape[:-1]).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        # transformers keeps [E, in, out] in memory, the packed file [E, out, in].
        plain[name] = mxfp4_by_hand(blocks, exponents).swapaxes(1, 2)
    config = {"model_type": "gpt_oss", "num_local_experts": E, "num_experts_per_tok": 2}
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    got = moe_block_from_hf({**config, "quantization_config": mxfp4}, tensors)
    if width != hidden:
        want = moe_block_from_hf(config, plain)
    else:  # square: only both tensors [E, out, in] can be told from both [E, in, out]
        want = moe_block_from_hf(config, {n: turned(n, t) for n, t in plain.items()})
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def turned(name, tensor):
    return tensor.swapaxes(1, 2) if name.endswith("_proj") else tensor


# --- on disk, experts in the layer itself -----------------------------------------------------


def gemma4(folder: Path, spoil=lambda tensors: None) -> dict[str, np.ndarray]:
    """A Gemma 4 layer in float8, one scale a tensor; returns its block in plain numbers."""
    plain = {
        "router.proj.weight": RNG.normal(size=(E, D)).astype(np.float32),
        "router.scale": RNG.normal(size=D).astype(np.float32),
        "router.per_expert_scale": RNG.normal(size=E).astype(np.float32),
    }
    tensors = dict(plain)
    for name, shape in (("gate_up_proj", (E, 2 * F, D)), ("down_proj", (E, D, F))):
        q, s = numbers(shape), scales(())
        tensors |= {f"experts.{name}": q, f"experts.{name}.weight_scale": s}
        plain[f"experts.{name}"] = q.astype(np.float32) * s
    around = {
        "self_attn.q_proj.weight": numbers((D, D)),
        "self_attn.q_proj.weight_scale": scales(()),
        "mlp.down_proj.weight": numbers((D, F)),
        "mlp.down_proj.weight_scale": scales(()),
        "layer_scalar": np.ones(1, np.float32),
    }
    layer = {f"model.language_model.layers.1.{n}": t for n, t in {**tensors, **around}.items()}
    spoil(layer)
    write(folder / "model.safetensors", layer)
    text = {"model_type": "gemma4_text", "num_experts": E, "top_k_experts": 2, "hidden_size": D}
    config = {"model_type": "gemma4", "text_config": text, "quantization_config": PER_CHANNEL}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def test_float8_experts_in_the_layer_itself(tmp_path):
    plain = gemma4(tmp_path)
    text = {"model_type": "gemma4_text", "num_experts": E, "top_k_experts": 2, "hidden_size": D}
    want = moe_block_from_hf(text, plain)
    jax.tree.map(np.testing.assert_array_equal, load_hf_block(tmp_path, 1).params, want.params)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "experts.down_proj.weight_scale",
            r"experts\.down_proj'.*got float8_e4m3fn.*without the scales",
        ),
        ("experts.down_proj", "expected a weight that is plain or quantised in a known way"),
    ],
)
def test_what_is_missing_in_the_layer_is_named(tmp_path, name, message):
    gemma4(tmp_path, lambda layer: layer.pop(f"model.language_model.layers.1.{name}"))
    with pytest.raises(ValueError, match=message):
        load_hf_block(tmp_path, 1)


@pytest.mark.parametrize("name", ["experts.down_proj.new_scale_kind", "router.proj.smooth"])
def test_no_tensor_of_the_blocks_modules_is_ignored(tmp_path, name):
    key = f"model.language_model.layers.1.{name}"
    gemma4(tmp_path, lambda layer: layer.update({key: np.ones(1, np.float32)}))
    with pytest.raises(ValueError, match=f"got also '{name}'"):
        load_hf_block(tmp_path, 1)


# --- refused by name --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        np.int8,
        np.uint8,
        np.int32,
        np.int64,
        np.bool_,
        E4M3,
        ml_dtypes.float8_e5m2,
        E8M0,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        ml_dtypes.float4_e2m1fn,
    ],
)
@pytest.mark.parametrize("name", ["gate.weight", "experts.down_proj", "experts.gate_up_proj"])
def test_numbers_that_stand_for_others_are_never_read_as_plain(dtype, name):
    tensors = {
        "gate.weight": np.ones((E, D), np.float32),
        "experts.gate_up_proj": np.ones((E, 2 * F, D), np.float32),
        "experts.down_proj": np.ones((E, D, F), np.float32),
    }
    tensors[name] = tensors[name].astype(dtype)
    with pytest.raises(
        ValueError, match=rf"'{name}': expected plain weights.*got {np.dtype(dtype)}"
    ):
        moe_block_from_hf(CONFIG, tensors)


PARTS = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "input_scale",
    "scales",
    "qweight",
    "qzeros",
    "g_idx",
    "SCB",
    "weight_packed",
    "weight_shape",
    "weight.absmax",
    "weight.quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight_zero_point",
)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("prefix", ["", "model.layers.3.block_sparse_moe."])
def test_a_part_without_its_weight_or_beside_a_plain_one_is_named(part, prefix):
    _, plain = one_by_one(E4M3, lambda r, c: (), "weight_scale")
    for alone in (True, False):
        wrong = {**plain, f"experts.1.w1.{part}": np.ones(1, np.float32)}
        if alone:
            del wrong["experts.1.w1.weight"]
        with pytest.raises(ValueError, match=r"experts\.1\.w1") as error:
            moe_block_from_hf(CONFIG, {prefix + n: t for n, t in wrong.items()}, prefix)
        assert "leave" not in str(error.value)


@pytest.mark.parametrize("method", ["awq", "gptq", "quark", "hqq", "bitnet", "auto-round", None])
def test_other_methods_are_refused_with_method_and_tensor(method):
    _, plain = one_by_one(E4M3, lambda r, c: (), "weight_scale")
    settings = {} if method is None else {"quant_method": method}
    config = {**CONFIG, "quantization_config": {**settings, "bits": 4}}
    with pytest.raises(ValueError, match=rf"{method or 'unnamed'}.*tensor '"):
        moe_block_from_hf(config, plain)


@pytest.mark.parametrize("settings", ["fp8", ["awq"], 8])
def test_settings_that_are_no_object_are_refused(settings):
    _, plain = one_by_one(E4M3, lambda r, c: (), "weight_scale")
    with pytest.raises(ValueError, match="expected plain weights or a quantisation among"):
        moe_block_from_hf({**CONFIG, "quantization_config": settings}, plain)


def test_a_tensor_that_is_no_array_is_named():
    _, plain = one_by_one(E4M3, lambda r, c: (), "weight_scale")
    with pytest.raises(TypeError, match=r"'experts\.0\.w1\.weight': expected an array, got a list"):
        moe_block_from_hf(CONFIG, {**plain, "experts.0.w1.weight": [[1.0]]})


def test_a_config_that_says_quantised_and_tensors_that_are_not():
    _, plain = one_by_one(E4M3, lambda r, c: (), "weight_scale")
    prefix = "model.layers.0.mlp."
    full = {prefix + n: t for n, t in plain.items()}
    with pytest.raises(
        ValueError, match=r"quantised by 'fp8'.*got .* float32.*remove quantization_c"
    ):
        moe_block_from_hf({**CONFIG, "quantization_config": BLOCKS}, full, prefix)
    for listed in ("model.layers.0.mlp", "re:.*layers.0.*", "model.layers.0*", "experts"):
        settings = {**BLOCKS, "modules_to_not_convert": ["lm_head", listed]}
        assert moe_block_from_hf({**CONFIG, "quantization_config": settings}, full, prefix)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [((3, 1), None), ((2, 2), None), ((F, D + 1), None), ((2, 2), BLOCKS), ((1, 5, 1), None)],
)
def test_scales_that_do_not_fit_are_named(shape, settings):
    tensors, _ = one_by_one(E4M3, lambda r, c: (), "weight_scale")
    tensors["experts.0.w1.weight_scale"] = scales(shape)
    config = CONFIG if settings is None else {**CONFIG, "quantization_config": settings}
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.weight'.*scale float32"):
        moe_block_from_hf(config, tensors)
