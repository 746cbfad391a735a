"""Cosine routing: experts are compared with a token by direction alone, at a learned temperature."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array, check_count, check_range
from moe_jax.routers.arguments import check_params
from moe_jax.routers.contracts import FixedK
from moe_jax.routing.gate import Gate, zero_padding
from moe_jax.routing.numerics import unit_vectors
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params

# The learned factor on the cosines stays below this, as in Tutel, or one expert would take all mass.
_MOST_SCALE = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(FixedK):
    """Top-k of ``exp(temperature) * cos(x @ projection, e)`` with an embedding e of each expert.

    XMoE (Chi et al. 2022, arXiv:2204.09179): tokens are projected to few dimensions and compared by
    direction, so that a router cannot grow one expert's embedding, nor pull tokens towards it. The
    details are those of Tutel's cosine gate: the parameter ``temperature`` f32[] is the log of the
    factor, which is at most 100.

    Parameters: ``projection`` f32[D, P], ``projection_bias`` f32[P], ``kernel`` f32[P, E] with the
    embeddings as columns, ``temperature`` f32[].

    Args:
        num_experts: E.
        k: experts per token.
        projection_size: P; XMoE takes E / 2, Tutel 256.
        initial_temperature: the cosines start divided by this; 0.5 in Tutel.
        gate: multiplier, softcap, noise and disabled experts; it sees the projected tokens.
        scoring: logits to scores and weights.
        balance_rate: of loss-free balancing by ``update``; 0 is off.

    Example:
        >>> router = Cosine(num_experts=8, k=2, projection_size=4)
        >>> params, state = router.init(jax.random.key(0), 16), router.init_state()
        >>> x = jax.random.normal(jax.random.key(1), (5, 16))
        >>> near, far = (router(params, state, scale * x) for scale in (1.0, 50.0))
        >>> bool(jnp.allclose(near.router_logits, far.router_logits, atol=1e-5))
        True
    """

    num_experts: int
    k: int
    projection_size: int = 256
    initial_temperature: float = 0.5
    gate: Gate = Gate()
    scoring: Scoring = Scoring()
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("projection_size", self.projection_size, fix="256 is usual.")
        usual = "Cosines are divided by it; 0.5 is usual."
        check_range(
            "initial_temperature", self.initial_temperature, least=1 / _MOST_SCALE, fix=usual
        )
        if self.gate.use_bias or self.gate.input_norm_eps is not None:
            raise ValueError(
                f"gate: expected neither use_bias nor input_norm_eps, got {self.gate!r}. Tokens are "
                "brought to unit length, and a bias would not be a cosine."
            )

    def init(self, key: Array, d_model: int) -> Params:
        key, projection_key = jax.random.split(key)
        size = self.projection_size
        projection = jax.random.normal(projection_key, (d_model, size), jnp.float32)
        return {
            **self.gate.init(key, d_model=size, num_experts=self.num_experts),
            "projection": projection / d_model**0.5,
            "projection_bias": jnp.zeros((size,), jnp.float32),
            "temperature": jnp.asarray(-math.log(self.initial_temperature), jnp.float32),
        }

    def logits(self, params, x: Array, *, key=None, token_mask=None, context=None) -> Array:
        """f32[T, E]: scaled cosines."""
        size = self.projection_size
        check_params(
            params,
            kernel=(size, self.num_experts),
            projection=(None, size),
            projection_bias=(size,),
            temperature=(),
        )
        projection = params["projection"].astype(jnp.float32)
        check_array(
            "x",
            x,
            "T D",
            sizes={"D": projection.shape[0]},
            fix="Pass hidden states flattened to [tokens, d_model], as wide as the projection.",
        )
        x = zero_padding(x, token_mask).astype(jnp.float32)
        low = jnp.matmul(x, projection, precision=jax.lax.Precision.HIGHEST)
        low = low + params["projection_bias"].astype(jnp.float32)[None, :]
        scale = jnp.exp(
            jnp.minimum(params["temperature"].astype(jnp.float32), math.log(_MOST_SCALE))
        )
        kernel = scale * unit_vectors(params["kernel"].astype(jnp.float32), axis=0)
        return self.gate({"kernel": kernel}, unit_vectors(low, axis=1), key=key)
