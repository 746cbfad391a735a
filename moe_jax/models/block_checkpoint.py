"""Checkpoints of MoE blocks: what each layer is, so that inspection, export and the service open it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.checkpoint import Checkpoint, LayerSpec
from moe_jax.experts import FeedForward
from moe_jax.interop import MoEBlock
from moe_jax.interop.blocks import BlockOptions
from moe_jax.interop.rules import JointShared

# The parts of a block that `moe_layer` runs.
_LAYER_PARTS = {"router", "experts", "shared", "shared_gate"}


def block_spec(block: MoEBlock, keys: tuple[str, ...]) -> LayerSpec:
    """Describes a block whose ``params`` are stored at ``keys`` of a checkpoint's tree.

    ``layer`` and ``experts`` are set if ``moe_layer`` computes the outputs of the block from these
    parameters. Blocks that do more, such as a latent projection, a factor on the output or an expert
    that is no ``FeedForward``, are described by their router alone.

    Args:
        block: the block.
        keys: keys from the root of the checkpoint's ``params`` to ``block.params``.
    """
    router = (*keys, "router")
    if not _is_layer(block):
        return LayerSpec(router=router)
    assert isinstance(block.expert_fn, FeedForward)
    return LayerSpec(router=router, layer=keys, experts=block.expert_fn)


def _is_layer(block: MoEBlock) -> bool:
    """Whether ``moe_layer`` with the block's parameters computes what the block computes."""
    if not isinstance(block.expert_fn, FeedForward) or not block.params.keys() <= _LAYER_PARTS:
        return False
    if block.options != BlockOptions():
        return False
    # `moe_layer` runs the shared expert with the function of the routed ones, and has one of them.
    return "shared" not in block.params or (
        block.shared_fn == block.expert_fn and not isinstance(block.router, JointShared)
    )


def block_checkpoint(
    blocks: Mapping[str, MoEBlock], *, metadata: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Returns a checkpoint of blocks, to be written by ``moe_jax.checkpoint.save``.

    Parameters, rules and states of all blocks are in it, each under its name. ``moe-jax inspect``,
    ``moe-jax export`` and the service open it; see ``block_spec`` for the layers of which the service
    computes outputs as well as routing.

    Args:
        blocks: the blocks by name, e.g. ``layer_0``. A fitted rule replaces a block's own in
            ``moe_jax.interop.make_dynamic``.
        metadata: values that JSON can hold.

    Raises:
        ValueError: no blocks.

    Example:
        >>> import numpy as np
        >>> from moe_jax.interop import moe_block_from_hf
        >>> rng = np.random.default_rng(0)
        >>> shapes = {"gate.weight": (4, 8), "experts.gate_up_proj": (4, 12, 8),
        ...           "experts.down_proj": (4, 8, 6)}
        >>> block = moe_block_from_hf(
        ...     {"model_type": "mixtral", "num_local_experts": 4},
        ...     {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
        >>> block_checkpoint({"layer_0": block}).layers["layer_0"].layer
        ('layer_0',)
    """
    if not blocks:
        raise ValueError("blocks: expected at least one block by its name, got an empty mapping.")
    return Checkpoint(
        params={name: dict(block.params) for name, block in blocks.items()},
        routers={name: block.router for name, block in blocks.items()},
        states={name: block.state for name, block in blocks.items()},
        layers={name: block_spec(block, (name,)) for name, block in blocks.items()},
        metadata=dict(metadata or {}),
    )
