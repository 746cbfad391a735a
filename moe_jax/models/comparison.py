"""The price of a budget: a model's loss under it beside the trained k and both controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.interop.retrofit import fixed_rule, fold_expert_scale
from moe_jax.models.causal_lm import Implementation
from moe_jax.models.confidence import MAX_DRIFT, paired_bootstrap, verdict
from moe_jax.models.evaluation import Evaluation, LaneCounts
from moe_jax.models.model_budget import Budget
from moe_jax.models.streaming import ModelSource, Progress, Stream, with_rule
from moe_jax.models.text import TokenizedText
from moe_jax.routers.twin import control_twin, starting_state

CONTROLS = {"mix of k and k-1": "lowest", "random drop": "random"}
FEWEST_FILES = 8  # below, the interval resamples sequences instead of files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Evaluations of one text under several rules, by name; "trained" is the model as it is.

    Attributes:
        text: what was evaluated.
        evaluations: by rule.
        other: the same on a second text, empty without one.
        other_text: the second text, or None.
        fitted_on: paths of the files of ``text`` that the budget was fitted on: what the budget costs
            on them is no price on new text.
    """

    text: TokenizedText
    evaluations: Mapping[str, Evaluation]
    other_text: TokenizedText | None = None
    other: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    fitted_on: Sequence[str] = ()

    def report(self) -> dict[str, Any]:
        """Everything as JSON values, as ``moe-jax evaluate --json`` prints it."""
        base = self.evaluations["trained"]
        rows = [_row(name, one, base, self.text) for name, one in self.evaluations.items()]
        report: dict[str, Any] = {
            "tokens": base.tokens,
            "bytes": self.text.bytes,
            "files": self.text.files,
            "fitted_on_files": list(self.fitted_on),
            "interval": "95 %, paired bootstrap over "
            + ("files" if self.text.files >= FEWEST_FILES else "sequences"),
            "rules": rows,
        }
        if self.other_text is not None:
            report["drift"] = _drift(self)
        return report


def _bits(one: Evaluation, text: TokenizedText) -> float:
    # The first token of a sequence has no prediction; it is counted as costing the mean.
    return one.loss / float(np.log(2)) * text.tokens / text.bytes


def _units(text: TokenizedText, one: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """(nats, bytes) of what the bootstrap draws: files, or sequences where there are few files."""
    nats = np.nan_to_num(one.sequence_loss) * one.sequence_tokens
    if text.files >= FEWEST_FILES:
        return np.bincount(text.file_index, nats, minlength=text.files), text.file_bytes
    share = (text.file_bytes / np.maximum(text.file_tokens, 1))[text.file_index]
    return nats, share * one.sequence_tokens


def _row(name: str, one: Evaluation, base: Evaluation, text: TokenizedText) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rule": name,
        "loss": one.loss,
        "perplexity": one.perplexity,
        "bits_per_byte": _bits(one, text),
        "mean_k": one.mean_k,
        "mean_k_per_layer": {str(n): k for n, k in one.experts_per_token.items()},
        "saving": 1.0 - one.mean_k / base.mean_k,
        "flops_used": one.flops.used,
        "flops_executed": one.flops.executed,
        "expert_flops_used": one.flops.experts_used,
        "expert_flops_executed": one.flops.experts_executed,
        "seconds": one.seconds,
    }
    if one is base:
        return row
    after, size = _units(text, one)
    before, _ = _units(text, base)
    change = paired_bootstrap(after, before, size)
    row |= {**change, "verdict": verdict(change["relative_low"], change["relative_high"])}
    row["tails"] = _tails(one, base, text)
    return row


def _tails(one: Evaluation, base: Evaluation, text: TokenizedText) -> dict[str, Any]:
    """What a mean hides: the tokens and the file that lose most."""
    rises = (one.token_loss.astype(np.float64) - base.token_loss)[
        text.mask[:, :-1] & text.mask[:, 1:]
    ]
    worst = np.sort(rises)[-max(1, round(len(rises) / 100)) :]
    count = text.files
    after = np.bincount(
        text.file_index, np.nan_to_num(one.sequence_loss) * one.sequence_tokens, minlength=count
    )
    before = np.bincount(
        text.file_index, np.nan_to_num(base.sequence_loss) * base.sequence_tokens, minlength=count
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(before > 0, after / before - 1.0, -np.inf)
    file = int(relative.argmax())
    return {
        "worst_1_percent_tokens_nats": float(worst.mean()),
        "worst_file": text.paths[file],
        "worst_file_relative": float(relative[file]),
    }


def _drift(self: Comparison) -> list[dict[str, Any]]:
    assert self.other_text is not None
    rows = []
    base = self.other["trained"]
    for name, one in self.other.items():
        evaluation = self.evaluations[name]
        change = one.mean_k / evaluation.mean_k - 1.0
        layers = {
            str(n): one.experts_per_token[n] / k - 1.0
            for n, k in evaluation.experts_per_token.items()
        }
        rows.append(
            {
                "rule": name,
                "mean_k": one.mean_k,
                "bits_per_byte": _bits(one, self.other_text),
                "relative_loss": one.loss / base.loss - 1.0,
                "mean_k_drift": change,
                "mean_k_drift_per_layer": layers,
                "drifted": abs(change) > MAX_DRIFT,
            }
        )
    return rows


def compare(
    model: ModelSource,
    text: TokenizedText,
    budget: Budget | None = None,
    *,
    controls: bool = False,
    changes: Mapping[str, Callable[[int, MoEBlock], MoEBlock]] | None = None,
    other_text: TokenizedText | None = None,
    batch_size: int = 8,
    dtype: Any = None,
    implementation: Implementation = None,
    progress: Progress | None = None,
    work: str | Path | None = None,
) -> Comparison:
    """Evaluates a model as trained, under a budget, and under the controls, in one pass of its layers.

    A control drops experts without looking at the token, and in each layer uses as many as the budget
    used there on the same text: "mix of k and k-1" drops the lowest-ranked expert of a random share
    of the tokens, "random drop" drops random ones.

    Args:
        model: see ``evaluate``.
        text: tokens from ``tokenize_files``.
        budget: from ``fit_budget`` or ``load_budget``; None evaluates the trained model alone.
        controls: whether both controls are evaluated; they need a budget.
        changes: further lanes by name: ``(layer, block) -> block``.
        other_text: a second text of the same sequence length, on which the drift is measured.
        batch_size, dtype, implementation, progress, work: see ``evaluate``.

    Raises:
        ValueError: see ``evaluate``; or the budget is of another model.
    """
    if controls and budget is None:
        raise ValueError(
            "controls: expected a budget whose saving they match, got controls alone. Give a budget "
            "or a rule with a target."
        )
    texts = [text] if other_text is None else [text, other_text]
    lengths = {t.input_ids.shape[1] for t in texts}
    if len(lengths) > 1:
        raise ValueError(
            f"other_text: expected sequences as long as those of text, got lengths {sorted(lengths)}. "
            "Tokenize both with one length."
        )
    chosen = CONTROLS if controls else {}
    changes = changes or {}
    names = ("trained", *(() if budget is None else ("budget",)), *chosen, *changes)
    stream = Stream(
        model,
        np.concatenate([t.input_ids for t in texts]),
        np.concatenate([t.mask for t in texts]),
        lanes=names,
        batch_size=batch_size,
        dtype=dtype,
        implementation=implementation,
        progress=progress,
        work=work,
        task=["compare", None if budget is None else dict(budget.metadata)],
    )
    lanes = {name: LaneCounts(stream, name) for name in names}
    for taken in stream.layers():
        if taken.block is None:
            continue
        for name, counts in lanes.items():
            block = taken.block
            if name == "budget":
                assert budget is not None
                block = budget.block(taken.number, block)
            elif name in changes:
                block = changes[name](taken.number, block)
            elif name in chosen:
                block = _control(block, chosen[name], lanes["budget"].mean_k(taken.number))
            for _ in counts.add(taken, block):
                pass
    first = slice(0, len(text.input_ids))
    second = slice(len(text.input_ids), len(stream.ids))
    results = {name: counts.evaluation(first) for name, counts in lanes.items()}
    other = {} if other_text is None else {n: c.evaluation(second) for n, c in lanes.items()}
    stream.finish()
    fitted_on = () if budget is None else budget.files_fitted_on(text)
    return Comparison(
        text=text, evaluations=results, other_text=other_text, other=other, fitted_on=fitted_on
    )


def _control(block: MoEBlock, drop: str, mean_k: float) -> MoEBlock:
    trained = fixed_rule(block)
    if trained.use_expert_scale:
        block, trained = fold_expert_scale(block)
    router = control_twin(trained, drop, mean_k=trained.k)
    state = starting_state(router, block.state)
    # The mean is part of the state, so that one compiled program serves every layer.
    mean = jnp.asarray(min(max(mean_k, 1.0), trained.k), jnp.float32)
    return with_rule(block, router, dataclasses.replace(state, mean_k=mean))
