"""The training step of the small language model, compiled for an absent accelerator."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.training import init_training, train_step
from moe_jax.parallel.targets import Target, TargetProgram, compile_program


def training_program(
    target: Target, config: LMConfig = LMConfig(), *, implementation: str | None = None
) -> TargetProgram:
    """Compiles one whole training step for the first device of a target: gradient, AdamW, controllers.

    Args:
        target: what is compiled for.
        config: the model.
        implementation: what runs the experts; None is the library's choice.
    """
    config = dataclasses.replace(config, implementation=implementation)
    steps = 100
    state = jax.eval_shape(functools.partial(init_training, config, steps), 0)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)
    return compile_program(
        target,
        functools.partial(train_step, config, steps),
        (state, tokens),
        what="training step of the small model",
        gradient=True,
        implementation=implementation or "default",
    )
