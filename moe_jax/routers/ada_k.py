"""Ada-K: a small network decides how many experts a token uses, and learns it by reward."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_array, check_range
from moe_jax.routers.arguments import check_params, check_state, check_uses_an_expert
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing import budget
from moe_jax.routing.gate import Gate, check_token_mask, zero_padding
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import clip_counts, first_k
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class AdaKState:
    """The selection bias and what ``fit`` adds for each further expert."""

    expert_bias: Array  # f32[E], added for selection only
    tilt: Array  # f32[]
    fit: budget.Fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaK(TokenChoice):
    """Top-k whose k is an action of a linear policy on the token: ``softmax(x @ allocator + bias)``.

    Ada-K (Yue et al. 2024, arXiv:2410.10456) trains such allocators by proximal policy optimisation.
    The authors published no code, and these details were not compared with the paper's text: the
    allocator is one linear layer over the numbers of experts; actions are sampled in training, and the
    likeliest is taken when serving; the reward trades the loss of the language model against the number
    of experts. There is no critic: ``reward_advantages`` compares rewards with their mean.

    With a key the count is sampled, by Gumbel noise f32[T, K] that ``context["draw"]`` may hold
    instead; without either it is the likeliest. The choice of a count sends no
    gradient into the weights, so the allocator learns from ``policy_loss`` alone::

        routing = router(params, state, x, key=key)  # sampled
        counts = routing.num_experts_per_token
        # f32[T] nats: the model's loss under these counts
        gain = reward_advantages(nats, counts, price=0.01)
        loss = router.policy_loss(params, state, x, counts, gain)

    Parameters: ``kernel`` f32[D, E], ``allocator`` f32[D, K], ``allocator_bias`` f32[K].

    Args:
        num_experts: E.
        max_k: K: most experts a token uses, such as the trained k.
        min_k: fewest experts a token uses, at least 1.
        gate: the map to logits.
        scoring: logits to scores and weights.

    Example:
        >>> router = AdaK(num_experts=8, max_k=4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (1000, 16))
        >>> state = router.fit(params, state, x, target_mean_k=2.5)
        >>> round(float(router(params, state, x).num_experts_per_token.mean()), 2)
        2.5
    """

    num_experts: int
    max_k: int
    min_k: int = 1
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    context_keys: ClassVar[frozenset[str] | None] = frozenset({"draw"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_uses_an_expert(self.min_k, "A token always uses its best expert.")

    def init(self, key: Array, d_model: int) -> Params:
        key, allocator_key = jax.random.split(key)
        params = self.gate.init(key, d_model=d_model, num_experts=self.num_experts)
        allocator = jax.random.normal(allocator_key, (d_model, self.max_k), jnp.float32)
        return {
            **params,
            "allocator": allocator / d_model**0.5,
            "allocator_bias": jnp.zeros((self.max_k,), jnp.float32),
        }

    def init_state(self) -> AdaKState:
        return AdaKState(
            expert_bias=jnp.zeros((self.num_experts,), jnp.float32),
            tilt=jnp.zeros((), jnp.float32),
            fit=budget.unfitted(self.max_k),
        )

    def __call__(
        self, params, state: AdaKState, x, *, key=None, token_mask=None, context=None
    ) -> Routing:
        if key is not None and "draw" not in (context or {}):
            check_array("x", x, "T D", fix="Pass hidden states flattened to [tokens, d_model].")
            key, draw_key = jax.random.split(key)
            draw = jax.random.gumbel(draw_key, (x.shape[0], self.max_k), jnp.float32)
            context = {**(context or {}), "draw": draw}
        return super().__call__(params, state, x, key=key, token_mask=token_mask, context=context)

    def log_probs(self, params: Params, state: AdaKState, x: Array) -> Array:
        """f32[T, K]: log probability of each number of experts, 1 to K, for x float[T, D].

        -inf for numbers below ``min_k``.
        """
        check_array("x", x, "T D", fix="Pass hidden states flattened to [tokens, d_model].")
        check_params(params, allocator=(x.shape[1], self.max_k), allocator_bias=(self.max_k,))
        scores = jnp.matmul(
            x.astype(jnp.float32),
            params["allocator"].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        steps = jnp.arange(self.max_k, dtype=jnp.float32)
        offsets = params["allocator_bias"].astype(jnp.float32) + state.tilt * steps
        allowed = steps >= self.min_k - 1
        scores = jnp.where(allowed[None, :], scores + offsets[None, :], -jnp.inf)
        return jax.nn.log_softmax(scores, axis=-1)

    def select(self, params, state: AdaKState, slots, x, context):
        scores = jax.lax.stop_gradient(self.log_probs(params, state, x))
        if "draw" in context:  # the largest of log probabilities with Gumbel noise is a sample
            sizes = {"T": scores.shape[0], "K": self.max_k}
            check_array("draw", context["draw"], "T K", sizes=sizes, fix="Pass Gumbel noise.")
            scores = scores + context["draw"]
        counts = 1 + jnp.argmax(scores, axis=-1).astype(jnp.int32)
        keep = clip_counts(first_k(counts, self.max_k), min_k=self.min_k)
        return keep, self.weights(slots, keep)

    def policy_loss(
        self,
        params: Params,
        state: AdaKState,
        x: Array,
        counts: Array,
        advantages: Array,
        *,
        old_log_probs: Array | None = None,
        clip: float = 0.2,
        token_mask: Array | None = None,
    ) -> Array:
        """f32[]: the clipped surrogate of PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7).

        Its gradient reaches the allocator alone. For several steps on one batch pass
        ``old_log_probs``; without them the gradient is the plain policy gradient.

        Args:
            params, state: of the router.
            x: float[T, D].
            counts: i32[T], the experts that each token used.
            advantages: f32[T], how much better a token's reward was than expected.
            old_log_probs: f32[T], log probability of the counts when they were drawn.
            clip: how far the probability of a count may move, as a share in (0, 1).
            token_mask: bool[T], False for padding.

        Raises:
            TypeError: a state of another class, a wrong dtype.
            ValueError: arrays of different numbers of tokens, parameters of other sizes, a clip
                outside (0, 1).
        """
        check_state(self, state)
        check_array("x", x, "T D", fix="Pass hidden states flattened to [tokens, d_model].")
        per_token: Any = {"sizes": {"T": x.shape[0]}, "fix": "Pass one value a token."}
        check_array("counts", counts, "T", kind="int", **per_token)
        check_array("advantages", advantages, "T", **per_token)
        if old_log_probs is not None:
            check_array("old_log_probs", old_log_probs, "T", **per_token)
        check_range("clip", clip, above=0, below=1, fix="0.2 is usual.")
        if token_mask is not None:
            check_token_mask(token_mask, x.shape[0])
        real = jnp.ones((x.shape[0],), bool) if token_mask is None else token_mask
        x = jax.lax.stop_gradient(zero_padding(x, token_mask))
        place = jnp.clip(counts, self.min_k, self.max_k)[:, None] - 1
        now = jnp.take_along_axis(self.log_probs(params, state, x), place, axis=1)[:, 0]
        before = now if old_log_probs is None else old_log_probs
        ratio = jnp.exp(now - jax.lax.stop_gradient(before))
        clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
        gain = jnp.where(real, jnp.minimum(ratio * advantages, clipped * advantages), 0.0)
        return -gain.sum() / jnp.maximum(real.sum(dtype=jnp.float32), 1.0)

    def calibrate(self, params, state: AdaKState, slots, x, context, *, real, target_mean_k):
        flat = dataclasses.replace(state, tilt=jnp.zeros((), jnp.float32))
        scores = np.asarray(self.log_probs(params, flat, x))[real, self.min_k - 1 :]
        steps = np.arange(scores.shape[1], dtype=np.float32)

        def mean_k(tilt: float) -> float:
            best = np.argmax(scores + np.float32(tilt) * steps[None, :], axis=1)
            return float(self.min_k + best.mean())

        reach = float(scores.max() - scores.min()) + 1.0
        tilt = budget.bisect(mean_k, target_mean_k, low=-reach, high=reach, steps=40)
        return dataclasses.replace(state, tilt=jnp.asarray(tilt, jnp.float32))


def reward_advantages(
    nats: Array, counts: Array, *, price: float, token_mask: Array | None = None
) -> Array:
    """f32[T]: each token's reward ``-nats - price * counts`` less the mean, over the deviation.

    Mean and deviation are those of real tokens; padding has 0.

    Args:
        nats: f32[T], the model's loss on what follows each token, with these counts.
        counts: i32[T], experts that the token used.
        price: nats that an expert has to be worth.
        token_mask: bool[T], False for padding.

    Raises:
        TypeError: a wrong dtype.
        ValueError: arrays of different numbers of tokens.

    Example:
        >>> reward_advantages(jnp.array([1.0, 3.0]), jnp.array([1, 1]), price=0.1).round(3).tolist()
        [1.0, -1.0]
    """
    check_array("nats", nats, "T", fix="Pass the loss on what follows each token.")
    tokens = nats.shape[0]
    fix = "Pass routing.num_experts_per_token."
    check_array("counts", counts, "T", kind="int", sizes={"T": tokens}, fix=fix)
    if token_mask is not None:
        check_token_mask(token_mask, tokens)
    real = jnp.ones((tokens,), bool) if token_mask is None else token_mask
    reward = -nats.astype(jnp.float32) - price * counts.astype(jnp.float32)
    count = jnp.maximum(real.sum(dtype=jnp.float32), 1.0)
    away = jnp.where(real, reward - jnp.where(real, reward, 0.0).sum() / count, 0.0)
    return away / jnp.maximum(jnp.sqrt(jnp.square(away).sum() / count), 1e-6)
