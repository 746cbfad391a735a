"""Difficulty decides how many experts a token gets: the production guide's router."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.difficulty import (
    Context,
    Estimator,
    context_keys_of,
    raw_difficulty,
    resolve_estimator,
)
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import first_k
from moe_jax.types import Array, Params, RoutingStats, pytree


@pytree
class DynamicKState:
    """The balancing bias and the calibrated map from difficulty to k."""

    expert_bias: Array  # f32[E], added for selection only
    knots: Array  # f32[NUM_KNOTS], raw-score quantiles: raw difficulty -> [0, 1]
    thresholds: Array  # f32[max_k - min_k], increasing, in (0, 1)
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicK(TokenChoice):
    """Each token uses between ``min_k`` and ``max_k`` experts, as its difficulty says.

    A raw score from ``difficulty`` is mapped to [0, 1] by the quantiles seen at calibration, and k is
    ``min_k`` plus the number of thresholds exceeded. Difficulty 0 gives ``min_k``, difficulty 1 gives
    ``max_k``. Before ``fit``, raw scores are taken as they are (clipped to [0, 1]) and the
    thresholds are those of ``round(min_k + (max_k - min_k) * difficulty)``.

    Args:
        num_experts: E.
        min_k: fewest experts a token uses.
        max_k: most experts a token uses.
        difficulty: the name of an estimator (``moe_jax.routing.difficulty``) or a function
            ``(x, context) -> f32[T]``.
        gate: the map to logits.
        scoring: logits to scores and weights.
        balance_rate: step of the loss-free bias controller that ``update`` runs; 0 is off.

    Example:
        >>> import jax
        >>> router = DynamicK(num_experts=8, min_k=1, max_k=4)
        >>> params = router.init(jax.random.key(0), 16)
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> state = router.fit(params, router.init_state(), x, target_mean_k=1.7)
        >>> routing = router(params, state, x)
        >>> round(float(routing.num_experts_per_token.mean()), 2)
        1.7
    """

    num_experts: int
    min_k: int
    max_k: int
    difficulty: str | Estimator = "router_entropy"
    gate: Gate = Gate()
    scoring: Scoring = Scoring()
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        resolve_estimator(self.difficulty)

    @property
    def context_keys(self) -> frozenset[str] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the difficulty estimator."""
        return context_keys_of(self.difficulty)

    def init_state(self) -> DynamicKState:
        return DynamicKState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            knots=budget.uniform_knots(),
            thresholds=budget.rounding_thresholds(self.min_k, self.max_k),
            fit=budget.unfitted(self.max_k),
        )

    def select(self, params, state: DynamicKState, slots, x, context):
        raw = self._raw(x, slots.logits, context)
        counts = budget.raw_to_k(raw, state.knots, state.thresholds, min_k=self.min_k)
        keep = first_k(counts, self.max_k)
        return keep, self.weights(slots, keep)

    def difficulty_of(
        self, params: Params, state: DynamicKState, x: Array, *, context: Context | None = None
    ) -> Array:
        """f32[T] in [0, 1]: calibrated difficulty of tokens x [T, D]."""
        raw = self._raw(x, self.gate(params, x), context)
        return budget.calibrated_difficulty(raw, state.knots)

    def _raw(self, x: Array, logits: Array, context: Context | None) -> Array:
        return raw_difficulty(self.difficulty, x, {**(context or {}), "router_logits": logits})

    def update(self, state: DynamicKState, stats: RoutingStats) -> DynamicKState:
        return self.balanced(state, stats)  # as inherited, with the type for callers

    def calibrate(self, params, state: DynamicKState, slots, x, context, *, real, target_mean_k):
        raw = np.asarray(self._raw(x, slots.logits, context))[real]
        knots = budget.fit_knots(raw)
        level = np.asarray(budget.calibrated_difficulty(jnp.asarray(raw), knots))
        thresholds = budget.fit_thresholds(
            level, min_k=self.min_k, max_k=self.max_k, target_mean_k=target_mean_k
        )
        return dataclasses.replace(state, knots=knots, thresholds=jnp.asarray(thresholds))
