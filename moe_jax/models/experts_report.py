"""Which expert fires where in a whole model: counts by layer, and the choices of a piece of text."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.models.evaluation import LaneCounts
from moe_jax.models.model_budget import Budget
from moe_jax.models.streaming import ModelSource, Progress, Stream
from moe_jax.models.text import TextTokenizer, TokenizedText

SHOWN_CHOICES = 250_000  # most numbers of the text's choices on a page

CLASSES = (
    "word start",
    "word part",
    "capitalised",
    "number",
    "punctuation",
    "space",
    "other script",
)


def token_class(text: str) -> int:
    """The index in ``CLASSES`` of a token's text.

    Example:
        >>> [CLASSES[token_class(t)] for t in (" the", "ing", " Paris", "42", "(", "\\n")]
        ['word start', 'word part', 'capitalised', 'number', 'punctuation', 'space']
    """
    # Byte-level tokenizers write a leading space as U+0120, SentencePiece as U+2581.
    bare = text.strip(" \u0120\u2581")
    if not bare.strip():
        return CLASSES.index("space")
    first = bare[0]
    if first.isdigit():
        return CLASSES.index("number")
    if not first.isalpha():
        symbol = unicodedata.category(first)[0] in "PS"
        return CLASSES.index("punctuation" if symbol else "other script")
    if "LATIN" not in unicodedata.name(first, ""):
        return CLASSES.index("other script")
    if first.isupper():
        return CLASSES.index("capitalised")
    return CLASSES.index("word part" if bare == text else "word start")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsReport:
    """What ``experts_report`` counted. L layers with experts, E experts, K most a token may use.

    Attributes:
        layers: numbers of the layers with experts.
        load: f64[L, E], tokens that used each expert.
        histogram: f64[L, K + 1], tokens that used 0..K experts.
        classes: f64[L, classes, E], uses by the class of the token.
        class_tokens: f64[classes], tokens of each class.
        together: f64[L, E, E], tokens that used both experts.
        tokens: text of the shown tokens.
        choices: i16[L, shown, K], experts of the shown tokens, best first; -1 is unused.
        title: what was run.
        loss: mean loss of the text in nats, or None.
    """

    layers: tuple[int, ...]
    load: np.ndarray
    histogram: np.ndarray
    classes: np.ndarray
    class_tokens: np.ndarray
    together: np.ndarray
    tokens: tuple[str, ...]
    choices: np.ndarray
    title: str
    loss: float | None

    @property
    def mean_k(self) -> np.ndarray:
        """f64[L]: experts per token."""
        ks = np.arange(self.histogram.shape[1])
        return self.histogram @ ks / self.histogram.sum(axis=1)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "title": self.title,
            "layers": list(self.layers),
            "loss": self.loss,
            "mean_k": self.mean_k.tolist(),
            "tokens_per_expert": self.load.astype(int).tolist(),
            "experts_per_token_histogram": self.histogram.astype(int).tolist(),
            "token_classes": list(CLASSES),
            "tokens_per_class": self.class_tokens.astype(int).tolist(),
            "uses_by_class": self.classes.astype(int).tolist(),
            "used_together": self.together.astype(int).tolist(),
            "text": list(self.tokens),
            "text_experts": self.choices.tolist(),
        }


def experts_report(
    model: ModelSource,
    text: TokenizedText,
    tokenizer: TextTokenizer,
    budget: Budget | None = None,
    *,
    shown: int = 1500,
    title: str = "",
    batch_size: int = 8,
    dtype: Any = None,
    progress: Progress | None = None,
    work: str | Path | None = None,
) -> ExpertsReport:
    """Runs a text through a model and counts which experts its tokens use.

    Args:
        model: see ``evaluate``.
        text: tokens from ``tokenize_files``.
        tokenizer: of the model.
        budget: rules to run with; None is the model as trained.
        shown: tokens of the beginning of the text whose choices are kept one by one.
        title: what is run, for the page.
        batch_size, dtype, progress, work: see ``evaluate``.

    Raises:
        ValueError: see ``evaluate``; or a model without experts.
    """
    stream = Stream(
        model,
        text.input_ids,
        text.mask,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
        work=work,
        task=["experts", shown, None if budget is None else dict(budget.metadata)],
    )
    layers = stream.config.moe_layers
    if not layers:
        raise ValueError("model: expected layers with experts, got a dense model.")
    kinds = np.zeros(stream.config.vocab_size, np.int8)
    for token in np.unique(stream.ids):
        kinds[token] = token_class(tokenizer.token(int(token)))
    rows = _shown_rows(stream, shown, len(layers))
    counts = LaneCounts(stream, "model")
    for taken in stream.layers():
        if taken.block is None:
            continue
        block = taken.block if budget is None else budget.block(taken.number, taken.block)
        _count(stream, taken.number, counts.add(taken, block), kinds, rows)
    evaluation = counts.evaluation()
    arrays = stream.arrays
    experts = max(len(arrays[f"load/{n}"]) for n in layers)

    def stacked(name: str) -> np.ndarray:
        held = [arrays[f"{name}/{n}"] for n in layers]
        size = np.max([a.shape for a in held], axis=0)
        return np.stack([_padded(a, size, -1 if name == "choices" else 0) for a in held])

    ids = stream.ids[stream.mask][:rows]
    report = ExpertsReport(
        layers=layers,
        load=stacked("load")[:, :experts],
        histogram=stacked("histogram"),
        classes=stacked("classes"),
        class_tokens=np.bincount(kinds[stream.ids[stream.mask]], minlength=len(CLASSES)).astype(
            float
        ),
        together=stacked("together"),
        tokens=tuple(tokenizer.token(int(i)) for i in ids),
        choices=stacked("choices").astype(np.int16),
        title=title,
        loss=evaluation.loss,
    )
    stream.finish()
    return report


def report_of_choices(
    choices: np.ndarray,
    tokens: Sequence[str],
    num_experts: int,
    *,
    title: str = "",
    loss: float | None = None,
) -> ExpertsReport:
    """Returns the report of a text whose choices are known, all of it shown.

    Args:
        choices: int[L, T, K], the experts of each token, best first; -1 is unused.
        tokens: the text of each token.
        num_experts: E.
        title: what was run.
        loss: mean loss of the text in nats, or None.

    Example:
        >>> report_of_choices(np.array([[[0, 1], [1, -1]]]), ["a", "b"], 2).mean_k.tolist()
        [1.5]
    """
    if choices.ndim != 3 or choices.shape[1] != len(tokens):
        raise ValueError(
            f"choices: expected int[layers, {len(tokens)}, K], one row a token, got "
            f"{choices.dtype}{list(choices.shape)}. Route the same tokens that are shown."
        )
    kinds = np.array([token_class(token) for token in tokens], np.int8)
    held = [_tallies(layer, num_experts, kinds) for layer in choices]
    return ExpertsReport(
        layers=tuple(range(len(choices))),
        **{
            name: np.stack([one[name] for one in held])
            for name in ("load", "histogram", "classes", "together")
        },
        class_tokens=np.bincount(kinds, minlength=len(CLASSES)).astype(float),
        tokens=tuple(tokens),
        choices=choices.astype(np.int16),
        title=title,
        loss=loss,
    )


def _tallies(chosen: np.ndarray, experts: int, kinds: np.ndarray) -> dict[str, np.ndarray]:
    """The counts of int[T, K] choices, -1 unused, of tokens of the classes ``kinds``."""
    # One row a token, one column an expert: sums of products of this matrix are all counts.
    one_hot = np.zeros((len(chosen), experts + 1), np.float32)
    np.put_along_axis(one_hot, np.where(chosen < 0, experts, chosen).astype(np.int64), 1.0, axis=1)
    one_hot = one_hot[:, :experts]
    by_class = np.zeros((len(CLASSES), len(kinds)), np.float32)
    by_class[kinds, np.arange(len(kinds))] = 1.0
    counts = {
        "load": one_hot.sum(axis=0),
        "histogram": np.bincount((chosen >= 0).sum(axis=1), minlength=chosen.shape[1] + 1),
        "classes": by_class @ one_hot,
        "together": one_hot.T @ one_hot,
    }
    return {name: value.astype(np.float64) for name, value in counts.items()}


def _padded(array: np.ndarray, size: Any, value: int) -> np.ndarray:
    return np.pad(
        array,
        [(0, int(s) - n) for n, s in zip(array.shape, size, strict=True)],
        constant_values=value,
    )


def _shown_rows(stream: Stream, shown: int, layers: int) -> int:
    """How many tokens are shown, so that the page stays small."""
    # K is known only after the first layer: 4 experts a token are assumed.
    return min(shown, int(stream.mask.sum()), SHOWN_CHOICES // max(layers * 4, 1))


def _count(stream: Stream, number: int, batches: Any, kinds: np.ndarray, shown: int) -> None:
    """Adds a layer's counts to the arrays of the stream."""
    arrays: dict[str, Any] = {}
    choices = []
    kept = 0
    for i, aux in batches:
        part = stream.parts[i]
        real = stream.mask[part].ravel()
        indices = np.asarray(aux.routing.expert_indices)[real]
        experts = aux.routing.num_experts
        kind = kinds[stream.ids[part].ravel()[real]]
        chosen = np.where(indices < experts, indices, -1)
        for name, value in _tallies(chosen, experts, kind).items():
            arrays[name] = arrays.get(name, 0) + value
        if kept < shown:
            choices.append(chosen[: shown - kept])
            kept += len(choices[-1])
    arrays["choices"] = np.concatenate(choices)
    for name, value in arrays.items():
        stream.arrays[f"{name}/{number}"] = value
