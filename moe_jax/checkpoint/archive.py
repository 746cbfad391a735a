"""Backups of a service: one folder with all it needs, versioned and checksummed.

An export is a folder::

    EXPORT/
      export.json        format, versions, provenance, and SHA-256 of every other file
      checkpoint/        the checkpoint as it was: parameters, router states, thresholds
      config.json        what ``moe-jax serve --config`` and ``load_config`` read
      thresholds.json    a readable copy of the fitted budgets; ``checkpoint/`` is authoritative
      baseline.json      a performance baseline of ``moe-jax bench ... --json``, if one was given

``restore`` verifies all of it and copies it as one release into a folder of releases::

    RELEASES/
      1f0c…/checkpoint, config.json, …    one folder a release, named by its checksum
      current -> 1f0c…                    what is served
      previous -> 90ab…                   what ``rollback`` goes back to

A release appears whole or not at all, and ``current`` changes by one rename, so whoever reads
``RELEASES/current/checkpoint`` sees either the old release or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from moe_jax import checkpoint as checkpoints
from moe_jax.checkpoint.description import describe_checkpoint, router_sizes, superseded
from moe_jax.checkpoint.sealed import (
    LIBRARY,
    PathLike,
    Seal,
    checksum_of,
    move_into_place,
    sync_folder,
)
from moe_jax.config import Config, load_config


class ArchiveError(ValueError):
    """An export cannot be written or must not be restored; the message says what to do."""


SEAL = Seal(
    noun="an export",
    manifest="export.json",
    mark=("kind", f"{LIBRARY} export"),
    format=1,
    error=ArchiveError,
    absent="Check the path; a bare checkpoint becomes an export by moe-jax export.",
    renew="Take another copy of the export, or export again.",
)


def export(
    path: PathLike,
    checkpoint: PathLike,
    *,
    config: Config | None = None,
    baseline: PathLike | None = None,
) -> dict[str, Any]:
    """Writes an export and returns its manifest.

    Args:
        path: the folder to make. It must be free: an export is never replaced.
        checkpoint: a checkpoint's folder. It is verified before it is copied.
        config: the configuration to serve it with; None takes the checkpoint's own, or the default
            with the sizes of the checkpoint's default router. It is kept as it is. Where it differs
            from the checkpoint, the service goes by the checkpoint, and the manifest names the
            settings in ``provenance["superseded"]``.
        baseline: a file that ``moe-jax bench ... --json`` wrote.

    Raises:
        ArchiveError: ``path`` is taken, there is no configuration, it names a router that is
            not in the checkpoint, the baseline file is invalid, or writing fails.
        CheckpointError: the checkpoint is damaged.

    Example:
        >>> import jax, tempfile
        >>> from moe_jax import TopK
        >>> from moe_jax.checkpoint import Checkpoint, save
        >>> router = TopK(num_experts=4, k=2)
        >>> saved = Checkpoint(
        ...     params={"router": router.init(jax.random.key(0), 16)},
        ...     routers={"router": router}, states={"router": router.init_state()},
        ...     config=Config(),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(f"{folder}/one", saved)
        ...     manifest = export(f"{folder}/backup", f"{folder}/one")
        ...     restored = restore(f"{folder}/backup", f"{folder}/releases")
        ...     restored["checkpoint"] == manifest["provenance"]["checkpoint"]
        True
    """
    target, source = Path(path).resolve(), Path(checkpoint).resolve()
    if target.exists():
        raise ArchiveError(
            f"{target}: expected a path that is free, got one that exists. Choose another: an "
            "export is a backup and is never replaced."
        )
    opened = checkpoints.open_checkpoint(source)  # reads and verifies every file
    about, described = opened.about, describe_checkpoint(opened)
    if config is None:
        config = _config_of(opened)
    differing = _superseded(config, opened)
    measured = None if baseline is None else _read_baseline(Path(baseline))
    thresholds = {name: router["fit"] for name, router in described["routers"].items()}
    content = {
        "library_version": about["library_version"],
        "versions": about["versions"],
        "provenance": {
            "checkpoint": about["checksum"],
            "config": config.config_hash,
            "routers": {n: r["fingerprint"] for n, r in described["routers"].items()},
            "fits": thresholds,
            "metadata": about["metadata"],
            "superseded": differing,
            "baseline": None
            if measured is None
            else {word: measured[word] for word in ("bench", "machine")},
        },
    }
    with SEAL.writing(target) as beside:
        shutil.copytree(source, beside / "checkpoint")
        _write_json(beside / "config.json", config.to_json())
        _write_json(beside / "thresholds.json", thresholds)
        if measured is not None:
            _write_json(beside / "baseline.json", measured)
        manifest = SEAL.close(beside, content)
    return {**manifest, "checksum": checksum_of(manifest)}


def _config_of(opened: checkpoints.OpenCheckpoint) -> Config:
    """The configuration that a checkpoint was saved with, or the default one with its sizes."""
    if opened.about["config"] is not None:
        return Config.from_json(opened.about["config"])
    try:
        layer = opened.layer(None)
        sizes: dict[str, Any] = {**router_sizes(layer.router, layer.width)}
        return load_config(env={}, **sizes)
    except ValueError as error:
        raise ArchiveError(
            f"{opened.path}: expected a checkpoint with its configuration, or with a router to take "
            f"its sizes from, got neither ({error}). Pass the configuration that it is served with "
            "(--config FILE)."
        ) from error


def _superseded(config: Config, opened: checkpoints.OpenCheckpoint) -> dict[str, int]:
    named = config.serving.checkpoint_router
    if named:
        try:
            opened.router_name(named)
        except ValueError as error:
            raise ArchiveError(f"checkpoint_router: {error}") from None
    try:
        return superseded(config, opened)
    except ValueError:  # it cannot be served, but it can be exported as a backup
        return {}


def verify(path: PathLike) -> dict[str, Any]:
    """Returns the manifest of an export, after comparing every byte of the export with it.

    Raises:
        ArchiveError: there is no export, it is of a newer format, or any file of it was damaged,
            lost or added; the message names the file.
    """
    folder = Path(path).resolve()
    manifest = SEAL.read(folder)
    SEAL.verify(folder, manifest)
    return {**manifest, "checksum": checksum_of(manifest)}


def restore(path: PathLike, releases: PathLike) -> dict[str, Any]:
    """Verifies an export, copies it into ``releases`` and makes it the current release.

    The release that was current becomes ``previous``. Restoring what is current already changes
    nothing, unless the release was damaged: it is replaced by a copy of the export then.

    Returns:
        ``{"release", "folder", "checkpoint", "current", "previous", "repaired"}``: its name, its
        folder, the checkpoint's checksum, which releases are current and previous now, and whether
        a damaged release was replaced.

    Raises:
        ArchiveError: as ``verify``, or writing fails; the message says which release is current.
    """
    source, root = Path(path).resolve(), Path(releases).resolve()
    manifest = verify(source)
    name = manifest["checksum"][:16]
    folder = root / name
    beside = root / f".{name}.restoring-{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        damaged = folder.exists() and not _is_intact(folder)
        if damaged or not folder.exists():
            shutil.copytree(source, beside)
            verify(beside)  # copying can fail after the source was verified
            sync_folder(beside)
            move_into_place(beside, folder, overwrite=damaged)
        before = _pointed(root, "current")
        if before != name:
            if before is not None:
                _point(root, "previous", before)
            _point(root, "current", name)
        sync_folder(root)
    except OSError as error:
        raise ArchiveError(
            f"{root}: expected to restore into it, got {type(error).__name__}: {error}. "
            f"The current release is {_pointed(root, 'current')}. Check the space, the permissions "
            "and the path."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {
        "release": name,
        "folder": str(folder),
        "checkpoint": manifest["provenance"]["checkpoint"],
        "current": _pointed(root, "current"),
        "previous": _pointed(root, "previous"),
        "repaired": damaged,
    }


def rollback(releases: PathLike) -> dict[str, Any]:
    """Makes the previous release the current one, after verifying it. Doing it twice undoes it.

    Returns:
        As ``restore``, without ``repaired``.

    Raises:
        ArchiveError: there is no previous release, or it is damaged, and nothing has changed; or a
            link could not be replaced, and the message says which release is current.
    """
    root = Path(releases).resolve()
    current, previous = _pointed(root, "current"), _pointed(root, "previous")
    if current is None:
        got = (
            "one without current"
            if root.is_dir()
            else "a file"
            if root.exists()
            else "nothing there"
        )
        raise ArchiveError(
            f"{root}: expected a folder of releases, which restore writes, got {got}. Check the path."
        )
    if previous is None:
        raise ArchiveError(
            f"{root}: expected a previous release, got the current one alone ({current}). There is "
            "nothing to go back to: restore another export instead."
        )
    try:
        manifest = verify(root / previous)
    except ArchiveError as error:
        raise ArchiveError(
            f"{error} The current release is still {current}. Restoring the export of {previous} "
            "replaces the damaged release and makes it current."
        ) from error
    try:
        _point(root, "current", previous)
        _point(root, "previous", current)
        sync_folder(root)
    except OSError as error:
        raise ArchiveError(
            f"{root}: expected to change its links, got {type(error).__name__}: {error}. "
            f"The current release is {_pointed(root, 'current')}. Check the permissions."
        ) from error
    return {
        "release": previous,
        "folder": str(root / previous),
        "checkpoint": manifest["provenance"]["checkpoint"],
        "current": previous,
        "previous": current,
    }


# --- parts ----------------------------------------------------------------------------------


def _is_intact(folder: Path) -> bool:
    try:
        verify(folder)
    except ArchiveError:
        return False
    return True


def _read_baseline(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArchiveError(
            f"{file}: expected a JSON file, got {type(error).__name__}: {error}. "
            "Write one with: moe-jax bench route --json FILE."
        ) from error
    words = ("bench", "machine", "settings", "rows")
    if not isinstance(content, dict) or not all(word in content for word in words):
        raise ArchiveError(
            f"{file}: expected a baseline with {', '.join(words)}, got something else. "
            "Write one with: moe-jax bench route --json FILE."
        )
    return content


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def _pointed(root: Path, link: str) -> str | None:
    try:
        return os.readlink(root / link)
    except OSError:
        return None


def _point(root: Path, link: str, name: str) -> None:
    """Replaces a link atomically, so that readers never find it missing."""
    beside = root / f".{link}-{uuid.uuid4().hex}"
    try:
        os.symlink(name, beside)
        os.replace(beside, root / link)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def release_of(checkpoint: PathLike) -> str:
    """Returns the name of the release or export that a checkpoint lies in, "" outside of one.

    It is the name of the folder that ``restore`` makes: 16 digits of the export's checksum.
    """
    folder = Path(checkpoint).resolve().parent
    if not (folder / SEAL.manifest).is_file():
        return ""
    try:
        return checksum_of(SEAL.read(folder))[:16]
    except ArchiveError:  # the checkpoint itself is verified by whoever opens it
        return ""


def releases_of(checkpoint: PathLike) -> Path | None:
    """Returns the folder of releases that a checkpoint lies in, None outside of one.

    Example:
        >>> releases_of("runs/model") is None
        True
    """
    release = Path(checkpoint).resolve().parent
    # An export has the same files. Only a folder of releases has a link to the current one.
    has_current = _pointed(release.parent, "current") is not None
    return release.parent if has_current and (release / SEAL.manifest).is_file() else None


def baseline_of(path: PathLike) -> Path:
    """Returns the baseline file inside an export or a release, or ``path`` itself where it is a file.

    Raises:
        ArchiveError: a folder without one.
    """
    where = Path(path)
    if where.is_dir():
        where = where / "baseline.json"
        if not where.is_file():
            raise ArchiveError(
                f"{where.parent}: expected an export with baseline.json, got one without. "
                "Export again with --baseline FILE."
            )
    return where
