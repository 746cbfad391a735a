"""Fixed k: every token uses its k best experts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.checks import check_choice, check_flag, check_range
from moe_jax.routers.arguments import check_params
from moe_jax.routers.base import BiasState
from moe_jax.routers.contracts import FixedK
from moe_jax.routing.balancing import (
    balancing_bias,
    histogram_bias,
    margin_histogram,
    quantile_bias,
)
from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, ExpertChoice, Params, Routing, RoutingStats

BALANCES = ("sign", "quantile", "histogram")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(FixedK):
    """Top-k routing (Shazeer et al. 2017, arXiv:1701.06538) with every published variation.

    Softmax or sigmoid scores, softmax before or after selection, renormalised or not, expert
    groups, selection bias, scale: see ``Scoring``. ``k=1`` is the Switch Transformer's rule.

    Args:
        num_experts: E.
        k: experts per token.
        gate: the map to logits.
        scoring: logits to scores and weights.
        balance_rate: of the controller that ``update`` runs on the selection bias; 0 is off, which
            ``quantile`` refuses.
        balance: ``sign`` moves the bias by ``balance_rate`` against the load (loss-free balancing);
            ``quantile`` by the share ``balance_rate`` of the way to the bias that would have evened
            out the batch (quantile balancing, at rate 1 that of Megatron-LM, which wants no
            load-balancing loss beside it); ``histogram`` does the same from a histogram of margins
            [E, 258], whose sum over devices or micro-batches is that of the whole batch, where the mean
            of their quantiles is only near it. ``observe`` returns the histogram, in place of f32[E].
        use_expert_scale: whether the parameter ``expert_scale`` f32[E] multiplies the final weights
            (Gemma 4).

    Example:
        >>> router = TopK(num_experts=8, k=2, scoring=Scoring(norm="sum"))
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> routing = router(params, state, jnp.ones((5, 16)))
        >>> routing.expert_indices.shape, float(routing.combine_weights[0].sum())
        ((5, 2), 1.0)
    """

    num_experts: int
    k: int
    gate: Gate = Gate()
    scoring: Scoring = Scoring()
    balance_rate: float = 0.0
    use_expert_scale: bool = False
    balance: str = "sign"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("use_expert_scale", self.use_expert_scale)
        check_choice("balance", self.balance, BALANCES)
        if self.balance == "sign":
            return
        off, groups = self.gate.disabled_experts, self.scoring.num_groups
        if self.k == self.num_experts or off or groups != 1:
            raise ValueError(
                f"balance: expected a choice among all experts for {self.balance!r}, got "
                f"k={self.k} of {self.num_experts}, disabled_experts={off}, num_groups={groups}. It "
                "would give every expert the same load; use balance='sign'."
            )
        usual = f"1.0 is usual with balance={self.balance!r}: all the way to the batch's quantiles."
        check_range("balance_rate", self.balance_rate, above=0, most=1, fix=usual)

    @property
    def min_k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """k, or fewer where disabled experts leave a token's groups with fewer."""
        off = self.gate.disabled_experts
        if not off:
            return self.k
        # A token's groups may hold fewer enabled experts than k.
        return min(self.k, self.scoring.least_reach(num_experts=self.num_experts, disabled=off))

    def init(self, key: Array, d_model: int) -> Params:
        params = self.gate.init(key, d_model=d_model, num_experts=self.num_experts)
        if self.use_expert_scale:
            params["expert_scale"] = jnp.ones((self.num_experts,), jnp.float32)
        return params

    def init_state(self) -> BiasState:  # as inherited, with the type for callers
        return super().init_state()

    def select(self, params, state, slots, x, context):
        keep, weights = super().select(params, state, slots, x, context)
        if self.use_expert_scale:
            check_params(params, expert_scale=(self.num_experts,))
            scale = jnp.asarray(params["expert_scale"], jnp.float32)
            weights = weights * scale[slots.indices]
        return keep, weights

    def observe(self, state: BiasState, routing: Routing | ExpertChoice) -> Array:
        if self.balance == "sign":
            return super().observe(state, routing)
        logits = jax.lax.stop_gradient(routing.router_logits)
        scores = logits if self.scoring.select_by == "logit" else self.scoring.scores(logits)
        observed = balancing_bias if self.balance == "quantile" else margin_histogram
        return observed(scores, state.expert_bias, routing.token_mask, k=self.k)

    def update(self, state: BiasState, stats: RoutingStats) -> BiasState:
        if self.balance == "quantile":
            bias = quantile_bias(state.expert_bias, stats.observed, rate=self.balance_rate)
            return dataclasses.replace(state, expert_bias=bias)
        if self.balance == "histogram":
            if stats.observed.ndim != 2:
                raise ValueError(
                    "stats: expected observed of shape [E, bins], the histogram that observe returns, "
                    f"got {list(stats.observed.shape)}. Pass observed=router.observe(state, routing) "
                    "to routing_stats; moe_layer does so where the router is given."
                )
            bias = histogram_bias(
                state.expert_bias, stats.observed, k=self.k, rate=self.balance_rate
            )
            return dataclasses.replace(state, expert_bias=bias)
        return self.balanced(state, stats)
