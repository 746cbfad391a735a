"""Text files of a reader's own: which files are text, and how few large files become many sections."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FEWEST_FILES = 30
FEWEST_BYTES = 64 * 1024  # of one's own text, for a split whose three parts all say something
_SECTIONS = 200  # sections aimed at, where files are too few to be split whole
_SHORTEST_SECTION, _LONGEST_SECTION = 1024, 64 * 1024
_CONTROL_BYTES = np.array([b for b in range(32) if b not in b"\t\n\r\f\b\x1b"], np.uint8)


class DataError(ValueError):
    """The text cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SourceFile:
    """One file, or one section of a file: its path below the folder, and its bytes as u8[size]."""

    path: str
    data: np.ndarray


def read_bytes(path: Path) -> np.ndarray:
    """Returns the bytes of a file as u8[size].

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(
            f"{path}: expected a file that can be read, got {error.strerror}. Change its "
            "permissions, or leave it out with --glob."
        ) from None


def is_text(data: np.ndarray) -> bool:
    """Whether bytes u8[size] are text: UTF-8, or another code of bytes without control characters.

    Example:
        >>> is_text(np.frombuffer("é".encode("latin-1"), np.uint8))
        True
        >>> is_text(np.frombuffer(b"PNG\\x00\\x01", np.uint8))
        False
    """
    if not data.size or (data == 0).any():
        return not data.size
    try:
        data.tobytes().decode("utf-8")
    except UnicodeDecodeError:
        return bool(np.isin(data, _CONTROL_BYTES).mean() < 0.01)
    return True


def read_text_files(
    path: str | os.PathLike[str], glob: str | None = None
) -> tuple[list[SourceFile], int]:
    """Reads one text file, or the text files below a folder in the order of their paths.

    Hidden files and folders and ``__pycache__`` are left out. Without a pattern, files that are no
    text (pictures, archives) are skipped and counted. A file that the pattern names must be text.

    Args:
        path: a file or a folder.
        glob: a pattern such as ``*.md`` or ``docs/**/*.txt``, for a folder.

    Returns:
        The files, and how many files were skipped because they are no text.

    Raises:
        DataError: no such path, nothing to read, or a file that cannot be read or is no text.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(
            f"{root}: expected a text file or a folder of text files, got nothing at this path. "
            "Correct the path."
        )
    if root.is_file():
        if glob is not None:
            raise DataError(
                f"--glob: expected it with --data of a folder, got the file {root}. Leave it out."
            )
        data = read_bytes(root)
        if not is_text(data):
            raise DataError(_not_text(root))
        return [SourceFile(path=root.name, data=data)], 0
    files, skipped = [], []
    for file in _paths_below(root, glob):
        data = read_bytes(file)
        if is_text(data):
            files.append(SourceFile(path=file.relative_to(root).as_posix(), data=data))
        elif glob is not None:
            raise DataError(_not_text(file))
        else:
            skipped.append(file)
    if not files:
        pattern = f" that match {glob!r}" if glob is not None else ""
        reason = (
            f"{len(skipped)} files that are no text, such as {skipped[0]}" if skipped else "none"
        )
        raise DataError(
            f"{root}: expected text files{pattern} below this folder, got {reason}. Name a folder "
            "with text in UTF-8, or another --glob."
        )
    return files, len(skipped)


def _not_text(file: Path) -> str:
    return (
        f"{file}: expected text, got a binary file (zero bytes or control characters; UTF-16 counts "
        "as binary). Convert it to UTF-8, or leave it out with --glob."
    )


def _paths_below(root: Path, glob: str | None) -> list[Path]:
    def visible(path: Path) -> bool:
        parts = path.relative_to(root).parts
        return not any(part.startswith(".") or part == "__pycache__" for part in parts)

    if glob is not None:
        try:
            matches = sorted(set(root.rglob(glob)))
        except (ValueError, NotImplementedError):
            raise DataError(
                f"--glob: expected a pattern relative to the folder, such as '*.md', got {glob!r}."
            ) from None
        return [path for path in matches if visible(path) and path.is_file()]
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if visible(Path(folder, name))]
        paths += [Path(folder, name) for name in names]
    return sorted(path for path in paths if visible(path) and path.is_file())


def cut_sections(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Cuts files into about 200 sections, named ``PATH#0000`` ..., each ending with a line if it can.

    Example:
        >>> book = SourceFile(path="book.txt", data=np.full(300_000, ord("a"), np.uint8))
        >>> sections = cut_sections([book])
        >>> sections[3].path, len(sections), sum(s.data.size for s in sections)
        ('book.txt#0003', 200, 300000)
    """
    total = sum(file.data.size for file in files)
    size = min(max(total // _SECTIONS, _SHORTEST_SECTION), _LONGEST_SECTION)
    sections = []
    for file in files:
        start, number = 0, 0
        while start < file.data.size:
            end = start + size
            if end < file.data.size:
                # A line end in the second half of the section moves the cut there.
                lines = np.flatnonzero(file.data[start + size // 2 : end] == ord("\n"))
                end = start + size // 2 + int(lines[-1]) + 1 if lines.size else end
            section = SourceFile(path=f"{file.path}#{number:04d}", data=file.data[start:end])
            sections.append(section)
            start, number = end, number + 1
    return sections
