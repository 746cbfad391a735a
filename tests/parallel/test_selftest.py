"""moe-jax verify: a table, an exit code, and as many devices as were asked for."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe_jax.cli import app, devices
from moe_jax.parallel import selftest as verification
from moe_jax.parallel.selftest import Check

GOOD = Check(name="a", passed=True, detail="within 1e-7")
OTHER = Check(name="b", passed=None, detail="one device here")
BAD = Check(name="c", passed=False, detail="within 1e-1")


@pytest.mark.parametrize(("checks", "code"), [([GOOD, OTHER], 0), ([GOOD, BAD], 1)])
def test_the_exit_code_says_whether_all_hold(monkeypatch, checks, code):
    monkeypatch.setattr(verification, "verify", lambda count: checks)
    table = CliRunner().invoke(app, ["verify"])
    assert table.exit_code == code
    result = CliRunner().invoke(app, ["verify", "--json"])
    assert result.exit_code == code
    report = json.loads(result.stdout)
    assert report["ok"] == (code == 0)
    assert [row["name"] for row in report["checks"]] == [check.name for check in checks]


def test_a_wrong_answer_is_noticed(monkeypatch):
    def off(expert_fn, params, x, plan, weights, *, implementation):
        ran = verification_run(expert_fn, params, x, plan, weights, implementation=implementation)
        factor = 1.001 if implementation == "capacity" else 1.0
        return dataclasses.replace(ran, y=ran.y * factor)

    verification_run = verification.run_experts
    monkeypatch.setattr(verification, "run_experts", off)
    verification._value_and_gradients.clear_cache()
    said = {check.name: check.passed for check in verification._implementations()}
    verification._value_and_gradients.clear_cache()
    assert not said["capacity = dense oracle"]
    assert said["tiered = dense oracle"]


def test_more_devices_than_there_are_start_a_python_that_has_them():
    done = subprocess.run(
        [sys.executable, "-c", devices._WITH_DEVICES, "3", "version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.split("devices:")[1].replace("\n", " ").split(",")) == 3
