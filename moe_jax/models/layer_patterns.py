"""Which layers of a decoder have experts, and which see a window, from the keys of its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_jax.models.config_keys import ConfigKeys

FULL, SLIDING = "full_attention", "sliding_attention"

# --- which layers have experts ----------------------------------------------------------------


def all_layers(keys: ConfigKeys, layers: int) -> list[bool]:
    """Every layer has experts."""
    return [True] * layers


def after_first(keys: ConfigKeys, layers: int) -> list[bool]:
    """All but the first ``first_k_dense_replace``, every ``moe_layer_freq``-th of them."""
    first, every = keys.get("first_k_dense_replace", 0), keys.get("moe_layer_freq", 1)
    if isinstance(every, list):
        return [bool(flag) for flag in one_a_layer(keys, "moe_layer_freq", every, layers)]
    return [i >= first and i % every == 0 for i in range(layers)]


def sparse_step(keys: ConfigKeys, layers: int) -> list[bool]:
    """Every ``decoder_sparse_step``-th layer that is not in ``mlp_only_layers``."""
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def by_types(first: str = "", dense: int = 0) -> Callable[[ConfigKeys, int], list[bool]]:
    """As ``mlp_layer_types`` say; where the config has no such key, all but the first few.

    Args:
        first: the key that says how many are dense.
        dense: how many, where that key is not there.
    """

    def experts(keys: ConfigKeys, layers: int) -> list[bool]:
        skipped = keys.get(first, dense) if first else dense
        given = keys.get("mlp_layer_types")
        if given is None:
            return [i >= skipped for i in range(layers)]
        unknown = sorted(set(given) - {"dense", "sparse"})
        if unknown:
            raise keys.error("mlp_layer_types", "'dense' or 'sparse' in each layer", unknown[0])
        flags = one_a_layer(keys, "mlp_layer_types", given, layers)
        return [flag == "sparse" for flag in flags]

    return experts


def interval(keys: ConfigKeys, layers: int) -> list[bool]:
    """Every ``moe_layer_interval``-th layer from a first to a last one (Ernie)."""
    every = keys.get("moe_layer_interval", 1)
    first, last = keys.get("moe_layer_start_index", 1), keys.get("moe_layer_end_index", -1)
    last = layers - 1 if last == -1 else last
    return [(i + 1) % every == 0 and first <= i <= last for i in range(layers)]


# --- which layers see how far -----------------------------------------------------------------


def no_window(keys: ConfigKeys, layers: int) -> list[str]:
    """Every layer sees all that came before."""
    return [FULL] * layers


def one_window(keys: ConfigKeys, layers: int) -> list[str]:
    """Every layer has ``sliding_window``, if there is one."""
    return [FULL if keys.get("sliding_window") is None else SLIDING] * layers


def switched_window(keys: ConfigKeys, layers: int) -> list[str]:
    """Every layer has ``sliding_window`` where ``use_sliding_window`` says so."""
    return [SLIDING if keys.get("use_sliding_window", False) else FULL] * layers


def listed(default: Callable[[ConfigKeys, int], str]) -> Callable[[ConfigKeys, int], list[str]]:
    """As ``layer_types`` say; without that key, ``default`` of each layer's number."""

    def types(keys: ConfigKeys, layers: int) -> list[str]:
        given = keys.get("layer_types")
        if given is None:
            return [default(keys, i) for i in range(layers)]
        unknown = sorted(set(given) - {FULL, SLIDING})
        if unknown:
            raise keys.error("layer_types", f"{FULL!r} or {SLIDING!r} in each layer", unknown[0])
        return one_a_layer(keys, "layer_types", given, layers)

    return types


def one_a_layer(keys: ConfigKeys, key: str, values: list[Any], layers: int) -> list[Any]:
    """Returns ``values`` if there is one for each layer."""
    if len(values) != layers:
        raise keys.error(key, f"a list of {layers}, one a layer", f"a list of {len(values)}")
    return list(values)


def qwen2_type(keys: ConfigKeys, i: int) -> str:
    """Every other layer among the first ``max_window_layers`` has a window."""
    slides = keys.get("use_sliding_window", False) and i < keys.get("max_window_layers", 28)
    return SLIDING if slides and (i + 1) % 2 else FULL


def alternating(keys: ConfigKeys, i: int) -> str:
    """Even layers have a window."""
    return FULL if i % 2 else SLIDING


def late(keys: ConfigKeys, i: int) -> str:
    """Layers from ``max_window_layers`` on have a window."""
    first = keys.get("max_window_layers", 62)
    return SLIDING if keys.get("sliding_window") is not None and i >= first else FULL


def every(period: int, key: str = "") -> Callable[[ConfigKeys, int], str]:
    """Every ``period``-th layer (or as ``key`` says) sees all tokens; the others have a window."""

    def kind(keys: ConfigKeys, i: int) -> str:
        step = keys.get(key, period) if key else period
        if not isinstance(step, int) or step < 1:
            raise keys.error(key, "a positive whole number, or layer_types beside it", step)
        return SLIDING if (i + 1) % step else FULL

    return kind


def flint_type(keys: ConfigKeys, i: int) -> str:
    """The first two layers, the last, and every fourth see all tokens."""
    whole = i < 2 or i % 4 == 1 or i == keys.number("num_hidden_layers") - 1
    return FULL if whole else SLIDING


def granite_type(keys: ConfigKeys, i: int) -> str:
    """Every fourth layer sees all tokens."""
    return SLIDING if i % 4 else FULL


def all_full(keys: ConfigKeys, i: int) -> str:
    """Every layer sees all tokens."""
    return FULL
