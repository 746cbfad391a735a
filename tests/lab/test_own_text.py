"""One's own text: what is read, how it is split, and whose text a checkpoint is measured on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moe_jax.lab import data
from moe_jax.lab.data import PARTS, DataError, corpus_of_checkpoint, load_corpus
from moe_jax.lab.text_files import SourceFile, cut_sections, read_text_files

LINE = b"the quick brown fox jumps over the lazy dog\n"


@pytest.fixture
def folder(tmp_path):
    """Forty text files, and a few files that are not text."""
    root = tmp_path / "text"
    (root / "deep").mkdir(parents=True)
    for number in range(40):
        name = f"deep/{number}.md" if number % 2 else f"{number}.txt"
        (root / name).write_bytes(LINE * 60)
    (root / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    (root / ".hidden").write_bytes(LINE * 100)
    return root


def paths(corpus) -> list[str]:
    return sorted(file.path for part in PARTS for file in getattr(corpus, part))


def test_a_folder_is_split_by_file_and_describes_itself(folder):
    corpus = load_corpus(folder)
    assert len(paths(corpus)) == 40
    for part in PARTS:
        assert {data.part_of(file.path) for file in getattr(corpus, part)} == {part}
    about = corpus.describe()
    assert about["source"] == {"path": str(folder.resolve()), "glob": None, "skipped": 1}
    assert about["split"]["unit"] == "file"
    assert "python" not in about


def test_a_pattern_chooses_files(folder):
    (folder / "more.md").write_bytes(LINE * 2000)
    chosen = load_corpus(folder, glob="*.md")
    assert {path.split("#")[0].rsplit(".")[-1] for path in paths(chosen)} == {"md"}
    assert chosen.describe()["source"]["glob"] == "*.md"


def test_one_file_is_cut_into_sections_that_end_with_lines(tmp_path):
    book = tmp_path / "book.txt"
    book.write_bytes(LINE * 5000)
    corpus = load_corpus(book)
    assert corpus.describe()["split"]["unit"] == "section"
    assert paths(corpus)[0] == "book.txt#0000"
    sections = cut_sections([SourceFile(path="b", data=np.frombuffer(LINE * 5000, np.uint8))])
    assert b"".join(s.data.tobytes() for s in sections) == LINE * 5000
    assert all(s.data[-1] == ord("\n") for s in sections)
    assert 150 < len(sections) < 450


def test_uneven_files_are_cut_too(folder):
    [held_out, *_] = [p for p in paths(load_corpus(folder)) if data.part_of(p) == "held_out"]
    (folder / held_out).write_bytes(LINE * 20_000)
    corpus = load_corpus(folder)
    assert corpus.unit == "section"
    trained = sum(file.data.size for file in corpus.train)
    assert trained > 0.5 * sum(f.data.size for part in PARTS for f in getattr(corpus, part))


def test_a_folder_may_move_and_stays_the_same_text(folder, tmp_path):
    before = load_corpus(folder).describe()["fingerprint"]
    moved = folder.rename(tmp_path / "moved")
    assert load_corpus(moved).describe()["fingerprint"] == before


def test_line_ends_and_names_of_windows_change_nothing(folder, monkeypatch):
    """Paths are recorded with slashes, and bytes are never translated."""
    (folder / "0.txt").write_bytes(b"one\r\ntwo\r\n" * 300)
    files, _ = read_text_files(folder)
    assert all("\\" not in file.path for file in files)
    [mixed] = [file for file in files if file.path == "0.txt"]
    assert mixed.data.tobytes() == b"one\r\ntwo\r\n" * 300


@pytest.mark.parametrize(
    ("make", "glob", "says"),
    [
        (lambda p: p / "nowhere", None, r"nowhere: expected .* got nothing at this path"),
        (lambda p: p, None, "expected text files below this folder, got none"),
        (lambda p: _write(p / "a.bin", b"\0\1"), None, r"a\.bin: expected text, got a binary file"),
        (lambda p: _write(p / "a.bin", b"\0\1").parent, None, "got 1 files that are no text"),
        (lambda p: _write(p / "a.bin", b"\0\1").parent, "*.bin", r"a\.bin: expected text, got a b"),
        (lambda p: _write(p / "a.md", LINE).parent, "*.txt", r"text files that match '\*\.txt'"),
        (lambda p: _write(p / "a.md", LINE).parent, "/abs/*", "expected a pattern relative to"),
        (lambda p: _write(p / "a.md", LINE), "*.md", "expected it with --data of a folder"),
        (
            lambda p: _write(p / "a.md", LINE),
            None,
            r"at least 65,536 bytes.*got 44 bytes in 1 file",
        ),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_name(tmp_path, make, glob, says):
    with pytest.raises(DataError, match=says):
        load_corpus(make(tmp_path), glob=glob)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_pattern_without_a_folder_is_refused():
    with pytest.raises(DataError, match="Add --data"):
        load_corpus(glob="*.md")


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    read = Path.read_bytes

    def refuse(path):
        if path.name == "4.txt":
            raise PermissionError(13, os.strerror(13), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        DataError, match=r"4\.txt: expected a file that can be read, got Permission"
    ):
        load_corpus(folder)


# --- the text of a checkpoint ---------------------------------------------------------------


def test_a_checkpoint_gets_its_own_text_back(folder):
    metadata = {"data": load_corpus(folder).describe()}
    assert corpus_of_checkpoint(metadata).root == str(folder.resolve())


def test_another_text_is_refused_unless_it_is_asked_for(folder, tmp_path):
    metadata = {"data": load_corpus(folder).describe()}
    other = _write(tmp_path / "other.txt", LINE * 3000)
    with pytest.raises(DataError, match=r"own text .*text, fingerprint .*--allow-other-data"):
        corpus_of_checkpoint(metadata, other)
    assert corpus_of_checkpoint(metadata, other, allow_other=True).root == str(other)
    (folder / "0.txt").write_bytes(LINE * 61)
    with pytest.raises(DataError, match="which differs"):
        corpus_of_checkpoint(metadata)


def test_a_moved_text_is_asked_for_and_accepted_at_its_new_place(folder, tmp_path):
    metadata = {"data": load_corpus(folder).describe()}
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="name its new place with --data"):
        corpus_of_checkpoint(metadata)
    assert corpus_of_checkpoint(metadata, moved).root == str(moved)


def test_the_text_of_the_calibration_counts_as_the_checkpoints_own(folder, tmp_path):
    trained = load_corpus(folder).describe()
    other = _write(tmp_path / "other.txt", LINE * 3000)
    metadata = {"data": trained, "calibration": {"text": load_corpus(other).describe()}}
    assert corpus_of_checkpoint(metadata).root == str(other)
    assert corpus_of_checkpoint(metadata, folder).root == str(folder.resolve())


def test_checkpoints_of_earlier_versions_used_the_standard_library():
    about = load_corpus().describe()
    del about["source"], about["split"]
    assert corpus_of_checkpoint({"data": about}).root is None
