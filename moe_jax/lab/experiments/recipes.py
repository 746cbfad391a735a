"""Trains the recipes of an experiment, and distils a frozen model into an elastic one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.lab.data import Batches, Corpus
from moe_jax.lab.experiments.declaration import Experiment, Recipe
from moe_jax.lab.language_model import forward
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, load_model, save_model
from moe_jax.lab.optimizer import part_of
from moe_jax.lab.training import train
from moe_jax.routers import Elastic, with_share
from moe_jax.routers.twin import starting_state
from moe_jax.routing.elasticity import distillation_loss
from moe_jax.types import Array, Params


def trained_model(
    experiment: Experiment, recipe: Recipe, seed: int, folder: Path, corpus: Corpus
) -> tuple[Model, dict[str, Any]]:
    """Trains a recipe, or loads what an earlier call trained.

    Returns:
        The model, and what its training cost: ``seconds``, and ``cost`` in expert rows per byte of a
        batch, where a forward and a backward pass together count 3.
    """
    path = folder / f"{recipe.name}-{seed}"
    if not (path / "manifest.json").exists():
        if recipe.base:
            base = experiment.recipes[recipe.base]
            model, before = trained_model(experiment, base, seed, folder, corpus)
            model = distil(model, recipe, seed, corpus, cost=before["cost"])
            save_model(path, model, overwrite=True)
        else:
            train(recipe.config, path, recipe.steps, seed, False, overwrite=True, corpus=corpus)
    model = load_model(path)
    training = model.metadata["training"]
    wanted = {
        "configuration": recipe.config,
        "number of steps": recipe.steps,
        "text": corpus.describe()["fingerprint"],
    }
    had = (model.config, training["steps"], model.metadata["data"]["fingerprint"])
    other = [what for (what, value), old in zip(wanted.items(), had, strict=True) if value != old]
    if other:
        raise ValueError(
            f"{path}: expected the model of recipe {recipe.name}, got another {other[0]}. Remove "
            "the folder, or choose another --out."
        )
    if "cost" in training:
        return model, {"seconds": training["seconds"], "cost": training["cost"]}
    used = np.mean([row["computed_experts_per_token"] for row in training["history"]])
    return model, {"seconds": training["seconds"], "cost": 3.0 * float(used) * recipe.steps}


def distil(model: Model, recipe: Recipe, seed: int, corpus: Corpus, *, cost: float) -> Model:
    """Teaches a frozen model to do with fewer experts, by its routers (and norms) alone.

    Every step routes with a drawn budget for all tokens and learns to predict what the frozen model
    predicts at full k (``distillation_loss``).

    Args:
        model: the trained model. Its parameters outside ``recipe.parts`` stay as they are.
        recipe: ``config.rule`` is the ``Elastic`` rule to train and serve.
        seed: of the batches, which differ from those of the training.
        corpus: the text.
        cost: of the model's own training, see ``trained_model``.

    Raises:
        ValueError: the recipe's rule is not ``Elastic``.
    """
    config, rule = recipe.config, recipe.config.router()
    if not isinstance(rule, Elastic):
        raise ValueError(
            f"recipe {recipe.name}: expected rule to be an Elastic one, got {rule!r}. Only that rule "
            "draws budgets."
        )
    count = config.num_moe_layers
    states = tuple(starting_state(rule, model.states[i]) for i in range(count))
    params = jax.tree.map(jnp.copy, model.params)
    with jax.numpy_dtype_promotion("standard"):
        optimizer_state = _optimizer(config, recipe.steps, recipe.parts).init(params)
    batches = Batches(
        corpus.train,
        batch_size=config.batch_size,
        length=config.length,
        seed=seed + 1_000_003,
    )
    used = []
    for step in range(recipe.steps):
        params, optimizer_state, metrics = _distillation_step(
            config,
            recipe.steps,
            recipe.parts,
            params,
            optimizer_state,
            model.params,
            states,
            jnp.asarray(batches[step]),
        )
        used.append(metrics)
    seen = jax.device_get(used)
    drawn = float(np.mean([value["mean_k"] for value in seen]))
    # Teacher: one forward pass. Student: a forward pass and the half of a backward pass that carries
    # gradients through the frozen experts without computing theirs.
    student_cost = recipe.steps * (config.k + 2.0 * drawn)
    training = {
        **model.metadata["training"],
        "steps": recipe.steps,
        "cost": cost + student_cost,
        "distillation": [float(seen[0]["loss"]), float(seen[-1]["loss"])],
        "seconds": 0.0,
    }
    return Model(
        config=config,
        params=params,
        routers=(rule,) * count,
        states=with_share(states, 0.0),
        metadata={**model.metadata, "training": training},
    )


def trainable(path: Sequence[Any], parts: Sequence[str]) -> bool:
    """Whether the parameter at this tree path belongs to ``router`` or, by its name, to ``norms``."""
    name = str(getattr(path[-1], "key", path[-1]))
    return (part_of(path) == "router" and "router" in parts) or (
        name.endswith("norm") and "norms" in parts
    )


def _optimizer(
    config: LMConfig, steps: int, parts: tuple[str, ...]
) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, steps // 20), max(2, steps), config.learning_rate / 10
    )

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "train" if trainable(path, parts) else "freeze", params
        )

    adam = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, b2=0.98)
    )
    return optax.partition({"train": adam, "freeze": optax.set_to_zero()}, labels)


@functools.partial(jax.jit, static_argnames=("config", "steps", "parts"))
def _distillation_step(
    config: LMConfig,
    steps: int,
    parts: tuple[str, ...],
    params: Params,
    optimizer_state: Any,
    frozen: Params,
    states: tuple[Any, ...],
    tokens: Array,
) -> tuple[Params, Any, dict[str, Array]]:
    inputs = tokens[:, :-1]
    full = dataclasses.replace(config, rule=None, schedule=None, distill=0.0)
    plain = tuple(starting_state(full.router(), state) for state in states)
    teacher = forward(full, frozen, plain, inputs).logits

    def value(params: Params) -> tuple[Array, Array]:
        out = forward(config, params, with_share(states, 1.0), inputs)
        used = [layer.stats.mean_experts_per_token for layer in out.layers]
        return distillation_loss(out.logits, teacher), jnp.stack(used).mean()

    (loss, mean_k), grads = jax.value_and_grad(value, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = _optimizer(config, steps, parts).update(
            grads, optimizer_state, params
        )
        params = optax.apply_updates(params, updates)
    return params, optimizer_state, {"loss": loss, "mean_k": mean_k}
