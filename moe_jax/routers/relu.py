"""ReLU routing: an expert is used wherever its logit is positive, and the weight is that logit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_finite, check_range
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.balancing import multiplicative_controller
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import relu_l1_loss
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, RoutingStats, pytree


@pytree
class ReLUState:
    """The coefficient of the loss and the cutoff that ``fit`` sets."""

    l1_coefficient: Array  # f32[]: lambda
    cutoff: Array  # f32[], at least 0: a weight at or below it is left out
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReLURouter(TokenChoice):
    """Expert e is used iff ``relu(logit[t, e]) > 0``, with that value as its weight.

    ReMoE (Wang et al. 2024, arXiv:2412.14711): routing without a jump, since a weight is 0 where an
    expert comes or goes. The mean k is held by a loss, so this rule is for training from the start:
    add ``router.regularization(params, state, routing)``, which is lambda times
    ``losses.relu_l1_loss``, to what you minimise, and call ``update`` after every step, which
    multiplies or divides lambda by ``step``. Without the loss the mean stays near E / 2, where random
    logits put it. With the loss it also stays there if tokens lie evenly around 0, half of them on
    either side of every column: give the gate a bias then. ``fit`` can make a trained rule sparser,
    never denser.

    The authors steer one lambda by the mean over all layers. In this library every layer has a state
    and meets the target alone; for the authors' rule give every layer's ``update`` the same
    ``stats.merge_stats`` of all layers. Their lambda has no bounds; this one stays within 1e-12 and
    ``max_l1_coefficient``, because it grows without end where the mean cannot be met. Where it can
    be met, in this library's training test, lambda peaked at 4.3.

    ``router_probs`` is the softmax of the logits, for statistics and the general losses: weights over
    their sum would have gradients without bound where all are small. Leave
    ``LossWeights.load_balancing`` at 0, since the loss of this rule balances.

    A token may have no expert (15.6 % of the tokens in the authors' reference output). A residual block
    takes that well; a division by the sum of weights does not. An expert whose logit is negative on
    every token gets no gradient from the layer, nor from this loss (a router z-loss reaches it): watch
    ``stats.tokens_per_expert``.

    Args:
        num_experts: E.
        target_k: mean experts per token that ``update`` steers to.
        max_k: most experts a token uses; None is E. Lower, it cuts the lowest weights off.
        l1_coefficient: the first lambda.
        step: factor of the controller.
        max_l1_coefficient: the most that lambda may grow to. Lambda at this bound says that the mean
            cannot be met (see the bias above), and that the loss is steering nothing.
        gate: the map to logits.
        scoring: ReLU scores, scaled if need be.

    Example:
        >>> router = ReLURouter(num_experts=8, target_k=2.0)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> routing = router(params, state, jax.random.normal(jax.random.key(1), (5, 16)))
        >>> bool(((routing.combine_weights > 0) == (routing.expert_indices < 8)).all())
        True
        >>> float(router.regularization(params, state, routing)) < 1e-6  # lambda starts at 1e-8
        True
    """

    num_experts: int
    target_k: float
    max_k: int = None  # pyright: ignore[reportAssignmentType]  # None becomes E
    l1_coefficient: float = 1e-8
    step: float = 1.2
    max_l1_coefficient: float = 10.0
    gate: Gate = Gate()
    scoring: Scoring = Scoring(score="relu")

    # Every logit of a token may be negative.
    min_k: ClassVar[int] = 0  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        # Before the checks of all rules, which would name the reach of the groups instead.
        if (
            self.scoring.score != "relu"
            or self.scoring.num_groups != 1
            or self.scoring.post != "none"
        ):
            raise ValueError(
                "scoring: expected ungrouped ReLU scores as they are, got "
                f"{self.scoring}. Use Scoring(score='relu'), with a scale if need be."
            )
        super().__post_init__()
        mean = f"It is the mean number of experts per token, of max_k={self.max_k}."
        check_range("target_k", self.target_k, above=0, below=self.max_k, fix=mean)
        check_range("step", self.step, above=1, fix="The authors use 1.2.")
        check_range("l1_coefficient", self.l1_coefficient, above=0, fix="The authors use 1e-8.")
        check_finite("max_l1_coefficient", self.max_l1_coefficient)
        first = "It bounds l1_coefficient from above; 10 is usual."
        check_range(
            "max_l1_coefficient", self.max_l1_coefficient, least=self.l1_coefficient, fix=first
        )

    def init_state(self) -> ReLUState:
        return ReLUState(
            l1_coefficient=jnp.asarray(self.l1_coefficient, jnp.float32),
            cutoff=jnp.zeros((), jnp.float32),
            fit=budget.unfitted(self.max_k),
        )

    def probs(self, logits: Array, scores: Array) -> Array:
        return jax.nn.softmax(logits, axis=-1)

    def select(self, params, state: ReLUState, slots, x, context):
        keep = slots.scores > jax.lax.stop_gradient(state.cutoff)
        return keep, self.weights(slots, keep)

    def regularization(self, params, state: ReLUState, routing, *, axis_name=None) -> Array:
        loss = relu_l1_loss(routing, target_k=self.target_k, axis_name=axis_name)
        return jax.lax.stop_gradient(state.l1_coefficient) * loss

    def update(self, state: ReLUState, stats: RoutingStats) -> ReLUState:
        coefficient = multiplicative_controller(
            state.l1_coefficient,
            measured=stats.mean_experts_per_token,
            target=self.target_k,
            step=self.step,
            low=1e-12,
            high=self.max_l1_coefficient,
        )
        return dataclasses.replace(state, l1_coefficient=coefficient)

    def calibrate(self, params, state: ReLUState, slots, x, context, *, real, target_mean_k):
        best = np.asarray(slots.scores)[real]
        most = float((best > 0).sum(axis=1).mean())
        if target_mean_k > most:
            raise ValueError(
                f"target_mean_k: expected at most {most:.3f}, which is what these tokens use without "
                f"a cutoff, got {target_mean_k}. More than that only training can give."
            )
        cutoff = max(0.0, -budget.fit_cut(-best, target_mean_k * len(best)))
        return dataclasses.replace(state, cutoff=jnp.asarray(cutoff, jnp.float32))
