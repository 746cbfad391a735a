# %% [markdown]
# # A Flax model with a dynamic MoE
#
# `DynamicMoE` is a Flax NNX module that takes the place of a feed-forward layer. Here it sits in a
# small decoder that learns to predict the next byte of Python source: build, train, calibrate,
# count. (`moe_jax.nn.linen` has the same module for Linen.)

# %%
import argparse
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import moe_jax
from moe_jax.nn.nnx import DynamicMoE
from moe_jax.nn.profiler import FLOPProfiler

# %% [markdown]
# ## A decoder block
#
# Norm, causal attention, norm, experts. `return_aux=True` hands back the routing and its
# statistics beside the output; they are needed for the auxiliary loss and for `update_router`.

# %%
WIDTH, LENGTH, VOCABULARY = 64, 64, 128


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before_attention = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.before_moe = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.moe = DynamicMoE(
            num_experts=8,
            expert_fn=moe_jax.FeedForward(activation="silu", gated=True),
            min_k=1,
            max_k=4,
            d_model=WIDTH,
            d_ff=WIDTH,
            balance_rate=1e-3,  # update_router nudges the selection bias towards equal load
            rngs=rngs,
        )

    def attend(self, h):
        """The residual stream after attention, and the input of the experts."""
        mask = nnx.make_causal_mask(h[..., 0])
        h = h + self.attention(self.before_attention(h), mask=mask)
        return h, self.before_moe(h)

    def __call__(self, h):
        h, x = self.attend(h)
        y, aux = self.moe(x, return_aux=True)
        return h + y, aux


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def embed(self, tokens):
        return self.embedding(tokens) + self.position[...]

    def __call__(self, tokens):
        h, auxes = self.embed(tokens), []
        for block in self.blocks:
            h, aux = block(h)
            auxes.append(aux)
        return self.head(self.norm(h)), auxes


# %% [markdown]
# ## Text
#
# The source of a module that every Python has. The last fifth is held out.

# %%
text = np.frombuffer(inspect.getsource(argparse).encode("ascii", "replace"), np.uint8)
cut = len(text) * 4 // 5
train_text, held_out_text = text[:cut], text[cut:]


def batch(source: np.ndarray, seed: int, size: int = 16) -> jax.Array:
    """i32[size, LENGTH + 1]: random excerpts."""
    starts = np.random.default_rng(seed).integers(len(source) - LENGTH - 1, size=size)
    return jnp.asarray(np.stack([source[s : s + LENGTH + 1] for s in starts]), jnp.int32)


# %% [markdown]
# ## Train
#
# Gradients reach routers through the combine weights. The router's *state* (selection bias,
# thresholds) is no `nnx.Param`, so the optimiser never touches it; `update_router` writes it, and
# only where you call it.

# %%
model = Decoder(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)


def losses(model, tokens):
    logits, auxes = model(tokens[:, :-1])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    auxiliary = sum(moe_jax.aux_loss(a.routing, moe_jax.LossWeights())[0] for a in auxes)
    return cross_entropy + auxiliary, (cross_entropy, auxes)


@nnx.jit
def train_step(model, optimizer, tokens):
    grads, (cross_entropy, auxes) = nnx.grad(losses, has_aux=True)(model, tokens)
    optimizer.update(model, grads)
    for block, aux in zip(model.blocks, auxes, strict=True):
        block.moe.update_router(aux)
    return cross_entropy, jnp.stack([a.stats.mean_experts_per_token for a in auxes])


history = [train_step(model, optimizer, batch(train_text, step)) for step in range(80)]
loss_curve = np.array([float(loss) for loss, _ in history])
k_curve = np.array([np.asarray(k) for _, k in history])
print(f"loss {loss_curve[0]:.2f} -> {loss_curve[-5:].mean():.2f} nats a byte")

# %% [markdown]
# ## Calibrate to a budget
#
# So far nobody set a budget: raw router entropy was taken as difficulty, and k went where that led.
# `fit_router` sets the thresholds of one layer from that layer's own inputs. We go layer by layer,
# so that the second one is fitted on what the first really gives it.


# %%
@nnx.jit
def evaluate(model, tokens):
    _, (cross_entropy, auxes) = losses(model, tokens)
    histograms = jnp.stack([a.stats.experts_per_token_histogram for a in auxes])
    return cross_entropy, histograms


held_out = batch(held_out_text, seed=0, size=64)
loss_before, histogram_before = evaluate(model, held_out)

attend, run = nnx.jit(Block.attend), nnx.jit(Block.__call__)
h = model.embed(batch(train_text, seed=1000, size=64)[:, :-1])
for block in model.blocks:
    _, x = attend(block, h)
    block.moe.fit_router(x.reshape(-1, WIDTH), target_mean_k=1.7)
    h, _ = run(block, h)

loss_after, histogram_after = evaluate(model, held_out)
mean_before, mean_after = (
    np.asarray(h @ jnp.arange(5.0)) for h in (histogram_before, histogram_after)
)
print(f"before: {float(loss_before):.3f} nats a byte, mean k by layer {mean_before.round(2)}")
print(f"after:  {float(loss_after):.3f} nats a byte, mean k by layer {mean_after.round(2)}")

# %% [markdown]
# ## See it

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
axes[0].plot(loss_curve, color="black", linewidth=1)
axes[0].set(xlabel="step", ylabel="nats a byte", title="training loss")
axes[1].plot(k_curve, linewidth=1, label=["layer 0", "layer 1"])
axes[1].set(xlabel="step", ylabel="mean k", ylim=(1, 4.1), title="while training: no budget yet")
axes[1].legend(frameon=False)
for layer in range(2):
    share = 100 * np.asarray(histogram_after[layer])[1:]
    axes[2].bar(np.arange(1, 5) + 0.4 * layer - 0.2, share, width=0.38, label=f"layer {layer}")
axes[2].set(xlabel="experts (k)", ylabel="% of tokens", title="held out, fitted to 1.7")
axes[2].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Count the operations
#
# `FLOPProfiler` watches every MoE layer while its context is open, and counts the router as cost.
# A saving means nothing without its baseline, so you must name one: `top_max` is the same layer
# with every token at four experts. That flatters us, because this model never trained at a full
# four, so the last line compares with the mean k it had just before calibration.
#
# *Used* counts rows that carried a token; *executed* is what really ran, and only that can become
# time. Eighty steps are no trained model: take the mechanics from here, not the loss.
#
# Next: [calibrate and persist a budget](03_calibrate_and_persist_a_budget.ipynb).

# %%
with FLOPProfiler(model, baseline="top_max") as profiler:
    evaluate(model, held_out)
print(profiler.summary())
print(
    f"expert calls saved against k before calibration: {1 - mean_after.sum() / mean_before.sum():.1%}"
)
