"""The loss of a published model on token ids, with one layer in memory at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.layer import LayerAux
from moe_jax.models.causal_lm import Implementation
from moe_jax.models.flops import FlopCount, flops_of_experts, flops_of_rest
from moe_jax.models.streaming import LayerPass, ModelSource, Progress, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a model predicts token ids, and what that takes.

    Attributes:
        loss: mean negative log probability of the next token, in nats.
        tokens: how many tokens were predicted.
        sequence_loss: f64[N], the mean of each sequence; NaN where nothing was predicted.
        sequence_tokens: i64[N], how many tokens of each were predicted.
        token_loss: f32[N, S - 1], of each token; 0 where it is padding.
        experts_per_token: mean number of experts a token used, by number of the layer.
        flops: floating-point operations of the forward pass.
        seconds: time spent in this pass.
    """

    loss: float
    tokens: int
    sequence_loss: np.ndarray
    sequence_tokens: np.ndarray
    token_loss: np.ndarray
    experts_per_token: dict[int, float]
    flops: FlopCount
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)

    @property
    def mean_k(self) -> float:
        """Experts per token, the mean over layers with experts."""
        return float(np.mean(list(self.experts_per_token.values())))


class LaneCounts:
    """Counts what a lane uses, layer by layer, in the arrays of its stream."""

    def __init__(self, stream: Stream, lane: str) -> None:
        self._stream, self._lane = stream, lane

    def _name(self, what: str, layer: int) -> str:
        return f"{self._lane}/{what}/{layer}"

    def add(self, taken: LayerPass, block: MoEBlock) -> Iterator[tuple[int, LayerAux]]:
        """Passes the lane through the layer and yields the reports after counting them."""
        started = time.perf_counter()
        stream = self._stream
        sums = np.zeros(len(stream.ids), np.float64)
        rows = np.zeros(2, np.float64)
        for i, aux in taken.experts(self._lane, block):
            part = stream.parts[i]
            counts = np.asarray(aux.routing.num_experts_per_token).reshape(stream.ids[part].shape)
            sums[part] = np.where(stream.mask[part], counts, 0).sum(axis=1)
            rows += [float(aux.stats.slots_used), float(aux.stats.slots_executed)]
            yield i, aux
        used, executed = flops_of_experts(block, rows)
        layer, arrays = taken.number, stream.arrays
        arrays[self._name("experts", layer)] = sums
        seconds = time.perf_counter() - started
        arrays[self._name("cost", layer)] = np.array([used, executed, seconds])

    def mean_k(self, layer: int) -> float:
        """Experts per token in a layer that has passed."""
        sums = self._stream.arrays[self._name("experts", layer)]
        return float(sums.sum() / self._stream.mask.sum())

    def evaluation(self, rows: slice = slice(None)) -> Evaluation:
        """The results after the last layer, of these sequences; time and operations are of all."""
        stream = self._stream
        started = time.perf_counter()
        losses = stream.losses(self._lane)[rows]
        sums, predicted = losses.astype(np.float64).sum(axis=1), stream.predicted[rows]
        real = stream.mask[rows].sum()
        with np.errstate(invalid="ignore"):
            each = np.where(predicted > 0, sums / np.maximum(predicted, 1), np.nan)
        layers = stream.config.moe_layers
        costs = [stream.arrays[self._name("cost", layer)] for layer in layers]
        used, executed, seconds = np.sum(costs, axis=0) if costs else np.zeros(3)
        return Evaluation(
            loss=float(sums.sum() / predicted.sum()),
            tokens=int(predicted.sum()),
            sequence_loss=each,
            sequence_tokens=predicted,
            token_loss=losses,
            experts_per_token={
                layer: float(stream.arrays[self._name("experts", layer)][rows].sum() / real)
                for layer in layers
            },
            flops=FlopCount(
                experts_used=float(used),
                experts_executed=float(executed),
                rest=flops_of_rest(stream.config, stream.mask),
            ),
            seconds=float(seconds) + time.perf_counter() - started,
        )


def evaluate(
    model: ModelSource,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    batch_size: int = 8,
    dtype: Any = None,
    change_block: Callable[[int, MoEBlock], MoEBlock] | None = None,
    implementation: Implementation = None,
    progress: Progress | None = None,
    work: str | Path | None = None,
) -> Evaluation:
    """The loss of a model on sequences of token ids.

    A folder is read layer by layer: all sequences pass a layer before the next one is read, so memory
    holds one layer and the hidden states of all sequences (N * S * D numbers).

    Args:
        model: a folder (see ``load_model``), the same opened, or a model in memory.
        input_ids: i32[N, S].
        attention_mask: bool or int[N, S], 0 for padding.
        batch_size: sequences that run at a time.
        dtype: see ``HubFolder``; for a folder only.
        change_block: ``(layer, block) -> block``, e.g. one with another rule.
        implementation: how experts run, see ``moe_jax.experts``.
        progress: called after each layer with the number of layers done, of all, and a word.
        work: folder that keeps the state after each layer, from which an interrupted call
            continues; the files are removed at the end.

    Raises:
        TypeError, ValueError: see ``forward``; or sequences with nothing to predict.

    Example:
        >>> ids = np.arange(20).reshape(2, 10)
        >>> result = evaluate("tests/goldens/models/mixtral", ids)
        >>> result.tokens, result.experts_per_token
        (18, {0: 2.0, 1: 2.0})
    """
    stream = Stream(
        model,
        input_ids,
        attention_mask,
        batch_size=batch_size,
        dtype=dtype,
        implementation=implementation,
        progress=progress,
        work=work,
        task="evaluate",
    )
    counts = LaneCounts(stream, "model")
    for taken in stream.layers():
        if taken.block is not None:
            change = change_block or (lambda layer, block: block)
            for _ in counts.add(taken, change(taken.number, taken.block)):
                pass
    result = counts.evaluation()
    stream.finish()
    return result
