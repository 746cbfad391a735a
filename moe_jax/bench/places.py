"""Whether a file that a measurement is to fill can be written: tried, since only the kernel knows."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import typer


def writable(file: Path | None) -> Path | None:
    """The file as it is if it can be written; asked before the minutes that fill it.

    Raises:
        typer.BadParameter: it cannot; nothing is left of the attempt.
    """
    if file is None:
        return None
    try:
        if file.is_dir():
            raise typer.BadParameter(f"expected a file, got the folder {file}. Name a file in it.")
        there = next(path for path in (file, *file.absolute().parents) if path.exists())
        if there != file and not there.is_dir():
            raise typer.BadParameter(
                f"expected a file under folders, got {file} under the file {there}. Choose another."
            )
        _try_to_write(file)
    except OSError as error:
        raise typer.BadParameter(
            f"expected a file that can be written, got {file}: {error.strerror}. "
            "Check the permissions of its folder, or choose another."
        ) from None
    return file


def _try_to_write(file: Path) -> None:
    """Raises OSError if the file cannot be written. Leaves no file or folder that was not there."""
    if file.exists() and not file.is_file():  # opening a pipe would wait for its reader
        if not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    there = os.path.lexists(file)
    missing = [folder for folder in file.absolute().parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
        if not there:
            file.unlink()
    finally:
        for folder in missing:  # the innermost first
            with suppress(OSError):
                folder.rmdir()


def picture(file: Path | None) -> Path | None:
    """The same of a picture, whose name must say its kind."""
    if file is not None and file.suffix != ".png":
        raise typer.BadParameter(f"expected a file that ends in .png, got {file}.")
    return writable(file)
