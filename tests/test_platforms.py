"""What other systems do differently: spawned processes, locales, paths, and no fork."""

from __future__ import annotations

import ast
import functools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_jax

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "moe_jax").rglob("*.py"))


def route(router, params, state, x):
    """Runs in a spawned process, so everything it gets was pickled."""
    routing = router(params, state, x)
    return np.asarray(routing.expert_indices)


def test_a_spawned_process_routes_the_same():
    """``spawn`` is the start method of macOS and Windows."""
    router = moe_jax.MinP(num_experts=4, max_k=2)
    params = jax.device_get(router.init(jax.random.key(0), 8))
    state = jax.device_get(router.init_state())
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        theirs = pool.apply(route, (router, params, state, x))
    np.testing.assert_array_equal(theirs, route(router, params, state, x))


@pytest.mark.parametrize(
    "value",
    [
        moe_jax.DynamicK(num_experts=8, min_k=1, max_k=4),
        moe_jax.FeedForward(activation="silu", gated=True),
        moe_jax.LayerOptions(capacity_factor=1.25),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_survive_pickling(value):
    again = pickle.loads(pickle.dumps(value))
    assert again == value
    assert hash(again) == hash(value)


@functools.cache
def all_calls() -> list[tuple[Path, ast.Call]]:
    return [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def calls(name: str) -> list[tuple[Path, ast.Call]]:
    """Calls of a function or method of this name in the library."""
    return [
        (path, node)
        for path, node in all_calls()
        if name in (getattr(node.func, "attr", ""), getattr(node.func, "id", ""))
    ]


def test_the_library_never_forks():
    """Threads of JAX do not survive a fork, and Windows has none."""
    assert not calls("fork")
    assert not calls("forkpty")
    for path, call in calls("get_context"):
        assert ast.literal_eval(call.args[0]) == "spawn", path


def test_calls_that_only_linux_has_can_be_missing(monkeypatch):
    from moe_jax.bench import measure, peers
    from moe_jax.lab.experiments import runner
    from moe_jax.serving.http import process

    for name in ("sched_getaffinity", "getloadavg", "sysconf"):
        monkeypatch.delattr(os, name)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert measure.machine()["cores"] == runner.machine_note()["cores"] == os.cpu_count()
    assert runner.machine_note()["load"] is None
    assert peers.free_memory() is None
    process._allow_many_connections()


@pytest.mark.parametrize("name", ["read_text", "write_text"])
def test_text_files_name_their_encoding(name):
    """Windows has another default than UTF-8."""
    unnamed = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, call in calls(name)
        if isinstance(call.func, ast.Attribute)
        and not any(word.arg == "encoding" for word in call.keywords)
        and not (
            call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value == "utf-8"
        )
    ]
    assert unnamed == []


def test_the_command_line_starts_light_and_under_another_locale():
    """Help loads neither Flax nor a server, and prints its boxes where the locale is not UTF-8."""
    program = (
        "import json, sys; from typer.testing import CliRunner; from moe_jax.cli import app\n"
        "result = CliRunner().invoke(app, ['-h'])\n"
        "heavy = ['flax', 'optax', 'orbax', 'matplotlib', 'starlette', 'uvicorn', 'grpc', 'scipy']\n"
        "print(json.dumps([result.exit_code, [name for name in heavy if name in sys.modules]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
