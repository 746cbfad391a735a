"""Sealed folders: a manifest with the digest of every file, sealed by its own digest.

Checkpoints and exports are sealed folders. One is written beside its place and renamed into it last,
so it exists whole or not at all; what was damaged later no longer matches its manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARY = "moe_jax"

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seal:
    """One kind of sealed folder.

    Attributes:
        noun: what messages call it, with its article.
        manifest: name of the manifest file.
        mark: key and value by which the manifest says what it belongs to.
        format: the newest format that this version reads, and the one that it writes.
        error: what its methods raise.
        absent: what to do where the folder has no manifest.
        renew: what to do about damage.
    """

    noun: str
    manifest: str
    mark: tuple[str, str]
    format: int
    error: type[ValueError]
    absent: str
    renew: str

    def read(self, folder: Path) -> dict[str, Any]:
        """Returns the manifest without its checksum; the other files are not read.

        Raises:
            error: there is none, it is of another kind or a newer format, or it was changed.
        """
        file = folder / self.manifest
        if not folder.is_dir():
            # Only a crash between the two renames of an overwrite leaves one of these.
            old = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.replaced-*"))
            hint = (
                f"An overwrite was cut short: rename {old[-1]} to it." if old else "Check the path."
            )
            what = "a file" if folder.exists() else "nothing there"
            raise self.error(
                f"{folder}: expected {self.noun}, which is a folder, got {what}. {hint}"
            )
        try:
            text = file.read_bytes().decode("utf-8")
            manifest = json.loads(text)
        except FileNotFoundError as error:
            inside = listed(sorted(entry.name for entry in folder.iterdir())[:8])
            raise self.error(
                f"{folder}: expected {self.noun} with {self.manifest}, got {inside}. {self.absent}"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise self.error(
                f"{file}: expected a JSON file, got {type(error).__name__}: {error}. {self.renew}"
            ) from error
        key, value = self.mark
        if not isinstance(manifest, dict) or manifest.get(key) != value:
            raise self.error(
                f"{file}: expected the manifest of {self.noun} of {LIBRARY}, got that of something "
                "else. Check the path."
            )
        version = manifest.get("format")
        # Before the seal is checked: a newer format may seal differently.
        if isinstance(version, int) and version > self.format:
            raise self.error(
                f"{folder}: expected format {self.format} or older, got format {version}, written by "
                f"{LIBRARY} {manifest.get('library_version')}. Upgrade {LIBRARY} to read it."
            )
        checksum = manifest.pop("checksum", None)
        if sealed_text(manifest) != text:
            raise self.error(
                f"{file}: expected the text that was sealed with SHA-256 {checksum}, got one with "
                f"{checksum_of(manifest)}: it was damaged or edited. {self.renew}"
            )
        return manifest

    def verify(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Compares every byte of the folder with its manifest.

        Raises:
            error: a file was damaged, lost or added; the message names it.
        """
        wanted: dict[str, Any] = manifest["files"]
        try:
            present = {f.relative_to(folder).as_posix() for f in self._files(folder)}
            lost, added = sorted(set(wanted) - present), sorted(present - set(wanted))
            if lost or added:
                raise self.error(
                    f"{folder}: expected the {len(wanted)} files of {self.manifest}, got "
                    f"{len(lost)} missing ({listed(lost[:3])}) and {len(added)} unknown "
                    f"({listed(added[:3])}). {self.renew}"
                )
            digests = file_digests(self._files(folder), folder)
        except OSError as error:
            raise self.error(
                f"{folder}: expected files that can be read, got {type(error).__name__}: {error}. "
                "Check the permissions and the disk."
            ) from error
        for name, entry in wanted.items():
            if digests[name] != entry:
                raise self.error(
                    f"{folder / name}: expected {entry['size']} bytes with SHA-256 "
                    f"{entry['sha256']}, got {digests[name]['size']} with "
                    f"{digests[name]['sha256']}: it was damaged or changed. {self.renew}"
                )

    def _files(self, folder: Path) -> Iterator[Path]:
        """Every file of the folder but its manifest."""
        for root, _, names in os.walk(folder):
            for name in names:
                file = Path(root, name)
                if file != folder / self.manifest:
                    yield file

    @contextlib.contextmanager
    def writing(self, target: Path, *, overwrite: bool = False) -> Iterator[Path]:
        """Yields a new folder beside ``target``, which takes its place if the block ends well.

        Raises:
            error: the disk refuses. ``target`` is unchanged then.
        """
        beside = target.with_name(f".{target.name}.saving-{uuid.uuid4().hex}")
        try:
            beside.mkdir(parents=True)
            yield beside
            move_into_place(beside, target, overwrite)
            sync_folder(target.parent)
        except self.error:
            raise
        except (OSError, ValueError) as error:  # orbax raises either
            raise self.error(
                f"{target}: expected to write {self.noun}, got {type(error).__name__}: {error}. "
                "Nothing was changed there: check the space, the permissions and the path."
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # gone already when all went well

    def close(self, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
        """Writes the manifest of a filled folder, all of it on disk, and returns it."""
        key, value = self.mark
        files = file_digests(self._files(folder), folder, sync=True)
        manifest = {**content, key: value, "format": self.format, "files": files}
        with open(folder / self.manifest, "x", encoding="utf-8") as file:
            file.write(sealed_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        return manifest


def move_into_place(beside: Path, target: Path, overwrite: bool) -> None:
    """Renames a folder to ``target``, which must be free unless ``overwrite`` is set.

    Raises:
        OSError: ``target`` is taken, or a rename failed. What was at ``target`` is there still.
    """
    if not (overwrite and target.exists()):
        # An empty folder that appeared meanwhile would be replaced without a word.
        if target.exists():
            raise FileExistsError(f"{target} appeared while it was written")
        os.rename(beside, target)
        return
    # No portable call swaps two folders, so for an instant neither is at target. A crash right
    # there loses nothing: the old one is whole under the name that Seal.read then points at.
    old = target.with_name(f".{target.name}.replaced-{uuid.uuid4().hex}")
    os.rename(target, old)
    try:
        os.rename(beside, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def file_digests(
    files: Iterator[Path], folder: Path, *, sync: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of files by their path in ``folder``; ``sync`` puts them on disk."""
    digests = {}
    for path in files:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            if sync:  # on disk before the rename, or a power cut could leave an empty file
                os.fsync(file.fileno())
        digests[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    return digests


def sync_folder(folder: Path) -> None:
    """Puts the entries of a folder on disk, where the file system can."""
    with contextlib.suppress(OSError):  # some file systems have no fsync for folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def canonical(manifest: dict[str, Any]) -> str:
    """Returns the one JSON text of a manifest without its checksum."""
    return json.dumps(manifest, sort_keys=True, indent=1, allow_nan=False)


def sealed_text(manifest: dict[str, Any]) -> str:
    """Returns the one text that a manifest may have on disk, its checksum included."""
    return canonical({**manifest, "checksum": checksum_of(manifest)})


def checksum_of(manifest: dict[str, Any]) -> str:
    """Returns SHA-256 of a manifest, which holds the digest of every file and so names the folder."""
    return hashlib.sha256(canonical(manifest).encode()).hexdigest()


def listed(names: Any) -> str:
    """Returns names for a sentence, or "none"."""
    return ", ".join(map(str, names)) or "none"
