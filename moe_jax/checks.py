"""Checks of arguments, made while tracing: they add no operation to a compiled program."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Self

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

_KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool_}


class NamedArguments:
    """A base of dataclasses: an argument that a class does not have is refused with those it has.

    Example:
        >>> import moe_jax
        >>> try:
        ...     moe_jax.LossWeights(entropies=0.1)
        ... except TypeError as error:
        ...     print(str(error).partition("got")[2])
         entropies. Did you mean entropy?
    """

    __slots__ = ()

    # Before __init__, which dataclasses and Flax write themselves.
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        accepted = _accepted(cls)
        unknown = [] if accepted is None else [name for name in kwargs if name not in accepted]
        if accepted and unknown:
            names = [name for name in accepted if name not in ("self", "parent", "name")]
            near = difflib.get_close_matches(unknown[0], names, n=1)
            raise TypeError(
                f"{cls.__name__}: expected arguments among {', '.join(names)}, got "
                f"{', '.join(unknown)}. "
                + (f"Did you mean {near[0]}?" if near else "Correct the name, or leave it out.")
            )
        return super().__new__(cls)


@functools.cache
def _accepted(cls: type) -> tuple[str, ...] | None:
    """The arguments of a class, None if it takes any; kept, as each call makes options."""
    parameters = inspect.signature(cls.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return tuple(parameters)


def describe_array(value: Any) -> str:
    """``float32[3, 4]``; for anything that is not an array, its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"


def describe_value(value: Any) -> str:
    """The value as a message shows it: short values themselves, arrays by dtype and shape."""
    if value is None or isinstance(value, str | numbers.Number):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return describe_array(value)


def check_array(
    name: str,
    value: Any,
    axes: str,
    *,
    kind: str = "float",
    sizes: Mapping[str, int] | None = None,
    fix: str,
) -> None:
    """Checks rank, axis sizes and dtype kind of ``value`` at trace time (no runtime cost).

    Args:
        name: what the caller calls the value.
        value: an array or tracer.
        axes: one letter or word an axis, e.g. ``"T D"``.
        kind: ``"float"``, ``"int"`` or ``"bool"``.
        sizes: sizes that some of the axes must have.
        fix: one sentence that tells the caller what to do.

    Raises:
        TypeError: not an array, or the wrong kind of dtype.
        ValueError: wrong rank or size, or an axis of size 0.

    Example:
        >>> check_array("x", jnp.ones((3, 4)), "T D", sizes={"D": 4}, fix="pass [tokens, 4]")
    """
    names = axes.split()
    sizes = sizes or {}
    wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in names)
    if hasattr(value, "unbox"):  # a parameter of Flax Linen with the names of its axes
        fix = "Take it out of its box first: flax.linen.meta.unbox(variables)."
    message = f"{name}: expected {kind}[{wanted}], got {describe_array(value)}. {fix}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(message)
    if not jnp.issubdtype(value.dtype, _KINDS[kind]):
        raise TypeError(message)
    try:
        chex.assert_shape(value, tuple(sizes.get(a) for a in names))
    except AssertionError as error:
        raise ValueError(message) from error
    if 0 in value.shape:
        raise ValueError(f"{message} (an axis is empty: there must be at least one of each.)")


def check_hidden_states(x: Any) -> None:
    """Raises unless ``x`` is an array float[..., D] with at least the axis D.

    Raises:
        TypeError: ``x`` is not an array, or not of a float dtype.
        ValueError: ``x`` is a scalar.
    """
    if not hasattr(x, "ndim") or x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        check_array("x", x, "T D", fix="Pass hidden states [..., d_model].")


def flat_token_mask(token_mask: Any, lead: tuple[int, ...]) -> Any:
    """bool[T] from the mask of hidden states with the leading axes ``lead``; None stays None.

    Raises:
        TypeError: the mask is not an array, or not of dtype bool.
        ValueError: the mask has other axes than ``lead``.

    Example:
        >>> flat_token_mask(jnp.ones((2, 3), bool), (2, 3)).shape
        (6,)
    """
    if token_mask is None:
        return None
    message = (
        f"token_mask: expected bool{list(lead)} like the leading axes of x, got "
        f"{describe_array(token_mask)}. Pass one flag a token: True for real tokens, False for "
        "padding."
    )
    if not hasattr(token_mask, "shape") or token_mask.dtype != jnp.bool_:
        raise TypeError(message)
    if token_mask.shape != lead:
        raise ValueError(message)
    return token_mask.reshape(-1)


def check_key(key: Any, *, required: bool = False) -> None:
    """Raises TypeError unless ``key`` is one JAX key, typed or raw, or None where it may be.

    Example:
        >>> check_key(jax.random.key(0))
    """
    if key is None and not required:
        return
    if key is not None and hasattr(key, "shape") and hasattr(key, "dtype"):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            fits = key.shape == ()
        else:  # raw keys have two words with threefry, four with rbg
            fits = key.dtype == jnp.uint32 and key.shape in ((2,), (4,))
        if fits:
            return
    none = "" if required else " None switches randomness off."
    raise TypeError(
        f"key: expected one JAX key{'' if required else ' or None'}, got {describe_value(key)}. Pass "
        f"jax.random.key(0), or a part of jax.random.split.{none}"
    )


def check_instance(name: str, value: Any, kind: type | tuple[type, ...], *, fix: str) -> None:
    """Raises TypeError unless ``value`` is an instance of ``kind``, or of one of these."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise TypeError(f"{name}: expected {wanted}, got {describe_value(value)}. {fix}")


def holds(comparison: Callable[[], bool]) -> bool | None:
    """Returns what a comparison of sizes gives; None where symbolic sizes leave it open.

    Under ``jax.export`` with symbolic shapes a size may be an expression such as ``2*b``.

    Example:
        >>> (b,) = jax.export.symbolic_shape("b", constraints=["b <= 8"])
        >>> holds(lambda: 2 * b <= 16), holds(lambda: b >= 4)
        (True, None)
    """
    try:
        return bool(comparison())
    except jax.errors.InconclusiveDimensionOperation:
        return None


def check_count(name: str, value: Any, *, least: int = 1, fix: str) -> None:
    """Raises TypeError unless ``value`` is an integer, ValueError unless it is at least ``least``.

    A symbolic size (``jax.export``) counts as an integer.

    Example:
        >>> check_count("groups", 2, fix="Pass the number of groups.")
    """
    if jax.export.is_symbolic_dim(value):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name}: expected an integer of at least {least}, got {describe_value(value)}. {fix}"
        )
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}. {fix}")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name}: expected True or False, got {describe_value(value)}. Pass a Python bool."
        )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``, and lists them."""
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name}: expected one of {listed}, got {value!r}. Choose one of these.")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a Python or NumPy number, ValueError if it is NaN.

    Example:
        >>> check_number("scale", 1.5)
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        shown = describe_array(value) if hasattr(value, "shape") else repr(value)
        raise TypeError(
            f"{name}: expected a number, got {shown}. Give a Python number, not text or an array."
        )
    if value != value:
        raise ValueError(f"{name}: expected a number, got nan. Look at how it was calculated.")


def check_finite(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless it is finite."""
    check_number(name, value)
    if abs(value) == float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {value}. Give a finite one.")


def check_at_least_0(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless it is finite and at least 0."""
    check_number(name, value)
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"{name}: expected a finite number of at least 0, got {value}. 0 switches it off."
        )


def check_range(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    fix: str,
) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless it is within its bounds.

    A value without a bound on one side must be finite.

    Args:
        name: what the caller calls the value.
        value: the number.
        above, below: bounds that the value must not reach; None is no such bound.
        least, most: bounds that the value may reach.
        fix: one sentence that tells the caller what to do.

    Example:
        >>> check_range("threshold", 0, above=0, most=1, fix="0.5 is usual.")
        Traceback (most recent call last):
            ...
        ValueError: threshold: expected 0 < threshold <= 1, got 0. 0.5 is usual.
    """
    low, high = above if least is None else least, below if most is None else most
    if low is None or high is None:
        check_finite(name, value)
    else:
        check_number(name, value)
    inside = (
        (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    if not inside:
        left = "" if low is None else f"{low} {'<' if least is None else '<='} "
        right = "" if high is None else f" {'<' if most is None else '<='} {high}"
        raise ValueError(f"{name}: expected {left}{name}{right}, got {value}. {fix}")


def check_share(name: str, value: Any, *, fix: str) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless it lies in [0, 1].

    Example:
        >>> check_share("p", 1.5, fix="0.4 is usual.")
        Traceback (most recent call last):
            ...
        ValueError: p: expected 0 <= p <= 1, got 1.5. 0.4 is usual.
    """
    check_range(name, value, least=0, most=1, fix=fix)


def check_k(*, num_experts: int, min_k: int, max_k: int) -> None:
    """Raises ValueError unless ``0 <= min_k <= max_k <= num_experts`` and ``max_k >= 1``.

    Raises TypeError if one is not an integer: 8.0 would become a shape later.
    """
    low, high = ("k", "k") if min_k is max_k else ("min_k", "max_k")
    for name, value in (("num_experts", num_experts), (low, min_k), (high, max_k)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {value!r}. Write 8, not 8.0 or '8'.")
    if num_experts < 1:
        raise ValueError(
            f"num_experts: expected at least 1, got {num_experts}. Give the number of experts."
        )
    if min_k > max_k:
        raise ValueError(
            f"min_k, max_k: expected min_k <= max_k, got min_k={min_k}, max_k={max_k}. Swap them?"
        )
    if low == high and not 1 <= max_k <= num_experts:
        raise ValueError(
            f"k: expected 1 <= k <= num_experts={num_experts}, got {max_k}. Lower k or add experts."
        )
    if not (min_k >= 0 and 1 <= max_k <= num_experts):
        raise ValueError(
            f"k: expected 0 <= min_k and 1 <= max_k <= num_experts={num_experts}, "
            f"got min_k={min_k}, max_k={max_k}. Lower k or add experts."
        )


def check_expert_tuple(name: str, values: tuple[int, ...]) -> None:
    """Raises TypeError unless ``values`` is a tuple of integers, which stays hashable."""
    integers = isinstance(values, tuple) and all(
        isinstance(v, numbers.Integral) and not isinstance(v, bool) for v in values
    )
    if not integers:
        raise TypeError(
            f"{name}: expected a tuple of integers, got {values!r}. Write (0, 3), and (3,) for one."
        )


def check_expert_index(name: str, values: tuple[int, ...], num_experts: int) -> None:
    """Raises ValueError unless every entry is an expert's index and at least one expert is left."""
    check_expert_tuple(name, values)
    bad = [v for v in values if not 0 <= v < num_experts]
    if bad or len(set(values)) >= num_experts:
        raise ValueError(
            f"{name}: expected distinct indices in 0..{num_experts - 1} that leave at least one "
            f"expert, got {values}. Remove the ones out of range."
        )


_LAYER_PARTS = ("router", "experts", "shared", "shared_gate")


def check_layer_params(params: Any) -> None:
    """Raises unless ``params`` is a dict of a layer's parts: ``router``, ``experts`` and so on."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params: expected a dict with 'router' and 'experts', got {describe_value(params)}. "
            "Pass what init_moe_layer returned."
        )
    missing = [name for name in _LAYER_PARTS[:2] if name not in params]
    if "shared_gate" in params and "shared" not in params:
        missing.append("shared")
    unknown = sorted(str(name) for name in params if name not in _LAYER_PARTS)
    if missing or unknown:
        raise ValueError(
            "params: expected router, experts and optionally shared, shared_gate, got "
            f"{', '.join(map(str, params)) or 'none of them'}. "
            + (f"Add {', '.join(missing)}." if missing else f"Remove {', '.join(unknown)}.")
        )
