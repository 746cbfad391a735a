"""What the checks share: a report that is printed line by line, and the command around it."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class DidNotRun(Exception):
    """A tool that a check needs is missing and cannot be installed."""


@dataclasses.dataclass
class Report:
    """What held, what failed, and what was skipped with its reason; printed as it comes."""

    title: str
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    passed: int = 0

    def hold(self, true: Any, claim: str, detail: str = "") -> bool:
        """Notes that a claim holds, or that it does not, and returns which."""
        if true:
            self.passed += 1
        else:
            self.failed.append(claim)
        self.say(f"{'ok  ' if true else 'FAIL'} {claim}{': ' + detail if detail else ''}")
        return bool(true)

    def skip(self, claim: str, reason: str) -> None:
        """Notes that a claim was not tried."""
        self.skipped.append(claim)
        self.say(f"SKIP {claim}: {reason}")

    def say(self, text: str) -> None:
        """Prints a line at once."""
        print(text, flush=True)

    def finish(self) -> int:
        """Prints the sum and returns the exit code."""
        self.say(
            f"{self.title}: {self.passed} held, {len(self.failed)} failed, "
            f"{len(self.skipped)} skipped"
        )
        for claim in self.failed:
            self.say(f"  failed: {claim}")
        return 1 if self.failed else 0


def run(
    title: str,
    verify: Callable[[Path, Report, argparse.Namespace], None],
    *,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Runs a check as a command and returns its exit code.

    Options of every check are ``--work FOLDER`` and ``--keep``. SIGTERM ends the check as an exception
    does, so that every program is stopped.

    Args:
        title: the make target, printed before the sum.
        verify: the check; gets a folder for its files, the report and the options.
        add_options: adds the options of this check.

    Returns:
        0 where all held, 1 where something failed, 2 where the check could not run.
    """
    parser = argparse.ArgumentParser(prog=title, description=(verify.__doc__ or "").strip())
    parser.add_argument("--work", type=Path, help="folder for logs and data (default: a new one)")
    parser.add_argument("--keep", action="store_true", help="keep that folder and say where it is")
    add_options(parser)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report(title)
    work: Path = options.work or Path(tempfile.mkdtemp(prefix=f"{title}-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        verify(work, report, options)
    except DidNotRun as error:
        report.say(f"{title} DID NOT RUN: {error}")
        return 2
    finally:
        if options.keep:
            report.say(f"logs and data in {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return report.finish()
