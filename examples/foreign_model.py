"""Dynamic experts in a model of another package: Qwen3 of ``google-tunix``, small and untrained.

    pip install moe_jax google-tunix
    python examples/foreign_model.py moe      # its MoE blocks become dynamic
    python examples/foreign_model.py dense    # its feed-forward blocks become experts

Both replace ``layer.mlp``, give the layers a budget, take two training steps, and save and restore the
model with orbax. docs/how-to/foreign-model.md explains the steps.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tunix.models.qwen3 import model as qwen3

from moe_jax import FeedForward, Scoring, TopK
from moe_jax.nn.nnx import MoE
from moe_jax.nn.patching import fit_model, patch_model_with_dynamic_routing

VOCABULARY, WIDTH, HIDDEN, EXPERTS, K = 256, 32, 16, 8, 4
BUDGET = 2.5  # experts per token
# Fewest and most experts of a token, as shares of all. At least 2: where weights add up to 1, a token
# with one expert teaches the router nothing.
SHARES = 2 / EXPERTS, K / EXPERTS
# Qwen3 divides the weights of the chosen experts by their sum.
RULE = TopK(num_experts=EXPERTS, k=K, scoring=Scoring(norm="sum"))
SWIGLU = FeedForward(activation="silu", gated=True)


def build(num_experts: int | None) -> qwen3.Qwen3:
    """A Qwen3 of two layers with random weights; None gives it dense feed-forward blocks."""
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=HIDDEN,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        num_experts=num_experts,
        num_experts_per_tok=None if num_experts is None else K,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    if num_experts is None:
        # tunix makes dense blocks of zeros and expects them to be loaded. Zeros would prove nothing.
        keys = iter(jax.random.split(jax.random.key(1), 3 * config.num_layers))
        for layer in model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                shape = linear.kernel.get_value().shape
                linear.kernel.set_value(jax.random.normal(next(keys), shape) / shape[0] ** 0.5)
    return model


def experts_of_moe_block(block: Any) -> MoE:
    """The same block as ``MoE``: the arrays go over as they are."""
    weights = {"gate": block.gate_proj, "up": block.up_proj, "down": block.down_proj}
    params = {
        "router": {"kernel": block.router.kernel.get_value()},
        "experts": {name: weight.get_value() for name, weight in weights.items()},
    }
    return MoE(RULE, d_model=WIDTH, d_ff=HIDDEN, expert_fn=SWIGLU, params=params)


def experts_of_dense_block(block: Any) -> MoE:
    """Sparse upcycling (Komatsuzaki et al. 2023, arXiv:2212.05055): every expert copies the block.

    The weights of a token add up to 1, so the layer computes what the block computed, however many
    experts a token uses. Training then makes the experts differ; the random router sees to that.
    """
    linears = {"gate": block.gate_proj, "up": block.up_proj, "down": block.down_proj}
    params = {
        "router": RULE.init(jax.random.key(2), WIDTH),
        "experts": {
            name: jnp.stack([linear.kernel.get_value()] * EXPERTS)
            for name, linear in linears.items()
        },
    }
    return MoE(RULE, d_model=WIDTH, d_ff=HIDDEN, expert_fn=SWIGLU, params=params)


def replace_blocks(model: qwen3.Qwen3, convert: Callable[[Any], MoE]) -> None:
    """Replaces the feed-forward part of every layer, in place."""
    for layer in model.layers:
        layer.mlp = convert(layer.mlp)


@nnx.jit
def run(model: qwen3.Qwen3, tokens: jax.Array) -> jax.Array:
    """Logits f32[B, S, V]. The model takes several inputs: the library runs it by this function."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool))[None], (batch, length, length)
    )
    return model(tokens, positions, None, mask)[0]


@nnx.jit
def train_step(model: qwen3.Qwen3, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step on the next token; the loss before it."""

    def loss_of(model: qwen3.Qwen3) -> jax.Array:
        logits = run(model, tokens)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def restored(folder: Path, fresh: qwen3.Qwen3) -> qwen3.Qwen3:
    """``fresh`` with the saved arrays; it is patched in the same way, so the trees are equal."""
    graph, state = nnx.split(fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        return nnx.merge(graph, checkpointer.restore(folder, state))


def main(kind: str) -> None:
    """Runs the example ``moe`` or ``dense`` and prints what it shows."""
    num_experts, convert = {
        "moe": (EXPERTS, experts_of_moe_block),
        "dense": (None, experts_of_dense_block),
    }[kind]
    # Every token once: equal tokens are equally difficult, and a threshold cannot part them.
    tokens = jax.random.permutation(jax.random.key(3), VOCABULARY).reshape(8, 32)
    model = build(num_experts)
    before = run(model, tokens)

    replace_blocks(model, convert)
    full = run(model, tokens)
    patch_model_with_dynamic_routing(model, *SHARES)
    fits = fit_model(model, tokens, target_mean_k=BUDGET, call=run)
    dynamic = run(model, tokens)

    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    losses = [float(train_step(model, optimizer, tokens)) for _ in range(3)]

    with tempfile.TemporaryDirectory() as folder:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(folder) / "model", nnx.split(model)[1])
        fresh = build(num_experts)
        replace_blocks(fresh, convert)
        patch_model_with_dynamic_routing(fresh, *SHARES)
        again = restored(Path(folder) / "model", fresh)
    same = bool((run(again, tokens) == run(model, tokens)).all())

    def difference(a: jax.Array, b: jax.Array) -> str:
        return f"{float(jnp.abs(a - b).max() / jnp.abs(b).max()):.1e}"

    print(f"Qwen3 of google-tunix, {kind}: {len(fits)} layers, {EXPERTS} experts, k = {K}")
    print(f"{f'k = {K}, largest change of the logits':<42}{difference(full, before):>10}")
    for path, fit in fits.items():
        print(f"{f'{path}, experts per token':<42}{fit['achieved_mean_k']:>10.4g}")
    print(f"{f'{BUDGET} of {K} experts, largest change':<42}{difference(dynamic, before):>10}")
    for step, loss in enumerate(losses):
        print(f"{f'loss after {step} steps':<42}{loss:>10.4f}")
    print(f"{'restored model gives the same logits':<42}{same!s:>10}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("moe", "dense"):
        sys.exit("usage: foreign_model.py moe|dense")
    main(sys.argv[1])
