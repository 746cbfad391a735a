"""Data parallelism on the mesh that ``jax.make_mesh`` makes by default gives one device's answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from moe_jax.experts import IMPLEMENTATIONS

HERE = Path(__file__).parent
FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def test_explicit_axes_give_one_devices_answer():
    """Every implementation, a Flax module and the sharded layer: outputs, statistics, gradients.

    Before, counting tokens raised ShardingTypeError, and the sharded layer raised in shard_map. One
    test, so that one worker measures once.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "explicit_axes.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    measured = json.loads(done.stdout)
    for case in (
        *(f"top-k, {name}" for name in IMPLEMENTATIONS),
        "dynamic k, dense",
        "expert choice, dense",
        "set_mesh",
        "whole on every device",
        "eager",
        "sharded, set_mesh",
        "sharded, mesh=",
        "sharded, eager",
        "sharded, jvp of grad and grad of jvp",
        "DynamicMoE, nnx.jit",
    ):
        assert measured[case] <= 5e-5, (case, measured)
