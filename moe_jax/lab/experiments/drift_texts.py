"""Texts that differ from the training text: prose and reference text that Python brings along."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

from moe_jax.lab.data import Corpus, DataError, SourceFile
from moe_jax.lab.text_files import read_text_files

REFERENCE = "pydoc_data/topics.py"  # the language reference as a module of strings
_SHORTEST = 512  # bytes; shorter docstrings are mostly one phrase


def drift_text(name: str, corpus: Corpus) -> list[SourceFile]:
    """Returns the files of one text of a drift experiment.

    Args:
        name: ``code``, the held-out files; ``prose``, the long docstrings of these files;
            ``reference``, the entries of Python's language reference, which ``help("if")`` shows;
            or the path of a text file or folder.
        corpus: the text that the model was trained on.

    Raises:
        DataError: no text of this name, or no such path.

    Example:
        >>> from moe_jax.lab.data import load_corpus
        >>> files = drift_text("reference", load_corpus())
        >>> bytes(files[0].data[:20]).decode()
        'The "assert" stateme'
    """
    held_out = [file for file in corpus.held_out if file.path != REFERENCE]
    if name == "code":
        return held_out
    if name == "prose":
        files = [_text(f"{file.path}: docstrings", _docstrings(file)) for file in held_out]
        files = [file for file in files if file.data.size > 1]
        if not files:
            raise DataError(
                "prose: expected long docstrings in the held-out Python files, got no Python files "
                "with them. Name a text file or a folder instead."
            )
        return files
    if name == "reference":
        from pydoc_data.topics import topics  # pyright: ignore[reportMissingTypeStubs]

        return [_text(topic, text.strip()) for topic, text in sorted(topics.items()) if text]
    check_text(name)
    return read_text_files(name)[0]


def check_text(name: str) -> None:
    """Raises DataError unless ``name`` is a text that ``drift_text`` knows, or a path that exists."""
    if name not in ("code", "prose", "reference") and not Path(name).exists():
        raise DataError(
            f"texts: expected code, prose, reference or the path of a text, got {name!r}. Correct the "
            "name, or run in the folder that the path starts from."
        )


def _text(path: str, text: str) -> SourceFile:
    return SourceFile(path=path, data=np.frombuffer(text.encode("utf-8"), np.uint8))


def _docstrings(file: SourceFile) -> str:
    try:
        tree = ast.parse(file.data.tobytes())
    except (SyntaxError, ValueError):  # another version's Python, or no Python
        return ""
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return "\n\n".join(text for text in texts if len(text) >= _SHORTEST)
