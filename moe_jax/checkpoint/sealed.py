"""What makes a checkpoint trustworthy: a manifest with the digest of every file, sealed by its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1
LIBRARY = "moe_jax"
MANIFEST = "manifest.json"
RESTORE_COPY = "Restore a copy from your backup, or save it again."


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or must not be loaded, with what to do about it."""


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
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
        inside = listed(sorted(entry.name for entry in folder.iterdir())[:8])
        raise CheckpointError(
            f"{folder}: expected {MANIFEST}, got {inside}. Either this is no {LIBRARY} "
            "checkpoint, or it was copied or saved only in part: copy it again, or save it again."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: expected a JSON file, got {type(error).__name__}: {error}. {RESTORE_COPY}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("library") != LIBRARY:
        raise CheckpointError(
            f"{file}: expected the manifest of a {LIBRARY} checkpoint, got that of something "
            "else. Check the path."
        )
    version = manifest.get("format")
    # Before the seal is checked: a newer format may seal differently.
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{folder}: expected format {FORMAT} or older, got format {version}, written by "
            f"{LIBRARY} {manifest.get('library_version')}. Upgrade {LIBRARY} to read it."
        )
    checksum = manifest.pop("checksum", None)
    if sealed_text(manifest) != text:
        found = checksum_of(manifest)
        raise CheckpointError(
            f"{file}: expected the text that was sealed with SHA-256 {checksum}, got one with "
            f"{found}: it was damaged or edited. {RESTORE_COPY}"
        )
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    wanted: dict[str, Any] = manifest["files"]
    try:
        present = {str(file.relative_to(folder).as_posix()) for file in array_files(folder)}
        lost, added = sorted(set(wanted) - present), sorted(present - set(wanted))
        if lost or added:
            raise CheckpointError(
                f"{folder}: expected the {len(wanted)} files of its manifest, got "
                f"{len(lost)} missing ({listed(lost[:3])}) and {len(added)} unknown "
                f"({listed(added[:3])}). {RESTORE_COPY}"
            )
        found = file_digests(folder)
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
                f"changed. {RESTORE_COPY}"
            )


def array_files(folder: Path) -> Iterator[Path]:
    """Every file of a checkpoint but its manifest."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file != folder / MANIFEST:
                yield file


def file_digests(folder: Path, *, sync: bool = False) -> dict[str, dict[str, Any]]:
    found = {}
    for path in array_files(folder):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            if sync:  # on disk before the rename, or a power cut could leave an empty file
                os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    return found


def sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems have no fsync for folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def canonical(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False)


def sealed_text(manifest: dict[str, Any]) -> str:
    """The one text that a manifest may have on disk, its own checksum included."""
    return canonical({**manifest, "checksum": checksum_of(manifest)})


def checksum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(manifest).encode()).hexdigest()


def listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
