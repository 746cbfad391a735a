"""A made OLMoE-shaped decoder beside transformers' own, in alternate turns on the same threads.

    python benchmarks/whole_model.py --json benchmarks/results/cpu-whole-model.json [--turns 9]

It needs torch and transformers, which are no dependencies: pip install torch transformers. Both sides
hold the same weights (the checkpoint that transformers writes). Their logits are compared before
anything is timed; with random weights, experts of nearly equal score change places at some tokens, so
the median over tokens is looked at. Both have ``--threads`` threads, and the process is bound to as
many cores. A reading is the median over turns of the ratio within a turn, so that other work on the
machine falls on both sides.

Three parts: the forward pass of a whole sequence; one step of a token with a cache, over the time of
reading the bytes of its active experts and attention once; and the time of each kind of part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> list[float]:
    """The quartiles of values."""
    low, _, high = statistics.quantiles(values, n=4)
    return [round(low, 3), round(high, 3)]


def turns_of(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call by turn; the order of calls turns around each time."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for turn in range(turns):
        for name in list(calls) if turn % 2 else list(calls)[::-1]:
            seconds[name].append(timed(calls[name]))
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, Any]:
    """Median and quartiles of the ratio within a turn."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return {"ratio": round(statistics.median(ratios), 3), "quartiles": spread(ratios)}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each call, in milliseconds."""
    return {name: round(1e3 * statistics.median(s), 1) for name, s in seconds.items()}


def build(threads: int) -> tuple[Any, Any]:
    """(transformers' model, this library's) with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from moe_jax.models import load_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_config(OlmoeConfig(**SHAPE)).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder, dtype="float32")
    return theirs, ours


def forward_cases(theirs: Any, ours: Any, tokens: int) -> tuple[dict[str, Callable], Any, Any]:
    """The forward pass of each side on the same tokens, and the logits of both."""
    import jax
    import numpy as np
    import torch

    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, tokens)).astype(np.int32)
    tensor = torch.from_numpy(ids.astype(np.int64))

    def transformers() -> Any:
        with torch.no_grad():
            return theirs(tensor, use_cache=False).logits

    def moe_jax() -> Any:
        return jax.block_until_ready(ours(ids))

    return {"moe_jax": moe_jax, "transformers": transformers}, moe_jax, transformers


def part_times(theirs: Any, ours: Any, tokens: int, turns: int) -> dict[str, Any]:
    """Milliseconds of attention, experts and head on both sides, each jitted or called alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from moe_jax.models import causal_lm

    config, params = ours.config, ours.params()
    layer, weights = config.layers[0], params["layers"][0]
    h = jax.random.normal(jax.random.key(0), (1, tokens, config.d_model), jnp.float32)
    layout = causal_lm.token_layout(jnp.zeros((1, tokens), jnp.int32), None)
    attention = jax.jit(lambda p, h: causal_lm.attention_half(config, layer, p, h, layout)[0])
    experts = jax.jit(lambda p, h: causal_lm.feed_forward_half(config, layer, p, h, layout.mask)[0])
    t = torch.from_numpy(np.array(h))
    decoder, block = theirs.model, theirs.model.layers[0]
    positions = torch.arange(tokens)[None]
    rope = decoder.rotary_emb(t, position_ids=positions)
    # transformers passes no mask where its attention kernel is causal by itself.
    calls: dict[str, Callable[[], Any]] = {
        "attention, moe_jax": lambda: jax.block_until_ready(attention(weights, h)),
        "attention, transformers": lambda: block.self_attn(
            hidden_states=block.input_layernorm(t),
            position_embeddings=rope,
            attention_mask=None,
        ),
        "experts, moe_jax": lambda: jax.block_until_ready(experts(weights, h)),
        "experts, transformers": lambda: block.mlp(block.post_attention_layernorm(t)),
        "head, moe_jax": lambda: jax.block_until_ready(causal_lm.unembed(config, params, h)),
        "head, transformers": lambda: theirs.lm_head(t),
    }
    with torch.no_grad():
        return medians(turns_of(calls, turns))


def decode(theirs: Any, ours: Any, context: int, turns: int) -> dict[str, Any]:
    """One step of a token on both sides, over the reading of the bytes that it needs."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from moe_jax.models import init_cache
    from moe_jax.models.causal_lm import forward

    config, params = ours.config, ours.params()
    ids = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (1, context)).astype(np.int32)
    cache = init_cache(config, 1, context + turns + 8)
    state = {"cache": forward(config, params, ids, cache=cache, last_only=True).cache}
    token = jnp.asarray(ids[:, :1])

    def ours_step() -> None:
        out = forward(config, params, token, cache=state["cache"], last_only=True)
        state["cache"] = out.cache
        jax.block_until_ready(out.logits)

    with torch.no_grad():
        held = theirs(torch.from_numpy(ids.astype(np.int64)), use_cache=True).past_key_values

    def their_step() -> None:
        with torch.no_grad():
            theirs(torch.from_numpy(ids[:, :1].astype(np.int64)), past_key_values=held)

    d, f, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    numbers = layers * (SHAPE["num_experts_per_tok"] * 3 * d * f + 4 * d * d)
    buffer = jnp.ones((numbers // 2048, 2048), jnp.float32)
    vector = jnp.ones((2048,), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    shared = torch.ones((numbers // 2048, 2048))
    other = torch.ones(2048)
    # The faster of the two in each turn: reading cannot take longer than what did read.
    calls: dict[str, Callable[[], Any]] = {
        "moe_jax": ours_step,
        "read, XLA": lambda: jax.block_until_ready(product(buffer, vector)),
        "read, torch": lambda: torch.mv(shared, other),
        "transformers": their_step,
    }
    seconds = turns_of(calls, turns)
    seconds["read"] = [
        min(pair) for pair in zip(seconds["read, XLA"], seconds["read, torch"], strict=True)
    ]
    return {
        "context": context,
        "megabytes": round(4 * numbers / 1e6),
        "milliseconds": medians(seconds),
        "over_the_floor": ratio(seconds, "moe_jax", "read"),
        "over_transformers": ratio(seconds, "moe_jax", "transformers"),
        "transformers_over_the_floor": ratio(seconds, "transformers", "read"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in ("turns", "tokens", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}.")
    with contextlib.suppress(AttributeError):  # not on macOS
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    import numpy as np
    import torch
    import transformers

    theirs, ours = build(args.threads)
    cases, mine, reference = forward_cases(theirs, ours, args.tokens)
    theirs_logits = reference().numpy()
    worst = np.abs(np.asarray(mine()) - theirs_logits).max(axis=-1) / theirs_logits.std()
    difference = float(np.median(worst))
    assert difference < 0.05, f"logits differ by {difference} of their deviation"
    seconds = turns_of(cases, args.turns)
    result = {
        "bench": "whole_model",
        "machine": {"python": platform.python_version(), "threads": args.threads},
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "settings": {**SHAPE, "tokens": args.tokens, "dtype": "f32", "turns": args.turns},
        # Largest of a token, the median over tokens, in standard deviations of the logits.
        "difference_of_logits": difference,
        "forward": {
            "milliseconds": medians(seconds),
            "over_transformers": ratio(seconds, "moe_jax", "transformers"),
        },
    }
    print(json.dumps(result["forward"]), flush=True)
    result["decode"] = decode(theirs, ours, 128, 3 * args.turns)
    print(json.dumps(result["decode"]), flush=True)
    result["parts_milliseconds"] = part_times(theirs, ours, args.tokens, args.turns)
    print(json.dumps(result["parts_milliseconds"]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
