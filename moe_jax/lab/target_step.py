"""The training step of the small language model, compiled for an absent accelerator."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.training import init_training, train_step
from moe_jax.parallel.sharding import P, param_specs, shardings, token_spec
from moe_jax.parallel.target_layers import LayerShape
from moe_jax.parallel.targets import Target, TargetProgram, compile_program, target_mesh

_STEPS = 100  # of the schedule of learning rates


def layer_shape(config: LMConfig) -> LayerShape:
    """The sizes of the model's layers of experts, with the tokens of one batch."""
    return LayerShape(
        d_model=config.d_model,
        d_ff=config.d_ff,
        num_experts=config.num_experts,
        k=config.k,
        tokens=config.batch_size * config.length,
    )


def training_program(
    target: Target,
    config: LMConfig = LMConfig(),
    *,
    implementation: str | None = None,
    all_devices: bool = False,
) -> TargetProgram:
    """Compiles one whole training step for a target: gradient, AdamW, controllers.

    Args:
        target: what is compiled for.
        config: the model.
        implementation: what runs the experts; None is the library's choice.
        all_devices: whether tokens and experts are spread over all devices of the target, with at least
            one sequence for each device; False is the whole step on the first device.

    Returns:
        The report. ``work`` counts the grouped kernels alone, against the experts' share of the step;
        it is None if there are no such kernels.
    """
    config = dataclasses.replace(config, implementation=implementation)
    count = len(target.devices) if all_devices else 1
    config = dataclasses.replace(config, batch_size=math.lcm(config.batch_size, count))
    state = jax.eval_shape(functools.partial(init_training, config, _STEPS), 0)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)
    mesh, inputs, outputs, what = None, None, None, "training step of the small model"
    if all_devices:
        experts = math.gcd(config.num_experts, count)
        mesh = target_mesh(target, data=count // experts, expert=experts)
        specs = param_specs(state, mesh)
        inputs = shardings((specs, token_spec(mesh)), mesh)
        outputs = shardings((specs, P()), mesh)
        what += f" over {count // experts} x {experts} devices"

    def step(state: Any, tokens: Any) -> Any:
        return train_step(config, _STEPS, state, tokens, mesh)

    shape = layer_shape(config)
    rows = shape.rows * config.num_moe_layers / count
    flops = 3 * rows * config.experts.flops_per_row(config.d_model, config.d_ff)
    return compile_program(
        target,
        step,
        (state, tokens),
        what=what,
        gradient=True,
        implementation=implementation or "default",
        useful_flops=flops,
        kernel_work=True,
        in_shardings=inputs,
        out_shardings=outputs,
        donate_argnums=(0,),
    )
