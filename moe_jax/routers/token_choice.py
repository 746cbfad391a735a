"""The base class of rules in which each token chooses its experts."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_at_least_0, check_instance, describe_array
from moe_jax.routers.arguments import check_classes, check_concrete, check_context, check_state
from moe_jax.routers.base import BiasState, Router, State, Traits, check_declared
from moe_jax.routers.fit import finish_fit, real_tokens
from moe_jax.routing.balancing import loss_free_bias
from moe_jax.routing.budget import check_target
from moe_jax.routing.chance import token_chance
from moe_jax.routing.difficulty import Context
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import build_routing, compact, top_slots
from moe_jax.types import Array, Params, Routing, RoutingStats, pytree


@pytree
class Slots:
    """A batch scored and sorted, before a rule decides how many slots each token uses."""

    logits: Array  # f32[T, E]
    probs: Array  # f32[T, E]
    indices: Array  # i32[T, K], best first
    selection: Array  # f32[T, K]: selection scores at the slots
    scores: Array  # f32[T, K]: scores at the slots, which weights are made of
    slot_probs: Array  # f32[T, K]: probs at the slots
    available: Array  # bool[T, K]: False where no expert was left, so the slot holds a disabled one
    token_mask: Array  # bool[T]: False for padding
    draws: Any = None  # f32[T, num_draws] in [0, 1), for rules with ``num_draws``


def gather_slots(
    indices: Array,
    selection: Array,
    *,
    logits: Array,
    probs: Array,
    scores: Array,
    token_mask: Array | None,
) -> Slots:
    """Returns the slots of the experts ``indices`` i32[T, K] with selection scores f32[T, K].

    ``logits``, ``probs`` and ``scores`` are f32[T, E]. A selection score of -inf marks a slot for which
    no expert was left.
    """
    if token_mask is None:
        token_mask = jnp.ones((logits.shape[0],), bool)
    return Slots(
        logits=logits,
        probs=probs,
        indices=indices,
        selection=selection,
        scores=jnp.take_along_axis(scores, indices, axis=-1),
        slot_probs=jnp.take_along_axis(probs, indices, axis=-1),
        available=selection > -jnp.inf,
        token_mask=token_mask,
    )


class TokenChoice(Router, abc.ABC):
    """The frame of rules in which a token chooses experts: score, exclude, select, build.

    A rule gives ``select``, ``init_state`` if its state is more than a selection bias, and
    ``calibrate``, ``observe``, ``update`` if it learns. ``__call__`` and ``fit`` are the same for all.
    A few rules replace the steps before ``select`` (``logits``, ``selection_scores``, ``probs``) or the
    step after it (``build``). Disabled experts are excluded between these steps, for every rule alike.
    """

    scoring: Scoring

    keeps_prefix: ClassVar[bool] = True  # False: kept slots are moved to the front
    num_draws: ClassVar[int] = 0  # random numbers that the rule needs for each token
    # Step of the loss-free bias controller that `update` runs, for a rule with this field; 0 is off.
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        check_declared(self, "num_experts", "min_k", "max_k", "gate", "scoring")
        check_instance(
            "scoring", self.scoring, Scoring, fix="Write Scoring(norm='sum'), for example."
        )
        super().__post_init__()
        self.check_within_reach(self.min_k)
        check_at_least_0("balance_rate", self.balance_rate)

    @property
    def traits(self) -> Traits:
        """Returns the traits of a rule that routes each token independently; others override them."""
        fixed = self.min_k == self.max_k
        return Traits(
            causal=True,
            batch_invariant=True,
            may_leave_token_empty=self.min_k == 0,
            budget="expected" if self.calibrates() else "exact" if fixed else "none",
        )

    def check_within_reach(self, k: int) -> None:
        """Raises ValueError unless a token can use ``k`` of the enabled experts, within its groups."""
        self.gate.check(num_experts=self.num_experts, k=k)
        self.scoring.check(
            num_experts=self.num_experts,
            max_k=self.max_k,
            min_k=k,
            disabled=self.gate.disabled_experts,
        )

    @classmethod
    def calibrates(cls) -> bool:
        return cls.calibrate is not TokenChoice.calibrate

    # --- what a rule gives

    @abc.abstractmethod
    def select(
        self, params: Params, state: Any, slots: Slots, x: Array, context: Context
    ) -> tuple[Array, Array]:
        """Decides which slots each token uses, and their weights.

        Args:
            params: the router's parameters.
            state: the router's state.
            slots: the ``max_k`` best experts of each token, best first.
            x: float[T, D].
            context: what the caller passed, or an empty dict.

        Returns:
            keep: bool[T, K], a prefix of the slots unless ``keeps_prefix`` is False.
            weights: f32[T, K], for example ``self.weights(slots, keep)``; read where ``keep`` holds.
        """

    def calibrate(
        self,
        params: Params,
        state: Any,
        slots: Slots,
        x: Array,
        context: Context,
        *,
        real: np.ndarray,
        target_mean_k: float,
    ) -> Any:
        """Returns the state under which these tokens use ``target_mean_k`` experts on average.

        Runs on the host, inside ``fit``, which has checked the target and the tokens and records
        provenance afterwards. A rule without a budget leaves this method out.

        Args:
            params, slots, x, context: as in ``select``.
            state: the state to start from.
            real: bool[T], False for padding.
            target_mean_k: strictly between ``min_k`` and ``max_k``.
        """
        raise NotImplementedError

    def init_state(self) -> Any:
        """Returns ``BiasState`` without a bias; a rule with a larger state overrides this."""
        return BiasState(expert_bias=jnp.zeros((self.num_classes,), jnp.float32))

    def update(self, state: Any, stats: RoutingStats) -> Any:
        """Moves ``expert_bias`` by ``balance_rate``, against the load."""
        return self.balanced(state, stats)

    @property
    def num_choices(self) -> int:
        """Slots scored for each token: ``max_k``, or more where some choices compute nothing."""
        return self.max_k

    @property
    def num_classes(self) -> int:
        """Columns of ``logits``: E, and more for rules with choices that compute nothing."""
        return self.num_experts

    # --- the steps of the frame, in order

    def logits(
        self,
        params: Params,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Array:
        """f32[T, E] of x float[T, D]: the gate's, unless a rule has its own map."""
        return self.gate(params, x, key=key, token_mask=token_mask)

    def selection_scores(
        self,
        params: Params,
        state: Any,
        logits: Array,
        scores: Array,
        context: Context,
        *,
        token_mask: Array | None = None,
    ) -> Array:
        """f32[T, E]: the scores that rank experts, before exclusion and group limits.

        By default the scores plus ``state.expert_bias``, if the state has one. ``token_mask`` bool[T]
        is for rules in which tokens compete: padding must not take part.
        """
        bias = getattr(state, "expert_bias", None)
        if bias is None:
            bias = jnp.zeros((logits.shape[1],), jnp.float32)
        return self.scoring.selection_scores(logits, scores, bias)

    def probs(self, logits: Array, scores: Array) -> Array:
        """f32[T, E], rows summing to 1: what losses and statistics read."""
        return self.scoring.probs(logits, scores)

    def score(
        self,
        params: Params,
        state: Any,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Slots:
        """Scores x float[T, D] and sorts the ``max_k`` best experts of each token that are enabled."""
        context = context or {}
        draw_key = None
        if self.num_draws and key is not None:
            key, draw_key = jax.random.split(key)
        logits = self.logits(params, x, key=key, token_mask=token_mask, context=context)
        check_classes(logits, self.num_classes)
        scores = self.scoring.scores(logits)
        probs = self.probs(logits, scores)
        selection = self.selection_scores(
            params, state, logits, scores, context, token_mask=token_mask
        )
        indices, best = top_slots(self.exclude_and_limit(selection), self.num_choices)
        slots = gather_slots(
            indices, best, logits=logits, probs=probs, scores=scores, token_mask=token_mask
        )
        if not self.num_draws:
            return slots
        return dataclasses.replace(slots, draws=self._draws(logits, draw_key))

    def _draws(self, logits: Array, key: Array | None) -> Array:
        """f32[T, num_draws] in [0, 1): from the key, or a hash of each token's own logits."""
        if key is None:
            return token_chance(logits, self.num_draws)
        return jax.random.uniform(key, (logits.shape[0], self.num_draws), jnp.float32)

    def exclude_and_limit(self, selection: Array) -> Array:
        """f32[T, E]: selection scores with -inf for disabled experts, limited to the best groups."""
        # Exclude first, so that a disabled expert adds nothing to the score of its group. Exclude
        # again afterwards, because group_fill="zero" would rank it above enabled experts with
        # negative scores.
        selection = self.gate.exclude(selection)
        if self.scoring.num_groups == 1:
            return selection
        return self.gate.exclude(self.scoring.limit_groups(selection))

    def weights(self, slots: Slots, keep: Array, *, min_k: int | None = None) -> Array:
        """f32[T, K]: combine weights of the slots in ``keep`` bool[T, K], as ``scoring`` says.

        ``min_k`` is the fewest experts that a token may use; None is the rule's. It changes no weight.
        Below 2, a ``scoring`` that renormalises warns while gradients are taken, because the weight of
        a token's only expert is then always 1 and teaches the router nothing.
        """
        logits = None
        if self.scoring.reads_slot_logits:
            logits = jnp.take_along_axis(slots.logits, slots.indices, axis=-1)
        return self.scoring.weights(
            slots.scores,
            keep & slots.available,
            min_k=self.min_k if min_k is None else min_k,
            slot_logits=logits,
        )

    def balanced(self, state: Any, stats: RoutingStats) -> Any:
        """Returns the state with ``expert_bias`` moved by ``loss_free_bias``; for a rule's ``update``.

        A ``balance_rate`` of 0 changes nothing.
        """
        if not self.balance_rate:
            return state
        bias = loss_free_bias(
            state.expert_bias,
            stats.tokens_per_expert,
            rate=self.balance_rate,
            disabled=self.gate.disabled_experts,
        )
        return dataclasses.replace(state, expert_bias=bias)

    def build(self, slots: Slots, keep: Array, weights: Array) -> Routing:
        """Returns the ``Routing`` of the kept slots."""
        indices = slots.indices
        if not self.keeps_prefix:
            keep, indices, weights = compact(keep, indices, weights)
        return build_routing(
            logits=slots.logits,
            probs=slots.probs,
            indices=indices,
            weights=weights,
            keep=keep,
            token_mask=slots.token_mask,
        )

    def __call__(
        self,
        params: Params,
        state: Any,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing:
        slots = self.score(params, state, x, key=key, token_mask=token_mask, context=context)
        keep, weights = self.select(params, state, slots, x, context or {})
        self._check_selection(slots, keep, weights)
        return self.build(slots, keep & slots.available, weights)

    def _check_selection(self, slots: Slots, keep: Any, weights: Any) -> None:
        """Raises TypeError unless ``select`` returned keep bool[T, K] and weights float[T, K]."""
        shape = slots.slot_probs.shape
        for value, kind in ((keep, jnp.bool_), (weights, jnp.floating)):
            if np.shape(value) == shape and jnp.issubdtype(jnp.result_type(value), kind):
                continue
            raise TypeError(
                f"{type(self).__name__}.select: expected keep bool{list(shape)} and weights "
                f"float32{list(shape)}, one value a slot, got keep {describe_array(keep)} and weights "
                f"{describe_array(weights)}. Return (keep, self.weights(slots, keep))."
            )

    def fit(
        self,
        params: Params,
        state: State,
        x: Array,
        *,
        target_mean_k: float,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> State:
        if not self.calibrates():
            return super().fit(params, state, x, target_mean_k=target_mean_k)
        check_concrete("fit", params, state, x, token_mask, context)
        check_state(self, state)
        check_context(self, context)
        check_target(target_mean_k, min_k=self.min_k, max_k=self.max_k)
        real = real_tokens(token_mask, x)
        slots = self.score(params, state, x, token_mask=token_mask, context=context)
        state = self.calibrate(
            params, state, slots, x, context or {}, real=real, target_mean_k=target_mean_k
        )
        return finish_fit(
            self,
            params,
            state,
            x,
            target_mean_k=target_mean_k,
            token_mask=token_mask,
            context=context,
        )
