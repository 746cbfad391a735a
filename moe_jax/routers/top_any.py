"""Top-any: a token uses every expert whose cosine to it passes a learned threshold per expert."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_array, check_at_least_0, check_range
from moe_jax.routers.arguments import check_params
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.gate import Gate, zero_padding
from moe_jax.routing.losses import mean_over_tokens, orthogonality_loss
from moe_jax.routing.numerics import safe_sqrt, unit_vectors
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts
from moe_jax.types import Array, Params, pytree


@pytree
class TopAnyState:
    """The offset that ``fit`` sets."""

    offset: Array  # f32[], added to every threshold; cosines
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopAny(TokenChoice):
    """Expert e is used iff ``sigmoid(scale * cos(x, w_e)) > sigmoid(scale * threshold_e)``.

    The top-any gate of DynMoE (Guo et al. 2024, arXiv:2405.14297). ``w_e`` is column e of the kernel,
    ``thresholds`` f32[E] is a parameter too: the weight of a used expert is 1 / n, n being the number
    that the token uses, while its gradient is that of ``(score - threshold score) / n`` with n held
    fixed (straight through the sign). So the router learns although weights are constant, which
    renormalised weights would not let it. Experts that are not used get no gradient.

    With ``min_k=1`` a token that passes no threshold uses its best-scoring expert, with weight 1 and
    without a gradient: what the authors do in evaluation. In training they leave it without any:
    ``min_k=0``, the same parameters and state.

    Nothing holds the mean: in a layer it may fall to one expert or to 0, or rise to all. Watch
    ``stats.mean_experts_per_token``; ``fit`` moves all thresholds by one offset so that the mean
    reaches a target; ``efficiency`` pushes it down in training.

    ``regularization`` is the authors' loss on parameters, ``diversity * (|W'W - 1| + mean |w_e|)``,
    with columns of unit length in the first (Frobenius) norm, plus ``efficiency * mean gate``. Their
    load-balancing term is on gates; ``losses.load_balancing_loss`` reads the scores over their sum.
    Experts are added and removed while training by ``moe_jax.routers.adapt_experts``. Left
    out: a learned temperature (their Tutel release has one, their DeepSpeed release fixes it at 1) and
    columns that start orthogonal.

    Args:
        num_experts: E.
        min_k: 1, or 0 to leave a token without an expert.
        max_k: most experts a token uses, the best-scoring ones that pass; None is E.
        scale: of the cosines; the authors start from 1 (DeepSpeed release) or 10 (Tutel release).
        diversity: coefficient of the loss on parameters.
        efficiency: coefficient of the mean gate.
        gate: noise, jitter and disabled experts; it sees x and the kernel's columns at unit length.

    Example:
        >>> router = TopAny(num_experts=8, max_k=4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> routing = router(params, state, jax.random.normal(jax.random.key(1), (5, 16)))
        >>> routing.expert_indices.shape, sorted(params)
        ((5, 4), ['kernel', 'thresholds'])
    """

    num_experts: int
    min_k: int = 1
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E
    scale: float = 1.0
    diversity: float = 1e-2
    efficiency: float = 0.0
    gate: Gate = Gate()
    scoring: ClassVar[Scoring] = Scoring(score="sigmoid")  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("min_k", self.min_k, most=1, fix="Top-any falls back on one expert.")
        check_range("scale", self.scale, above=0, most=100, fix="1 is usual.")
        check_at_least_0("diversity", self.diversity)
        check_at_least_0("efficiency", self.efficiency)

    def init(self, key: Array, d_model: int) -> Params:
        params = self.gate.init(key, d_model=d_model, num_experts=self.num_experts)
        return {**params, "thresholds": jnp.zeros((self.num_experts,), jnp.float32)}

    def init_state(self) -> TopAnyState:
        return TopAnyState(offset=jnp.zeros((), jnp.float32), fit=budget.unfitted(self.max_k))

    def logits(self, params, x: Array, *, key=None, token_mask=None, context=None) -> Array:
        """f32[T, E]: scaled cosines."""
        check_params(params, kernel=(None, self.num_experts), thresholds=(self.num_experts,))
        check_array("x", x, "T D", fix="Pass hidden states flattened to [tokens, d_model].")
        x = unit_vectors(zero_padding(x, token_mask).astype(jnp.float32), axis=1)
        kernel = self.scale * unit_vectors(params["kernel"].astype(jnp.float32), axis=0)
        return self.gate({**params, "kernel": kernel}, x, key=key, token_mask=token_mask)

    def selection_scores(self, params, state: TopAnyState, logits, scores, context, **_) -> Array:
        # Experts that pass come first, best score first, then the fallback's order: sigmoid scores lie
        # in (0, 1), so that 2 less puts every other expert behind.
        return jnp.where(self._margins(params, state, scores) > 0, scores, scores - 2.0)

    def select(self, params, state: TopAnyState, slots, x, context):
        scores = self.scoring.scores(slots.logits)
        margins = self._margins(params, state, scores)
        margin = jnp.take_along_axis(margins, slots.indices, axis=-1)
        passes = margin > 0
        keep = clip_counts(passes, min_k=self.min_k) & slots.available
        margin = jnp.where(passes, margin, 0.0)
        # Straight through the sign: the value is 1, the gradient is the margin's.
        gates = 1.0 + (margin - jax.lax.stop_gradient(margin))
        count = jnp.maximum(keep.sum(axis=-1, keepdims=True, dtype=jnp.float32), 1.0)
        return keep, gates / count

    def regularization(self, params, state: TopAnyState, routing, *, axis_name=None) -> Array:
        kernel = params["kernel"].astype(jnp.float32)
        similar = orthogonality_loss(kernel, disabled=self.gate.disabled_experts)
        lengths = safe_sqrt(jnp.square(kernel).sum(axis=0))
        loss = self.diversity * (safe_sqrt(similar) + lengths.mean())
        if self.efficiency:
            count = routing.num_experts_per_token.astype(jnp.float32)
            gates = routing.combine_weights.sum(axis=-1) * count / self.num_experts
            loss = loss + self.efficiency * mean_over_tokens(gates, routing, axis_name)
        return loss

    def calibrate(self, params, state: TopAnyState, slots, x, context, *, real, target_mean_k):
        scores = np.asarray(self.scoring.scores(slots.logits))[real]

        def mean_k(offset: float) -> float:
            least = self._threshold_scores(params["thresholds"], jnp.float32(offset))
            counts = (scores > np.asarray(least)[None, :]).sum(axis=1)
            return float(np.clip(counts, self.min_k, self.max_k).mean())

        # Cosines lie in [-1, 1]: an offset of this size makes every expert pass, or none.
        reach = 1.0 + float(np.abs(np.asarray(params["thresholds"])).max())
        offset = budget.bisect(mean_k, target_mean_k, low=-reach, high=reach, steps=30)
        return dataclasses.replace(state, offset=jnp.asarray(offset, jnp.float32))

    def _margins(self, params: Params, state: TopAnyState, scores: Array) -> Array:
        """f32[T, E]: by how much each score passes the score of the expert's threshold."""
        offset = jax.lax.stop_gradient(state.offset)
        return scores - self._threshold_scores(params["thresholds"], offset)[None, :]

    def _threshold_scores(self, thresholds: Array, offset: Array) -> Array:
        return jax.nn.sigmoid(self.scale * (thresholds.astype(jnp.float32) + offset))
