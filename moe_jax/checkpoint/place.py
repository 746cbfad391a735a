"""Where a checkpoint may go, asked before the work that fills it."""

from __future__ import annotations

import os
from pathlib import Path

from moe_jax.checkpoint.sealed import MANIFEST, CheckpointError


def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The absolute path, links followed, if a checkpoint may be saved there; nothing is written.

    ``save`` asks the same, so a long job calls this first and ``save`` at its end.

    Args:
        path: the folder to make.
        overwrite: whether a checkpoint at ``path`` may be replaced.

    Raises:
        CheckpointError: ``path`` is taken, is no checkpoint although ``overwrite``, or lies under a
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
        if not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{target}: expected a path that may be written, got the folder {above}, which may "
                "not. Check its permissions, or choose another path."
            )
        return target
    if not overwrite:
        raise CheckpointError(
            f"{target}: expected a path that is free, got one that exists. Choose another path, or "
            "replace a checkpoint with overwrite=True (--overwrite on the command line)."
        )
    if not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target}: expected a checkpoint to overwrite, got something without {MANIFEST}. "
            "Only checkpoints are replaced: choose another path, or remove this one yourself."
        )
    return target
