"""How logits become selection scores and combine weights: the part that model families differ in."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import jax.numpy as jnp

from moe_jax.checks import (
    NamedArguments,
    check_at_least_0,
    check_choice,
    check_count,
    check_finite,
    check_number,
)
from moe_jax.routing.numerics import divide
from moe_jax.routing.selection import group_limit
from moe_jax.types import Array

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "relu", "identity")
POST_SCORES = ("none", "softmax", "sigmoid")
NORMS = ("none", "sum", "sum_eps", "clamp", "p")
GROUP_SCORES = ("top2_sum", "max")
GROUP_FILLS = ("lowest", "zero")

# Scores that fall like exp(logit) or its root, and so vanish in float32 where logits are low. Their
# logs do not; below _LOW_LOGIT, where scores are still exact, the logs take their place.
_UNDERFLOWING = ("sigmoid", "sqrtsoftplus")
_LOW_LOGIT = -41.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring(NamedArguments):
    """One spec for the routers of the published model families, as a value that a rule holds.

    ``s = score(logits)``; selection looks at ``s`` (or the logits) plus the state's expert bias,
    limited to the best groups; the weight of a selected expert is ``scale * norm(post(s))``.

    Args:
        score: ``softmax`` over experts, or ``sigmoid``, ``sqrtsoftplus``, ``relu``, ``identity`` one by
            one.
        select_by: ``score``, or ``logit`` when the expert bias belongs on the logit.
        post: what turns the selected scores into weights: ``softmax`` over the used slots (with
            ``score="identity"`` this is "top-k, then softmax"), ``sigmoid``, or ``none``.
        norm: ``sum`` divides a token's weights by their sum over the used slots, ``sum_eps`` by
            sum + eps, ``clamp`` by max(sum, eps), ``p`` by their p-norm (DBRX). Off by default: see
            ``warn_starved_router``.
        norm_eps: eps.
        norm_p: the p of ``norm="p"``.
        scale: constant factor on the weights (2.5 in DeepSeek-V3).
        num_groups: experts are split into this many blocks of neighbours; 1 is no grouping.
        top_groups: how many groups a token may use.
        group_score: a group is worth its two best scores together, or its best one.
        group_fill: experts outside get the lowest score, or 0 as some families do.

    Example:
        >>> mixtral = Scoring(norm="sum")
        >>> deepseek_v3 = Scoring(
        ...     score="sigmoid", norm="sum_eps", scale=2.5, num_groups=8, top_groups=4)
        >>> granite = Scoring(score="identity", post="softmax")
    """

    score: str = "softmax"
    select_by: str = "score"
    post: str = "none"
    norm: str = "none"
    norm_eps: float = 1e-20
    norm_p: float = 1.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2_sum"
    group_fill: str = "lowest"

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORES)
        check_choice("select_by", self.select_by, ("score", "logit"))
        check_choice("post", self.post, POST_SCORES)
        check_choice("norm", self.norm, NORMS)
        check_choice("group_score", self.group_score, GROUP_SCORES)
        check_choice("group_fill", self.group_fill, GROUP_FILLS)
        check_at_least_0("norm_eps", self.norm_eps)
        check_number("norm_p", self.norm_p)
        check_finite("scale", self.scale)
        check_count("num_groups", self.num_groups, fix="1 is no grouping.")
        check_count("top_groups", self.top_groups, fix="Both 1 is no grouping.")
        if not self.norm_p > 0:
            raise ValueError(
                f"norm_p: expected a positive number, got {self.norm_p}. 1 is the sum."
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"top_groups: expected 1 <= top_groups <= num_groups={self.num_groups}, got "
                f"{self.top_groups}. Both 1 is no grouping."
            )

    def check(
        self, *, num_experts: int, max_k: int, min_k: int = 0, disabled: tuple[int, ...] = ()
    ) -> None:
        """Raises ValueError unless the groups divide E and can hold the experts that k asks for.

        ``max_k`` experts must fit into ``top_groups`` groups, and ``min_k`` must be within reach of
        some choice of groups once the experts in ``disabled`` are gone.
        """
        if num_experts % self.num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of num_experts={num_experts}, got "
                f"{self.num_groups}. Groups are equal blocks of experts."
            )
        reach = num_experts // self.num_groups * self.top_groups
        if max_k > reach:
            raise ValueError(
                f"k: expected at most {reach} experts, which is what top_groups={self.top_groups} "
                f"of {self.num_groups} groups hold, got {max_k}. Raise top_groups or lower k."
            )
        most = sum(self._enabled_in_groups(num_experts, disabled)[-self.top_groups :])
        if self.group_fill == "lowest" and min_k > most:
            raise ValueError(
                f"k: expected at most {most} experts, which is what top_groups={self.top_groups} of "
                f"{self.num_groups} groups hold without disabled_experts={disabled}, got {min_k}. "
                "Raise top_groups, lower k, or disable fewer experts."
            )

    def least_reach(self, *, num_experts: int, disabled: tuple[int, ...] = ()) -> int:
        """Returns the fewest enabled experts that the groups of one token can hold.

        Groups whose experts are all disabled are taken only where nothing else is left.
        """
        enabled = self._enabled_in_groups(num_experts, disabled)
        return sum(enabled if self.group_fill == "zero" else enabled[: self.top_groups])

    def _enabled_in_groups(self, num_experts: int, disabled: tuple[int, ...]) -> list[int]:
        """Enabled experts of each group that has any, ascending."""
        # A prefix is then the worst choice of groups, a suffix the best. Groups without any enabled
        # expert are left out, since they are taken only where nothing else is.
        size = num_experts // self.num_groups
        off = [sum(e // size == g for e in set(disabled)) for g in range(self.num_groups)]
        return sorted(size - n for n in off if n < size)

    @property
    def renormalizes(self) -> bool:
        """Whether the weight of a token's only expert is a constant, whatever its logits are."""
        return self.norm != "none" or self.post == "softmax"

    def scores(self, logits: Array) -> Array:
        """f32[T, E]: s."""
        if self.score == "softmax":
            return jax.nn.softmax(logits, axis=-1)
        if self.score == "sigmoid":
            return jax.nn.sigmoid(logits)
        if self.score == "sqrtsoftplus":
            # Not 0, where the slope of the root is infinite and its product with 0 NaN.
            tiny = jnp.finfo(jnp.float32).tiny
            return jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), tiny))
        if self.score == "relu":
            return jax.nn.relu(logits)
        return logits

    def probs(self, logits: Array, scores: Array) -> Array:
        """f32[T, E], rows summing to 1: what losses, statistics, top-p and min-p read.

        Softmax scores are one already; identity scores pass through softmax; the others are divided
        by their sum (as DeepSeek-V3 does for its balance loss, arXiv:2412.19437 eq. 19).

        Args:
            logits: f32[T, E].
            scores: f32[T, E], what ``scores`` returned for these logits.
        """
        if self.score == "softmax":
            return scores
        if self.score == "identity":
            return jax.nn.softmax(scores, axis=-1)
        if self.score in _UNDERFLOWING:
            # s / sum(s) = softmax(log s). The scores themselves underflow to 0 from a logit of about
            # -87 down, where their ratios, and the gradient that could bring them back, still exist.
            return jax.nn.softmax(self._log_scores(logits), axis=-1)
        # By the largest first: the gradient of a quotient squares its divisor, and the square of a
        # sum of tiny scores (sigmoid of -50) is 0 in float32.
        most = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        some = most > 0
        shares = scores / jnp.where(some, most, 1.0)
        total = jnp.where(some, shares.sum(axis=-1, keepdims=True), 1.0)
        return jnp.where(some, shares / total, 1.0 / scores.shape[-1])

    def _log_scores(self, logits: Array) -> Array:
        """f32[T, E]: log of sigmoid or sqrtsoftplus scores, also where these underflow."""
        if self.score == "sigmoid":
            return jax.nn.log_sigmoid(logits)
        # softplus(z) = exp(z) (1 - exp(z) / 2 + ...), so its log is z to float32 below -17. The clamp
        # keeps the branch that is not taken finite, whose gradient would else be 0 / 0.
        low = logits < -17.0
        log_softplus = jnp.log(jax.nn.softplus(jnp.where(low, 0.0, logits)))
        return 0.5 * jnp.where(low, logits, log_softplus)

    def selection_scores(self, logits: Array, scores: Array, expert_bias: Array) -> Array:
        """f32[T, E]: what experts are compared by, before groups limit the choice.

        No gradient flows through the bias.
        """
        bias = jax.lax.stop_gradient(expert_bias)[None, :]
        if self.select_by == "logit":
            return logits + bias
        if self.score not in _UNDERFLOWING:
            return scores + bias
        # Where every score is about to vanish, sums with a bias forget the scores: experts with the
        # highest bias are then compared by their shares, which are in the same order.
        low = logits.max(axis=-1, keepdims=True) < _LOW_LOGIT
        # The factor puts any difference of biases above any difference of shares, which are below 1.
        by_share = (bias - bias.max()) * 2.0**40 + self.probs(logits, scores)
        return jnp.where(low, by_share, scores + bias)

    def limit_groups(self, selection: Array) -> Array:
        """f32[T, E]: selection scores with the experts outside a token's best groups filled.

        Exclude disabled experts (-inf) before: they count for nothing in the worth of their group.
        """
        if self.num_groups == 1:
            return selection
        return group_limit(
            selection,
            groups=self.num_groups,
            top_groups=self.top_groups,
            reduce=self.group_score,
            fill=-jnp.inf if self.group_fill == "lowest" else 0.0,
        )

    @property
    def reads_slot_logits(self) -> bool:
        """Whether ``weights`` can use the logits of the slots, because the scores may underflow."""
        return self.score in _UNDERFLOWING and self.norm == "sum" and self.post == "none"

    def weights(
        self, slot_scores: Array, keep: Array, *, min_k: int, slot_logits: Array | None = None
    ) -> Array:
        """f32[T, K]: combine weights from the scores of the slots, over the kept slots only.

        Differentiating weights that are renormalised while a token may have one expert warns.

        Args:
            slot_scores: f32[T, K].
            keep: bool[T, K], the slots that count.
            min_k: fewest experts that a token uses, for the warning.
            slot_logits: f32[T, K]. With them, ``norm="sum"`` divides right also where sigmoid scores
                are too small for float32.
        """
        weights = slot_scores
        if self.post == "softmax":
            weights = jax.nn.softmax(jnp.where(keep, slot_scores, -jnp.inf), axis=-1)
            weights = jnp.where(keep, weights, 0.0)  # a token without experts: softmax gave NaN
        elif self.post == "sigmoid":
            weights = jax.nn.sigmoid(slot_scores)
        if self.norm != "none":
            kept = jnp.where(keep, weights, 0.0)
            if self.norm == "p" and self.norm_p != 1.0:
                # Unused slots are set to 1 before the power, whose gradient at 0 may be infinite.
                powers = jnp.where(keep, jnp.abs(jnp.where(keep, weights, 1.0)) ** self.norm_p, 0.0)
                total = powers.sum(axis=-1, keepdims=True)
                total = jnp.where(total > 0, total, 1.0) ** (1.0 / self.norm_p)
            else:
                total = kept.sum(axis=-1, keepdims=True)
            if self.norm == "sum_eps":
                weights = divide(weights, total + self.norm_eps)
            elif self.norm == "clamp":
                weights = divide(weights, jnp.maximum(total, self.norm_eps))
            elif slot_logits is None or not self.reads_slot_logits:
                # A sum may be negative (identity scores), but 0 only where nothing is kept.
                weights = divide(weights, jnp.where(total != 0, total, 1.0))
            else:
                # The lowest number for slots that do not count: of -inf alone softmax would be NaN.
                lowest = jnp.finfo(jnp.float32).min
                low = jnp.where(keep, slot_logits, lowest).max(axis=-1, keepdims=True) < _LOW_LOGIT
                logs = jnp.where(keep, self._log_scores(slot_logits), lowest)
                shares = jnp.where(keep, jax.nn.softmax(logs, axis=-1), 0.0)
                total = jnp.where(low | (total == 0), 1.0, total)
                weights = jnp.where(low, shares, divide(weights, total))
        # The check is at differentiation: routing without gradients may renormalise as it likes.
        if self.renormalizes and min_k <= 1:
            weights = warn_starved_router(weights)
        return weights * self.scale if self.scale != 1.0 else weights


@jax.custom_jvp
def warn_starved_router(weights: Array) -> Array:
    """The identity, which warns when it is differentiated.

    Renormalised weights of a token with exactly one expert are 1 whatever its logits are: the
    router gets no gradient from it (measured: 0.000 against 1.10). The rule knows that it
    renormalises; only differentiation tells that somebody is training.
    """
    return weights


@warn_starved_router.defjvp
def _warn_starved_router_jvp(primals, tangents):
    warnings.warn(
        "router: expected raw weights for training where a token may have one expert, got renormalised "
        "ones: such a token sends no gradient to the router. Set norm='none', or min_k=2.",
        stacklevel=2,
    )
    return primals[0], tangents[0]
