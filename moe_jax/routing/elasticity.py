"""Training for elasticity: when tokens draw their budget, and how a full pass teaches a reduced one.

The rule itself is ``moe_jax.Elastic``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_finite
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The share of tokens that draw their budget, over the steps of a training run.

    Args:
        share: the share at the end, in [0, 1].
        start: part of the steps, in [0, 1], before which nothing is drawn: 0 draws from the start,
            0.7 in the last 30 % of the steps.
        ramp: part of the steps over which the share rises linearly from 0; 0 is a step.

    Raises:
        ValueError: a value outside [0, 1].

    Example:
        >>> late = Schedule(share=0.5, start=0.7)
        >>> [float(late.share_at(step, 100)) for step in (0, 69, 70, 99)]
        [0.0, 0.0, 0.5, 0.5]
        >>> float(Schedule(start=0.0, ramp=1.0).share_at(25, 100))
        0.25
    """

    share: float = 1.0
    start: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_finite(field.name, value)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"{field.name}: expected a part between 0 and 1, got {value}. 0.7 is 70 %."
                )

    def share_at(self, step: int | Array, steps: int) -> Array:
        """f32[]: the share at step ``step`` (from 0) of ``steps``; works under ``jit``."""
        done = jnp.asarray(step, jnp.float32) / steps - self.start
        if self.ramp:
            rise = jnp.clip(done / self.ramp, 0.0, 1.0)
        else:
            # Half a step of slack, because step / steps is rounded.
            rise = (done > -0.5 / steps).astype(jnp.float32)
        return self.share * rise


def distillation_loss(student: Array, teacher: Array, mask: Array | None = None) -> Array:
    """f32[]: mean KL divergence in nats of the student's prediction from the teacher's.

    No gradient flows into the teacher.

    Args:
        student: float[..., V], logits of the pass with fewer experts.
        teacher: float[..., V], logits of the pass with all k experts.
        mask: bool[...], False for padding; None is all real.

    Example:
        >>> logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
        >>> round(float(distillation_loss(logits, logits)), 6)
        0.0
    """
    target = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32), axis=-1))
    log_q = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    each = (jnp.exp(target) * (target - log_q)).sum(axis=-1)
    if mask is None:
        return each.mean()
    return jnp.where(mask, each, 0.0).sum() / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
