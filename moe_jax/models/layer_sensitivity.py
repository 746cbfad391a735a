"""How much a layer's output changes under each budget: on the text, or on Gaussian inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.interop import MoEBlock
from moe_jax.interop.retrofit import fixed_rule, fold_expert_scale
from moe_jax.models.causal_lm import CausalLM
from moe_jax.models.load import HubFolder, StreamedLayer, stream_layers
from moe_jax.models.streaming import (
    LayerPass,
    Stream,
    with_rule,
)
from moe_jax.routers.twin import dynamic_twin, fit_twin

MEASURED_TOKENS = 4096  # batches are added until they hold this many tokens, or the text ends


def output_changes(
    source: Any,
    input_ids: Any,
    attention_mask: Any,
    rule: str,
    share: str,
    steps: int,
    difficulty: str,
    options: dict[str, Any],
    work: str | Path | None,
) -> tuple[dict[int, list[float]], int]:
    """Squared relative change of each layer's output by budget, and the trained k."""
    curves: dict[int, list[float]] = {}
    ks: set[int] = set()
    if share == "profile":
        for layer in _layers(source):
            if layer.block is not None:
                ks.add(fixed_rule(layer.block).k)
                curves[layer.number] = _profile(layer, rule, steps, difficulty)
        return curves, _one_k(ks)
    stream = Stream(
        source,
        input_ids,
        attention_mask,
        lanes=("trained",),
        work=None if work is None else Path(work) / "sensitivity",
        task=["sensitivity", rule, steps, difficulty],
        **options,
    )
    for taken in stream.layers():
        if taken.block is None:
            continue
        stream.notes[str(taken.number)] = {
            "k": fixed_rule(taken.block).k,
            "curve": _measured(taken, rule, steps, difficulty),
        }
        for _ in taken.experts("trained", taken.block):
            pass
    stream.finish()
    for number in stream.config.moe_layers:
        ks.add(stream.notes[str(number)]["k"])
        curves[number] = stream.notes[str(number)]["curve"]
    return curves, _one_k(ks)


def _layers(source: HubFolder | CausalLM) -> Iterator[StreamedLayer]:
    if isinstance(source, HubFolder):
        return stream_layers(source)
    params = source.params()["layers"]
    return (StreamedLayer(i, source.config, layer) for i, layer in enumerate(params))


def _one_k(ks: set[int]) -> int:
    if len(ks) != 1 or min(ks) < 2:
        raise ValueError(
            f"share: expected one trained k of at least 2 in all layers, got {sorted(ks)}. Use "
            "share='uniform'."
        )
    return ks.pop()


def _twins(block: MoEBlock, x: Any, rule: str, steps: int, difficulty: str) -> Iterator[MoEBlock]:
    """Yields the block with the rule fitted to each budget below the trained k, on inputs x."""
    trained = fixed_rule(block)
    if trained.use_expert_scale:
        block, trained = fold_expert_scale(block)
    for mean in np.linspace(trained.k, 1.0, steps + 1)[1:-1]:
        router = dynamic_twin(trained, rule, target_mean_k=float(mean), difficulty=difficulty)
        state = fit_twin(router, block.params["router"], block.state, x, target_mean_k=float(mean))
        yield with_rule(block, router, state)


def _measured(taken: LayerPass, rule: str, steps: int, difficulty: str) -> list[float]:
    """Changes of the hidden states after the layer, on the first batches of the text."""
    stream, block = taken.stream, taken.block
    assert block is not None
    batches, tokens = 0, 0
    while batches < len(stream.parts) and tokens < MEASURED_TOKENS:
        tokens += int(stream.mask[stream.parts[batches]].sum())
        batches += 1
    hidden = stream.hidden["trained"][:batches]
    rows = []
    for i in range(batches):
        x = np.asarray(taken.input_of("trained", i), np.float32)
        rows.append(x[stream.mask[stream.parts[i]]])
    before = [np.asarray(taken.output(i, h, block)[0], np.float32) for i, h in enumerate(hidden)]
    masks = [stream.mask[part] for part in stream.parts[:batches]]
    size = sum(float((b[m] ** 2).sum()) for b, m in zip(before, masks, strict=True))
    curve = [0.0]
    x = jnp.asarray(np.concatenate(rows))
    for twin in _twins(block, x, rule, steps, difficulty):
        change = 0.0
        for i, h in enumerate(hidden):
            after = np.asarray(taken.output(i, h, twin)[0], np.float32)
            change += float(((after - before[i])[masks[i]] ** 2).sum())
        # A fit may happen to change less at a lower budget; the shares need curves that do not fall.
        curve.append(max(curve[-1], change / size))
    return curve


def _profile(layer: StreamedLayer, rule: str, steps: int, difficulty: str) -> list[float]:
    """Changes of the block's output on Gaussian inputs of the norm's scale."""
    block = layer.block
    assert block is not None
    d = layer.config.d_model
    x = jax.random.normal(jax.random.key(layer.number), (1024, d), jnp.float32)
    scale = layer.params.get("mlp_norm", {}).get("scale")
    if scale is not None:
        x = x * scale.astype(jnp.float32)[None, :]
    x = x.astype(jax.tree.leaves(block.params["experts"])[0].dtype)
    before = np.asarray(block(x), np.float32)
    curve = [0.0]
    for twin in _twins(block, x, rule, steps, difficulty):
        after = np.asarray(twin(x), np.float32)
        relative = float(((after - before) ** 2).sum() / (before**2).sum())
        curve.append(max(curve[-1], relative))
    return curve
