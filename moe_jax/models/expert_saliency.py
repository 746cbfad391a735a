"""How much each expert of a published model matters, on a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.layer import run_routing
from moe_jax.models.evaluation import LaneCounts
from moe_jax.models.streaming import ModelSource, Progress, Stream
from moe_jax.types import Array, Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saliency:
    """How much each expert of a layer matters, on a text. All f64[E] but ``hidden``.

    Attributes:
        tokens: how many tokens chose the expert.
        weight: the sum of its combine weights over these tokens.
        reap: the sum of combine weight times the norm of the expert's output (REAP,
            arXiv:2510.13999).
        hidden: the sum of the norms of the hidden states after the layer, to compare layers.
    """

    tokens: np.ndarray
    weight: np.ndarray
    reap: np.ndarray
    hidden: float

    def score(self, method: str) -> np.ndarray:
        """f64[E]: larger is kept. REAP and mean weight are means over the tokens that chose it."""
        if method == "frequency":
            return self.tokens
        total = self.reap if method == "reap" else self.weight
        return total / np.maximum(self.tokens, 1)


@jax.jit
def _slot_norms(block: MoEBlock, routing: Routing, rows: Array) -> Array:
    """f32[T, K]: the norm of each chosen expert's output, 0 in unused slots."""

    def norms(_: None, slot: Array) -> tuple[None, Array]:
        # One slot at a time with weight 1 returns that expert's output itself.
        in_slot = (jnp.arange(routing.expert_indices.shape[1]) == slot)[None, :]
        used = in_slot & (routing.expert_indices < routing.num_experts)
        alone = dataclasses.replace(
            routing,
            expert_indices=jnp.where(used, routing.expert_indices, routing.num_experts),
            combine_weights=jnp.where(used, 1.0, 0.0),
        )
        y, _stats = run_routing(block.expert_fn, block.params["experts"], rows, alone)
        return None, jnp.linalg.norm(y, axis=-1)

    slots = jnp.arange(routing.expert_indices.shape[1], dtype=jnp.int32)
    return jax.lax.scan(norms, None, slots)[1].T


def expert_saliency(
    model: ModelSource,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    batch_size: int = 8,
    dtype: Any = None,
    progress: Progress | None = None,
    work: str | Path | None = None,
) -> dict[int, Saliency]:
    """Returns the saliency of every expert on a text, by the layer's number.

    Args:
        model: see ``evaluate``.
        input_ids: i32[N, S].
        attention_mask: bool or int[N, S], 0 for padding.
        batch_size, dtype, progress, work: see ``evaluate``.

    Raises:
        ValueError: see ``evaluate``; or a block whose experts work on a compressed input.

    Example:
        >>> ids = np.arange(40).reshape(2, 20)
        >>> saliency = expert_saliency("tests/goldens/models/mixtral", ids)
        >>> int(saliency[0].tokens.sum())  # two experts for each of 40 tokens
        80
    """
    stream = Stream(
        model,
        input_ids,
        attention_mask,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
        work=work,
        task="saliency",
    )
    counts = LaneCounts(stream, "model")
    for taken in stream.layers():
        block = taken.block
        if block is None:
            continue
        if "latent" in block.params:
            raise ValueError(
                f"layer {taken.number}: expected experts on the layer's own input, got a block that "
                "compresses it first. Such blocks are not pruned."
            )
        inputs = [taken.input_of("model", i) for i in range(len(stream.parts))]
        total, hidden = np.zeros((3, block.router.num_experts)), 0.0
        for i, aux in counts.add(taken, block):
            routing = aux.routing
            assert isinstance(routing, Routing)
            rows = inputs[i].reshape(-1, inputs[i].shape[-1])
            norms = np.asarray(_slot_norms(block, routing, rows), np.float64).ravel()
            weights = np.asarray(routing.combine_weights, np.float64).ravel()
            experts = np.asarray(routing.expert_indices).ravel()
            used = experts < routing.num_experts
            for row, values in enumerate((np.ones_like(weights), weights, weights * norms)):
                total[row] += np.bincount(
                    experts[used], values[used], minlength=routing.num_experts
                )
            after = np.asarray(stream.hidden["model"][i], np.float64)[stream.mask[stream.parts[i]]]
            hidden += float(np.linalg.norm(after, axis=-1).sum())
        stream.arrays[f"saliency/{taken.number}"] = np.append(total.ravel(), hidden)
    result = {}
    for number in stream.config.moe_layers:
        flat = stream.arrays[f"saliency/{number}"]
        tokens, weight, reap = flat[:-1].reshape(3, -1)
        result[number] = Saliency(tokens=tokens, weight=weight, reap=reap, hidden=float(flat[-1]))
    stream.finish()
    return result
