"""Options of ``moe-jax bench``, checked before the minutes that a measurement takes."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import typer


def writable(file: Path | None) -> Path | None:
    """Returns the file if it can be written, which is tried: only the kernel knows.

    Raises:
        typer.BadParameter: it cannot; nothing is left of the attempt.
    """
    if file is None:
        return None
    try:
        if file.is_dir():
            raise typer.BadParameter(f"expected a file, got the folder {file}. Name a file in it.")
        above = next(path for path in (file, *file.absolute().parents) if path.exists())
        if above != file and not above.is_dir():
            raise typer.BadParameter(
                f"expected a file under folders, got {file} under the file {above}. Choose another."
            )
        _try_to_write(file)
    except OSError as error:
        raise typer.BadParameter(
            f"expected a file that can be written, got {file}: {error.strerror}. "
            "Check the permissions of its folder, or choose another."
        ) from None
    return file


def _try_to_write(file: Path) -> None:
    """Raises OSError if the file cannot be written. Leaves no file or folder behind."""
    if file.exists() and not file.is_file():  # opening a pipe would wait for its reader
        if not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    existed = os.path.lexists(file)
    missing = [folder for folder in file.absolute().parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
        if not existed:
            file.unlink()
    finally:
        for folder in missing:  # the innermost first
            with suppress(OSError):
                folder.rmdir()


def picture(file: Path | None) -> Path | None:
    """Returns the file if it can be written and its name ends in .png."""
    if file is not None and file.suffix != ".png":
        raise typer.BadParameter(f"expected a file that ends in .png, got {file}.")
    return writable(file)


def split_words(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """Splits a list of words. Raises typer.BadParameter for none and for one that is not allowed."""
    chosen = [w for w in text.split(",") if w]
    unknown = [w for w in chosen if w not in allowed]
    if unknown or not chosen:
        raise typer.BadParameter(
            f"expected some of {','.join(allowed)}, got {text!r}", param_hint=option
        )
    return chosen


def split_numbers(text: str, option: str) -> list[int]:
    """Splits a list of positive whole numbers. Raises typer.BadParameter for anything else."""
    try:
        parsed = [int(w) for w in text.split(",") if w]
    except ValueError:
        parsed = []
    if not parsed or min(parsed) < 1:
        raise typer.BadParameter(
            f"expected positive numbers such as 8,64, got {text!r}", param_hint=option
        )
    return parsed


def check_k(k: int, experts: int, mean_k: float | None = None) -> None:
    """Raises typer.BadParameter unless mean k <= k <= experts."""
    if k > experts:
        raise typer.BadParameter(
            f"expected at most the {experts} experts, got {k}. Lower it, or raise --experts.",
            param_hint="--k",
        )
    if mean_k is not None and mean_k > k:
        raise typer.BadParameter(
            f"expected at most k={k}, got {mean_k:g}. Lower it, or raise --k.",
            param_hint="--mean-k",
        )
