"""Parameters of this library from the tensors of a checkpoint; every mismatch is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import describe_array
from moe_jax.interop.names import SPELLINGS, canonical
from moe_jax.interop.safetensors import forget_pages
from moe_jax.types import Params

Tensor = Any  # np.ndarray (memory-mapped or not) or jax.Array, tracers included


class Tensors:
    """The tensors of one block by canonical name; records which were taken.

    Args:
        tensors: name -> array.
        prefix: names that start with it belong to the block; it is cut off.
        what: for messages, e.g. ``"'mixtral' block"``.
        ignore: whether a name under the prefix is no part of the block.

    Raises:
        ValueError: no name has the prefix, a name is unknown, two names mean the same tensor, or a
            tensor does not hold plain numbers (see ``quantization.dequantize``).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        prefix: str,
        what: str,
        ignore: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.what = what
        self.prefix = prefix
        self._by_meaning: dict[str, tuple[str, Tensor]] = {}
        self._taken: set[str] = set()
        inside = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        if not inside:
            raise ValueError(
                f"{what}: expected tensors under the prefix {prefix!r}, got none; the names begin "
                f"with {sorted(tensors)[:4]}. Give the prefix up to the router and the experts, "
                "e.g. 'model.layers.0.mlp.'."
            )
        unknown = []
        for name, tensor in inside.items():
            if ignore(name):
                continue
            meaning = canonical(name)
            if meaning is None:
                unknown.append(name)
                continue
            if meaning in self._by_meaning:
                other = self._by_meaning[meaning][0]
                raise ValueError(
                    f"{what}: expected one tensor for {meaning}, got {other!r} and {name!r}. Keep one."
                )
            _check_numbers(f"{what}, {prefix + name!r}", meaning, tensor)
            self._by_meaning[meaning] = (name, tensor)
        if unknown:
            raise ValueError(
                f"{what}: expected the tensors of a Mixture-of-Experts block under {prefix!r}, got "
                f"also {', '.join(map(repr, sorted(unknown)[:6]))}. Give the prefix of the block's own "
                "module; a tensor of the block that is not understood cannot be ignored."
            )

    def __contains__(self, meaning: str) -> bool:
        return meaning in self._by_meaning

    def name(self, meaning: str) -> str:
        """The full name of the tensor in the checkpoint."""
        return self.prefix + self._by_meaning[meaning][0]

    def shape(self, meaning: str) -> tuple[int, ...]:
        """The shape of the tensor, as the checkpoint has it."""
        return tuple(self._by_meaning[meaning][1].shape)

    def take(self, meaning: str, shape: tuple[int | None, ...], axes: str) -> Tensor:
        """The tensor, whose shape must be ``shape`` (None is any size).

        Raises:
            ValueError: it is missing, or has another shape.
        """
        wanted = ", ".join(
            letter if size is None else f"{letter}={size}"
            for letter, size in zip(axes.split(), shape, strict=True)
        )
        if meaning not in self._by_meaning:
            raise ValueError(
                f"{self.what}: expected {meaning} [{wanted}], called "
                f"{SPELLINGS.get(meaning, meaning)}, under {self.prefix!r}; got none. "
                f"There are {self._inventory()}."
            )
        name, tensor = self._by_meaning[meaning]
        got = tuple(tensor.shape)
        if len(got) != len(shape) or any(
            w not in (None, g) for g, w in zip(got, shape, strict=True)
        ):
            raise ValueError(
                f"{self.what}: expected {self.prefix + name!r} of shape [{wanted}], got "
                f"{describe_array(tensor)}. Check the config against the checkpoint."
            )
        self._taken.add(meaning)
        return tensor

    def finish(self, allowed: tuple[str, ...] = ()) -> None:
        """Raises ValueError if a tensor was not used, unless it is ``allowed``."""
        left = [m for m in self._by_meaning if m not in self._taken and m not in allowed]
        if left:
            names = ", ".join(repr(self.name(m)) for m in left[:6])
            raise ValueError(
                f"{self.what}: expected no further tensors, got {names}. The config describes a block "
                "without them: check its model_type and its counts of experts."
            )

    def _inventory(self) -> str:
        names = sorted(name for name, _ in self._by_meaning.values())
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return ", ".join(names[:8]) + more


def _check_numbers(where: str, meaning: str, tensor: Tensor) -> None:
    if meaning != "router.table":
        check_plain(where, tensor)
    elif not np.dtype(tensor.dtype).name.startswith(("int", "uint")):
        raise ValueError(f"{where}: expected whole numbers, expert ids, got {tensor.dtype}.")


def check_plain(where: str, tensor: Tensor) -> None:
    """Refuses numbers that stand for others: int8, float8 and the like without their scales.

    Raises:
        ValueError: the tensor is neither float64, float32, float16 nor bfloat16.
    """
    if np.dtype(tensor.dtype).name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(
            f"{where}: expected plain weights (float32, bfloat16, float16), got "
            f"{describe_array(tensor)} without the scales that such a quantised tensor needs. Take "
            "the scales along, or the checkpoint that it was made from."
        )


# Host arrays stay on the host until a block is whole, as views of the file where possible. JAX arrays
# stay JAX arrays, so that a block can be differentiated by its tensors.


def linear(tensor: Tensor) -> Tensor:
    """[in, out] from torch's [out, in]."""
    return tensor.swapaxes(-1, -2)


def f32(tensor: Tensor) -> Tensor:
    """The tensor in float32."""
    return tensor.astype(np.float32)


def expert_params(
    tensors: Tensors, *, experts: int, width: int, gated: bool, interleaved: bool, bias: bool
) -> Params:
    """``{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`` and biases, from either layout.

    Args:
        tensors: the block's tensors.
        experts: E.
        width: D, the width that the experts work at.
        gated: whether there is a gate.
        interleaved: whether gate and up alternate in the fused tensor.
        bias: whether projections must have biases.
    """
    if "experts.row_in" in tensors or "experts.row_out" in tensors:
        return _rows(tensors, experts, width)
    if "experts.flat_gate" in tensors:
        return _flat(tensors, experts, width)
    fused = "experts.gate_up" in tensors or "experts.gate_up_interleaved" in tensors
    if fused or "experts.up" in tensors or "experts.down" in tensors:
        params = _stacked(tensors, experts, width, gated, interleaved)
    else:
        params = _one_by_one(tensors, experts, width, gated)
    if bias:
        params.update(_biases(tensors, experts, params, gated, interleaved))
    return params


def _rows(tensors: Tensors, experts: int, width: int) -> Params:
    """Doge: an expert is one hidden unit, with one row for its input and one for its output."""
    read = tensors.take("experts.row_in", (experts, width), "E D")
    write = tensors.take("experts.row_out", (experts, width), "E D")
    return {"up": read[:, :, None], "down": write[:, None, :]}


def _flat(tensors: Tensors, experts: int, width: int) -> Params:
    """DBRX: the experts of a projection in one matrix, [E * F, D]."""
    rows = tensors.shape("experts.flat_gate")[0]
    if rows % experts:
        raise ValueError(
            f"{tensors.what}: expected {tensors.name('experts.flat_gate')!r} with a multiple of "
            f"E={experts} rows, got {rows}. Check the number of experts in the config."
        )
    out = {}
    for part in ("gate", "up", "down"):
        flat = tensors.take(f"experts.flat_{part}", (rows, width), "E*F D")
        split = flat.reshape(experts, rows // experts, width)
        out[part] = split if part == "down" else linear(split)
    return out


def _halves(fused: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) of the last axis."""
    if interleaved:
        return fused[..., ::2], fused[..., 1::2]
    half = fused.shape[-1] // 2
    return fused[..., :half], fused[..., half:]


def _stacked(tensors: Tensors, e: int, d: int, gated: bool, interleaved: bool) -> Params:
    shape = tensors.shape("experts.down") if "experts.down" in tensors else ()
    if len(shape) != 3 or d not in shape[1:]:
        tensors.take("experts.down", (e, d, None), "E D F")  # raises, and says what was expected
    # `take` has raised for any other number of axes; the zeros are for the type checker.
    _, rows, columns = (*shape, 0, 0, 0)[:3]
    f = columns if rows == d else rows
    separate = "experts.up" in tensors
    meaning = "experts.up" if separate else "experts.gate_up"
    if not separate and "experts.gate_up_interleaved" in tensors:
        meaning, interleaved = "experts.gate_up_interleaved", True
    wide = f if separate else 2 * f
    # torch keeps [out, in]; some files keep [in, out]. One tensor may be square; the two together are
    # ambiguous only if all their axes are equal.
    first = tensors.shape(meaning)[1:] if meaning in tensors else None
    torch_like = ((rows, columns) == (d, f)) and (f != d or first == (wide, d))
    if torch_like:
        down = linear(tensors.take("experts.down", (e, d, f), "E D F"))
        up = linear(tensors.take(meaning, (None, wide, d), f"E {'F' if separate else '2F'} D"))
    else:
        down = tensors.take("experts.down", (e, f, d), "E F D")
        up = tensors.take(meaning, (None, d, wide), f"E D {'F' if separate else '2F'}")
    if up.shape[0] < e:
        raise ValueError(
            f"{tensors.what}: expected {tensors.name(meaning)!r} for E={e} experts, got {up.shape[0]}. "
            "Check the number of experts in the config."
        )
    up = up[:e]  # LongCat also keeps unused projections of its zero experts
    if not gated:
        return {"up": up, "down": down}
    if separate:
        like_up, axes = ((e, f, d), "E F D") if torch_like else ((e, d, f), "E D F")
        gate = tensors.take("experts.gate", like_up, axes)
        return {"gate": linear(gate) if torch_like else gate, "up": up, "down": down}
    gate, up = _halves(up, interleaved)
    return {"gate": gate, "up": up, "down": down}


def _one_by_one(tensors: Tensors, e: int, d: int, gated: bool) -> Params:
    if "experts.0.up" not in tensors and "experts.0.down" not in tensors:
        # Raises. No expert is there in either layout, and the message names the usual one.
        tensors.take("experts.down", (e, d, None), "E D F")
    f = tensors.shape("experts.0.up")[0] if "experts.0.up" in tensors else None
    out = {}
    for part in ("gate", "up", "down") if gated else ("up", "down"):
        shape, axes = ((d, f), "D F") if part == "down" else ((f, d), "F D")
        each = [tensors.take(f"experts.{i}.{part}", shape, axes) for i in range(e)]
        out[part] = _stack_transposed(each)
    return out


def _stack_transposed(each: list[Tensor]) -> Tensor:
    """[E, in, out] from E matrices [out, in].

    Copied from the file into place, so that at no time two copies of all projections are in memory: a
    layer may be most of what fits.
    """
    if not all(isinstance(t, np.ndarray) for t in each):
        return linear(jnp.stack(each))
    out = host_buffer((len(each), *each[0].shape[::-1]), each[0].dtype)
    for i, tensor in enumerate(each):
        out[i] = tensor.T
        forget_pages(tensor)
    return jax.device_put(out)


def host_buffer(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that ``jax.device_put`` takes over on a CPU instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    # XLA wants 64 bytes; NumPy aligns to 16, and then two copies are in memory for a moment.
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def to_device(tensor: Tensor, dtype: Any = None) -> jax.Array:
    """The tensor as a JAX array in ``dtype``, with one copy of it in memory and no page of a file."""
    if not isinstance(tensor, np.ndarray):
        return jnp.asarray(tensor, dtype)
    out = host_buffer(tensor.shape, tensor.dtype if dtype is None else dtype)
    out[...] = tensor
    forget_pages(tensor)
    return jax.device_put(out)


def _stack(each: list[Tensor]) -> Tensor:
    """Stacks on the host where possible, so that a block is copied to the device once."""
    plain = all(isinstance(t, np.ndarray) for t in each)
    return np.stack(each) if plain else jnp.stack(each)


def _biases(tensors: Tensors, e: int, params: Params, gated: bool, interleaved: bool) -> Params:
    f, d = params["down"].shape[1:]
    if "experts.0.down_bias" in tensors or "experts.0.up_bias" in tensors:
        parts = {"gate": f, "up": f, "down": d} if gated else {"up": f, "down": d}
        return {
            f"{part}_bias": _stack(
                [tensors.take(f"experts.{i}.{part}_bias", (n,), "F") for i in range(e)]
            )
            for part, n in parts.items()
        }
    out = {"down_bias": tensors.take("experts.down_bias", (e, d), "E D")}
    both = tensors.take("experts.gate_up_bias", (e, 2 * f), "E 2F")
    out["gate_bias"], out["up_bias"] = _halves(both, interleaved)
    return out


def shared_params(tensors: Tensors, *, width: int, gated: bool) -> Params:
    """The shared expert: ``{"gate": [D, F], "up": [D, F], "down": [F, D]}`` and biases if there."""
    down = tensors.take("shared.down", (width, None), "D F")
    f = down.shape[1]
    out: dict[str, Tensor] = {"down": linear(down)}
    if "shared.gate_up" in tensors:
        both = linear(tensors.take("shared.gate_up", (2 * f, width), "2F D"))
        out["gate"], out["up"] = _halves(both, interleaved=False)
    else:
        for part in ("gate", "up") if gated else ("up",):
            out[part] = linear(tensors.take(f"shared.{part}", (f, width), "F D"))
    for part in ("gate", "up", "down"):
        if f"shared.{part}_bias" in tensors:
            size = width if part == "down" else f
            out[f"{part}_bias"] = tensors.take(f"shared.{part}_bias", (size,), "F")
    return out


def shared_stack(tensors: Tensors, *, count: int, width: int) -> Params:
    """S shared experts: ``{"gate": [S, D, F], "up": [S, D, F], "down": [S, F, D]}``."""
    down = tensors.take("shared_stack.down", (count, width, None), "S D F")
    f = down.shape[2]
    if "shared_stack.gate_up_interleaved" in tensors:
        both = tensors.take("shared_stack.gate_up_interleaved", (count, 2 * f, width), "S 2F D")
        gate, up = _halves(linear(both), interleaved=True)
    else:
        gate, up = (
            linear(tensors.take(f"shared_stack.{part}", (count, f, width), "S F D"))
            for part in ("gate", "up")
        )
    return {"gate": gate, "up": up, "down": linear(down)}
