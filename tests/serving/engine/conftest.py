"""Small engines that share their compiled functions, a clock to turn, and a log to read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine

WIDTH = 16
SMALL = {"input_dim": WIDTH, "buckets": "16,64", "serve_moe": "off"}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str):
        if level not in ("debug", "info", "warning", "error"):
            raise AttributeError(level)
        return lambda event, **facts: self.lines.append((level, event, facts))

    def events(self) -> list[str]:
        return [event for _, event, _ in self.lines]

    def text(self) -> str:
        return repr(self.lines)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def make_engine(clock, log):
    """``make_engine(**settings)``: an engine without environment, shut down after the test."""
    made = []

    def make(*, engine: dict[str, Any] | None = None, **settings: Any) -> RouterEngine:
        config = load_config(env={}, **{**SMALL, **settings})
        made.append(RouterEngine(config, **{"clock": clock, "logger": log, **(engine or {})}))
        return made[-1]

    yield make
    for one in made:
        one.shutdown(timeout_seconds=5.0)


@pytest.fixture
def states():
    """``states(batch, sequence, seed)``: hidden states f32[B, S, 16]."""

    def draw(batch: int = 2, sequence: int = 5, seed: int = 0) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return generator.standard_normal((batch, sequence, WIDTH)).astype(np.float32)

    return draw
