"""The checks against real parts: what they say when a part is missing, and that they can fail.

The checks themselves are ``make verify-image``, ``verify-monitoring``, ``verify-rollout`` and
``verify-soak``: they take minutes and real servers, and are no part of the suite.
"""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.verify import processes, promql

ROOT = Path(__file__).parents[2]
CHECKS = ["image", "monitoring", "rollout", "soak", "capacity"]


def test_examples_of_the_query_helpers():
    assert doctest.testmod(promql).failed == 0


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_is_documented_and_has_its_target(name):
    module = importlib.import_module(f"deploy.verify.{name}")
    command = f"python -m deploy.verify.{name}"
    assert module.__doc__
    assert command in module.__doc__
    makefile = (ROOT / "Makefile").read_text()
    manual = (ROOT / "docs" / "operations.md").read_text()
    if f"make verify-{name}" in module.__doc__:
        assert f"verify-{name}:" in makefile
        assert f"`make verify-{name}`" in manual
    else:
        assert command in manual


def test_a_missing_tool_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(processes.os, "geteuid", lambda: 1000)
    with pytest.raises(processes.DidNotRun, match="apt-get install nowhere"):
        processes.need("no-such-program", "nowhere")


def test_a_report_fails_when_anything_did(capsys):
    report = processes.Report("check")
    report.hold(True, "one thing")
    report.skip("another", "there is no cluster")
    assert report.finish() == 0
    assert not report.hold(False, "a third")
    assert report.finish() == 1
    told = capsys.readouterr().out
    assert "SKIP another: there is no cluster" in told
    assert "FAIL a third" in told
    assert "1 held, 1 failed, 1 skipped" in told


def test_a_process_is_stopped_by_its_id(tmp_path):
    process = processes.Process(
        [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log"
    )
    assert process.ended() is None
    process.stop()
    assert process.ended() is not None


def test_wrong_options_end_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "deploy.verify.rollout", "--surprise"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
