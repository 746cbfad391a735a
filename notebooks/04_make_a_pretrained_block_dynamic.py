# %% [markdown]
# # Make a pretrained block dynamic
#
# A published checkpoint has a fixed k. moe_jax loads its MoE block, reproduces the routing exactly,
# fits a dynamic twin to a budget, and reports what that changed.
#
# **The weights here are made up**, with the names and shapes of a Mixtral checkpoint, so that
# nothing is downloaded. Random weights prove the mechanics, not the quality: how much a real model
# can save has to be measured on that model, on its own text.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.interop import moe_block_from_hf
from moe_jax.interop.retrofit import DriftMonitor, make_dynamic, make_model_dynamic

# %% [markdown]
# ## A tiny Mixtral-like checkpoint
#
# Tensor names are those of the Hub's safetensors files. For a real one, `load_hf_block(folder,
# layer)` reads the same names lazily from disk. The routers differ by layer: the larger the kernel,
# the larger the gaps between an expert's probability and the next one's.

# %%
WIDTH, INNER, EXPERTS, TRAINED_K = 32, 48, 16, 4
config = {
    "model_type": "mixtral",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TRAINED_K,
}
DECISION = {"layers.0": 0.5, "layers.1": 1.0, "layers.2": 3.0}

rng = np.random.default_rng(0)


def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    return (scale * rng.normal(size=(rows, columns)) / np.sqrt(columns)).astype(np.float32)


tensors = {}
for layer, scale in DECISION.items():
    moe = f"model.{layer}.block_sparse_moe."
    tensors[f"{moe}gate.weight"] = matrix(EXPERTS, WIDTH, scale)
    for expert in range(EXPERTS):
        tensors[f"{moe}experts.{expert}.w1.weight"] = matrix(INNER, WIDTH)
        tensors[f"{moe}experts.{expert}.w2.weight"] = matrix(WIDTH, INNER)
        tensors[f"{moe}experts.{expert}.w3.weight"] = matrix(INNER, WIDTH)

# %% [markdown]
# ## Read the blocks
#
# A config and its tensors give a block: `block(x)` is the output, `block.route(x)` the decision. A
# tensor that is missing, left over, quantised in an unknown way or of another shape is named in an
# error before anything runs, and so is a routing key of the config that the block would not honour.

# %%
blocks = {
    layer: moe_block_from_hf(config, tensors, prefix=f"model.{layer}.block_sparse_moe.")
    for layer in DECISION
}
block = blocks["layers.1"]
print(f"{type(block.router).__name__}: k={block.router.k} of {block.router.num_experts} experts")

try:
    moe_block_from_hf(config, tensors, prefix="model.layers.7.block_sparse_moe.")
except ValueError as error:
    print("\n" + str(error))

# %% [markdown]
# ## Make one block dynamic
#
# Calibration inputs should be the block's own hidden states on real text; these are noise. The
# twin shares every parameter and never uses more than the trained k. By default the last fifth of
# the inputs is held out, and the report speaks of those only.

# %%
x = jnp.asarray(rng.normal(size=(10_000, WIDTH)), jnp.float32)
dynamic, report = make_dynamic(block, x, target_saving=0.25)
print(report.summary())

# %% [markdown]
# ## Compare with the controls
#
# A rule is useful where it changes the output less than dropping as many experts without looking at
# the token. So every report has two controls at the same budget: one drops the lowest-ranked expert
# of random tokens, one drops random experts.
#
# Where the router is nearly indifferent (layer 0), its confidence says little, and the control that
# drops the lowest expert wins; where it is decided (layer 2), the rule wins. On your own model rely
# on this comparison, not on the saving alone. `rule=` also accepts `"MinP"`, `"DynamicK"` and
# `"ExpertThreshold"`.

# %%
reports = {layer: make_dynamic(b, x, target_saving=0.25)[1] for layer, b in blocks.items()}
bars = {
    "TopP": [r.output_change for r in reports.values()],
    "control: lowest": [r.lowest_control_change for r in reports.values()],
    "control: random": [r.random_control_change for r in reports.values()],
}

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3), layout="constrained")
colours = ("tab:blue", "dimgrey", "silver")
for i, (name, changes) in enumerate(bars.items()):
    height = [100 * c for c in changes]
    drawn = left.bar(np.arange(3) + 0.28 * (i - 1), height, 0.26, label=name, color=colours[i])
    left.bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
left.set_xticks(range(3), ["layer 0\n(indifferent)", "layer 1", "layer 2\n(decided)"])
left.set(ylabel="output change, %", ylim=(0, 95), title="25 % of expert calls saved")
left.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
k = np.arange(1, TRAINED_K + 1)
for i, r in enumerate(reports.values()):
    right.bar(k + 0.28 * (i - 1), [100 * h for h in r.histogram[1:]], 0.26, label=f"layer {i}")
right.set(
    xticks=k, xlabel="experts (k)", ylabel="% of tokens", title="TopP: how the budget is spread"
)
right.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## One budget for the whole model
#
# The same saving changes some layers more than others. `make_model_dynamic` measures this for each
# block and removes experts where the output changes least, until the *mean over layers* is the
# target. A block that keeps its trained k is returned unchanged, without a report of its own; the
# report of the whole counts it.

# %%
inputs = dict.fromkeys(blocks, x)  # in a real model, each block has its own inputs
_, model_report = make_model_dynamic(blocks, inputs, target_saving=0.25, steps=4)
for layer in blocks:
    if layer in model_report:
        r = model_report[layer]
        print(f"{layer}: mean k {r.held_out_mean_k:.2f}, output change {r.output_change:.1%}")
    else:
        print(f"{layer}: mean k {TRAINED_K}, unchanged")
print(f"mean {model_report.held_out_mean_k:.2f}, target {model_report.target_mean_k:.2f}")

# %% [markdown]
# ## Watch it in use
#
# A budget fitted on one kind of input drifts on another (see notebook 03). `DriftMonitor` averages
# the observed mean k and returns the trained block once the average leaves its band. In this example
# the inputs shrink to half their size half-way.

# %%
monitor = DriftMonitor(static=block, dynamic=dynamic, band=0.1, decay=0.7)
for step in range(8):
    scale = 1.0 if step < 4 else 0.5
    tokens = jnp.asarray(scale * rng.normal(size=(512, WIDTH)), jnp.float32)
    mean_k = float(dynamic.route(tokens).num_experts_per_token.mean())
    monitor.observe(mean_k)
    running = "dynamic" if monitor.block is dynamic else "trained"
    print(
        f"batch {step}: mean k {mean_k:.2f}, average {monitor.mean_k:.2f} -> use the {running} block"
    )
