"""A compute budget for a whole published model: a fitted rule for each layer, in a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import Checkpoint, CheckpointError, LayerSpec, restore, save
from moe_jax.interop import MoEBlock, router_from_hf
from moe_jax.interop.budget_shares import shared_budget
from moe_jax.interop.hub import config_of_layer
from moe_jax.interop.retrofit import fixed_k, fixed_rule, fold_expert_scale, target_of
from moe_jax.models.block_checkpoint import block_spec
from moe_jax.models.causal_lm import CausalLM, Implementation
from moe_jax.models.layer_sensitivity import output_changes
from moe_jax.models.load import HubFolder, stream_layers
from moe_jax.models.streaming import (
    ModelSource,
    Progress,
    Stream,
    pack_state,
    unpack_state,
    with_rule,
)
from moe_jax.models.text import TokenizedText
from moe_jax.routers import Router
from moe_jax.routers.base import router_from_json
from moe_jax.routers.twin import dynamic_twin, find_dynamic_rule, fit_twin
from moe_jax.types import Params

SHARES = ("uniform", "measured", "profile")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Budget:
    """A fitted rule for each layer with experts, by the layer's number.

    Attributes:
        routers: the rules. A layer that keeps its trained k has its trained rule.
        states: their fitted states, each with its provenance in ``fit``.
        params: the routers' parameters, compared to detect a block of another model.
        trained_k: experts per token as trained.
        target_mean_k: the mean k that each layer was fitted to.
        metadata: rule, targets and text, as JSON values.
    """

    routers: Mapping[int, Router]
    states: Mapping[int, Any]
    params: Mapping[int, Params]
    trained_k: Mapping[int, int]
    target_mean_k: Mapping[int, float]
    metadata: Mapping[str, Any]

    def files_fitted_on(self, text: TokenizedText) -> list[str]:
        """Paths of the files of a text that the budget was fitted on, by their content."""
        return text.files_among(self.metadata.get("calibration_files", ()))

    def block(self, layer: int, block: MoEBlock) -> MoEBlock:
        """Returns a layer's block with the fitted rule.

        Raises:
            ValueError: the block is not the one that the rule was fitted for.
        """
        held = self.params.get(layer)
        router: Any = self.routers.get(layer)
        if getattr(block.router, "use_expert_scale", False):
            block, _ = fold_expert_scale(block)
        kernel = block.params["router"].get("kernel")
        if held is None or kernel is None or not np.array_equal(held["kernel"], kernel):
            raise ValueError(
                f"layer {layer}: expected the router that the budget was fitted for, got another. "
                "Use the model folder that moe-jax budget read, or fit a new budget."
            )
        return with_rule(block, router, self.states[layer])


def fit_budget(
    model: ModelSource,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    rule: str = "MinP",
    target_mean_k: float | None = None,
    target_saving: float | None = None,
    share: str = "uniform",
    steps: int = 6,
    difficulty: str = "router_entropy",
    calibration_files: Sequence[str] = (),
    batch_size: int = 8,
    dtype: Any = None,
    implementation: Implementation = None,
    progress: Progress | None = None,
    work: str | Path | None = None,
) -> Budget:
    """Fits a rule to a budget layer by layer, on what each layer gets from the fitted layers before it.

    Args:
        model: see ``evaluate``. A folder is read once, twice where ``share`` is not "uniform".
        input_ids: i32[N, S], calibration text.
        attention_mask: bool or int[N, S], 0 for padding.
        rule: ``TopP``, ``MinP``, ``DynamicK`` or ``ExpertThreshold``; or ``module:Class`` of your own.
        target_mean_k: experts per token, the mean over layers; or
        target_saving: share of expert calls to save against the trained k.
        share: how layers share the target. "uniform" gives each layer the same; "measured" saves
            where the output of a layer, measured on the text, changes least; "profile" measures on
            Gaussian inputs instead and needs no text for it, in the manner of LExI
            (arXiv:2509.02753), but with the fitted rule and a greedy allocation.
        steps: resolution of a layer's budget, for "measured" and "profile".
        difficulty: estimator for ``DynamicK``.
        calibration_files: ``TokenizedText.file_digests`` of the calibration text. The budget records
            them, and ``compare`` says which files of its text are the same.
        batch_size: see ``evaluate``.
        dtype: see ``HubFolder``.
        implementation: how experts run, see ``moe_jax.experts``.
        progress: called after each layer.
        work: folder from which an interrupted call continues, see ``evaluate``.

    Raises:
        ValueError: a target out of reach, an unknown rule or share, or a model without fixed-k layers.

    Example:
        >>> ids = np.random.default_rng(0).integers(0, 96, (8, 32))
        >>> budget = fit_budget("tests/goldens/models/mixtral", ids, target_saving=0.2)
        >>> round(float(budget.states[1].fit.achieved_mean_k), 1)
        1.6
    """
    task = [rule, target_mean_k, target_saving, share, steps, difficulty]
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "implementation": implementation,
        "progress": progress,
    }
    source = model if not isinstance(model, (str, Path)) else HubFolder(model, dtype=dtype)
    check_budget(
        source, rule=rule, target_mean_k=target_mean_k, target_saving=target_saving, share=share
    )
    means: dict[int, float] = {}
    if share != "uniform":
        curves, k = output_changes(
            source, input_ids, attention_mask, rule, share, steps, difficulty, options, work
        )
        target = target_of(k, target_mean_k, target_saving)
        means = shared_budget(curves, k=k, target_mean_k=target)
    stream = Stream(
        source,
        input_ids,
        attention_mask,
        lanes=("budget",),
        work=work,
        task=["fit", *task],
        **options,
    )
    routers: dict[int, Router] = {}
    states: dict[int, Any] = {}
    params: dict[int, Params] = {}
    trained_k: dict[int, int] = {}
    for taken in stream.layers():
        if taken.block is None:
            continue
        number, block = taken.number, taken.block
        trained = fixed_rule(block)
        if trained.use_expert_scale:
            block, trained = fold_expert_scale(block)
        mean = means.get(number)
        if mean is None:
            mean = target_of(trained.k, target_mean_k, target_saving)
        if mean < trained.k:
            router = dynamic_twin(trained, rule, target_mean_k=mean, difficulty=difficulty)
            x = jnp.asarray(taken.inputs("budget"))
            state = fit_twin(router, block.params["router"], block.state, x, target_mean_k=mean)
        else:
            router, state = trained, block.state
        pack_state(stream.arrays, f"state/{number}", state)
        pack_state(stream.arrays, f"params/{number}", block.params["router"])
        names = sorted(block.params["router"])
        note = {"k": trained.k, "mean_k": mean, "names": names, "router": router.to_json()}
        stream.notes[str(number)] = note
        for _ in taken.experts("budget", with_rule(block, router, state)):
            pass
    config = stream.config
    for number in config.moe_layers:
        note = stream.notes[str(number)]
        # From the notes and not from the loop: some layers may have been fitted before an interruption.
        routers[number] = router_from_json(note["router"])
        names = dict.fromkeys(note["names"], 0)
        params[number] = unpack_state(stream.arrays, f"params/{number}", names)
        like = routers[number].init_state()
        states[number] = unpack_state(stream.arrays, f"state/{number}", like)
        trained_k[number] = note["k"]
    stream.finish()
    return Budget(
        routers=routers,
        states=states,
        params=params,
        trained_k=trained_k,
        target_mean_k={n: stream.notes[str(n)]["mean_k"] for n in config.moe_layers},
        metadata={
            "model_type": config.model_type,
            "rule": rule,
            "share": share,
            "target_mean_k": target_mean_k,
            "target_saving": target_saving,
            "calibration_tokens": int(stream.mask.sum()),
            "calibration_files": list(calibration_files),
        },
    )


def check_budget(
    source: HubFolder | CausalLM,
    *,
    rule: str,
    target_mean_k: float | None,
    target_saving: float | None,
    share: str = "uniform",
) -> None:
    """Checks what ``fit_budget`` is asked for, against the model's config alone. Reads no tensor.

    Raises:
        ValueError: see ``fit_budget``.
    """
    if share not in SHARES:
        raise ValueError(f"share: expected one of {', '.join(SHARES)}, got {share!r}. Choose one.")
    find_dynamic_rule(rule)
    if isinstance(source, HubFolder):
        raw = source.raw
        routers = [router_from_hf(config_of_layer(raw, n)) for n in source.config.moe_layers]
    else:
        routers = [block.router for block in source.blocks().values()]
    if not routers:
        raise ValueError(
            "model: expected layers with experts, got a dense model. Use another model."
        )
    for k in dict.fromkeys(fixed_k(router).k for router in routers):
        target_of(k, target_mean_k, target_saving)


# --- on disk ----------------------------------------------------------------------------------


def save_budget(
    budget: Budget,
    folder: str | Path,
    *,
    model: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves a budget as a checkpoint, which ``load_budget``, ``moe-jax export`` and the service open.

    Args:
        budget: what to save.
        folder: the folder to make.
        model: a model folder whose experts are saved too, so that the service can compute outputs
            and not routing alone. All layers are in memory at once.
        overwrite: whether a checkpoint at ``folder`` is replaced.

    Raises:
        CheckpointError: see ``moe_jax.checkpoint.save``.
        ValueError: ``moe_layer`` does not compute a block of the model; see ``HubFolder``.
    """
    params: dict[str, Any] = {f"layer_{n}": {"router": p} for n, p in budget.params.items()}
    specs = {name: LayerSpec(router=(name, "router")) for name in params}
    if model is not None:
        for layer in stream_layers(model):
            if layer.block is None:
                continue
            name, block = f"layer_{layer.number}", budget.block(layer.number, layer.block)
            specs[name] = block_spec(block, (name,))
            if specs[name].layer is None:
                raise ValueError(
                    f"layer {layer.number}: expected a block that moe_layer computes, got one with "
                    f"{', '.join(sorted(block.params))}, {block.options} and "
                    f"{type(block.expert_fn).__name__}. The service computes no outputs of such "
                    "blocks: save the routers alone."
                )
            params[name] = dict(block.params)
    numbers = [str(n) for n in budget.routers]
    note = {
        **budget.metadata,
        "trained_k": {n: budget.trained_k[int(n)] for n in numbers},
        "layer_mean_k": {n: budget.target_mean_k[int(n)] for n in numbers},
    }
    checkpoint = Checkpoint(
        params=params,
        routers={f"layer_{n}": router for n, router in budget.routers.items()},
        states={f"layer_{n}": state for n, state in budget.states.items()},
        layers=specs,
        metadata={"model_budget": note},
    )
    return save(folder, checkpoint, overwrite=overwrite)


def load_budget(folder: str | Path) -> Budget:
    """Loads what ``save_budget`` wrote.

    Raises:
        CheckpointError: the folder is no checkpoint, or one without a model's budget.
    """
    held = restore(folder)
    note = held.metadata.get("model_budget")
    if note is None:
        raise CheckpointError(
            f"{folder}: expected a budget of a published model, got another checkpoint. Give the "
            "folder that moe-jax budget wrote."
        )
    numbers = {int(name.removeprefix("layer_")): name for name in held.routers}
    return Budget(
        routers={n: held.routers[name] for n, name in sorted(numbers.items())},
        states={n: held.states[name] for n, name in sorted(numbers.items())},
        params={n: held.params[name]["router"] for n, name in sorted(numbers.items())},
        trained_k={int(n): k for n, k in note["trained_k"].items()},
        target_mean_k={int(n): k for n, k in note["layer_mean_k"].items()},
        metadata={k: v for k, v in note.items() if k not in ("trained_k", "layer_mean_k")},
    )
