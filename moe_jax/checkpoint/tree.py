"""Pytrees as names, shapes and JSON, and back, for the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax


class CheckpointError(ValueError):
    """A checkpoint cannot be written or must not be loaded; the message says what to do."""


def named_leaves(item: str, tree: Any) -> dict[str, Any]:
    """Returns the leaves by name, in the order in which JAX flattens the tree."""
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if name in leaves:
            raise CheckpointError(
                f"{item}: expected names that differ, got {name!r} twice. Rename a key with '/'."
            )
        leaves[name] = leaf
    return leaves


def structure_of(tree: Any, names: Iterator[str]) -> Any:
    """The containers as JSON, a leaf being its name; ``{"custom": type}`` where JSON ends."""
    if tree is None:
        return None
    if jax.tree_util.all_leaves([tree]):
        return next(names)
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: structure_of(tree[key], names) for key in sorted(tree)}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [structure_of(child, names) for child in tree]}
    for _ in jax.tree.leaves(tree):
        next(names)
    return {"custom": f"{type(tree).__module__}.{type(tree).__qualname__}"}


def rebuilt_tree(
    folder: Path, leaves: dict[str, jax.Array], entry: dict[str, Any], example: Any
) -> Any:
    """Returns params as ``structure_of`` described them, or like the example if there is one."""
    if example is not None:
        return shaped_like(example, leaves)

    def build(node: Any) -> Any:
        if node is None or isinstance(node, str):
            return None if node is None else leaves[node]
        ((kind, inside),) = node.items()
        if kind == "dict":
            return {key: build(child) for key, child in inside.items()}
        if kind in ("list", "tuple"):
            return [build(c) for c in inside] if kind == "list" else tuple(map(build, inside))
        raise CheckpointError(
            f"{folder}: params: expected an example for containers of type {inside}, got none. "
            "Pass restore(..., expected=Checkpoint(params=...)) with params as they were saved."
        )

    return build(entry["structure"])


def shaped_like(example: Any, leaves: dict[str, jax.Array]) -> Any:
    """Returns a tree with the structure of ``example`` and the named leaves."""
    names = named_leaves("example", example)
    return jax.tree.unflatten(jax.tree.structure(example), [leaves[name] for name in names])


def leaf_shapes(item: str, tree: Any) -> dict[str, str]:
    """Returns ``dtype[shape]`` of each leaf of a tree, by its name."""
    return {name: array_words(leaf) for name, leaf in named_leaves(item, tree).items()}


def leaf_table(entry: dict[str, Any]) -> dict[str, str]:
    """Returns ``dtype[shape]`` of each leaf that a manifest's entry lists, by its name."""
    return {n: f"{leaf['dtype']}{leaf['shape']}" for n, leaf in entry["leaves"].items()}


def array_words(leaf: Any) -> str:
    """Returns ``dtype[shape]`` of an array, or the type of another value, for messages."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def check_against(origin: str, example: Any, entry: dict[str, Any], fix: str) -> None:
    """Raises CheckpointError unless a manifest's entry lists the arrays of ``example``.

    The message names the first few arrays that differ.
    """
    wanted, stored = leaf_shapes(origin, example), leaf_table(entry)
    if wanted != stored:
        raise CheckpointError(
            f"{origin}: expected the arrays asked for, got {difference_between(wanted, stored)}. {fix}"
        )


def difference_between(wanted: Mapping[str, str], stored: Mapping[str, str]) -> str:
    """Returns the first few entries that differ, as ``name: stored instead of wanted``."""
    names = [n for n in sorted({*wanted, *stored}) if wanted.get(n) != stored.get(n)]
    changes = [
        f"{n}: {stored.get(n, 'nothing')} instead of {wanted.get(n, 'nothing')}" for n in names[:3]
    ]
    return "; ".join(changes) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``metadata`` as JSON gives it back. Raises CheckpointError where JSON would change it."""
    plain: dict[str, Any] = {}
    for key, item in value.items():
        try:
            plain[key] = json.loads(json.dumps(item, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"metadata[{key!r}]: expected a value that JSON can hold, got {error}. "
                "Convert it: float(x), list(x), str(x); arrays belong into extra."
            ) from error
        if not isinstance(key, str) or plain[key] != untuple(item):
            raise CheckpointError(
                f"metadata[{key!r}]: expected text as keys throughout, got other keys, which JSON "
                "would turn into text. Convert them with str()."
            )
    return plain


def untuple(value: Any) -> Any:
    """Returns a tree of mappings and sequences with lists in place of tuples, as JSON reads it."""
    if isinstance(value, Mapping):
        return {key: untuple(item) for key, item in value.items()}
    return [untuple(item) for item in value] if isinstance(value, list | tuple) else value
