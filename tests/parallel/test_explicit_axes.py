"""Data parallelism on the mesh that ``jax.make_mesh`` makes by default gives one device's answer."""

from __future__ import annotations

from moe_jax.experts import IMPLEMENTATIONS
from tests.parallel import host_devices


def test_explicit_axes_give_one_devices_answer():
    """Every implementation, a Flax module and the sharded layer: outputs, statistics, gradients.

    Before, counting tokens raised ShardingTypeError, and the sharded layer raised in shard_map. One
    test, so that one worker measures once.
    """
    measured = host_devices.run_script("explicit_axes.py", devices=4)
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
