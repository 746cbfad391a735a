"""Product keys: many small experts, each addressed by a pair of keys."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array, check_count
from moe_jax.routers.arguments import check_params
from moe_jax.routers.base import NoState
from moe_jax.routers.contracts import FixedK
from moe_jax.routing.gate import Gate, zero_padding
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRetrieval(FixedK):
    """Top-k of ``query_1 @ keys_1[i] + query_2 @ keys_2[j]`` over all pairs (i, j) of keys.

    Product keys (Lample et al. 2019, arXiv:1907.05242) as PEER uses them to choose experts (He 2024,
    arXiv:2407.04153): a query of each token is cut in half, each half is compared with a set of keys,
    and expert ``i * n_2 + j`` is the pair of key i and key j. Weights are a softmax over the chosen.
    The router has only ``n_1 + n_2`` keys for ``n_1 * n_2`` experts.

    The authors find the k best pairs among the k best keys of either half, which gives the same experts
    (``tests/routers`` compares them). Here all E sums are formed, because statistics and losses read a
    logit for each expert; the products are those of the keys. This is one head: the authors add the
    outputs of several, which are several layers. A normalisation of queries is left out.

    Parameters: ``kernel`` f32[D, Q], ``keys_1`` f32[Q / 2, n_1], ``keys_2`` f32[Q / 2, n_2].

    Args:
        num_experts: E.
        k: experts per token.
        query_size: Q, even.
        num_keys: (n_1, n_2) with the product E; None is the pair closest to a square.
        gate: multiplier, softcap, jitter and noise, of each half's scores; disabled experts are indices
            below E.
        scoring: logits to scores and weights.

    Example:
        >>> router = ExpertRetrieval(num_experts=16, k=2, query_size=6)
        >>> params = router.init(jax.random.key(0), 8)
        >>> params["keys_1"].shape, params["keys_2"].shape
        ((3, 4), (3, 4))
        >>> router(params, router.init_state(), jnp.ones((5, 8))).expert_indices.shape
        (5, 2)
    """

    num_experts: int
    k: int
    query_size: int = 128
    num_keys: tuple[int, int] | None = None
    gate: Gate = Gate()
    scoring: Scoring = Scoring(score="identity", post="softmax")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("query_size", self.query_size, fix="128 is usual.")
        if self.query_size % 2:
            raise ValueError(
                f"query_size: expected an even number, got {self.query_size}. Queries are halved."
            )
        wanted = f"a tuple of two counts whose product is num_experts={self.num_experts}"
        message = f"num_keys: expected {wanted}, got {self.num_keys!r}. None chooses them."
        whole = isinstance(self.key_counts, tuple) and all(
            isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in self.key_counts
        )
        if not whole:
            raise TypeError(message)
        right = len(self.key_counts) == 2 and min(self.key_counts) > 0
        if not right or math.prod(self.key_counts) != self.num_experts:
            raise ValueError(message)
        if self.gate.use_bias or self.gate.input_norm_eps is not None:
            raise ValueError(
                f"gate: expected neither use_bias nor input_norm_eps, got {self.gate!r}. Queries have "
                "a kernel alone."
            )

    @property
    def key_counts(self) -> tuple[int, int]:
        """(n_1, n_2)."""
        if self.num_keys is not None:
            return self.num_keys
        root = math.isqrt(self.num_experts)
        first = next(n for n in range(root, 0, -1) if self.num_experts % n == 0)
        return first, self.num_experts // first

    def init(self, key: Array, d_model: int) -> Params:
        query_key, *keys = jax.random.split(key, 3)
        gate = self._gate_of_keys
        half = self.query_size // 2
        sets = [
            gate.init(key, d_model=half, num_experts=n)["kernel"]
            for key, n in zip(keys, self.key_counts, strict=True)
        ]
        kernel = gate.init(query_key, d_model=d_model, num_experts=self.query_size)["kernel"]
        return {"kernel": kernel, "keys_1": sets[0], "keys_2": sets[1]}

    def init_state(self) -> NoState:
        return NoState()

    def logits(self, params, x: Array, *, key=None, token_mask=None, context=None) -> Array:
        """f32[T, E]: the sum of the scores of each pair of keys."""
        half, (first, second) = self.query_size // 2, self.key_counts
        check_params(
            params, kernel=(None, self.query_size), keys_1=(half, first), keys_2=(half, second)
        )
        kernel = params["kernel"].astype(jnp.float32)
        check_array(
            "x",
            x,
            "T D",
            sizes={"D": kernel.shape[0]},
            fix="Pass hidden states flattened to [tokens, d_model], as wide as the router's kernel.",
        )
        x = zero_padding(x, token_mask).astype(jnp.float32)
        query = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        gate = self._gate_of_keys
        a, b = (
            gate({"kernel": params[name]}, part, key=key)
            for name, part, key in zip(
                ("keys_1", "keys_2"), jnp.split(query, 2, axis=1), keys, strict=True
            )
        )
        pairs = a[:, :, None] + b[:, None, :]
        logits = pairs.reshape(x.shape[0], pairs.shape[1] * pairs.shape[2])
        # As from a gate over experts: -inf would give NaN in the gradients of some losses.
        return jnp.maximum(self.gate.exclude(logits), jnp.finfo(jnp.float32).min)

    @property
    def _gate_of_keys(self) -> Gate:
        """The gate without its disabled experts, which are no indices of keys."""
        return dataclasses.replace(self.gate, disabled_experts=())
