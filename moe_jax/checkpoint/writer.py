"""Saving: checked before the disk is touched, and whole or not at all on it."""

from __future__ import annotations

import re
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.arrays import to_host, write_arrays
from moe_jax.checkpoint.content import SEAL, Checkpoint
from moe_jax.checkpoint.layers import check_specs
from moe_jax.checkpoint.sealed import LIBRARY, PathLike, listed
from moe_jax.checkpoint.tree import (
    CheckpointError,
    as_json,
    difference_between,
    leaf_shapes,
    named_leaves,
    structure_of,
)
from moe_jax.routers import Router


def check_free(path: PathLike, overwrite: bool = False) -> Path:
    """Returns the absolute path, links followed, if a checkpoint may be saved there.

    Leaves nothing behind. ``save`` checks the same, so a long job calls this first and ``save`` at
    its end.

    Args:
        path: the folder to make.
        overwrite: whether a checkpoint at ``path`` may be replaced.

    Raises:
        CheckpointError: ``path`` is taken, exists and is no checkpoint, or lies under a
            file or in a folder that may not be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_free(f"{folder}/one").name
        'one'
    """
    target = Path(path).resolve()
    if not target.exists():
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise CheckpointError(
                f"{target}: expected a path under folders, got one under the file {above}. "
                "Choose another path."
            )
        # Only an attempt tells: root may write anywhere, and a file system may be read-only.
        attempt = above / f".{uuid.uuid4().hex}"
        try:
            attempt.mkdir()
            attempt.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"{target}: expected a path that may be written, got the folder {above}, which may "
                f"not ({error.strerror}). Check its permissions, or choose another path."
            ) from None
        return target
    if not overwrite:
        raise CheckpointError(
            f"{target}: expected a path that is free, got one that exists. Choose another path, or "
            "replace a checkpoint with overwrite=True (--overwrite on the command line)."
        )
    if not (target / SEAL.manifest).is_file():
        raise CheckpointError(
            f"{target}: expected a checkpoint to overwrite, got something without {SEAL.manifest}. "
            "Only checkpoints are replaced: choose another path, or remove this one yourself."
        )
    return target


class SaveHandle:
    """A save that runs in the background. Its failure is raised by ``wait``, so call it."""

    def __init__(self, future: Future[Path]) -> None:
        self._future = future

    def done(self) -> bool:
        """Returns whether the save has ended, successfully or not."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> Path:
        """Waits for the save to end and returns the checkpoint's folder.

        Raises:
            CheckpointError: the save failed.
            TimeoutError: it has not ended after ``timeout`` seconds; it goes on.
        """
        return self._future.result(timeout)


def save(path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False) -> Path:
    """Writes a checkpoint folder and returns its path. It appears whole or not at all.

    Arrays are gathered to this process, so all of them must be addressable from it; for arrays over
    several processes see ``moe_jax.parallel.distributed.gathered``. The files do not depend on a mesh:
    they restore on any number of devices and processes.

    Args:
        path: the folder to make; missing parents are made too.
        checkpoint: what to save.
        overwrite: whether a checkpoint at ``path`` is replaced. A folder that is not a checkpoint is
            never replaced.

    Raises:
        CheckpointError: ``path`` is taken, a state does not fit its router, something is not an
            array or not JSON, or the disk refuses.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from moe_jax.checkpoint import restore
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
        >>> import jax.numpy as jnp
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
    """Returns host arrays and the manifest, after every check that needs no disk."""
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
        _check_state(name, router, checkpoint.states[name])
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
        "library_version": _version(LIBRARY),
        "versions": {name: _version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
        "routers": routers,
        "layers": {name: spec.to_json() for name, spec in checkpoint.layers.items()},
        "config": None if checkpoint.config is None else checkpoint.config.to_json(),
        "metadata": as_json(checkpoint.metadata),
        "arrays": arrays,
    }
    return items, content


def _check_state(name: str, router: Router, state: Any) -> None:
    """Raises CheckpointError for a state of another rule, or of other sizes of this one."""
    template = jax.eval_shape(router.init_state)
    wanted = leaf_shapes(f"states[{name!r}]", template)
    given = leaf_shapes(f"states[{name!r}]", state)
    # Two rules may have states with the same arrays, so the types are compared too.
    foreign = type(state) is not type(template)
    if wanted == given and not foreign:
        return
    parts = [f"a {type(state).__name__}"] if foreign else []
    parts += [difference_between(wanted, given)] if wanted != given else []
    problem = ": ".join(parts)
    raise CheckpointError(
        f"states[{name!r}]: expected the arrays of {type(router).__name__}.init_state(), got "
        f"{problem}. Pass a state that this router made or was fitted to."
    )


def _write(
    target: Path,
    items: dict[str, dict[str, np.ndarray]],
    content: dict[str, Any],
    overwrite: bool,
) -> Path:
    with SEAL.writing(target, overwrite=overwrite) as beside:
        for item, arrays in items.items():
            write_arrays(beside, item, arrays)
        SEAL.close(beside, content)
    return target


def _version(distribution: str) -> str:
    try:
        return distributions.version(distribution)
    except distributions.PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"
