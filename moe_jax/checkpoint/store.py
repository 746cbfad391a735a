"""Saving and restoring: whole or not at all, verified before a single array is read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.checkpoint.layers import (
    LayerSpec,
    StoredLayer,
    check_specs,
    locate_layers,
    stored_layer,
)
from moe_jax.checkpoint.place import check_free
from moe_jax.checkpoint.sealed import (
    FORMAT,
    LIBRARY,
    MANIFEST,
    RESTORE_COPY,
    CheckpointError,
    checksum_of,
    file_digests,
    listed,
    read_manifest,
    sealed_text,
    sync_folder,
    verify_files,
)
from moe_jax.checkpoint.tree import (
    as_json,
    check_against,
    check_width,
    difference_between,
    leaf_shapes,
    leaf_table,
    named_leaves,
    rebuilt_tree,
    shaped_like,
    structure_of,
    to_host,
    told_array,
)
from moe_jax.config import Config, ConfigError
from moe_jax.routers import Router, router_from_json
from moe_jax.types import Params

_ARRAYS = "arrays"

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What is saved and restored together.

    Args:
        params: any pytree of arrays; restored without an example if its containers are dicts with
            text keys, lists, tuples and None.
        routers: the rules by name, e.g. one a layer.
        states: the router states by the same names, each shaped like ``router.init_state()``.
        layers: what the routers belong to: where in ``params`` their parameters are, and which
            experts they feed. Routers that are left out are looked for by name when restored.
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
    layers: Mapping[str, LayerSpec] = dataclasses.field(default_factory=dict)
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

    Arrays are gathered to this process, so all of them must be addressable from it; for arrays over
    several processes see ``moe_jax.parallel.distributed.gathered``. What is on disk knows no mesh:
    it restores on any number of devices and processes.

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
    target = check_free(path, overwrite)
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
    target = check_free(path, overwrite)
    items, content = _prepare(checkpoint, copy=True)
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moe_jax-save")
    future = pool.submit(_write, target, items, content, overwrite)
    pool.shutdown(wait=False)  # the interpreter still waits for the thread before it exits
    return SaveHandle(future)


def _prepare(
    checkpoint: Checkpoint, *, copy: bool
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Everything that can be checked before the disk is touched: host arrays and the manifest."""
    names = set(checkpoint.routers)
    if names != set(checkpoint.states):
        raise CheckpointError(
            f"states: expected one for each router ({listed(names)}), "
            f"got {listed(checkpoint.states)}. Pass router.init_state() for a router that was "
            "never calibrated."
        )
    routers = {}
    for name, router in checkpoint.routers.items():
        try:
            routers[name] = {"router": router.to_json(), "fingerprint": router.fingerprint()}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"routers[{name!r}]: {error}") from error
        wanted = leaf_shapes(f"states[{name!r}]", _state_template(router))
        found = leaf_shapes(f"states[{name!r}]", checkpoint.states[name])
        if wanted != found:
            raise CheckpointError(
                f"states[{name!r}]: expected the arrays of {type(router).__name__}.init_state(), "
                f"got {difference_between(wanted, found)}. Pass a state that this router made."
            )
    check_specs(checkpoint.layers, checkpoint.routers, checkpoint.params)
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
        leaves = named_leaves(item, tree)
        items[item] = {name: to_host(f"{item}: {name}", x, copy) for name, x in leaves.items()}
        arrays[item] = {
            "structure": structure_of(tree, iter(leaves)),
            "leaves": {
                name: {"dtype": x.dtype.name, "shape": list(x.shape)}
                for name, x in items[item].items()
            },
        }
    content = {
        "format": FORMAT,
        "library": LIBRARY,
        "library_version": _version(LIBRARY),
        "versions": {name: _version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        "routers": routers,
        "layers": {name: spec.to_json() for name, spec in checkpoint.layers.items()},
        "config": None if checkpoint.config is None else checkpoint.config.to_json(),
        "metadata": as_json(checkpoint.metadata),
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
                with _alone() as writer:
                    writer.save(beside / _ARRAYS / item, args=ocp.args.StandardSave(stored))
        manifest = {**content, "files": file_digests(beside, sync=True)}
        with open(beside / MANIFEST, "x", encoding="utf-8") as file:
            file.write(sealed_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(beside)
        _move_into_place(beside, target, overwrite)
        sync_folder(target.parent)
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
    return _restore(Path(path).resolve(), expected)[0]


def _restore(folder: Path, expected: Checkpoint | None) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its manifest; every file is read and verified once."""
    expected = Checkpoint() if expected is None else expected
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    arrays: dict[str, Any] = manifest["arrays"]

    routers = _restore_routers(folder, manifest, expected)
    templates = {name: _state_template(router) for name, router in routers.items()}
    check_against(
        f"{folder}: states", templates, arrays["states"],
        "Use the version of the library that wrote it.",
    )  # fmt: skip
    if expected.params is not None:
        check_against(
            f"{folder}: params", expected.params, arrays["params"],
            "Build the model as it was when the checkpoint was saved.",
        )  # fmt: skip
    for name, example in expected.extra.items():
        if f"extra-{name}" not in arrays:
            there = [item.removeprefix("extra-") for item in arrays if item.startswith("extra-")]
            raise CheckpointError(
                f"{folder}: expected extra {name!r}, got {listed(there)}. "
                "Ask for one of these, or leave it out."
            )
        check_against(
            f"{folder}: extra {name!r}", example, arrays[f"extra-{name}"],
            "Build the example as it was when the checkpoint was saved.",
        )  # fmt: skip

    try:
        config = None if manifest["config"] is None else Config.from_json(manifest["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: config: {error} Use {LIBRARY} {manifest['library_version']} to read it."
        ) from error

    wanted = ["params", "states", *(f"extra-{name}" for name in expected.extra)]
    found = {item: _read_arrays(folder, item, arrays[item]) for item in wanted}
    # Every file is opened by path, so an overwrite in between could mix two checkpoints.
    if read_manifest(folder) != manifest:
        raise CheckpointError(
            f"{folder}: expected one checkpoint, got it replaced while it was read. "
            "Restore it again."
        )
    params = rebuilt_tree(folder, found["params"], arrays["params"], expected.params)
    described = {name: LayerSpec.from_json(x) for name, x in manifest.get("layers", {}).items()}
    located = locate_layers(
        {name: router for name, router in routers.items() if name not in described},
        params,
        manifest["metadata"],
    )
    restored = Checkpoint(
        params=params,
        routers=routers,
        layers={**described, **located},
        states=shaped_like(templates, found["states"]),
        config=config,
        metadata=manifest["metadata"],
        extra={name: shaped_like(x, found[f"extra-{name}"]) for name, x in expected.extra.items()},
    )
    return restored, manifest


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenCheckpoint:
    """A checkpoint that was read and verified once, for everything that is asked of it.

    Attributes:
        path: its folder.
        content: what ``restore`` returns.
        about: what ``load_metadata`` returns.
    """

    path: Path
    content: Checkpoint
    about: Mapping[str, Any]

    def layer(self, name: str | None = None) -> StoredLayer:
        """The router of this name with its parameters and experts; None is the first by name.

        Raises:
            ValueError: no such router, or the checkpoint has no parameters for it.
        """
        names = sorted(self.content.routers)
        if not names:
            raise ValueError(
                f"{self.path}: expected a checkpoint with a router, got none. Inspect it."
            )
        chosen = names[0] if name is None else name
        if chosen not in self.content.routers:
            raise ValueError(
                f"router: expected one of {', '.join(names)}, got {chosen!r}. See moe-jax inspect."
            )
        spec = self.content.layers.get(chosen)
        if spec is None:
            raise ValueError(
                f"{self.path}: expected parameters of router {chosen!r}, got none under that name. "
                "Save params as {name: {'kernel': ...}} or {name: {'router': {'kernel': ...}}}, or "
                "say where they are: Checkpoint(layers={name: LayerSpec(...)})."
            )
        return stored_layer(
            chosen,
            self.content.routers[chosen],
            self.content.states[chosen],
            self.content.params,
            spec,
        )


def open_checkpoint(path: PathLike) -> OpenCheckpoint:
    """Reads and verifies a checkpoint once, for callers that ask several things of it.

    Raises:
        CheckpointError: as ``restore``.

    Example:
        >>> import tempfile
        >>> from moe_jax.routers import TopK
        >>> router = TopK(num_experts=4, k=2)
        >>> content = Checkpoint(
        ...     params={"block": router.init(jax.random.key(0), 16)},
        ...     routers={"block": router}, states={"block": router.init_state()},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     opened = open_checkpoint(save(f"{folder}/one", content))
        >>> opened.layer("block").width
        16
    """
    folder = Path(path).resolve()
    content, manifest = _restore(folder, None)
    return OpenCheckpoint(path=folder, content=content, about=_about(manifest))


def load_metadata(path: PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself, as plain JSON values, without reading an array.

    Returns:
        ``format``, ``library_version``, ``versions``, ``routers`` (name to ``router`` JSON and
        ``fingerprint``), ``layers`` (name to ``LayerSpec`` JSON), ``config`` (JSON or None),
        ``metadata`` as it was saved, ``arrays`` (``params``, ``states``, ``extra-NAME`` to leaf
        name to e.g. ``float32[3, 4]``),
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
    return _about(read_manifest(Path(path).resolve()))


def _about(manifest: dict[str, Any]) -> dict[str, Any]:
    words = ("format", "library_version", "versions", "routers", "config", "metadata")
    return {
        **{word: manifest[word] for word in words},
        "layers": manifest.get("layers", {}),
        "arrays": {item: leaf_table(entry) for item, entry in manifest["arrays"].items()},
        "checksum": checksum_of(manifest),
        "num_bytes": sum(entry["size"] for entry in manifest["files"].values()),
    }


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
                f"Use {LIBRARY} {manifest['library_version']}, or calibrate and save again."
            )
    if expected.routers:
        wanted = {name: _words(router) for name, router in expected.routers.items()}
        found = {name: _words(router) for name, router in routers.items()}
        if wanted != found:
            raise CheckpointError(
                f"{folder}: routers: expected the ones given, got "
                f"{difference_between(wanted, found)}. Build the routers from the checkpoint, or "
                "choose the checkpoint that fits these."
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
        check_width(f"{folder}: {item}: {name}", dtype)
        if 0 in shape:
            empty[name] = np.zeros(shape, dtype)
        else:
            wanted[name] = jax.ShapeDtypeStruct(shape, dtype)
    found: dict[str, Any] = {}
    if wanted:
        try:
            with _alone() as reader:
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
    table = {name: told_array(value) for name, value in arrays.items()}
    if table != leaf_table(entry):
        raise CheckpointError(
            f"{folder}: {item}: expected the arrays of the manifest, got "
            f"{difference_between(leaf_table(entry), table)}. {RESTORE_COPY}"
        )
    return arrays


def _alone() -> ocp.Checkpointer:
    """Orbax for this process alone: of several processes, one writes, and each reads for itself."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _state_template(router: Router) -> Any:
    return jax.eval_shape(router.init_state)


def _version(distribution: str) -> str:
    try:
        return distributions.version(distribution)
    except distributions.PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"
