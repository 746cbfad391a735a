"""Arrays on disk, one orbax checkpoint for each tree, and on the host."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.checkpoint.tree import CheckpointError, array_words, difference_between, leaf_table

_ARRAYS = "arrays"
# Orbax searches below a path as a glob pattern and writes nothing that can be read where the path has
# such characters; TensorStore takes a backslash, and a folder named "gs:", for something else.
_MISREAD = re.compile(r"[\[\]*?\\]|:/")


def write_arrays(folder: Path, item: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays of one item below the folder of a checkpoint. Raises as orbax does."""
    stored = {name: x for name, x in arrays.items() if x.size}  # orbax takes no empty array
    if stored:
        with _alone() as writer, _safe_path(folder) as place:
            writer.save(place / _ARRAYS / item, args=ocp.args.StandardSave(stored))


def read_arrays(folder: Path, item: str, entry: dict[str, Any], renew: str) -> dict[str, jax.Array]:
    """The arrays of one item by name, on the default device, each in a buffer of its own.

    Raises:
        CheckpointError: orbax cannot read them, or they are not those of the manifest.
    """
    empty: dict[str, np.ndarray] = {}
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for name, leaf in entry["leaves"].items():
        shape, dtype = tuple(leaf["shape"]), np.dtype(leaf["dtype"])
        check_width(f"{folder}: {item}: {name}", dtype)
        if 0 in shape:
            empty[name] = np.zeros(shape, dtype)
        else:
            wanted[name] = jax.ShapeDtypeStruct(shape, dtype)
    stored: dict[str, Any] = {}
    if wanted:
        try:
            with _alone() as reader, _safe_path(folder) as place:
                stored = reader.restore(
                    place / _ARRAYS / item, args=ocp.args.StandardRestore(wanted)
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: expected orbax to read {item}, got {type(error).__name__}: {error}. "
                "The files are as they were written: install the orbax-checkpoint that the "
                "manifest names under versions, or restore again if it was replaced meanwhile."
            ) from error
    # Empty arrays are new ones each, so that no two leaves share a buffer and all can be donated.
    arrays = {name: jnp.asarray(value) for name, value in {**stored, **empty}.items()}
    # Compared once more, because orbax casts where it is asked for another dtype.
    table = {name: array_words(value) for name, value in arrays.items()}
    if table != leaf_table(entry):
        raise CheckpointError(
            f"{folder}: {item}: expected the arrays of the manifest, got "
            f"{difference_between(leaf_table(entry), table)}. {renew}"
        )
    return arrays


@contextlib.contextmanager
def _safe_path(folder: Path) -> Iterator[Path]:
    """Yields a path to the folder that orbax and TensorStore take as it is: itself, or a link to it."""
    # Without its anchor, which on Windows has a colon and a slash.
    if not _MISREAD.search(folder.relative_to(folder.anchor).as_posix()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as beside:
        link = Path(beside, "checkpoint")
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link


def _alone() -> ocp.Checkpointer:
    """Orbax for this process alone: of several processes, one writes, and each reads for itself."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def to_host(name: str, leaf: Any, copy: bool) -> np.ndarray:
    """Returns a leaf as a NumPy array.

    Raises:
        CheckpointError: not an array of numbers, or one that other processes hold parts of.
    """
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise CheckpointError(
            f"{name}: expected an array, got a {type(leaf).__name__}. "
            "Wrap it in jnp.asarray, or put it into metadata."
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise CheckpointError(
            f"{name}: expected an array of numbers, got a random key ({leaf.dtype}). "
            "Save jax.random.key_data(key) and wrap it again after restoring."
        )
    if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == np.bool_):
        raise CheckpointError(
            f"{name}: expected an array of numbers or bools, got dtype {leaf.dtype}. "
            "Put text and objects into metadata."
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise CheckpointError(
            f"{name}: expected an array that this process can read whole, got one spread over "
            "several processes. Gather it first, with jax.experimental.multihost_utils."
        )
    check_width(name, leaf.dtype)
    return np.array(leaf) if copy else np.asarray(leaf)


def check_width(name: str, dtype: Any) -> None:
    """Raises CheckpointError for 64-bit types while JAX is limited to 32 bits."""
    wide = ("int64", "uint64", "float64", "complex128")
    if np.dtype(dtype).name in wide and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            f"{name}: expected at most 32 bits, got {dtype}, which JAX would cut to 32. "
            "Cast it, or run with jax_enable_x64."
        )
