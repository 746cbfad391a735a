"""Router logits: always float32, noise only where a key is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.checks import (
    NamedArguments,
    check_array,
    check_at_least_0,
    check_count,
    check_expert_index,
    check_expert_tuple,
    check_finite,
    check_flag,
    check_key,
    check_number,
)
from moe_jax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(NamedArguments):
    """The linear map from tokens to router logits, as a value that a router holds.

    ``logits = softcap(multiplier * (norm(x) @ kernel + bias))``, computed in float32 whatever the
    dtype of x is: a bfloat16 product changes the expert set of 0.4 % of tokens at E=8 and of 8.6 % at
    E=256.

    Args:
        use_bias: whether the product has a bias.
        input_norm_eps: if given, x is first divided by its root mean square over D, with this eps
            under the root, and multiplied by the parameter ``input_scale`` f32[D] (Gemma 4).
        multiplier: constant factor on the logits.
        softcap: ``softcap * tanh(logits / softcap)``; None for none.
        jitter: x is multiplied by uniform(1 - jitter, 1 + jitter) when a key is given
            (Switch Transformer, arXiv:2101.03961, section 2.2).
        noise: standard deviation of normal noise on the logits when a key is given; multiples of
            1/E are usual (V-MoE, arXiv:2106.05974, section 2.2).
        disabled_experts: experts that are never selected: their logit is the lowest float32, and
            what rules select by passes through ``exclude``. A token whose expert groups hold fewer
            than k enabled experts uses those alone.

    Example:
        >>> gate = Gate()
        >>> params = gate.init(jax.random.key(0), d_model=4, num_experts=2)
        >>> gate(params, jnp.ones((3, 4), jnp.bfloat16)).dtype.name
        'float32'
    """

    use_bias: bool = False
    input_norm_eps: float | None = None
    multiplier: float = 1.0
    softcap: float | None = None
    jitter: float = 0.0
    noise: float = 0.0
    disabled_experts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_flag("use_bias", self.use_bias)
        check_number("jitter", self.jitter)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: expected 0 <= jitter < 1, got {self.jitter}. 0.01 is usual.")
        check_at_least_0("noise", self.noise)
        check_finite("multiplier", self.multiplier)
        if self.input_norm_eps is not None:
            check_number("input_norm_eps", self.input_norm_eps)
            if not self.input_norm_eps >= 0:
                raise ValueError(
                    f"input_norm_eps: expected a number >= 0 or None, got {self.input_norm_eps}. "
                    "1e-6 is usual; None is no normalisation."
                )
        if self.softcap is not None:
            check_number("softcap", self.softcap)
            if not self.softcap > 0:
                raise ValueError(
                    f"softcap: expected a positive number or None, got {self.softcap}. None is no "
                    "cap."
                )
        check_expert_tuple("disabled_experts", self.disabled_experts)

    def check(self, *, num_experts: int, k: int) -> None:
        """Raises ValueError unless the experts left enabled are at least ``k``, and at least one."""
        check_expert_index("disabled_experts", self.disabled_experts, num_experts)
        enabled = num_experts - len(set(self.disabled_experts))
        if k > enabled:
            raise ValueError(
                f"k: expected at most {enabled}, the number of experts left without disabled_experts="
                f"{self.disabled_experts}, got {k}. Lower k or min_k, or disable fewer experts."
            )

    def init(self, key: Array, *, d_model: int, num_experts: int) -> Params:
        """``{"kernel": f32[D, E]}``, normal with variance 1/D; ``"bias": f32[E]`` and
        ``"input_scale": f32[D]`` if used.
        """
        check_key(key, required=True)
        check_count("d_model", d_model, fix="It is the width of a token.")
        check_count("num_experts", num_experts, fix="A router passes its own.")
        check_expert_index("disabled_experts", self.disabled_experts, num_experts)
        kernel = jax.random.normal(key, (d_model, num_experts), jnp.float32) / d_model**0.5
        params = {"kernel": kernel}
        if self.use_bias:
            params["bias"] = jnp.zeros((num_experts,), jnp.float32)
        if self.input_norm_eps is not None:
            params["input_scale"] = jnp.ones((d_model,), jnp.float32)
        return params

    def __call__(
        self,
        params: Params,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
    ) -> Array:
        """f32[T, E] from x float[T, D]. Deterministic without a key.

        Padding (False in ``token_mask`` bool[T]) is read as zeros: the gradient of the kernel is a
        product with x, in which a NaN would survive being multiplied by 0.

        Raises:
            TypeError, ValueError: x is not float[T, D] with the kernel's D, or the mask not bool[T].
        """
        self._check_params(params)
        kernel = params["kernel"]
        check_array("kernel", kernel, "D E", fix="Make it with router.init(key, d_model).")
        check_array(
            "x",
            x,
            "T D",
            sizes={"D": kernel.shape[0]},
            fix="Pass hidden states flattened to [tokens, d_model], as wide as the router's kernel.",
        )
        fix = "Make it with router.init(key, d_model)."
        if self.use_bias:
            check_array("bias", params["bias"], "E", sizes={"E": kernel.shape[1]}, fix=fix)
        if self.input_norm_eps is not None:
            width = {"D": kernel.shape[0]}
            check_array("input_scale", params["input_scale"], "D", sizes=width, fix=fix)
        x = zero_padding(x.astype(jnp.float32), token_mask)
        if self.input_norm_eps is not None:
            x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.input_norm_eps)
            x = x * params["input_scale"].astype(jnp.float32)[None, :]
        # The key is split even if one of the two is off: switching jitter on does not change the
        # noise.
        jitter_key, noise_key = (None, None) if key is None else jax.random.split(key)
        if jitter_key is not None and self.jitter:
            low, high = 1 - self.jitter, 1 + self.jitter
            x = x * jax.random.uniform(jitter_key, x.shape, jnp.float32, low, high)
        # HIGHEST: on TPUs and on GPUs with TF32 the default would round the inputs.
        logits = jnp.matmul(x, kernel.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        if self.use_bias:
            logits = logits + params["bias"].astype(jnp.float32)[None, :]
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        if noise_key is not None and self.noise:
            # After the cap, so that noise has its stated size whatever the logit is.
            logits = logits + self.noise * jax.random.normal(noise_key, logits.shape, jnp.float32)
        # Finite, because a product of -inf with 0 further on would be NaN. Selection gets -inf from
        # `exclude`.
        return self._replace_disabled(logits, float(jnp.finfo(jnp.float32).min))

    def _check_params(self, params: Params) -> None:
        """Refuses parameters that the fields of this gate do not describe, by name."""
        wanted = {
            "kernel": True,
            "bias": self.use_bias,
            "input_scale": self.input_norm_eps is not None,
        }
        names = sorted(params) if isinstance(params, Mapping) else None
        if names is None or not all(n in params for n, used in wanted.items() if used):
            needed = ", ".join(n for n, used in wanted.items() if used)
            got = f"a {type(params).__name__}" if names is None else ", ".join(names) or "none"
            raise ValueError(
                f"params: expected a router's parameters with {needed}, got {got}. Pass what "
                "router.init returned; of a layer's parameters that is params['router']."
            )
        # A bias that is silently ignored would route otherwise than the model that it was trained
        # in.
        unread = [n for n, used in wanted.items() if not used and n in params]
        if unread:
            flag = "use_bias=True" if unread[0] == "bias" else "input_norm_eps=1e-6"
            raise ValueError(
                f"params: expected no {unread[0]!r} for a gate without {flag}, got one. Set "
                f"Gate({flag}), or leave the parameter out."
            )

    def exclude(self, selection: Array) -> Array:
        """f32[T, E] with -inf for disabled experts, so that no bias or cutoff can bring them back."""
        return self._replace_disabled(selection, -jnp.inf)

    def _replace_disabled(self, values: Array, low: float) -> Array:
        if not self.disabled_experts:
            return values
        off = jnp.zeros((values.shape[1],), bool).at[jnp.array(self.disabled_experts)].set(True)
        return jnp.where(off[None, :], low, values)


def check_token_mask(token_mask: Array, tokens: int) -> None:
    """Raises TypeError or ValueError unless the mask is bool[T] of T ``tokens``."""
    check_array(
        "token_mask",
        token_mask,
        "T",
        kind="bool",
        sizes={"T": tokens},
        fix="Pass bool[T], True for real tokens, flattened like x.",
    )


def zero_padding(x: Array, token_mask: Array | None) -> Array:
    """float[T, D]: x with zeros where ``token_mask`` bool[T] is False.

    A NaN in padding would survive in the gradient of a kernel, which is a product with x.
    """
    if token_mask is None:
        return x
    check_token_mask(token_mask, x.shape[0])
    return jnp.where(token_mask[:, None], x, jnp.zeros((), x.dtype))
