"""Trained language models on disk, with any further sets of rules for the same parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import checkpoint
from moe_jax.checkpoint.layers import own_rule
from moe_jax.checkpoint.sealed import PathLike
from moe_jax.lab.data import Corpus, corpus_of_checkpoint
from moe_jax.lab.lm_config import LMConfig
from moe_jax.routers import Router
from moe_jax.types import Params

LayerRouters = tuple[Router, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A trained model, with a rule and its state for every layer that has experts."""

    config: LMConfig
    params: dict[str, Params]
    routers: LayerRouters
    states: tuple[Any, ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Variants = Mapping[str, tuple[LayerRouters, tuple[Any, ...]]]


def save_model(
    path: PathLike,
    model: Model,
    *,
    variants: Variants | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves a model, and any further sets of routers and states for the same parameters.

    Layer i's rule is named ``layer_i``, that of a variant ``NAME/layer_i``.
    """
    routers, states = {}, {}
    for name, (rules, values) in {"": (model.routers, model.states), **(variants or {})}.items():
        for i, (rule, value) in enumerate(zip(rules, values, strict=True)):
            routers[_layer_name(name, i)] = rule
            states[_layer_name(name, i)] = value
    metadata = {**model.metadata, "model": model.config.to_json(), "variants": [*(variants or {})]}
    layers = {
        _layer_name(name, i): checkpoint.LayerSpec(
            router=("layers", "moe", "router"),
            layer=("layers", "moe"),
            experts=model.config.experts,
            index=i,
        )
        for name in ("", *(variants or {}))
        for i in range(model.config.num_moe_layers)
    }
    content = checkpoint.Checkpoint(
        params=model.params,
        routers=routers,
        states=states,
        layers=layers,
        metadata=metadata,
        extra=extra or {},
    )
    return checkpoint.save(path, content, overwrite=overwrite)


def load_model(path: PathLike, variant: str = "") -> Model:
    """Restores what ``train`` or ``calibrate`` saved, or one of its variants.

    Raises:
        ValueError: no such variant, or a checkpoint of something else.
        CheckpointError: see ``moe_jax.checkpoint.restore``.
    """
    return load_variants(path, [variant])[variant]


def load_variants(path: PathLike, names: Sequence[str] | None = None) -> dict[str, Model]:
    """Restores the model of a checkpoint under each of these variants.

    Args:
        path: the checkpoint.
        names: variants; ``""`` is the model itself, and so is the first rule of its calibration. None
            is all of them, each once.

    Returns:
        A model for each name. The parameters are read once and shared.

    Raises:
        ValueError, CheckpointError: see ``load_model``.
    """
    saved = checkpoint.restore(path)
    if "model" not in saved.metadata:
        raise ValueError(
            f"{path}: expected a language model saved by moe_jax.lab.training, got a checkpoint "
            "without one. Restore it by moe_jax.checkpoint.restore instead."
        )
    config = LMConfig.from_json(saved.metadata["model"])
    prefixes = {name: name for name in ("", *saved.metadata["variants"])}
    first = own_rule(saved.metadata)
    if first is not None:  # the rule that calibrate was given first has the model's own routers
        prefixes.setdefault(first, "")
    names = ["", *saved.metadata["variants"]] if names is None else names
    unknown = [name for name in names if name not in prefixes]
    if unknown:
        raise ValueError(
            f"variant: expected one of {', '.join(filter(None, prefixes)) or 'none'}, got "
            f"{unknown[0]!r}. Leave it out for the model itself."
        )
    layers = range(config.num_moe_layers)
    return {
        name: Model(
            config=config,
            params=saved.params,
            routers=tuple(saved.routers[_layer_name(prefixes[name], i)] for i in layers),
            states=tuple(saved.states[_layer_name(prefixes[name], i)] for i in layers),
            metadata=saved.metadata,
        )
        for name in names
    }


def corpus_for(
    path: PathLike,
    root: PathLike | None = None,
    *,
    glob: str | None = None,
    allow_other: bool = False,
    calibrated: bool = False,
) -> Corpus:
    """Returns the text of a checkpoint; see ``moe_jax.lab.data.corpus_of_checkpoint``.

    With ``calibrated``, the text of the checkpoint's calibration comes before that of its training,
    and either counts as its own.
    """
    metadata = checkpoint.load_metadata(path)["metadata"]
    if not calibrated:
        metadata = {name: value for name, value in metadata.items() if name != "calibration"}
    return corpus_of_checkpoint(metadata, root, glob=glob, allow_other=allow_other)


def _layer_name(variant: str, layer: int) -> str:
    return f"{variant}/layer_{layer}" if variant else f"layer_{layer}"
