"""Logging never breaks or holds up an answer, and lost lines are counted."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time

import pytest

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine, make_logger
from moe_jax.serving.engine.logs import LineStream, stream_of
from tests.serving.engine.conftest import SMALL


def full():
    return open("/dev/full", "w")


def no_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [full, no_reader, closed, lambda: None])
def test_a_line_that_cannot_be_written_is_counted_and_raises_nothing(make, monkeypatch, capsys):
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    logger = make_logger("INFO", "production", stream="stdout")
    for number in range(600):
        logger.info("line", number=number)
    lines = stream_of(logger)
    assert lines is not None
    assert (lines.dropped, bool(lines.failure)) == (600, True)
    printed = capsys.readouterr().err
    assert printed.count("moe_log_lines_dropped_total") == 1, "said once, not for each line"
    monkeypatch.undo()
    if stream is not None:
        stream.close()  # nothing is left in its buffer, whose flush would fail


def test_logging_recovers_with_what_it_writes_to(monkeypatch, tmp_path, capsys):
    logger = make_logger("INFO", "production", stream="stdout")
    with open("/dev/full", "w") as bad, open(tmp_path / "log", "w") as good:
        monkeypatch.setattr(sys, "stdout", bad)
        logger.info("lost")
        monkeypatch.setattr(sys, "stdout", good)
        logger.info("kept", text="é\ud800")
        monkeypatch.undo()
    lines = stream_of(logger)
    assert lines is not None
    assert (lines.dropped, lines.failure) == (1, "")
    [line] = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["event"] == "kept"


def test_a_reader_that_does_not_read_holds_up_one_line_and_no_more(monkeypatch, capsys):
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    logger = make_logger("INFO", "production", stream="stdout")
    start = time.monotonic()
    for _ in range(1000):
        logger.info("line", text="x" * 1000)
    assert time.monotonic() - start < 60.0
    lines = stream_of(logger)
    assert lines is not None
    assert lines.dropped > 900, "a pipe holds 64 KiB"
    assert lines.failure
    received = []
    done = threading.Event()

    def drain():
        while data := os.read(reader, 65536):
            received.append(data)
        done.set()

    threading.Thread(target=drain, daemon=True).start()
    deadline = time.monotonic() + 60.0
    while lines.failure:
        logger.info("after")
        assert time.monotonic() < deadline
    monkeypatch.undo()
    stream.close()
    assert done.wait(60.0)
    os.close(reader)
    last = b"".join(received).splitlines()[-1]
    assert json.loads(last)["event"] == "after", "a torn line does not spoil the next one"


def test_lines_go_to_whatever_stands_for_the_stream(capsys):
    stream = LineStream("stdout")
    stream.msg("one")
    stream.error("two")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert stream.dropped == 0


def test_an_engine_answers_and_reports_while_its_log_is_lost(states, monkeypatch, capsys):
    config = load_config(env={}, **SMALL)
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with RouterEngine(
            config, logger=make_logger("DEBUG", "production", stream="stdout")
        ) as engine:
            for seed in range(5):
                assert engine.route(states(seed=seed))["expert_indices"].shape == (2, 5, 4)
            assert engine.reload()["trained"] is False, "a reload that was made is not refused"
            component = engine.health_check()["components"]["monitoring"]
            assert component["status"] == "losing_log_lines"
            assert component["log_error"] == "No space left on device"
            assert component["log_lines_dropped"] >= 7
            text = engine.metrics_text().decode()
            count = next(
                line
                for line in text.splitlines()
                if line.startswith("moe_log_lines_dropped_total ")
            )
            assert float(count.split()[1]) >= 7
        monkeypatch.undo()
