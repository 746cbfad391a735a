"""Text for a published model: its tokenizer, and files cut into sequences of token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._tokenizer.decode(list(map(int, ids)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """Files as sequences of equal length.

    Attributes:
        input_ids: i32[N, S], padded on the right.
        mask: bool[N, S], False for padding.
        files: number of files.
        bytes: size of their text in UTF-8.
        tokens: how many tokens they make.
    """

    input_ids: np.ndarray
    mask: np.ndarray
    files: int
    bytes: int
    tokens: int


def tokenize_files(
    folder: str | Path, tokenizer: TextTokenizer, *, length: int = 512, limit: int | None = None
) -> TokenizedText:
    """Cuts the text files of a folder into sequences of ``length`` tokens; none spans two files.

    Args:
        folder: a text file, or a folder whose files are read in the order of their names.
        tokenizer: of the model.
        length: S, tokens a sequence.
        limit: files after so many tokens are left out.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no text, or a file that is not UTF-8.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a text file or a folder of them, got nothing.")
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if length < 2:
        raise ValueError(f"length: expected at least 2 tokens a sequence, got {length}.")
    rows: list[list[int]] = []
    size = tokens = files = 0
    for file in paths:
        if limit is not None and tokens >= limit:
            break
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"{file}: expected text in UTF-8, got other bytes. Move it out of the folder."
            ) from None
        ids = tokenizer.encode(text) if text.strip() else []
        rows += [ids[i : i + length] for i in range(0, len(ids), length)]
        size, tokens, files = size + len(text.encode()), tokens + len(ids), files + bool(ids)
    if not tokens:
        raise ValueError(
            f"{path}: expected files with text, got none. Give a folder of text files."
        )
    out = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        out[i, : len(row)], mask[i, : len(row)] = row, True
    return TokenizedText(input_ids=out, mask=mask, files=files, bytes=size, tokens=tokens)
