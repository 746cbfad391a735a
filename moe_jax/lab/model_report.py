"""Measures a checkpoint of the small language model: loss, controls, experts per layer and tails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from moe_jax.checkpoint.sealed import PathLike
from moe_jax.lab.calibration import RULES, calibration_blocks, fit_layers
from moe_jax.lab.data import Corpus, TextBlocks
from moe_jax.lab.frontier import LMEvaluation, evaluate, held_out_blocks
from moe_jax.lab.model_files import Model, corpus_for, load_variants
from moe_jax.lab.progress import track
from moe_jax.models.confidence import (
    avoided_share,
    paired_bootstrap,
    resampled_sums,
    verdict,
)

CONTROLS = tuple(name for name, rule in RULES.items() if rule.control)


def evaluate_checkpoint(
    path: PathLike,
    *,
    variant: str = "",
    corpus: Corpus | None = None,
    tokens: int = 32_768,
    seed: int = 0,
    progress: Progress | bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures a checkpoint's rules on held-out files, beside the trained k and two controls.

    The controls drop experts without looking at the token, down to the mean k that each layer of the
    checkpoint's rules uses on the held-out text.

    Args:
        path: a checkpoint of ``moe_jax.lab.training.train`` or ``moe_jax.lab.calibration.calibrate``.
        variant: which set of rules of the checkpoint; ``""`` is its first.
        corpus: the text; None is the checkpoint's own, which must still be the same.
        tokens: bytes of held-out text, about.
        seed: of the choice of blocks and of the resampling.
        progress: see ``moe_jax.lab.training.train``.
        console: see ``moe_jax.lab.training.train``.

    Returns:
        JSON values: ``bits_per_byte`` with ``interval``; ``trained`` (k and bits per byte); ``change``
        against it (see ``moe_jax.models.confidence.paired_bootstrap``) with ``verdict``, and
        ``controls``, both empty for a model at its trained k; ``layers`` with target and measured
        mean k; ``tails``: mean k of sequences, tokens at the least and most experts, change of files.

    Raises:
        ValueError: no such variant, or a checkpoint of something else.
        DataError: the checkpoint's text has changed or is not there.
        CheckpointError: the checkpoint cannot be read.
    """
    models = load_variants(path)
    if variant not in models:  # the name of the first rules, or none at all
        models |= load_variants(path, [variant])
    model = models[variant]
    trained = _trained(models, model)
    if corpus is None:
        corpus = corpus_for(path, calibrated=True)
    blocks = held_out_blocks(model.config, corpus, tokens=tokens, seed=seed)
    dynamic = model.routers != trained.routers
    with track(
        progress, "evaluate", 2 + len(CONTROLS) if dynamic else 1, console=console
    ) as advance:
        base = evaluate(trained, blocks)
        advance("trained k")
        measured, controls = base, {}
        if dynamic:
            measured = evaluate(model, blocks)
            advance("the checkpoint's rules")
            text = calibration_blocks(model.config, corpus, seed=seed)
            for name in CONTROLS:
                controls[name] = _control(trained, name, measured.mean_k_per_layer, text, blocks)
                advance(RULES[name].label)
    low, high = _interval(measured, seed)
    report: dict[str, Any] = {
        "checkpoint": str(path),
        "variant": variant,
        "rule": type(model.routers[0]).__name__,
        "data": corpus.describe(),
        "held_out_files": len(blocks.paths),
        "tokens": blocks.num_tokens,
        "bits_per_byte": measured.bits_per_byte,
        "interval": [low, high],
        "trained": {"k": model.config.k, "bits_per_byte": base.bits_per_byte},
        "saving": 1.0 - measured.mean_k / model.config.k,
        "change": {},
        "controls": {},
        "layers": [
            {"layer": i, **_budget(state), "mean_k": float(mean)}
            for i, (state, mean) in enumerate(
                zip(model.states, measured.mean_k_per_layer, strict=True)
            )
        ],
        "tails": _tails(measured, base, blocks),
    }
    if dynamic:
        report["change"] = _change(measured, base)
        rise = measured.nats_per_file - base.nats_per_file
        for name, control in controls.items():
            theirs = control.nats_per_file - base.nats_per_file
            share: Sequence[float] = avoided_share(rise, theirs) if theirs.sum() > 0 else ()
            report["controls"][name] = {
                "label": RULES[name].label,
                "mean_k": control.mean_k,
                **_change(control, base),
                "avoided": [value if np.isfinite(value) else None for value in share] or None,
            }
    return report


def _trained(models: dict[str, Model], model: Model) -> Model:
    """The model under the rule that it was trained with."""
    rule = (model.config.router(),) * model.config.num_moe_layers
    for name in ("trained", ""):
        if name in models and models[name].routers == rule:
            return models[name]
    raise ValueError(
        "checkpoint: expected the trained rule among its variants, got none of them. Evaluate a "
        "checkpoint that moe-jax train, calibrate or demo wrote."
    )


def _control(
    trained: Model, name: str, means: np.ndarray, text: TextBlocks, blocks: TextBlocks
) -> LMEvaluation:
    k = trained.config.k
    # RandomSkip keeps at least one expert; at the trained k it has nothing to drop.
    targets = np.clip(means, 1.001, k - 1e-3)
    routers = (RULES[name].build(trained.config, k),) * len(means)
    states = fit_layers(trained, routers, text, targets.tolist())
    return evaluate(dataclasses.replace(trained, routers=routers, states=states), blocks)


def _change(after: LMEvaluation, before: LMEvaluation) -> dict[str, Any]:
    change = paired_bootstrap(after.nats_per_file, before.nats_per_file, before.bytes_per_file)
    return {**change, "verdict": verdict(change["relative_low"], change["relative_high"])}


def _interval(measured: LMEvaluation, seed: int) -> tuple[float, float]:
    """95 % interval of bits per byte, by resampling files."""
    nats, size = resampled_sums(
        [measured.nats_per_file[None], measured.bytes_per_file[None]], seed=seed
    )
    low, high = np.quantile(nats / size / np.log(2), (0.025, 0.975))
    return float(low), float(high)


def _budget(state: Any) -> dict[str, Any]:
    fit = getattr(state, "fit", None)
    about = fit.describe() if fit is not None else {"fitted": False}
    if not about["fitted"]:
        return {"target_mean_k": None, "calibrated_mean_k": None}
    return {
        "target_mean_k": about["target_mean_k"],
        "calibrated_mean_k": about["achieved_mean_k"],
    }


def _tails(measured: LMEvaluation, base: LMEvaluation, blocks: TextBlocks) -> dict[str, Any]:
    """What a mean hides: sequences that use many experts, and files that lose most."""
    real = blocks.mask.sum(axis=1)
    per_sequence = measured.counts.sum(axis=(0, 2)) / np.maximum(real, 1) / len(measured.counts)
    full = per_sequence[real == real.max()]  # short sequences vary more, and are not comparable
    low, median, high, highest = np.quantile(full, (0.05, 0.5, 0.95, 0.99)).tolist()
    used = base.bytes_per_file > 0
    rise = measured.nats_per_file[used] / base.nats_per_file[used] - 1.0
    worst = int(np.argmax(rise))
    return {
        "sequences": len(full),
        "mean_k_of_sequences": {
            "p5": low,
            "median": median,
            "p95": high,
            "p99": highest,
            "max": float(full.max()),
        },
        "tokens_by_experts": measured.histogram.mean(axis=0).tolist(),
        "change_of_files": {
            "median": float(np.median(rise)),
            "p95": float(np.quantile(rise, 0.95)),
            "max": float(rise[worst]),
            "worst_file": [path for path, has in zip(blocks.paths, used, strict=True) if has][
                worst
            ],
        },
    }
