"""Real text that every machine has: the Python standard library's own source, byte by byte.

Files, not bytes, are split: a file belongs to one part whole, decided by a hash of its path inside
the library. So the same file lands in the same part on every machine and with every seed, and
nothing that is measured on held-out files was seen in training or in calibration. Tests are left
out, and so is what installing Python generates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

VOCAB_SIZE = 256  # bytes

PARTS = ("train", "calibration", "held_out")
_CALIBRATION, _HELD_OUT = 0.10, 0.12  # shares of the files; the rest is for training

_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# Written by the build: it lists that machine's compilers and paths, and is nobody's source.
_GENERATED = ("_sysconfigdata", "_sysconfig_vars", "config-")
_FEWEST_FILES = 30


class DataError(ValueError):
    """There is no text to train on, with what to do about it."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SourceFile:
    """One file: its path inside the library (with ``/``), and its bytes as u8[size]."""

    path: str
    data: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """The three parts, each sorted by path; no file is in two of them."""

    train: tuple[SourceFile, ...]
    calibration: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    def describe(self) -> dict[str, object]:
        """Files and bytes of each part and a fingerprint of all, for logs and JSON."""
        digest = hashlib.sha256()
        summary: dict[str, object] = {}
        for part in PARTS:
            files: tuple[SourceFile, ...] = getattr(self, part)
            summary[part] = {"files": len(files), "bytes": sum(f.data.size for f in files)}
            for file in files:
                digest.update(f"{part}\0{file.path}\0{file.data.size}\0".encode())
                digest.update(file.data.tobytes())
        summary["python"] = ".".join(map(str, sys.version_info[:3]))
        summary["fingerprint"] = digest.hexdigest()[:32]
        return summary


def part_of(path: str) -> str:
    """Returns the part of ``PARTS`` that the file at this path (with ``/``) belongs to.

    Example:
        >>> part_of("json/decoder.py") == part_of("json/decoder.py")
        True
    """
    digest = hashlib.sha256(path.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < _HELD_OUT:
        return "held_out"
    return "calibration" if place < _HELD_OUT + _CALIBRATION else "train"


def load_corpus(root: str | os.PathLike[str] | None = None) -> Corpus:
    """Reads the standard library's source, or all ``*.py`` below another folder, and splits it.

    Args:
        root: the folder; None is the standard library of the running interpreter.

    Raises:
        DataError: the folder has too few source files to split (some distributions ship the
            library compiled or zipped).

    Example:
        >>> corpus = load_corpus()
        >>> len(corpus.train) > len(corpus.held_out) > 0
        True
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    parts: dict[str, list[SourceFile]] = {part: [] for part in PARTS}
    for path in _source_files(folder):
        name = path.relative_to(folder).as_posix()
        data = np.frombuffer(path.read_bytes(), np.uint8)
        if data.size > 1:  # a byte is predicted from the ones before it: one alone teaches nothing
            parts[part_of(name)].append(SourceFile(path=name, data=data))
    found = sum(map(len, parts.values()))
    if found < _FEWEST_FILES or not all(parts.values()):
        counts = ", ".join(f"{len(files)} {part}" for part, files in parts.items())
        raise DataError(
            f"text: expected at least {_FEWEST_FILES} .py files below {folder} with some in each "
            f"part, got {found} ({counts}). Use a Python that comes with its library's source (a "
            "python.org, conda or distribution build; not an embedded or zipped one), or pass "
            "root= with a folder of Python source."
        )
    return Corpus(**{part: tuple(files) for part, files in parts.items()})


def _source_files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if f not in _EXCLUDED_FOLDERS and not f.startswith(_GENERATED)
        )
        found += [
            Path(here, name)
            for name in names
            if name.endswith(".py") and not name.startswith(_GENERATED)
        ]
    return sorted(found)


class Batches:
    """Training batches that any step can be asked for: the same seed and step, the same batch.

    A window is drawn uniformly from all windows of ``length + 1`` bytes that lie inside one file.

    Args:
        files: to draw from.
        batch_size: B.
        length: L, bytes predicted per sequence.
        seed: of the draw.

    Raises:
        DataError: no file is longer than ``length``.

    Example:
        >>> batches = Batches(load_corpus().train, batch_size=2, length=16, seed=0)
        >>> batches[7].shape, bool((batches[7] == batches[7]).all())
        ((2, 17), True)
    """

    def __init__(
        self, files: Sequence[SourceFile], *, batch_size: int, length: int, seed: int
    ) -> None:
        long = [f for f in files if f.data.size > length]
        if not long or length < 1 or batch_size < 1:
            raise DataError(
                f"batches: expected batch_size >= 1, length >= 1 and files longer than length, got "
                f"batch_size={batch_size}, length={length} and {len(long)} such files of "
                f"{len(files)}. Use a shorter length or more text."
            )
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self._text = np.concatenate([f.data for f in long])
        starts = np.cumsum([0, *[f.data.size for f in long]])[:-1]
        windows = np.array([f.data.size - length for f in long])
        self._last_window = np.cumsum(windows)
        # What to add to a window's number to get where it starts in the text.
        self._shift = starts - (self._last_window - windows)

    def __getitem__(self, step: int) -> np.ndarray:
        """i32[B, L + 1]: inputs are ``[:, :-1]``, targets ``[:, 1:]``."""
        draw = np.random.default_rng((self.seed, step))
        window = draw.integers(self._last_window[-1], size=self.batch_size)
        file = np.searchsorted(self._last_window, window, side="right")
        start = window + self._shift[file]
        return self._text[start[:, None] + np.arange(self.length + 1)].astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """Text to measure on, cut into blocks of one size; each block lies in one file.

    A byte is predicted from those before it in its block; the first byte of a block only serves as
    context.
    """

    inputs: np.ndarray  # i32[N, L]
    targets: np.ndarray  # i32[N, L]
    mask: np.ndarray  # bool[N, L]: False where a file ended before the block did
    file_index: np.ndarray  # i32[N]
    paths: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, count: int) -> Blocks:
        """The first ``count`` blocks."""
        return Blocks(
            inputs=self.inputs[:count],
            targets=self.targets[:count],
            mask=self.mask[:count],
            file_index=self.file_index[:count],
            paths=self.paths,
        )

    def pad_to(self, size: int) -> Blocks:
        """Appends masked blocks until N is a multiple of ``size``, so that all batches are full."""
        more = -len(self) % size

        def grown(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])

        return Blocks(
            inputs=grown(self.inputs),
            targets=grown(self.targets),
            mask=grown(self.mask),
            file_index=grown(self.file_index),
            paths=self.paths,
        )


def cut_blocks(files: Sequence[SourceFile], *, length: int, per_file: int, seed: int) -> Blocks:
    """Blocks of ``length`` predicted bytes, at most ``per_file`` from each file, drawn by the seed.

    The cap keeps a few huge files from drowning the rest, which matters where files are what is
    resampled.

    Example:
        >>> blocks = cut_blocks(load_corpus().held_out, length=64, per_file=2, seed=0)
        >>> blocks.inputs.shape[1], int(blocks.file_index.max()) < len(blocks.paths)
        (64, True)
    """
    if not files or length < 1 or per_file < 1:
        raise DataError(
            f"blocks: expected files, length >= 1 and per_file >= 1, got {len(files)} files, "
            f"length={length}, per_file={per_file}. Pass a part of load_corpus()."
        )
    rows, index = [], []
    for i, file in enumerate(files):
        count = max(1, file.data.size // (length + 1))
        draw = np.random.default_rng((seed, i))
        for block in sorted(draw.choice(count, size=min(count, per_file), replace=False)):
            start = block * (length + 1)
            rows.append(file.data[start : start + length + 1])
            index.append(i)
    tokens = np.zeros((len(rows), length + 1), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
        mask[i, : row.size - 1] = True
    return Blocks(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        mask=mask,
        file_index=np.asarray(index, np.int32),
        paths=tuple(f.path for f in files),
    )
