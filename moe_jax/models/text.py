"""Text for a published model: its tokenizer, and files cut into sequences of token ids."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class TextTokenizer:
    """The tokenizer of a model folder, read from ``tokenizer.json`` by the ``tokenizers`` package.

    Args:
        folder: of the model.
        vocab_size: of the model; a tokenizer with ids beyond it belongs to another one.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json``.
        ValueError: the package is not installed, the file is broken, or it is another model's.
    """

    def __init__(self, folder: str | Path, *, vocab_size: int) -> None:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected the model's tokenizer, got no such file. Download it into the "
                "model's folder."
            )
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                "tokenizers: expected the package to be installed, got none. Run: "
                "pip install 'moe_jax[models]'"
            ) from None
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(
                f"{path}: expected a tokenizer, got a file that cannot be read ({error}). Download it "
                "again."
            ) from None
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise ValueError(
                f"{path}: expected ids below {vocab_size}, the model's vocabulary, got {largest}. The "
                "tokenizer belongs to another model: download both again."
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model expects."""
        return self._tokenizer.encode(text).ids

    def encode_start(self, text: str, limit: int) -> tuple[list[int], str]:
        """At most ``limit`` token ids from the beginning of a text, and the part they stand for."""
        encoded = self._tokenizer.encode(text)
        ids, ends = encoded.ids[:limit], [end for _, end in encoded.offsets[:limit]]
        return ids, text[: max(ends, default=0)] if len(encoded.ids) > limit else text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(map(int, ids)))

    def token(self, number: int) -> str:
        """The text of one token; spaces as spaces, where the vocabulary marks them otherwise."""
        decoded = self._tokenizer.decode([number], skip_special_tokens=False)
        piece = self._tokenizer.id_to_token(number) or ""
        # Decoding one token drops the space before it, which SentencePiece and byte BPE mark.
        spaced = piece[:1] in ("\u2581", "\u0120") and not decoded.startswith(" ")
        return f" {decoded}" if spaced else decoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Files as sequences of equal length.

    Attributes:
        input_ids: i32[N, S], padded on the right.
        mask: bool[N, S], False for padding.
        file_index: i32[N], the file of each sequence.
        paths: the files' paths.
        file_bytes: i64[files], sizes of their text in UTF-8.
        file_tokens: i64[files], how many tokens each makes.
        file_digests: of each file's whole content, also where a limit cuts it: the first 64 bits of
            SHA-256 as hexadecimal digits. Empty for tokens that are from no file.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    file_index: np.ndarray
    paths: tuple[str, ...]
    file_bytes: np.ndarray
    file_tokens: np.ndarray
    file_digests: tuple[str, ...] = ()

    def files_among(self, digests: Collection[str]) -> list[str]:
        """Paths of the files whose content is among these ``file_digests``, whatever their name."""
        known = set(digests)
        return [p for p, d in zip(self.paths, self.file_digests, strict=False) if d in known]

    @property
    def files(self) -> int:
        """Number of files."""
        return len(self.paths)

    @property
    def bytes(self) -> int:
        """Size of the whole text in UTF-8."""
        return int(self.file_bytes.sum())

    @property
    def tokens(self) -> int:
        """How many tokens the text makes."""
        return int(self.file_tokens.sum())


def tokenize_files(
    folder: str | Path | Sequence[Path],
    tokenizer: TextTokenizer,
    *,
    length: int = 512,
    limit: int | None = None,
) -> TokenizedText:
    """Cuts the text files of a folder into sequences of ``length`` tokens; none spans two files.

    Args:
        folder: a text file, the files themselves, or a folder. A folder's files are read in the order
            of their names; hidden ones and those that are no UTF-8 text, such as pictures, are skipped.
        tokenizer: of the model.
        length: S, tokens a sequence.
        limit: the text ends after so many tokens.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no text, or a named file that is not UTF-8.
    """
    named = True
    if isinstance(folder, (str, Path)):
        path = Path(folder)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: expected a text file or a folder of them, got no such path. Check it."
            )
        named = path.is_file()
        paths = [path] if named else _visible_files(path)
    else:
        paths = list(folder)
        path = paths[0].parent if paths else Path()
    if length < 2:
        raise ValueError(f"length: expected at least 2 tokens a sequence, got {length}.")
    rows: list[list[int]] = []
    files: list[str] = []
    digests: list[str] = []
    owner: list[int] = []
    sizes: list[tuple[int, int]] = []
    for file in paths:
        if limit is not None and sum(tokens for _, tokens in sizes) >= limit:
            break
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            if not named:
                continue
            raise ValueError(
                f"{file}: expected text in UTF-8, got other bytes. Name a text file."
            ) from None
        if not text.strip():
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        left = None if limit is None else limit - sum(tokens for _, tokens in sizes)
        if left is None:
            ids = tokenizer.encode(text)
        else:
            ids, text = tokenizer.encode_start(text, left)
        if not ids:
            continue
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        rows += pieces
        owner += [len(files)] * len(pieces)
        sizes.append((len(text.encode()), len(ids)))
        digests.append(digest)
        files.append(str(file.relative_to(path)) if file != path else file.name)
    if not files:
        raise ValueError(
            f"{path}: expected files with text, got none. Give a folder of text files."
        )
    out = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        out[i, : len(row)], mask[i, : len(row)] = row, True
    counts = np.asarray(sizes, np.int64)
    return TokenizedText(
        input_ids=out,
        mask=mask,
        file_index=np.asarray(owner, np.int32),
        paths=tuple(files),
        file_bytes=counts[:, 0],
        file_tokens=counts[:, 1],
        file_digests=tuple(digests),
    )


def _visible_files(folder: Path) -> list[Path]:
    parts = {path: path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()}
    return sorted(p for p, names in parts.items() if not any(n.startswith(".") for n in names))


def standard_library(part: str) -> list[Path]:
    """The .py files of the running Python's library, split by a hash of their paths.

    Args:
        part: "calibration" or "held_out"; no file is in both.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = []
    for path in sorted(root.glob("*.py")):
        # One file in four is for calibration, so that evaluation has the larger part.
        calibration = zlib.crc32(path.name.encode()) % 4 == 0
        if calibration == (part == "calibration") and path.stat().st_size:
            chosen.append(path)
    return chosen
