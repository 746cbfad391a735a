"""The checks against real programs: what they say when a program is missing, and that they can fail.

The checks themselves are ``make verify-image``, ``verify-monitoring``, ``verify-rollout`` and
``verify-soak``. They need minutes and real servers, so the suite does not run them.
"""

import contextlib
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.verify import check, processes, promql
from deploy.verify.traffic import Load

ROOT = Path(__file__).parents[2]
CHECKS = ["image", "monitoring", "rollout", "soak", "token_cost"]


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
    with pytest.raises(check.DidNotRun, match="apt-get install nowhere"):
        processes.need("no-such-program", "nowhere")


def test_a_report_fails_when_anything_did(capsys):
    report = check.Report("check")
    report.hold(True, "one thing")
    report.skip("another", "there is no cluster")
    assert report.finish() == 0
    assert not report.hold(False, "a third")
    assert report.finish() == 1
    printed = capsys.readouterr().out
    assert "SKIP another: there is no cluster" in printed
    assert "FAIL a third" in printed
    assert "1 held, 1 failed, 1 skipped" in printed


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
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2


class Counted:
    """Sends nothing; counts its calls and whether it was closed."""

    def __init__(self, number):
        self.number, self.closed = number, False

    def __call__(self):
        return self.number

    def close(self):
        self.closed = True


def test_a_load_ends_after_its_requests_and_closes_its_clients():
    senders = [Counted(0), Counted(1)]
    load = Load(senders.__getitem__, threads=2, most=50)
    assert load.run().total() == 50
    assert set(load.outcomes) <= {0, 1}
    assert all(sender.closed for sender in senders)
    assert not load.under_way


@pytest.mark.parametrize("limit", [{"seconds": 0.0}, {"done": lambda: True}], ids=["time", "done"])
def test_a_load_ends_by_its_time_and_when_it_is_done(limit):
    assert Load(Counted, **limit).run().total() == 0


def test_the_programs_of_a_check_are_stopped_when_it_fails(tmp_path):
    with contextlib.suppress(ValueError), processes.Programs(tmp_path) as programs:
        process = programs.start("sleep", [sys.executable, "-c", "import time; time.sleep(60)"])
        raise ValueError("a check failed")
    assert process.ended() is not None


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(lambda report: report.hold(True, "a"), 0), (lambda report: report.hold(False, "a"), 1)],
    ids=["holds", "fails"],
)
def test_a_check_ends_with_its_exit_code_and_removes_its_folder(outcome, code, monkeypatch):
    folders = []

    def verify(work, report, options):
        folders.append(work)
        outcome(report)

    monkeypatch.setattr(sys, "argv", ["check"])
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    assert check.run("check", verify) == code
    assert not folders[0].exists()


def test_a_check_that_cannot_run_ends_with_2_and_says_why(monkeypatch, capsys, tmp_path):
    def verify(work, report, options):
        raise check.DidNotRun("there is no haproxy")

    monkeypatch.setattr(sys, "argv", ["check", "--work", str(tmp_path / "kept"), "--keep"])
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    assert check.run("verify-a", verify) == 2
    assert "verify-a DID NOT RUN: there is no haproxy" in capsys.readouterr().out
    assert (tmp_path / "kept").is_dir()
