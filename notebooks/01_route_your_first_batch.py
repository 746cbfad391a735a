# %% [markdown]
# # Route your first batch
#
# A **Mixture-of-Experts** (MoE) layer holds many small feed-forward networks, the *experts*. A
# *router* scores all experts for every token and sends the token to its best *k*. Most layers use
# the same k for every token. Here k differs: a token that the router is sure about uses one
# expert, an ambiguous one up to four, and the *mean* k is a budget that you set.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import moe_jax

# %% [markdown]
# ## Three ingredients
#
# 1. a **rule** (`DynamicK`): a frozen value that says how experts are chosen;
# 2. an **expert** (`FeedForward`): a pure function of one expert's parameters;
# 3. **parameters** (trained by gradients) and **state** (calibrated, never trained): plain pytrees.
#
# Nothing is hidden in objects, so everything can be jitted, differentiated, saved and compared.

# %%
router = moe_jax.DynamicK(num_experts=8, min_k=1, max_k=4)
expert_fn = moe_jax.FeedForward(activation="silu", gated=True)

params = moe_jax.init_moe_layer(router, expert_fn, jax.random.key(0), d_model=64, d_ff=128)
state = router.init_state()
print(jax.tree.map(jnp.shape, params))

# %% [markdown]
# ## A batch in which difficulty is visible
#
# No dataset needed: every token is noise plus a multiple of one expert's own direction (a column
# of the router's kernel). Along the sequence the multiple grows from 0 to 3. Early tokens belong
# to no expert in particular, late ones clearly to one.

# %%
LENGTH = 128
kernel = params["router"]["kernel"]  # [64, 8]: one column an expert
directions = (kernel / jnp.linalg.norm(kernel, axis=0)).T


def make_batch(seed: int, sequences: int) -> jax.Array:
    """f32[sequences, LENGTH, 64]."""
    noise_key, expert_key = jax.random.split(jax.random.key(seed))
    noise = jax.random.normal(noise_key, (sequences, LENGTH, 64))
    owner = jax.random.randint(expert_key, (sequences, LENGTH), 0, router.num_experts)
    clarity = jnp.linspace(0.0, 3.0, LENGTH)[None, :, None]
    return noise + clarity * directions[owner]


x = make_batch(seed=1, sequences=32)

# %% [markdown]
# ## Set the budget and route
#
# `fit` chooses thresholds so that tokens like these use 1.7 experts on average. Then `moe_layer`
# routes, runs the experts and combines their outputs. It is one pure function, compiled here with
# rule and expert as static arguments. We look at a batch that `fit` did not see.

# %%
state = router.fit(params["router"], state, x.reshape(-1, 64), target_mean_k=1.7)

moe_layer = jax.jit(moe_jax.moe_layer, static_argnums=(0, 1))
fresh = make_batch(seed=2, sequences=8)
y, aux = moe_layer(router, expert_fn, params, state, fresh)
print("output:", y.shape)
print(f"mean experts a token: {float(aux.stats.mean_experts_per_token):.2f} (target 1.70)")
print("tokens per expert:", np.asarray(aux.stats.tokens_per_expert, int))

# %% [markdown]
# ## See it
#
# `aux.routing` holds the decision itself: expert indices and combine weights of every token.
# Left: the number of experts of each token. Right: the same, averaged over sequences. It falls
# as tokens become clearer.

# %%
counts = np.asarray(aux.routing.num_experts_per_token).reshape(-1, LENGTH)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
image = left.imshow(counts, aspect="auto", cmap="viridis", interpolation="nearest")
figure.colorbar(image, ax=left, ticks=[1, 2, 3, 4], label="experts (k)")
left.set(xlabel="position (unclear → clear)", ylabel="sequence", title="experts of each token")
blocks = counts.mean(axis=0).reshape(-1, 8).mean(axis=1)
right.plot(np.arange(4, LENGTH, 8), blocks, marker="o", markersize=4)
right.axhline(1.7, color="grey", linestyle="--", linewidth=1)
right.text(LENGTH, 1.74, "budget 1.7", ha="right", color="dimgrey")
right.set(
    xlabel="position (unclear → clear)", ylabel="mean k", ylim=(1, 3), title="mean over the batch"
)
plt.show()

# %% [markdown]
# ## Gradients
#
# Parameters, state and tokens are arrays, so `grad` needs no ceremony. The router learns through
# the combine weights, and through an auxiliary loss that keeps the experts evenly loaded.


# %%
@jax.jit
def loss(params, state, x):
    y, aux = moe_jax.moe_layer(router, expert_fn, params, state, x)
    balance, _ = moe_jax.aux_loss(aux.routing, moe_jax.LossWeights())
    return jnp.square(y).mean() + balance


grads = jax.grad(loss)(params, state, fresh)
print("largest router gradient:", float(jnp.abs(grads["router"]["kernel"]).max()))

# %% [markdown]
# ## Another rule, the same call
#
# Every rule answers with the same kind of `Routing`, so rules are swapped without touching the
# rest. `TopK` has a fixed k; `TopP` takes the shortest prefix of experts whose probability passes
# p, and its budget is fitted like the one above.
#
# Next: [a Flax model with a dynamic MoE](02_flax_model_with_dynamic_moe.ipynb).

# %%
tokens, unseen = x.reshape(-1, 64), fresh.reshape(-1, 64)
top_k = moe_jax.TopK(num_experts=8, k=2)
top_p = moe_jax.TopP(num_experts=8, max_k=4)
states = {
    top_k: top_k.init_state(),
    top_p: top_p.fit(params["router"], top_p.init_state(), tokens, target_mean_k=1.7),
    router: state,
}
for rule, own in states.items():
    routing = jax.jit(rule)(params["router"], own, unseen)  # the decision alone
    k = np.asarray(routing.num_experts_per_token)
    shares = " ".join(f"{share:4.0%}" for share in np.bincount(k, minlength=5)[1:] / k.size)
    print(
        f"{type(rule).__name__:9} mean k {k.mean():.2f}   tokens with 1, 2, 3, 4 experts: {shares}"
    )
