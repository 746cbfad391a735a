"""Regression detection (B09): ratios to a baseline, with intervals and an exit code."""

import importlib
import json

import pytest
from typer.testing import CliRunner

from moe_jax.bench.baseline import RUNNERS, BaselineError, compare, name_of, read_baseline
from moe_jax.cli import app

runner = CliRunner()
EMPTY = {"bench": "route", "machine": {}, "settings": {}, "rows": []}


def row(rule="TopK", ratio=1.0, spread=(0.9, 1.1)):
    return {"rule": rule, "tokens": 16, "ratio": ratio, "spread": list(spread), "ms": 3.0}


@pytest.mark.parametrize(
    ("before", "now", "slower"),
    [
        (row(), row(), "not shown"),
        (row(), row(ratio=1.15, spread=(1.05, 1.25)), "not shown"),  # the middle halves overlap
        (row(), row(ratio=1.3, spread=(1.25, 1.4)), "yes"),
        (row(), row(ratio=1.17, spread=(1.15, 1.2)), "not shown"),  # apart, but maybe by under 10 %
        (row(), row(ratio=0.5, spread=(0.4, 0.6)), "no"),
        (row(), row(ratio=1.0, spread=(0.99, 0.99)), "no"),
    ],
)
def test_slower_means_apart_by_more_than_the_tolerance(before, now, slower):
    [change], lost = compare([before], [now])
    assert not lost
    assert change.low <= change.change <= change.high
    assert change.verdict(0.1) == slower
    assert change.slower(0.1) is (slower == "yes")


def test_rows_are_told_apart_by_what_they_measure_and_lost_ones_are_named():
    changes, lost = compare([row("TopK"), row("TopP")], [row("TopP"), row("MinP")])
    assert [change.name for change in changes] == ["TopP tokens=16"]
    assert lost == ["TopK tokens=16"]
    assert name_of({**row(), "ms": 99.0}) == name_of(row())


def test_a_reference_is_no_case_and_what_does_not_run_any_more_is_gone():
    floor, peer = {**row(), "implementation": "balanced"}, {**row(), "implementation": "tokamax"}
    now = [{**floor, "ratio": 9.0}, {**peer, "ratio": None, "not_run": "failed"}]
    changes, lost = compare([floor, peer], now)
    assert not changes
    assert lost == ["TopK tokamax tokens=16"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected a JSON file"),
        ("[]", "expected a baseline with"),
        (json.dumps({**EMPTY, "bench": "batch"}), "no spread"),
        (json.dumps(EMPTY), "its spread"),
        (json.dumps({**EMPTY, "rows": [{"ratio": 1, "spread": [0, 1]}]}), "a positive ratio"),
    ],
)
def test_what_is_no_baseline_is_refused_with_exit_code_2(tmp_path, content, said):
    file = tmp_path / "baseline.json"
    file.write_text(content)
    with pytest.raises(BaselineError, match=said):
        read_baseline(file)
    assert runner.invoke(app, ["bench", "--against", str(file)]).exit_code == 2


def test_the_command_measures_again_and_its_exit_code_says_whether_anything_is_slower(tmp_path):
    taken = runner.invoke(
        app,
        [
            "bench",
            "route",
            "--tokens",
            "16",
            "--d-model",
            "8",
            "--experts",
            "4",
            "--rounds",
            "2",
            "--json",
            str(tmp_path / "baseline.json"),
        ],
    )
    assert taken.exit_code == 0, taken.output
    content = json.loads((tmp_path / "baseline.json").read_text())

    def against(factor):
        rows = [
            {**r, "ratio": r["ratio"] * factor, "spread": [s * factor for s in r["spread"]]}
            for r in content["rows"]
        ]
        (tmp_path / "changed.json").write_text(json.dumps({**content, "rows": rows}))
        return runner.invoke(app, ["bench", "--against", str(tmp_path / "changed.json")])

    # Factors far beyond what a busy machine does to a ratio.
    fine, slow = against(1000.0), against(0.001)
    assert fine.exit_code == 0, fine.output
    assert "none of 8 cases is shown to be slower" in " ".join(fine.output.split())
    assert slow.exit_code == 1, slow.output
    assert "slower in 8 of 8" in " ".join(slow.output.split())


@pytest.mark.parametrize("bench", list(RUNNERS))
def test_every_measurement_is_a_function_and_a_command(bench):
    module, function = RUNNERS[bench]
    assert callable(getattr(importlib.import_module(module), function))
    assert runner.invoke(app, ["bench", bench, "--help"]).exit_code == 0


def test_bench_alone_shows_what_there_is():
    shown = runner.invoke(app, ["bench"])
    assert shown.exit_code == 0
    assert "route" in shown.output
    assert "--against" in shown.output
