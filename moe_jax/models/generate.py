"""Tokens from a decoder, one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_count, check_number
from moe_jax.models.causal_lm import CausalLM, Implementation, check_tokens, forward
from moe_jax.models.kv_cache import init_cache
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from its logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws among the likeliest tokens that together have this probability; 1 is all.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p)
        if not self.temperature >= 0:
            raise ValueError(
                f"temperature: expected 0 or more, got {self.temperature}. 0 takes the likeliest token."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p: expected more than 0 and at most 1, got {self.top_p}. 1 draws among all."
            )


@functools.partial(jax.jit, static_argnames="sampling")
def sample(logits: Array, sampling: Sampling, key: Array) -> Array:
    """i32[B]: a token for each row of logits f32[B, V].

    Example:
        >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), jax.random.key(0)).tolist()
        [1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Below the largest, so that a tiny temperature makes minus infinities and no NaN.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / max(sampling.temperature, 1e-30)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # A token stays if those before it have not reached top_p yet, so the first always does.
        before = jnp.cumsum(probs, axis=-1) - probs
        ranks = jnp.argsort(order, axis=-1)
        kept = jnp.take_along_axis(before < sampling.top_p, ranks, axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def stream_tokens(
    model: CausalLM,
    input_ids: Array,
    attention_mask: Array | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    eos_ids: tuple[int, ...] = (),
    use_cache: bool = True,
    implementation: Implementation = None,
) -> Iterator[np.ndarray]:
    """Yields i32[B], the next token of each sequence, as they are made; see ``generate``."""
    check_count("max_new_tokens", max_new_tokens, fix="Ask for at least one token.")
    if sampling.temperature > 0 and key is None:
        raise ValueError(
            "key: expected a key, as the temperature is not 0, got none. Pass jax.random.key(0)."
        )
    key = jax.random.key(0) if key is None else key
    config, params = model.config, model.params()
    ids = jnp.asarray(input_ids)
    check_tokens(config, ids)
    mask = (
        jnp.ones(ids.shape, bool)
        if attention_mask is None
        else jnp.asarray(attention_mask).astype(bool)
    )
    batch, length = ids.shape
    cache = None
    if use_cache:
        cache = init_cache(config, batch, length + max_new_tokens, dtype=model.dtype)
    done = np.zeros(batch, bool)
    for step in range(max_new_tokens):
        # `last_only`: logits of all tokens [B, S, V] would be the largest array of a prompt.
        out = forward(
            config, params, ids, mask, cache=cache, implementation=implementation, last_only=True
        )
        cache = out.cache
        # The step's own key, so that a token does not depend on how many are asked for.
        token = sample(out.logits[:, -1], sampling, jax.random.fold_in(key, step))
        token_ids = np.asarray(token)
        if eos_ids:
            token_ids = np.where(done, eos_ids[0], token_ids).astype(np.int32)
            done = done | np.isin(token_ids, eos_ids)
        yield token_ids
        if done.all():
            return
        new = jnp.asarray(token_ids)[:, None]
        fresh = jnp.ones((batch, 1), bool)
        if cache is None:
            ids, mask = jnp.concatenate([ids, new], axis=1), jnp.concatenate([mask, fresh], axis=1)
        else:
            ids, mask = new, fresh


def generate(
    model: CausalLM, input_ids: Array, attention_mask: Array | None = None, **kwargs
) -> np.ndarray:
    """Continues sequences.

    Shapes are fixed, so one step compiles once: the prompt in one call, then a token a call.

    Args:
        model: the decoder.
        input_ids: i32[B, S]; shorter prompts are padded on the left.
        attention_mask: bool or int[B, S], 0 for padding.
        **kwargs: ``max_new_tokens``; ``sampling``, a ``Sampling``; ``key``, needed where it draws;
            ``eos_ids``, tokens that end a sequence, after which it repeats the first of them;
            ``use_cache``: False runs the whole sequence at each step, which compiles each length;
            ``implementation``: how experts run, see ``moe_jax.experts``.

    Returns:
        i32[B, N]: the new tokens; N is ``max_new_tokens``, or less where all sequences ended.

    Raises:
        TypeError, ValueError: see ``forward`` and ``Sampling``.

    Example:
        >>> from moe_jax.models import load_model
        >>> model = load_model("tests/goldens/models/mixtral")
        >>> generate(model, jnp.array([[5, 6, 7]]), max_new_tokens=2).shape
        (1, 2)
    """
    return np.stack(list(stream_tokens(model, input_ids, attention_mask, **kwargs)), axis=1)
