"""Text as bytes, split by file: the Python standard library's own source, or a reader's own files.

Files, not bytes, are split: a file belongs to one part whole, decided by a hash of its path. So the
same file lands in the same part on every machine and with every seed, and nothing that is measured on
held-out files was seen in training or in calibration. Few or very uneven files are first cut into
sections, which are then split like files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.lab.text_files import (
    FEWEST_BYTES,
    FEWEST_FILES,
    DataError,
    SourceFile,
    cut_sections,
    read_bytes,
    read_text_files,
)

VOCAB_SIZE = 256  # bytes

PARTS = ("train", "calibration", "held_out")
_CALIBRATION, _HELD_OUT = 0.10, 0.12  # shares of the files; the rest is for training

# Folders of the standard library that are not its source.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# Written by the build: it lists that machine's compilers and paths.
_GENERATED = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """The three parts, each sorted by path; no file is in two of them.

    Attributes:
        train: files for training.
        calibration: files that budgets are fitted on.
        held_out: files that results are measured on.
        root: file or folder that was read; None is the standard library.
        glob: pattern that chose files below ``root``.
        unit: what was split, ``"file"`` or ``"section"`` (of a file).
        skipped: number of files that were left out because they are no text.
    """

    train: tuple[SourceFile, ...]
    calibration: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    root: str | None = None
    glob: str | None = None
    unit: str = "file"
    skipped: int = 0

    def describe(self) -> dict[str, Any]:
        """Returns files and bytes of each part, the source, the split and a fingerprint, as JSON."""
        digest = hashlib.sha256()
        summary: dict[str, Any] = {}
        for part in PARTS:
            files: tuple[SourceFile, ...] = getattr(self, part)
            summary[part] = {"files": len(files), "bytes": sum(f.data.size for f in files)}
            for file in files:
                digest.update(f"{part}\0{file.path}\0{file.data.size}\0".encode())
                digest.update(file.data.tobytes())
        if self.root is None:
            summary["python"] = ".".join(map(str, sys.version_info[:3]))
        summary["source"] = {"path": self.root, "glob": self.glob, "skipped": self.skipped}
        summary["split"] = {
            "unit": self.unit,
            "by": "sha256 of the path",
            "held_out": _HELD_OUT,
            "calibration": _CALIBRATION,
        }
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


def load_corpus(root: str | os.PathLike[str] | None = None, *, glob: str | None = None) -> Corpus:
    """Reads text and splits it by file into training, calibration and held-out parts.

    Files stay whole if there are at least 30 and training gets half of the bytes or more. Otherwise
    each file is cut into sections (about 200 in all), which are split instead.

    Args:
        root: a text file, or a folder whose text files are read; None is the source of the running
            interpreter's standard library.
        glob: which files below a folder to read, such as ``*.md``; None is every text file.

    Raises:
        DataError: no such path, no text, too little text, a file that cannot be read, or a binary
            file that the pattern names.

    Example:
        >>> corpus = load_corpus()
        >>> len(corpus.train) > len(corpus.held_out) > 0
        True
    """
    if root is None:
        if glob is not None:
            raise DataError(
                f"--glob: expected it with --data of a folder, got {glob!r} alone. Add --data, or "
                "leave it out for the standard library."
            )
        return _standard_library(Path(sysconfig.get_paths()["stdlib"]))
    files, skipped = read_text_files(root, glob)
    total = sum(file.data.size for file in files)
    if total < FEWEST_BYTES:
        raise DataError(
            f"{root}: expected at least {FEWEST_BYTES:,} bytes of text, to train, calibrate and "
            f"measure on different parts, got {total:,} bytes in {len(files)} files. Add text."
        )
    unit, parts = "file", _split(files)
    trained = sum(file.data.size for file in parts["train"])
    if len(files) < FEWEST_FILES or not all(parts.values()) or trained < total / 2:
        unit, parts = "section", _split(cut_sections(files))
    _check_parts(parts, str(root), "Add text.")
    return Corpus(
        train=tuple(parts["train"]),
        calibration=tuple(parts["calibration"]),
        held_out=tuple(parts["held_out"]),
        root=str(Path(root).resolve()),
        glob=glob,
        unit=unit,
        skipped=skipped,
    )


def _split(files: Sequence[SourceFile]) -> dict[str, list[SourceFile]]:
    parts: dict[str, list[SourceFile]] = {part: [] for part in PARTS}
    for file in files:
        if (
            file.data.size > 1
        ):  # a byte is predicted from those before it: one alone teaches nothing
            parts[part_of(file.path)].append(file)
    return parts


def _check_parts(parts: Mapping[str, Sequence[SourceFile]], root: str, advice: str) -> None:
    total = sum(map(len, parts.values()))
    if total < FEWEST_FILES or not all(parts.values()):
        counts = ", ".join(f"{len(files)} {part}" for part, files in parts.items())
        raise DataError(
            f"text: expected at least {FEWEST_FILES} files below {root} with some in each part, got "
            f"{total} ({counts}). {advice}"
        )


def _standard_library(folder: Path) -> Corpus:
    paths = []
    for current, folders, names in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if f not in _EXCLUDED_FOLDERS and not f.startswith(_GENERATED)
        )
        paths += [
            Path(current, name)
            for name in names
            if name.endswith(".py") and not name.startswith(_GENERATED)
        ]
    parts = _split(
        [
            SourceFile(path=path.relative_to(folder).as_posix(), data=read_bytes(path))
            for path in sorted(paths)
        ]
    )
    # Some distributions ship the library compiled or zipped.
    _check_parts(
        parts,
        str(folder),
        "Use a Python that comes with its library's source (a python.org, conda or distribution "
        "build; not an embedded or zipped one), or name text of your own: --data FOLDER.",
    )
    return Corpus(
        train=tuple(parts["train"]),
        calibration=tuple(parts["calibration"]),
        held_out=tuple(parts["held_out"]),
    )


def corpus_of_checkpoint(
    metadata: Mapping[str, Any],
    root: str | os.PathLike[str] | None = None,
    *,
    glob: str | None = None,
    allow_other: bool = False,
) -> Corpus:
    """Returns the text that a checkpoint was trained or calibrated on, or another one if allowed.

    Args:
        metadata: of the checkpoint: ``data`` of its training, and ``calibration``.
        root: where the text is now; None is where it was read.
        glob: pattern for ``root``; None is the recorded one if ``root`` is None.
        allow_other: whether a text with another fingerprint may be used.

    Raises:
        DataError: the text cannot be read, or it is another one and ``allow_other`` is False.
    """
    records = [metadata.get("data")]
    calibration = metadata.get("calibration")
    if calibration and isinstance(calibration.get("text"), Mapping):
        records.insert(0, calibration["text"])
    recorded = [record for record in records if record]
    if root is None and recorded:
        # Checkpoints of earlier versions have no source: they used the standard library.
        source = recorded[0].get("source") or {"path": None, "glob": None}
        root, glob = source["path"], source["glob"] if glob is None else glob
        if root is not None and not Path(root).exists():
            raise DataError(
                f"text: expected the checkpoint's own text at {root}, got nothing at this path. If "
                "it moved, name its new place with --data."
            )
    corpus = load_corpus(root, glob=glob)
    prints = [record["fingerprint"] for record in recorded]
    now = corpus.describe()
    if allow_other or now["fingerprint"] in prints:
        return corpus
    had = list(dict.fromkeys(_name(record) for record in recorded)) or ["none recorded"]
    raise DataError(
        f"text: expected the checkpoint's own text ({' or '.join(had)}), got {_name(now)}, which "
        "differs. A budget that is fitted or measured on another text need not hold on the "
        "checkpoint's. Name the original with --data, or add --allow-other-data."
    )


def _name(record: Mapping[str, Any]) -> str:
    path = (record.get("source") or {}).get("path")
    python = f"the standard library of Python {record.get('python', 'unknown')}"
    return f"{path or python}, fingerprint {record['fingerprint'][:8]}"


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
                f"{len(files)}. Use a shorter length (in the file of --model) or more text."
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
class TextBlocks:
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
        """The number of bytes to predict."""
        return int(self.mask.sum())

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, count: int) -> TextBlocks:
        """The first ``count`` blocks."""
        return TextBlocks(
            inputs=self.inputs[:count],
            targets=self.targets[:count],
            mask=self.mask[:count],
            file_index=self.file_index[:count],
            paths=self.paths,
        )

    def pad_to(self, size: int) -> TextBlocks:
        """Appends masked blocks until N is a multiple of ``size``, so that all batches are full."""
        more = -len(self) % size

        def grown(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])

        return TextBlocks(
            inputs=grown(self.inputs),
            targets=grown(self.targets),
            mask=grown(self.mask),
            file_index=grown(self.file_index),
            paths=self.paths,
        )


def cut_blocks(files: Sequence[SourceFile], *, length: int, per_file: int, seed: int) -> TextBlocks:
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
    return TextBlocks(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        mask=mask,
        file_index=np.asarray(index, np.int32),
        paths=tuple(f.path for f in files),
    )
