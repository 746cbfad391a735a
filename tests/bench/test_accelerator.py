"""``benchmarks/accelerator.py`` as a lent machine runs it: rows, time limit, exit codes; on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def script(monkeypatch):
    """Runs the script's ``main`` with arguments; also its module."""
    path = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"
    spec = importlib.util.spec_from_file_location("accelerator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["accelerator.py", *map(str, arguments)])
        module.main()

    return run, module


def test_no_case_starts_after_the_time_and_every_case_is_a_row(script, tmp_path):
    run, module = script
    run("--out", tmp_path / "rows.json", "--small", "--seconds", 0)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["skipped"] for row in rows} == {"the time was over"}
    assert {row.get("load") for row in rows} == {*module.LOADS, None}
    assert [row["tokens"] for row in rows if "tokens" in row] == list(module.DECODE)
    assert [row["mean_k"] for row in rows if "mean_k" in row] == [module.MEAN_K["small"]]


def test_a_case_that_fails_is_a_row_and_the_exit_code_is_1(script, tmp_path, monkeypatch):
    run, module = script

    def fails():
        raise RuntimeError("no such kernel")

    def measure(run, name, shape):
        run.time_case("fails", fails, 1.0, shape=name)
        run.time_case("runs", lambda: 1.0, 1.0, shape=name)

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(SystemExit, match="1 of 2 cases failed"):
        run("--out", tmp_path / "rows.json", "--small", "--rounds", 1)
    failed, ran = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert failed["failed"] == "RuntimeError: no such kernel"
    assert {"ms", "tflops", "dense_tflops", "share"} <= set(ran)


def test_published_shapes_are_refused_on_a_cpu(script, tmp_path):
    run, _ = script
    with pytest.raises(SystemExit, match="expected an accelerator, got a CPU"):
        run("--out", tmp_path / "rows.json")
