"""Rules fitted to compute budgets on a model that was trained at a fixed k.

The model is left as it is. A rule is fitted layer by layer to use fewer experts on average, on text
that neither training nor measuring sees. Beside the rules stand controls that save as much without
looking at the token; a rule is worth its name only by what it does better than these.

Every rule weighs experts exactly as the model was trained to (raw probabilities, not renormalised,
unless the model itself renormalises): what is dropped is missing, and what stays keeps its weight.
And no rule may use more than the trained k for a token, so that a saving is never paid for with
something the model did not know before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from moe_jax.checkpoint import check_free
from moe_jax.checkpoint.sealed import PathLike
from moe_jax.lab.data import Corpus, TextBlocks, corpus_of_checkpoint, cut_blocks, load_corpus
from moe_jax.lab.language_model import embed, layer_params, router_input
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, load_model, save_model
from moe_jax.lab.progress import track
from moe_jax.layer import LayerOptions, add_residual, run_routing
from moe_jax.routers import Elastic, RandomSkip, Router, TopK
from moe_jax.routers.registry import load_rule
from moe_jax.routers.twin import control_twin, dynamic_twin, fit_twin, starting_state
from moe_jax.routing.budget import check_target, mean_k_after
from moe_jax.types import Array, Params, Routing, pytree

MAX_CALIBRATION_ERROR = 0.01  # of the mean k on calibration text, relative
BATCH = 32  # blocks a forward pass takes

Fitted = tuple[tuple[Router, ...], tuple[Any, ...]]  # a router and its state for every layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A row of the comparison.

    Attributes:
        name: the name in files and on the command line.
        label: the name in pictures and tables.
        kind: the class of the rule.
        difficulty: the estimator of ``DynamicK``.
        drop: which experts a control drops; None for a rule that looks at the token.
    """

    name: str
    label: str
    kind: str
    difficulty: str = "router_entropy"
    drop: str | None = None

    @property
    def control(self) -> bool:
        """Whether it is one of the controls, which do not look at the token."""
        return self.drop is not None

    def build(self, config: LMConfig, target_mean_k: float) -> Router:
        """Returns the rule for a trained model, to be fitted to a mean k."""
        trained = config.router()
        if not isinstance(trained, TopK | Elastic):
            raise ValueError(
                f"{self.label}: expected a model trained with TopK or Elastic, got {trained!r}. "
                "Fit that rule itself with fit_layers."
            )
        if self.drop is not None:
            # mean_k is only where an unfitted state starts; one value for all budgets compiles once.
            return control_twin(trained, self.drop, mean_k=config.k)
        return dynamic_twin(
            trained, self.kind, target_mean_k=target_mean_k, difficulty=self.difficulty
        )


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(name="top_p", label="top-p", kind="TopP"),
        Rule(name="min_p", label="min-p", kind="MinP"),
        Rule(name="dynamic_k_entropy", label="dynamic k (entropy)", kind="DynamicK"),
        Rule(
            name="dynamic_k_margin",
            label="dynamic k (margin)",
            kind="DynamicK",
            difficulty="router_margin",
        ),
        Rule(name="expert_threshold", label="expert threshold", kind="ExpertThreshold"),
        Rule(
            name="drop_lowest",
            label="mix of k and k-1 (control)",
            kind="RandomSkip",
            drop="lowest",
        ),
        Rule(name="drop_random", label="random drop (control)", kind="RandomSkip", drop="random"),
    )
}


def find_rules(names: Sequence[str]) -> list[Rule]:
    """Returns the rules of these names; the name of a class gives the first rule of that class.

    ``module:Class`` is a rule of your own, named after its class.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    by_class: dict[str, str] = {}
    for rule in RULES.values():
        by_class.setdefault(rule.kind, rule.name)
    trained = [name for name in names if name in ("ReLURouter", "TopAny")]
    if trained:
        raise ValueError(
            f"rule: expected rules that are fitted to a trained TopK model, got {', '.join(trained)}"
            ", which a model is trained with from the start. Build it as the router of your own "
            f"model, or choose from {', '.join(by_class)}."
        )
    meant = [by_class.get(name, name) for name in names]
    unknown = [name for name in meant if name not in RULES and ":" not in name]
    if unknown:
        raise ValueError(
            f"rule: expected some of {', '.join((*RULES, *by_class))}, got {', '.join(unknown)}. "
            "Choose from these, or give your own rule as module:Class."
        )
    return [RULES[name] if name in RULES else _own_rule(name) for name in meant]


def _own_rule(path: str) -> Rule:
    label = path.partition(":")[2]
    load_rule(path)  # refuses what is no rule, before any work
    return Rule(name=label, label=label, kind=path)


# --- a model, layer by layer ----------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def attend(config: LMConfig, layer: dict[str, Params], h: Array) -> tuple[Array, Array]:
    """Returns (h after attention, the normalised input of the MoE layer), both [B, S, D]."""
    return router_input(config, layer, h)


@pytree
class Seen:
    """The part of a layer's report that is brought to the host."""

    counts: Array  # i32[B, S]: experts per token
    histogram: Array  # f32[K + 1]: tokens that use 0..K experts
    tokens_per_expert: Array  # f32[E]
    slots_used: Array  # f32[]
    slots_executed: Array  # f32[]


@functools.partial(jax.jit, static_argnames="router")
def route(router: Router, params: Params, state: Any, x: Array, mask: Array) -> Any:
    """Routes x [B, S, D] as B * S tokens; ``mask`` bool[B, S] is False for padding."""
    return router(params, state, x.reshape(-1, x.shape[-1]), token_mask=mask.reshape(-1))


@functools.partial(jax.jit, static_argnames="config")
def mix(
    config: LMConfig, layer: dict[str, Params], routing: Routing, h: Array, x: Array
) -> tuple[Array, Seen]:
    """Runs what ``moe_layer`` does after routing; compiled once for all rules."""
    flat = x.reshape(-1, config.d_model)
    y, stats = run_routing(
        config.experts,
        layer["moe"]["experts"],
        flat,
        routing,
        options=LayerOptions(implementation=config.implementation),
    )
    y = add_residual(y, routing, flat)
    seen = Seen(
        counts=routing.num_experts_per_token.reshape(x.shape[:-1]),
        histogram=stats.experts_per_token_histogram * stats.token_count,
        tokens_per_expert=stats.tokens_per_expert,
        slots_used=stats.slots_used,
        slots_executed=stats.slots_executed,
    )
    return h + y.reshape(h.shape), seen


embed_batch = jax.jit(embed)


def run_layers(
    model: Model, routers: Sequence[Router], states: Sequence[Any], tokens: Array, mask: Array
) -> Iterator[tuple[Routing, Seen, Array]]:
    """Runs a model with one rule for each layer, and yields what each layer did.

    Args:
        model: the parameters.
        routers: a rule for each layer.
        states: a state for each of them.
        tokens: i32[B, S], byte values.
        mask: bool[B, S], False for padding.

    Yields:
        The routing of the layer's B * S tokens, what is counted of it, and the hidden states
        f32[B, S, D] after the layer.
    """
    config = model.config
    h = embed_batch(model.params, tokens)
    for index, (router, state) in enumerate(zip(routers, states, strict=True)):
        layer = layer_params(model.params, index)
        h, x = attend(config, layer, h)
        routing = route(router, layer["moe"]["router"], state, x, mask)
        h, seen = mix(config, layer, routing, h, x)
        yield routing, seen, h


# --- fitting --------------------------------------------------------------------------------


def fit_layers(
    model: Model,
    routers: Sequence[Router],
    blocks: TextBlocks,
    target_mean_k: float | Sequence[float],
) -> tuple[Any, ...]:
    """Fits the rule of every layer to a mean k, from the first layer to the last.

    Each layer is fitted on what reaches it when the layers before it already run their fitted
    rules, since fewer experts early on change what later layers see. What the trained routers
    learned besides (a selection bias) is carried over.

    Args:
        model: the trained model.
        routers: a rule for each layer, with a budget to fit.
        blocks: calibration text.
        target_mean_k: experts per token, one number for all layers or one for each. A rule without
            a budget (the trained one) stays as it is.

    Returns:
        A fitted state for each layer, with its provenance.

    Raises:
        ValueError: the target is out of reach, or a rule (not a control) missed it by over 1 %.
    """
    config, params = model.config, model.params
    targets = np.broadcast_to(np.asarray(target_mean_k, float), len(routers)).tolist()
    hs, masks = embedded_batches(model, blocks)
    fitted = []
    for index, (router, target) in enumerate(zip(routers, targets, strict=True)):
        layer = layer_params(params, index)
        pairs = [attend(config, layer, h) for h in hs]
        if router.calibrates():
            state = fit_twin(
                router,
                layer["moe"]["router"],
                model.states[index],
                real_rows(pairs, masks),
                target_mean_k=target,
            )
            _check_reached(router, state, target, index)
        else:
            state = starting_state(router, model.states[index])
        fitted.append(state)
        hs = []
        for (h, x), mask in zip(pairs, masks, strict=True):
            routing = route(router, layer["moe"]["router"], state, x, mask)
            hs.append(mix(config, layer, routing, h, x)[0])
    return tuple(fitted)


def embedded_batches(model: Model, blocks: TextBlocks) -> tuple[list[Array], list[Array]]:
    """Returns text as batches of hidden states f32[B, S, D] before the first layer, and their masks."""
    size = min(BATCH, len(blocks))
    blocks = blocks.pad_to(size)
    starts = range(0, len(blocks), size)
    masks = [jnp.asarray(blocks.mask[i : i + size]) for i in starts]
    inputs = [jnp.asarray(blocks.inputs[i : i + size]) for i in starts]
    return [embed_batch(model.params, tokens) for tokens in inputs], masks


def real_rows(pairs: Sequence[tuple[Array, Array]], masks: Sequence[Array]) -> Array:
    """f32[T, D]: the inputs of a layer's experts from all batches, without padding.

    Padding is left out rather than masked: that also keeps it out of a fit's fingerprint.
    """
    rows = [np.asarray(x)[np.asarray(mask)] for (_, x), mask in zip(pairs, masks, strict=True)]
    return jnp.asarray(np.concatenate(rows))


def _check_reached(router: Router, state: Any, target: float, layer: int) -> None:
    reached = float(state.fit.achieved_mean_k)
    missed = abs(reached / target - 1) > MAX_CALIBRATION_ERROR
    # A control decides by chance, so its mean is only near its target; it is reported as it is.
    if missed and not isinstance(router, RandomSkip):
        raise ValueError(
            f"{type(router).__name__}: expected mean k {target:g} within "
            f"{MAX_CALIBRATION_ERROR:.0%} on the calibration text of layer {layer}, got "
            f"{reached:.3f}. Use more calibration text or another target."
        )


def variant_name(rule: str, saving: float) -> str:
    """``top_p-20`` for a fifth fewer expert activations."""
    return f"{rule}-{100 * saving:.0f}"


def fit_rules(
    model: Model,
    blocks: TextBlocks,
    *,
    rules: Sequence[str] = tuple(RULES),
    savings: Sequence[float] = (0.10, 0.20, 0.35),
    progress: Progress | bool = False,
) -> dict[str, Fitted]:
    """Fits each rule to each saving: name (see ``variant_name``) to routers and states."""
    config, fitted = model.config, {}
    chosen = find_rules(rules)
    with track(progress, "calibrate", len(chosen) * len(savings)) as advance:
        for rule in chosen:
            for saving in savings:
                target = config.k * (1.0 - saving)
                routers = (rule.build(config, target),) * config.num_moe_layers
                states = fit_layers(model, routers, blocks, target)
                fitted[variant_name(rule.name, saving)] = (routers, states)
                advance(f"{rule.label}, -{saving:.0%}")
    return fitted


def calibration_blocks(
    config: LMConfig, corpus: Corpus | None = None, *, tokens: int = 16_384, seed: int = 0
) -> TextBlocks:
    """About ``tokens`` bytes of calibration files, evenly from all of them."""
    files = (load_corpus() if corpus is None else corpus).calibration
    return spread_blocks(files, config, tokens, seed)


def spread_blocks(files: Sequence[Any], config: LMConfig, tokens: int, seed: int) -> TextBlocks:
    """Returns blocks of about ``tokens`` bytes, as evenly from all files as their sizes allow."""
    # Small files have fewer blocks than the cap, so the cap is raised until the text suffices.
    per_file = 1
    blocks = cut_blocks(files, length=config.length, per_file=per_file, seed=seed)
    while blocks.num_tokens < tokens:
        per_file += 1
        more = cut_blocks(files, length=config.length, per_file=per_file, seed=seed)
        if more.num_tokens == blocks.num_tokens:  # no file has more text
            break
        blocks = more
    return blocks


def check_request(
    rule: str | Sequence[str], target_mean_k: float | None, target_saving: float | None
) -> list[Rule]:
    """Returns the rules that ``calibrate`` is asked for; needs neither a checkpoint nor a text.

    Raises:
        ValueError: an unknown rule, one twice, or no target or two.
    """
    chosen = find_rules([rule] if isinstance(rule, str) else rule)
    names = [one.name for one in chosen]
    if not chosen or (target_mean_k is None) == (target_saving is None):
        raise ValueError(
            "calibrate: expected a rule and exactly one of target_mean_k and target_saving "
            f"(--target-mean-k, --target-saving), got rule={names}, target_mean_k={target_mean_k}, "
            f"target_saving={target_saving}. For a fifth fewer expert activations pass "
            "target_saving=0.2 (--target-saving 0.2)."
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"rule: expected each rule once, got {', '.join(names)}. Leave out the second."
        )
    return chosen


def calibrate(
    source: PathLike,
    out: PathLike,
    rule: str | Sequence[str] = "top_p",
    *,
    target_mean_k: float | None = None,
    target_saving: float | None = None,
    tokens: int = 16_384,
    seed: int = 0,
    progress: Progress | bool = True,
    console: Console | None = None,
    overwrite: bool = False,
    corpus: Corpus | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Fits rules to a budget on a trained model and saves them as a new checkpoint.

    Args:
        source: a checkpoint of ``moe_jax.lab.training.train`` (or of this function).
        out: the new checkpoint. Its routers and states ``layer_0`` ... are those of the first
            rule; the others are variants under their names, see ``moe_jax.lab.model_files.load_model``.
        rule: a name in ``RULES`` (or of a router class, e.g. ``TopP``), or several.
        target_mean_k: experts per token on average, below the trained k; or
        target_saving: share of the expert activations to save, e.g. 0.2.
        tokens: bytes of calibration text, about.
        seed: of the choice of blocks.
        progress: see ``moe_jax.lab.training.train``.
        console: see ``moe_jax.lab.training.train``.
        overwrite: whether a checkpoint at ``out`` is replaced.
        corpus: the text; None is the text that the checkpoint was trained on, which must still be
            the same (see ``moe_jax.lab.data.corpus_of_checkpoint``).

    Returns:
        The new checkpoint's folder, and a summary: what was asked for, and for each rule and layer
        the provenance of its fit, which every state carries too (``state.fit.describe()``).

    Raises:
        ValueError: an unknown rule, no target or two, or a target out of reach.
        DataError: the checkpoint's text has changed or is not there.
        CheckpointError: the source cannot be read, or ``out`` is taken.
    """
    chosen = check_request(rule, target_mean_k, target_saving)
    names = [one.name for one in chosen]
    check_free(out, overwrite)
    model = load_model(source)
    if corpus is None:
        corpus = corpus_of_checkpoint({"data": model.metadata.get("data")})
    trained = model.config.router()
    # A source that is calibrated itself keeps the rules that its model was trained with as a variant.
    if model.routers != (trained,) * model.config.num_moe_layers:
        model = load_model(source, "trained")
    config = model.config
    if target_saving is not None:
        target_mean_k = mean_k_after(target_saving, min_k=1, trained_k=config.k)
    assert target_mean_k is not None  # one of the two was given, see above
    check_target(target_mean_k, min_k=1, max_k=config.k)
    blocks = calibration_blocks(config, corpus, tokens=tokens, seed=seed)
    fitted: dict[str, Fitted] = {}
    with track(progress, "calibrate", len(chosen), console=console) as advance:
        for one in chosen:
            routers = (one.build(config, target_mean_k),) * config.num_moe_layers
            fitted[one.name] = (routers, fit_layers(model, routers, blocks, target_mean_k))
            advance(one.name)
    fits = {name: [s.fit.describe() for s in states] for name, (_, states) in fitted.items()}
    first = fitted.pop(names[0])
    text = corpus.describe()
    note = {
        "rules": names,
        "target_mean_k": target_mean_k,
        "tokens": blocks.num_tokens,
        "seed": seed,
        "data": text["fingerprint"],
        "text": text,
    }
    new = dataclasses.replace(
        model,
        routers=first[0],
        states=first[1],
        metadata={**model.metadata, "calibration": note},
    )
    variants = {**fitted, "trained": (model.routers, model.states)}
    path = save_model(out, new, variants=variants, overwrite=overwrite)
    return path, {**note, "fits": fits}
