"""Measures the quality lost to a compute budget, on files unseen in training and calibration.

Each fitted rule is compared with the trained model on the same bytes. The difference in bits per byte
has a 95 % interval. ``moe_jax.lab.calibration`` describes the rules, and how the comparison is kept
fair.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from moe_jax.lab.calibration import (
    BATCH,
    RULES,
    find_rules,
    run_layers,
    spread_blocks,
    variant_name,
)
from moe_jax.lab.data import Corpus, TextBlocks, load_corpus
from moe_jax.lab.language_model import nats, unembed
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, Variants
from moe_jax.lab.progress import track
from moe_jax.models.confidence import MAX_DRIFT, avoided_share, paired_bootstrap, verdict
from moe_jax.routers import Router
from moe_jax.types import Array, Params, Routing


@jax.jit
def _score(params: dict[str, Params], h: Array, targets: Array) -> Array:
    return nats(unembed(params, h), targets)


def held_out_blocks(
    config: LMConfig, corpus: Corpus | None = None, *, tokens: int = 32_768, seed: int = 0
) -> TextBlocks:
    """Returns blocks of about ``tokens`` bytes, taken evenly from all held-out files."""
    files = (load_corpus() if corpus is None else corpus).held_out
    return spread_blocks(files, config, tokens, seed)


def layer_routings(model: Model, blocks: TextBlocks) -> list[Routing]:
    """Runs all blocks as one batch; returns each layer's routing of B * S tokens, on the host."""
    inputs, mask = jnp.asarray(blocks.inputs), jnp.asarray(blocks.mask)
    layers = run_layers(model, model.routers, model.states, inputs, mask)
    return [jax.device_get(routing) for routing, _, _ in layers]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LMEvaluation:
    """Measurements of a model, with its rules, on blocks of text. Arrays are on the host."""

    nats_per_file: np.ndarray  # f64[files]
    bytes_per_file: np.ndarray  # f64[files]
    histogram: np.ndarray  # f64[layers, K + 1]: share of tokens that use 0..K experts
    tokens_per_expert: np.ndarray  # f64[layers, E]
    counts: np.ndarray  # i8[layers, N, S]: experts per token; 0 for padding
    slots_used: float
    slots_executed: float
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy over all files, in bits per byte."""
        return float(self.nats_per_file.sum() / self.bytes_per_file.sum() / np.log(2))

    @property
    def mean_k_per_layer(self) -> np.ndarray:
        """f64[layers]."""
        return self.histogram @ np.arange(self.histogram.shape[1])

    @property
    def mean_k(self) -> float:
        """Experts per token, averaged over tokens and layers."""
        return float(self.mean_k_per_layer.mean())


def evaluate(
    model: Model,
    blocks: TextBlocks,
    *,
    routers: Sequence[Router] | None = None,
    states: Sequence[Any] | None = None,
) -> LMEvaluation:
    """Measures a model on text, with its rules or with the rules given.

    Args:
        model: parameters, and the rules to use unless others are given.
        blocks: the text.
        routers: a rule for each layer, with ``states``.
        states: the state of each rule.
    """
    config, params = model.config, model.params
    routers = model.routers if routers is None else routers
    states = model.states if states is None else states
    started = time.perf_counter()
    count = len(blocks)
    size = min(BATCH, count)
    # Full batches need one compilation only. The appended blocks are masked in the counts, and
    # `[:count]` removes their losses below.
    padded = blocks.pad_to(size)
    losses, seen = [], []
    for i in range(0, len(padded), size):
        mask = jnp.asarray(padded.mask[i : i + size])
        inputs = jnp.asarray(padded.inputs[i : i + size])
        last, layers = None, []
        for _, counted, h in run_layers(model, routers, states, inputs, mask):
            last = h
            layers.append(counted)
        losses.append(_score(params, last, jnp.asarray(padded.targets[i : i + size])))
        seen.append(layers)
    losses, seen = jax.device_get((losses, seen))
    real = blocks.mask
    each = np.where(real, np.concatenate(losses)[:count].astype(np.float64), 0.0).sum(axis=1)
    files = len(blocks.paths)

    def by_layer(name: str) -> np.ndarray:
        return np.stack(
            [
                sum(np.asarray(getattr(b[i], name), np.float64) for b in seen)
                for i in range(config.num_moe_layers)
            ]
        )

    counts = [
        np.concatenate([b[i].counts for b in seen])[:count].astype(np.int8)
        for i in range(config.num_moe_layers)
    ]
    return LMEvaluation(
        nats_per_file=np.bincount(blocks.file_index, each, minlength=files),
        bytes_per_file=np.bincount(blocks.file_index, real.sum(axis=1), minlength=files),
        # Counts were shares times tokens in float32: rounded, they are whole again.
        histogram=np.rint(by_layer("histogram")) / blocks.num_tokens,
        tokens_per_expert=by_layer("tokens_per_expert"),
        counts=np.stack(counts),
        slots_used=float(by_layer("slots_used").sum()),
        slots_executed=float(by_layer("slots_executed").sum()),
        seconds=time.perf_counter() - started,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Frontier:
    """Evaluations of all rules at all budgets, and of the trained model."""

    baseline: LMEvaluation
    evaluations: Mapping[str, LMEvaluation]  # by variant name
    variants: Variants  # fitted routers and states, ready for ``save_model``
    rows: tuple[dict[str, Any], ...]  # plain values, see ``measure``


def measure(
    model: Model,
    variants: Variants,
    blocks: TextBlocks,
    *,
    savings: Sequence[float],
    rules: Sequence[str] = tuple(RULES),
    progress: Progress | bool = False,
) -> Frontier:
    """Evaluates fitted variants on held-out text beside the trained model.

    ``rows`` has for each variant: ``rule``, ``label``, ``control``, ``saving`` (requested),
    ``target_mean_k``, ``calibrated_mean_k``, ``held_out_mean_k``, ``mean_k_per_layer``, ``drift``
    (relative), ``drifted`` (by more than 3 %), ``achieved_saving``, ``executed_saving`` (rows the
    implementation computed, padding included), ``bits_per_byte``, the values of ``paired_bootstrap``,
    ``verdict``, and for each control ``recovered``, the share of its loss at the same budget that
    the rule avoids, and ``recovered_interval``, the ends of its 95 % interval (see
    ``moe_jax.models.confidence.avoided_share``).
    """
    config = model.config
    evaluations: dict[str, LMEvaluation] = {}
    rows = []
    chosen = find_rules(rules)
    with track(progress, "evaluate", 1 + len(chosen) * len(savings)) as advance:
        base = evaluate(model, blocks)
        advance("trained model")
        for rule in chosen:
            for saving in savings:
                name = variant_name(rule.name, saving)
                routers, states = variants[name]
                evaluation = evaluate(model, blocks, routers=routers, states=states)
                evaluations[name] = evaluation
                target = float(states[0].fit.target_mean_k)
                change = paired_bootstrap(
                    evaluation.nats_per_file, base.nats_per_file, base.bytes_per_file
                )
                drift = evaluation.mean_k / target - 1.0
                rows.append(
                    {
                        "variant": name,
                        "rule": rule.name,
                        "label": rule.label,
                        "control": rule.control,
                        "saving": saving,
                        "target_mean_k": target,
                        "calibrated_mean_k": float(
                            np.mean([float(s.fit.achieved_mean_k) for s in states])
                        ),
                        "held_out_mean_k": evaluation.mean_k,
                        "mean_k_per_layer": evaluation.mean_k_per_layer.tolist(),
                        "drift": drift,
                        "drifted": abs(drift) > MAX_DRIFT,
                        "achieved_saving": 1.0 - evaluation.mean_k / config.k,
                        "executed_saving": 1.0 - evaluation.slots_executed / base.slots_executed,
                        "bits_per_byte": evaluation.bits_per_byte,
                        **change,
                        "verdict": verdict(change["relative_low"], change["relative_high"]),
                    }
                )
                advance(f"{rule.label}, -{saving:.0%}")
    for row in rows:
        row["recovered"], row["recovered_interval"] = {}, {}
        for other in rows:
            if not other["control"] or other["saving"] != row["saving"] or other["delta"] <= 0:
                continue
            ours, theirs = (
                evaluations[one["variant"]].nats_per_file - base.nats_per_file
                for one in (row, other)
            )
            share, low, high = avoided_share(ours, theirs)
            row["recovered"][other["rule"]] = share
            # JSON has no infinity: an interval without an end there is None.
            ends = [end if np.isfinite(end) else None for end in (low, high)]
            row["recovered_interval"][other["rule"]] = ends
    return Frontier(baseline=base, evaluations=evaluations, variants=variants, rows=tuple(rows))
