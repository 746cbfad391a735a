"""Quantised checkpoints: weights are restored exactly as their format defines, or refused by name.

A quantised weight is several tensors: small numbers, and scales beside them (``w1.weight`` with
``w1.weight_scale``, ``down_proj_blocks`` with ``down_proj_scales``). The tensors tell the format;
``quantization_config`` must name a method that this file knows. It restores:

- float8 or int8 with one scale for the tensor, one an expert, or one an output channel
  (compressed-tensors, fbgemm, modelopt, bitsandbytes int8);
- float8 with one scale a block of the matrix (DeepSeek-V3: ``weight_scale_inv``, 128 x 128);
- MXFP4 (gpt-oss): two 4-bit floats a byte, one power of two for every 32 of them, as the OCP
  Microscaling specification defines.

How a model rounds its *activations* (``input_scale``) is not reproduced.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import describe_array

Tensor = Any  # np.ndarray (memory-mapped or not) or jax.Array

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "bitsandbytes")

# Where configs list the modules that stay as they are.
_LEFT_PLAIN = (
    "ignore",
    "ignored_layers",
    "modules_to_not_convert",
    "exclude_modules",
    "llm_int8_skip_modules",
)

# The parts of a quantised weight by the ending of their names, after "." or "_".
_PARTS = (
    r"weight_scale_inv|weight_scale_2|weight_scale|scale_inv|scales|scale|blocks|SCB|weight_format"
    r"|weight_packed|weight_shape|weight_zero_point|weight_global_scale|weight_g_idx"
    r"|(?:input|output|activation|k|v)_(?:global_)?(?:scale|zero_point)"
    r"|qweight|qzeros|zeros|g_idx|(?:nested_)?(?:absmax|quant_map)|quant_state\..+"
    r"|W_q|codes|codebooks"
)
_PART = re.compile(rf"(?P<stem>.+?)[._](?P<part>{_PARTS})")
# Endings that no plain weight has, so that they say "quantised" without a weight beside them.
_NEVER_PLAIN = re.compile(
    r"weight_.*|scale_inv|scales|blocks|SCB.*|qweight|qzeros|g_idx|.*absmax|.*quant_map|quant_state.*"
    r"|W_q"
)
_OF_ACTIVATIONS = re.compile(r"(input|output|activation|k|v)_scale")


def part_of(name: str) -> tuple[str, str] | None:
    """(stem, part) of a tensor whose name is that of a part of a quantised weight, else None.

    Example:
        >>> part_of("experts.0.w1.weight_scale"), part_of("experts.down_proj_blocks")
        (('experts.0.w1', 'weight_scale'), ('experts.down_proj', 'blocks'))
        >>> part_of("experts.0.w1.weight.absmax"), part_of("gate.weight")
        (('experts.0.w1', 'absmax'), None)
    """
    match = _PART.fullmatch(name)
    return (match["stem"].removesuffix(".weight"), match["part"]) if match else None


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings of the quantisation that a config states, at the top or in a nested config."""
    for key in ("quantization_config", "compression_config"):
        stated = config.get(key)
        if stated:
            return stated if isinstance(stated, Mapping) else {"quant_method": repr(stated)}
    for value in config.values():
        if isinstance(value, Mapping) and (present := quantization_of(value)):
            return present
    return None


def dequantize(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    what: str,
    prefix: str = "",
) -> dict[str, Tensor]:
    """The tensors with every quantised weight restored to float32; plain ones as they are.

    Args:
        tensors: name -> array, all parts of a weight among them.
        config: ``config.json``.
        what: for messages, e.g. ``"'mixtral' block"``.
        prefix: what the full names begin with, for messages and for the config's lists of modules
            that are not quantised.

    Raises:
        TypeError: a tensor is not an array.
        ValueError: a method or a format that is not restored, parts that do not fit each other, or
            a config that says "quantised" for tensors that are not.
    """
    for name, tensor in tensors.items():
        if not hasattr(tensor, "dtype") or not hasattr(tensor, "shape"):
            raise TypeError(
                f"{what}, {prefix + name!r}: expected an array, got {describe_array(tensor)}. Convert "
                "it with np.asarray."
            )
    settings = quantization_of(config)
    method = str(settings.get("quant_method", "unnamed")) if settings else None
    weights, parts = _sort(tensors)
    if not parts and method is None:
        return dict(tensors)
    first = next((n for p in parts.values() for n in p.values()), None)
    if method is not None and method.lower() not in METHODS:
        tensor = first or next(iter(tensors), None)
        raise ValueError(
            f"{what}: expected plain weights or a quantisation among {', '.join(METHODS)}, got method "
            f"{method!r} (tensor {prefix + str(tensor)!r}). Take the checkpoint that it was made from, "
            "or dequantise it with the tool that made it."
        )
    if method is not None and not parts and not _skipped(settings or {}, prefix, tensors):
        _refuse_plain(tensors, method, what=what, prefix=prefix)
    consumed = {name for names in parts.values() for name in names.values()}
    out = {name: tensor for name, tensor in tensors.items() if name not in consumed}
    for stem, names in parts.items():
        where = f"{what}, {prefix + (weights.get(stem) or next(iter(names.values())))!r}"
        present = {part: tensors[n] for part, n in names.items()}
        weight = tensors[weights[stem]] if stem in weights else None
        out[weights.get(stem, stem)] = _restore(weight, present, settings or {}, where)
    return out


def _sort(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """(stem -> name of the weight, stem -> part -> name of the part)."""
    weights: dict[str, str] = {}
    parts: dict[str, dict[str, str]] = {}
    for name in tensors:
        split = part_of(name)
        if split is None:
            continue
        stem, part = split
        weight = next((n for n in (f"{stem}.weight", stem) if n in tensors), None)
        if weight is None and not _NEVER_PLAIN.fullmatch(part):
            continue  # Gemma's router.scale has no weight beside it: not a part of anything
        parts.setdefault(stem, {})[part] = name
        if weight is not None:
            weights[stem] = weight
    return weights, parts


def _skipped(settings: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the config lists a module of the experts among those that it leaves as they are."""
    patterns: list[Any] = []
    for key in _LEFT_PLAIN:
        listed = settings.get(key)
        patterns += listed if isinstance(listed, (list, tuple)) else []
    names = [prefix + n for n in tensors if "expert" in n]
    return any(_matches(str(p), n) for p in patterns for n in names)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatch(name, f"{pattern}*") or f".{pattern}." in f".{name}."


def _refuse_plain(tensors: Mapping[str, Tensor], method: str, *, what: str, prefix: str) -> None:
    name, tensor = next(iter(tensors.items()), ("", None))
    got = "no tensors" if tensor is None else describe_array(tensor)
    raise ValueError(
        f"{what}: expected weights quantised by {method!r} and their scales, as quantization_config of "
        f"the config says, got {prefix + name!r} {got} and no scales. Add the scales; if the weights "
        "are dequantised already, remove quantization_config from the config."
    )


# --- the formats ------------------------------------------------------------------------------


def _restore(
    weight: Tensor | None, parts: dict[str, Tensor], settings: Mapping[str, Any], where: str
) -> Tensor:
    """float32: the weight that these parts stand for."""
    # Scales of activations belong to a product of quantised numbers. Weights are restored alone.
    listed = parts
    parts = {name: part for name, part in parts.items() if not _OF_ACTIVATIONS.fullmatch(name)}
    if not parts:
        raise _unknown(listed, weight, where)
    if weight is None and set(parts) == {"blocks", "scales"}:
        return _mxfp4(parts["blocks"], parts["scales"], where)
    if weight is None:
        raise _unknown(parts, weight, where)
    if set(parts) <= {"SCB", "weight_format"} and "SCB" in parts:
        return _bitsandbytes(weight, parts, where)
    zero_point = parts.get("weight_zero_point")
    scales = [p for p in ("weight_scale_inv", "scale_inv", "weight_scale", "scale") if p in parts]
    if len(scales) != 1 or set(parts) - {scales[0], "weight_zero_point"}:
        raise _unknown(parts, weight, where)
    if not (_is_float8(weight) or weight.dtype == np.int8):
        raise _unknown(parts, weight, where)
    scale = parts[scales[0]]
    if not (_is_plain(scale) or scale.dtype == jnp.float8_e8m0fnu):
        raise _unknown(parts, weight, where)
    numbers = weight.astype(np.float32)
    # The zero point is an integer of the weight's scale, so it goes before the multiplication.
    if zero_point is not None:
        numbers = numbers - _spread(zero_point.astype(np.float32), weight, settings, where)
    return numbers * _spread(scale.astype(np.float32), weight, settings, where)


def _spread(scale: Tensor, weight: Tensor, settings: Mapping[str, Any], where: str) -> Tensor:
    """The scale of every number of the weight, as an array that broadcasts to it."""
    shape = weight.shape
    # From the coarsest to the finest: one scale, one a row or column, one a block.
    if scale.size == 1:
        return scale.reshape((1,) * len(shape))
    if scale.ndim == len(shape) and all(
        s in (1, n) for s, n in zip(scale.shape, shape, strict=True)
    ):
        return scale
    # One a row, which is an output channel of a matrix or an expert of a stack.
    if scale.ndim == 1 and scale.shape[0] == shape[0]:
        return scale.reshape(-1, *(1,) * (len(shape) - 1))
    blocks = _block_size(settings)
    # A block at the edge may be cut off, so counts are rounded up and the spread scales cut to shape.
    counts = tuple(-(-n // b) for n, b in zip(shape[-2:], blocks, strict=True))
    if len(shape) >= 2 and scale.shape == (*shape[:-2], *counts):
        array: Any = np if isinstance(scale, np.ndarray) else jnp
        rows = array.repeat(scale, blocks[0], axis=-2)[..., : shape[-2], :]
        return array.repeat(rows, blocks[1], axis=-1)[..., : shape[-1]]
    raise ValueError(
        f"{where}: expected one scale for the tensor, for each output channel, or for each block of "
        f"{blocks[0]} x {blocks[1]}, got a scale {describe_array(scale)} for {describe_array(weight)}. "
        "Check weight_block_size in quantization_config against the checkpoint."
    )


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) that share a scale: stated by the config, else DeepSeek's."""
    stated = settings.get("weight_block_size")
    groups = settings.get("config_groups")  # compressed-tensors
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") or {}
        stated = stated or weights.get("block_structure")
        if not stated and weights.get("group_size"):
            stated = (1, weights["group_size"])
    rows, columns = stated or (128, 128)
    return int(rows), int(columns)


def _bitsandbytes(weight: Tensor, parts: dict[str, Tensor], where: str) -> Tensor:
    """LLM.int8(): 127 stands for the largest magnitude of a row, which SCB holds."""
    # Format 0 is row-major; the others are tiles for one GPU generation, which nothing else can read.
    row_major = "weight_format" not in parts or int(np.asarray(parts["weight_format"]).max()) == 0
    if weight.dtype != np.int8 or weight.ndim != 2 or not row_major:
        raise _unknown(parts, weight, where)
    largest = parts["SCB"].astype(np.float32)
    if largest.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: expected SCB with one number a row, got {describe_array(largest)} for "
            f"{describe_array(weight)}. Download the checkpoint again."
        )
    return weight.astype(np.float32) * (largest[:, None] / 127.0)


_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _mxfp4(blocks: Tensor, scales: Tensor, where: str) -> Tensor:
    """f32[..., n * 32] from u8[..., n, 16] and u8[..., n]; the low four bits of a byte come first."""
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"{where}: expected MXFP4 blocks uint8[..., n, 16] and scales uint8[..., n], got "
            f"{describe_array(blocks)} and {describe_array(scales)}. Download the checkpoint again."
        )
    blocks, scales = np.asarray(blocks), np.asarray(scales)
    pairs = np.stack([_FP4[blocks & 15], _FP4[blocks >> 4]], axis=-1)
    # The scale is an exponent with bias 127; 255 is NaN in the specification.
    factor = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    factor = np.where(scales == 255, np.float32(np.nan), factor)
    numbers = pairs.reshape(*blocks.shape[:-1], -1) * factor[..., None]
    return numbers.reshape(*blocks.shape[:-2], -1)


def _is_float8(tensor: Tensor) -> bool:
    name = np.dtype(tensor.dtype).name
    return name.startswith("float8") and name != "float8_e8m0fnu"


def _is_plain(tensor: Tensor) -> bool:
    return np.dtype(tensor.dtype).name in ("float64", "float32", "float16", "bfloat16")


def _unknown(parts: Mapping[str, Tensor], weight: Tensor | None, where: str) -> ValueError:
    listed = ", ".join(f"{part} {describe_array(t)}" for part, t in parts.items())
    got = listed if weight is None else f"{describe_array(weight)} with {listed}"
    return ValueError(
        f"{where}: expected a weight that is plain or quantised in a known way (float8 or int8 with "
        f"scales, MXFP4), got {got}. Take the checkpoint that it was made from."
    )
