"""Routers, parameters, states and their provenance on disk, by orbax.

A checkpoint is one folder::

    PATH/
      manifest.json      routers, config, metadata, the shape of every array, SHA-256 of every file
      arrays/params/     an orbax checkpoint each, readable by orbax alone:
      arrays/states/     a flat mapping from names such as "layer_0/kernel" to arrays
      arrays/extra-NAME/

It is written beside its place and renamed into it last, so PATH either does not exist or is whole.
What was damaged later (cut short, a bit flipped, a file added or lost) no longer matches the
manifest and is refused before a single array is read. Nothing is pickled. A process that is killed
while saving leaves a hidden ``.NAME.saving-*`` beside PATH, which may be deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.config import Config, ConfigError
from moe_jax.routers import Router, router_from_json
from moe_jax.types import Params

FORMAT = 1
_LIBRARY = "moe_jax"
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_RESTORE_COPY = "Restore a copy from your backup, or save it again."

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or must not be loaded, with what to do about it."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What is saved and restored together.

    Args:
        params: any pytree of arrays; restored without an example if its containers are dicts with
            text keys, lists, tuples and None.
        routers: the rules by name, e.g. one a layer.
        states: the router states by the same names, each shaped like ``router.init_state()``.
        config: the configuration that all this was made with.
        metadata: anything that JSON can hold: provenance, measurements, step counts.
        extra: further pytrees by name, e.g. ``{"optimizer": opt_state}``. They are restored only
            on request, see ``restore``.

    Example:
        >>> from moe_jax.routers import TopK
        >>> router = TopK(num_experts=4, k=2)
        >>> saved = Checkpoint(
        ...     params={"router": router.init(jax.random.key(0), 16)},
        ...     routers={"router": router},
        ...     states={"router": router.init_state()},
        ... )
    """

    params: Params = None
    routers: Mapping[str, Router] = dataclasses.field(default_factory=dict)
    states: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Config | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class SaveHandle:
    """A save that runs in the background. Its failure is raised by ``wait``, so call it."""

    def __init__(self, future: Future[Path]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> Path:
        """Waits for the save to end and returns the checkpoint's folder.

        Raises:
            CheckpointError: the save failed.
            TimeoutError: it has not ended after ``timeout`` seconds; it goes on.
        """
        return self._future.result(timeout)


# --- saving ---------------------------------------------------------------------------------


def save(path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False) -> Path:
    """Writes a checkpoint folder and returns its path. It appears whole or not at all.

    Arrays are gathered to this process, so all of them must be addressable from it.

    Args:
        path: the folder to make; missing parents are made too.
        checkpoint: what to save.
        overwrite: whether a checkpoint at ``path`` is replaced. A folder that is no checkpoint
            never is.

    Raises:
        CheckpointError: ``path`` is taken, a state does not fit its router, something is not an
            array or not JSON, or the disk refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/one", Checkpoint(params={"w": jnp.ones((2, 3))}))
        ...     restore(f"{folder}/one").params["w"].shape
        (2, 3)
    """
    target = _free_place(path, overwrite)
    items, content = _prepare(checkpoint, copy=False)
    return _write(target, items, content, overwrite)


def save_async(path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False) -> SaveHandle:
    """``save`` in the background: checks and copies now, writes while the caller goes on.

    The values are those at the time of the call: arrays may be donated, deleted or changed in
    place right after. Costs one copy of all arrays in host memory.

    Raises:
        CheckpointError: as ``save``; what the disk refuses is raised by ``SaveHandle.wait``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     handle = save_async(f"{folder}/one", Checkpoint(params={"w": jnp.ones(3)}))
        ...     handle.wait().name
        'one'
    """
    target = _free_place(path, overwrite)
    items, content = _prepare(checkpoint, copy=True)
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moe_jax-save")
    future = pool.submit(_write, target, items, content, overwrite)
    pool.shutdown(wait=False)  # the interpreter still waits for the thread before it exits
    return SaveHandle(future)


def _free_place(path: PathLike, overwrite: bool) -> Path:
    """The absolute path, links followed. Raises CheckpointError if it may not be written."""
    target = Path(path).resolve()
    if not target.exists():
        return target
    if not overwrite:
        raise CheckpointError(
            f"{target}: expected a path that is free, got one that exists. "
            "Choose another path, or pass overwrite=True to replace a checkpoint."
        )
    if not (target / _MANIFEST).is_file():
        raise CheckpointError(
            f"{target}: expected a checkpoint to overwrite, got something without {_MANIFEST}. "
            "Only checkpoints are replaced: choose another path, or remove this one yourself."
        )
    return target


def _prepare(
    checkpoint: Checkpoint, *, copy: bool
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Everything that can be checked before the disk is touched: host arrays and the manifest."""
    names = set(checkpoint.routers)
    if names != set(checkpoint.states):
        raise CheckpointError(
            f"states: expected one for each router ({_listed(names)}), "
            f"got {_listed(checkpoint.states)}. Pass router.init_state() for a router that was "
            "never calibrated."
        )
    routers = {}
    for name, router in checkpoint.routers.items():
        try:
            routers[name] = {"router": router.to_json(), "fingerprint": router.fingerprint()}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"routers[{name!r}]: {error}") from error
        wanted = _shapes(f"states[{name!r}]", _state_template(router))
        found = _shapes(f"states[{name!r}]", checkpoint.states[name])
        if wanted != found:
            raise CheckpointError(
                f"states[{name!r}]: expected the arrays of {type(router).__name__}.init_state(), "
                f"got {_difference(wanted, found)}. Pass a state that this router made."
            )
    trees = {"params": checkpoint.params, "states": dict(checkpoint.states)}
    for name, tree in checkpoint.extra.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise CheckpointError(
                f"extra: expected names of letters, digits, '_', '.' and '-', got {name!r}. "
                "Rename it: the name becomes a folder's."
            )
        trees[f"extra-{name}"] = tree
    items = {}
    arrays = {}
    for item, tree in trees.items():
        leaves = _named_leaves(item, tree)
        items[item] = {name: _to_host(f"{item}: {name}", x, copy) for name, x in leaves.items()}
        arrays[item] = {
            "structure": _structure(tree, iter(leaves)),
            "leaves": {
                name: {"dtype": x.dtype.name, "shape": list(x.shape)}
                for name, x in items[item].items()
            },
        }
    content = {
        "format": FORMAT,
        "library": _LIBRARY,
        "library_version": _version(_LIBRARY),
        "versions": {name: _version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        "routers": routers,
        "config": None if checkpoint.config is None else checkpoint.config.to_json(),
        "metadata": _as_json(checkpoint.metadata),
        "arrays": arrays,
    }
    return items, content


def _write(
    target: Path,
    items: dict[str, dict[str, np.ndarray]],
    content: dict[str, Any],
    overwrite: bool,
) -> Path:
    beside = target.with_name(f".{target.name}.saving-{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        for item, arrays in items.items():
            stored = {name: x for name, x in arrays.items() if x.size}  # orbax takes no empty array
            if stored:
                with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
                    writer.save(beside / _ARRAYS / item, args=ocp.args.StandardSave(stored))
        manifest = {**content, "files": _digests(beside, sync=True)}
        with open(beside / _MANIFEST, "x", encoding="utf-8") as file:
            file.write(_seal(manifest))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(beside)
        _move_into_place(beside, target, overwrite)
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # orbax raises either
        raise CheckpointError(
            f"{target}: expected to write a checkpoint, got {type(error).__name__}: {error}. "
            "Nothing was changed there: check the space, the permissions and the path."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already when all went well
    return target


def _move_into_place(beside: Path, target: Path, overwrite: bool) -> None:
    if not (overwrite and target.exists()):
        # An empty folder that appeared meanwhile would be replaced without a word.
        if target.exists():
            raise FileExistsError(f"{target} appeared while the checkpoint was written")
        os.rename(beside, target)
        return
    # No portable call swaps two folders, so for an instant neither is at target. A crash right
    # there loses nothing: the old one is whole under the name that restore() then points at.
    old = target.with_name(f".{target.name}.replaced-{uuid.uuid4().hex}")
    os.rename(target, old)
    try:
        os.rename(beside, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


# --- restoring ------------------------------------------------------------------------------


def restore(path: PathLike, *, expected: Checkpoint | None = None) -> Checkpoint:
    """Reads a checkpoint, every array bit for bit as it was saved, on the default device.

    Router states come back as their own types, with the dtypes and shapes of
    ``router.init_state()``.

    Args:
        path: the folder.
        expected: an example of what the caller can use; arrays in it may be
            ``jax.ShapeDtypeStruct``. ``routers``, if any, must be equal to the stored ones.
            ``params``, if not None, must have the same names, shapes and dtypes, and gives the
            containers (needed where these are more than dicts, lists, tuples and None).
            ``extra`` names the extras to restore and gives their containers; extras that it does
            not name stay on disk. The other fields are not looked at.

    Raises:
        CheckpointError: there is no checkpoint, it is incomplete, damaged or changed, a newer
            format, or not what was expected. Nothing of it is returned then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/one", Checkpoint(params={}, extra={"m": (jnp.ones(2), None)}))
        ...     wish = Checkpoint(extra={"m": (jax.ShapeDtypeStruct((2,), jnp.float32), None)})
        ...     restore(f"{folder}/one", expected=wish).extra["m"][0].tolist()
        [1.0, 1.0]
    """
    folder = Path(path).resolve()
    expected = Checkpoint() if expected is None else expected
    manifest = _read_manifest(folder)
    _verify_files(folder, manifest)
    arrays: dict[str, Any] = manifest["arrays"]

    routers = _restore_routers(folder, manifest, expected)
    templates = {name: _state_template(router) for name, router in routers.items()}
    _check_against(
        f"{folder}: states", templates, arrays["states"],
        "Use the version of the library that wrote it.",
    )  # fmt: skip
    if expected.params is not None:
        _check_against(
            f"{folder}: params", expected.params, arrays["params"],
            "Build the model as it was when the checkpoint was saved.",
        )  # fmt: skip
    for name, example in expected.extra.items():
        if f"extra-{name}" not in arrays:
            there = [item.removeprefix("extra-") for item in arrays if item.startswith("extra-")]
            raise CheckpointError(
                f"{folder}: expected extra {name!r}, got {_listed(there)}. "
                "Ask for one of these, or leave it out."
            )
        _check_against(
            f"{folder}: extra {name!r}", example, arrays[f"extra-{name}"],
            "Build the example as it was when the checkpoint was saved.",
        )  # fmt: skip

    try:
        config = None if manifest["config"] is None else Config.from_json(manifest["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: config: {error} Use {_LIBRARY} {manifest['library_version']} to read it."
        ) from error

    wanted = ["params", "states", *(f"extra-{name}" for name in expected.extra)]
    found = {item: _read_arrays(folder, item, arrays[item]) for item in wanted}
    # Every file is opened by path, so an overwrite in between could mix two checkpoints.
    if _read_manifest(folder) != manifest:
        raise CheckpointError(
            f"{folder}: expected one checkpoint, got it replaced while it was read. "
            "Restore it again."
        )
    return Checkpoint(
        params=_rebuilt(folder, found["params"], arrays["params"], expected.params),
        routers=routers,
        states=_like(templates, found["states"]),
        config=config,
        metadata=manifest["metadata"],
        extra={name: _like(x, found[f"extra-{name}"]) for name, x in expected.extra.items()},
    )


def load_metadata(path: PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself, as plain JSON values, without reading an array.

    Returns:
        ``format``, ``library_version``, ``versions``, ``routers`` (name to ``router`` JSON and
        ``fingerprint``), ``config`` (JSON or None), ``metadata`` as it was saved, ``arrays``
        (``params``, ``states``, ``extra-NAME`` to leaf name to e.g. ``float32[3, 4]``),
        ``num_bytes`` on disk, and ``checksum``, 64 hex digits over all of it, arrays included:
        it names this checkpoint and no other.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest is damaged or of a newer format.
            The array files are not looked at: ``restore`` does that.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/one", Checkpoint(params={"w": jnp.ones(3)}, metadata={"a": 1}))
        ...     told = load_metadata(f"{folder}/one")
        >>> told["metadata"], told["arrays"]["params"]
        ({'a': 1}, {'w': 'float32[3]'})
    """
    manifest = _read_manifest(Path(path).resolve())
    words = ("format", "library_version", "versions", "routers", "config", "metadata")
    return {
        **{word: manifest[word] for word in words},
        "arrays": {item: _table(entry) for item, entry in manifest["arrays"].items()},
        "checksum": _checksum(manifest),
        "num_bytes": sum(entry["size"] for entry in manifest["files"].values()),
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / _MANIFEST
    if not folder.is_dir():
        # Only the crash that _move_into_place speaks of leaves one of these.
        old = sorted(folder.parent.glob(f".{folder.name}.replaced-*"))
        hint = f"An overwrite was cut short: rename {old[-1]} to it." if old else "Check the path."
        what = "a file" if folder.exists() else "nothing there"
        raise CheckpointError(f"{folder}: expected a checkpoint folder, got {what}. {hint}")
    try:
        text = file.read_bytes().decode("utf-8")
        manifest = json.loads(text)
    except FileNotFoundError as error:
        inside = _listed(sorted(entry.name for entry in folder.iterdir())[:8])
        raise CheckpointError(
            f"{folder}: expected {_MANIFEST}, got {inside}. Either this is no {_LIBRARY} "
            "checkpoint, or it was copied or saved only in part: copy it again, or save it again."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected a JSON file, got {type(error).__name__}: {error}. {_RESTORE_COPY}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("library") != _LIBRARY:
        raise CheckpointError(
            f"{file}: expected the manifest of a {_LIBRARY} checkpoint, got that of something "
            "else. Check the path."
        )
    version = manifest.get("format")
    # Before the seal is checked: a newer format may seal differently.
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{folder}: expected format {FORMAT} or older, got format {version}, written by "
            f"{_LIBRARY} {manifest.get('library_version')}. Upgrade {_LIBRARY} to read it."
        )
    checksum = manifest.pop("checksum", None)
    if _seal(manifest) != text:
        found = _checksum(manifest)
        raise CheckpointError(
            f"{file}: expected the text that was sealed with SHA-256 {checksum}, got one with "
            f"{found}: it was damaged or edited. {_RESTORE_COPY}"
        )
    return manifest


def _verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    wanted: dict[str, Any] = manifest["files"]
    try:
        present = {str(file.relative_to(folder).as_posix()) for file in _files(folder)}
        lost, added = sorted(set(wanted) - present), sorted(present - set(wanted))
        if lost or added:
            raise CheckpointError(
                f"{folder}: expected the {len(wanted)} files of its manifest, got "
                f"{len(lost)} missing ({_listed(lost[:3])}) and {len(added)} unknown "
                f"({_listed(added[:3])}). {_RESTORE_COPY}"
            )
        found = _digests(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: expected files that can be read, got {type(error).__name__}: {error}. "
            "Check the permissions and the disk."
        ) from error
    for name, entry in wanted.items():
        if found[name] != entry:
            raise CheckpointError(
                f"{folder / name}: expected {entry['size']} bytes with SHA-256 {entry['sha256']}, "
                f"got {found[name]['size']} with {found[name]['sha256']}: it was damaged or "
                f"changed. {_RESTORE_COPY}"
            )


def _restore_routers(
    folder: Path, manifest: dict[str, Any], expected: Checkpoint
) -> dict[str, Router]:
    routers = {}
    for name, entry in manifest["routers"].items():
        try:
            router = routers[name] = router_from_json(entry["router"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: router {name!r}: {error}") from error
        if router.fingerprint() != entry["fingerprint"]:
            raise CheckpointError(
                f"{folder}: router {name!r}: expected fingerprint {entry['fingerprint']}, got "
                f"{router.fingerprint()}: this version of the library reads the rule differently. "
                f"Use {_LIBRARY} {manifest['library_version']}, or calibrate and save again."
            )
    if expected.routers:
        wanted = {name: _words(router) for name, router in expected.routers.items()}
        found = {name: _words(router) for name, router in routers.items()}
        if wanted != found:
            raise CheckpointError(
                f"{folder}: routers: expected the ones given, got "
                f"{_difference(wanted, found)}. Build the routers from the checkpoint, or choose "
                "the checkpoint that fits these."
            )
    return routers


def _words(router: Router) -> str:
    return json.dumps(router.to_json(), sort_keys=True)


def _read_arrays(folder: Path, item: str, entry: dict[str, Any]) -> dict[str, jax.Array]:
    """The arrays of one item by name. Checked against the manifest once more: orbax might cast."""
    empty: dict[str, np.ndarray] = {}
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for name, leaf in entry["leaves"].items():
        shape, dtype = tuple(leaf["shape"]), np.dtype(leaf["dtype"])
        _check_width(f"{folder}: {item}: {name}", dtype)
        if 0 in shape:
            empty[name] = np.zeros(shape, dtype)
        else:
            wanted[name] = jax.ShapeDtypeStruct(shape, dtype)
    found: dict[str, Any] = {}
    if wanted:
        try:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                found = reader.restore(
                    folder / _ARRAYS / item, args=ocp.args.StandardRestore(wanted)
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: expected orbax to read {item}, got {type(error).__name__}: {error}. "
                "The files are as they were written: install the orbax-checkpoint that the "
                "manifest names under versions, or restore again if it was replaced meanwhile."
            ) from error
    arrays = {name: jnp.asarray(value) for name, value in {**found, **empty}.items()}
    table = {name: _told(value) for name, value in arrays.items()}
    if table != _table(entry):
        raise CheckpointError(
            f"{folder}: {item}: expected the arrays of the manifest, got "
            f"{_difference(_table(entry), table)}. {_RESTORE_COPY}"
        )
    return arrays


# --- trees and names ------------------------------------------------------------------------


def _named_leaves(item: str, tree: Any) -> dict[str, Any]:
    """Leaves by name, in the order in which JAX flattens the tree."""
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if name in leaves:
            raise CheckpointError(
                f"{item}: expected names that differ, got {name!r} twice. Rename a key with '/'."
            )
        leaves[name] = leaf
    return leaves


def _structure(tree: Any, names: Iterator[str]) -> Any:
    """The containers as JSON, a leaf being its name; ``{"custom": type}`` where JSON ends."""
    if tree is None:
        return None
    if jax.tree_util.all_leaves([tree]):
        return next(names)
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _structure(tree[key], names) for key in sorted(tree)}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_structure(child, names) for child in tree]}
    for _ in jax.tree.leaves(tree):
        next(names)
    return {"custom": f"{type(tree).__module__}.{type(tree).__qualname__}"}


def _rebuilt(
    folder: Path, leaves: dict[str, jax.Array], entry: dict[str, Any], example: Any
) -> Any:
    """Params as ``_structure`` described them, or like the example if there is one."""
    if example is not None:
        return _like(example, leaves)

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


def _like(example: Any, leaves: dict[str, jax.Array]) -> Any:
    names = _named_leaves("example", example)
    return jax.tree.unflatten(jax.tree.structure(example), [leaves[name] for name in names])


def _state_template(router: Router) -> Any:
    return jax.eval_shape(router.init_state)


def _shapes(item: str, tree: Any) -> dict[str, str]:
    return {name: _told(leaf) for name, leaf in _named_leaves(item, tree).items()}


def _table(entry: dict[str, Any]) -> dict[str, str]:
    return {n: f"{leaf['dtype']}{leaf['shape']}" for n, leaf in entry["leaves"].items()}


def _told(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _check_against(origin: str, example: Any, entry: dict[str, Any], fix: str) -> None:
    wanted, found = _shapes(origin, example), _table(entry)
    if wanted != found:
        raise CheckpointError(
            f"{origin}: expected the arrays asked for, got {_difference(wanted, found)}. {fix}"
        )


def _difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first few entries that differ, as ``name: found instead of wanted``."""
    names = [n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)]
    told = [
        f"{n}: {found.get(n, 'nothing')} instead of {wanted.get(n, 'nothing')}" for n in names[:3]
    ]
    return "; ".join(told) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


# --- arrays, files, JSON --------------------------------------------------------------------


def _to_host(name: str, leaf: Any, copy: bool) -> np.ndarray:
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
    _check_width(name, leaf.dtype)
    return np.array(leaf) if copy else np.asarray(leaf)


def _check_width(name: str, dtype: Any) -> None:
    wide = ("int64", "uint64", "float64", "complex128")
    if np.dtype(dtype).name in wide and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            f"{name}: expected at most 32 bits, got {dtype}, which JAX would cut to 32. "
            "Cast it, or run with jax_enable_x64."
        )


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a checkpoint but its manifest."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file != folder / _MANIFEST:
                yield file


def _digests(folder: Path, *, sync: bool = False) -> dict[str, dict[str, Any]]:
    found = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            if sync:  # on disk before the rename, or a power cut could leave an empty file
                os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    return found


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems have no fsync for folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _canonical(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False)


def _seal(manifest: dict[str, Any]) -> str:
    """The one text that a manifest may have on disk, its own checksum included."""
    return _canonical({**manifest, "checksum": _checksum(manifest)})


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(manifest).encode()).hexdigest()


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata`` as JSON gives it back. Raises CheckpointError where JSON would change it."""
    plain: dict[str, Any] = {}
    for key, item in value.items():
        try:
            plain[key] = json.loads(json.dumps(item, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"metadata[{key!r}]: expected a value that JSON can hold, got {error}. "
                "Convert it: float(x), list(x), str(x); arrays belong into extra."
            ) from error
        if not isinstance(key, str) or plain[key] != _untuple(item):
            raise CheckpointError(
                f"metadata[{key!r}]: expected text as keys throughout, got other keys, which JSON "
                "would turn into text. Convert them with str()."
            )
    return plain


def _untuple(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _untuple(item) for key, item in value.items()}
    return [_untuple(item) for item in value] if isinstance(value, list | tuple) else value


def _version(distribution: str) -> str:
    try:
        return distributions.version(distribution)
    except distributions.PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
