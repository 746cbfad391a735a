"""The text: split by file, the same everywhere, with nothing of one part in another."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.lab.data import (
    PARTS,
    Batches,
    DataError,
    SourceFile,
    cut_blocks,
    load_corpus,
    part_of,
)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def test_parts_are_disjoint_by_file_and_of_the_intended_sizes(corpus):
    names = {part: {f.path for f in getattr(corpus, part)} for part in PARTS}
    assert not names["train"] & names["held_out"]
    assert not names["train"] & names["calibration"]
    assert not names["held_out"] & names["calibration"]
    for part, paths in names.items():
        assert {part_of(path) for path in paths} == {part}
    total = sum(map(len, names.values()))
    assert 0.06 < len(names["held_out"]) / total < 0.2
    assert 0.05 < len(names["calibration"]) / total < 0.16


def test_the_split_of_a_path_never_changes():
    # Measured results are compared between versions, so these are promises.
    assert part_of("json/encoder.py") == "held_out"
    assert part_of("subprocess.py") == "held_out"
    assert part_of("typing.py") == "train"


def test_tests_and_installed_packages_are_left_out(corpus):
    paths = [f.path for part in PARTS for f in getattr(corpus, part)]
    banned = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [p for p in paths if banned & set(p.split("/")[:-1])]
    assert not [p for p in paths if "_sysconfigdata" in p or p.startswith("config-")]
    assert "json/decoder.py" in paths


def test_description_names_the_text(corpus):
    report = corpus.describe()
    assert report == load_corpus().describe()
    assert set(PARTS) <= set(report)


def test_a_library_without_source_is_refused_with_advice(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"expected at least 30 files.*got 1 .*--data FOLDER"):
        load_corpus()


def numbered(path: str, size: int, base: int) -> SourceFile:
    return SourceFile(path=path, data=(base + np.arange(size) % 100).astype(np.uint8))


def test_windows_lie_inside_one_file_and_reach_every_place():
    files = [numbered("a", 10, 0), numbered("b", 4, 200), numbered("c", 9, 100)]
    batches = Batches(files, batch_size=64, length=5, seed=0)
    seen = np.concatenate([batches[step] for step in range(20)])
    assert (np.diff(seen, axis=1) == 1).all()  # consecutive bytes, so one file
    assert set(seen[:, 0]) == {*range(5), *range(100, 104)}  # b is too short


def test_batches_are_a_function_of_seed_and_step(corpus):
    one, same, other = (
        Batches(corpus.train, batch_size=4, length=32, seed=seed) for seed in (3, 3, 4)
    )
    assert (one[11] == same[11]).all()
    assert (one[11] != same[12]).any()
    assert (one[11] != other[11]).any()
    assert one[0].shape == (4, 33)
    assert one[0].dtype == np.int32


def test_batches_refuse_what_is_too_short():
    with pytest.raises(DataError, match="files longer than length"):
        Batches([numbered("a", 4, 0)], batch_size=1, length=8, seed=0)


def test_blocks_pad_short_files_and_mask_the_padding():
    blocks = cut_blocks([numbered("a", 4, 7), numbered("b", 25, 0)], length=8, per_file=9, seed=0)
    assert blocks.mask.sum(axis=1).tolist() == [3, 8, 8]
    assert blocks.file_index.tolist() == [0, 1, 1]
    assert (blocks.targets[blocks.mask] == blocks.inputs[blocks.mask] + 1).all()
    padded = blocks.pad_to(8)
    assert len(padded) == 8
    assert padded.num_tokens == blocks.num_tokens
    assert len(blocks.take(2)) == 2
