# %% [markdown]
# # A budget for a whole model, and its price
#
# From a folder as the Hub has them to a model that uses a fifth fewer experts: fit, evaluate beside
# the controls, generate, save. The folder here is a tiny OLMoE that this notebook makes and trains for
# seconds; with a real one, begin at "Fit".

# %%
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from moe_jax.interop.safetensors import write_safetensors
from moe_jax.models import (
    CausalLM,
    compare,
    fit_budget,
    generate,
    load_budget,
    load_model,
    save_budget,
    save_model,
)
from moe_jax.models.causal_lm import forward
from moe_jax.models.text import TextTokenizer, standard_library, tokenize_files

work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A model folder
#
# `config.json` in OLMoE's own keys, tensors under OLMoE's own names, and a tokenizer of single letters.

# %%
D, F, E, K, LAYERS, VOCAB = 48, 48, 8, 4, 2, 96
config = {
    "model_type": "olmoe",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": E,
    "num_experts_per_tok": K,
    "max_position_embeddings": 256,
}
shapes = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
shapes["lm_head.weight"] = (VOCAB, D)
for i in range(LAYERS):
    layer = f"model.layers.{i}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}.{name}.weight"] = (D,)
    for name in ("q", "k"):
        shapes[f"{layer}.self_attn.{name}_norm.weight"] = (D,)
    for name in ("q", "k", "v", "o"):
        shapes[f"{layer}.self_attn.{name}_proj.weight"] = (D, D)
    shapes[f"{layer}.mlp.gate.weight"] = (E, D)
    for e in range(E):
        shapes[f"{layer}.mlp.experts.{e}.gate_proj.weight"] = (F, D)
        shapes[f"{layer}.mlp.experts.{e}.up_proj.weight"] = (F, D)
        shapes[f"{layer}.mlp.experts.{e}.down_proj.weight"] = (D, F)

rng = np.random.default_rng(0)


def draw(name):
    shape = shapes[name]
    if "norm" in name:
        return np.ones(shape, np.float32)
    return (shape[-1] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)


untrained = work / "untrained"
untrained.mkdir()
(untrained / "config.json").write_text(json.dumps(config))
specs = {name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}
write_safetensors(untrained / "model.safetensors", specs, draw)

letters = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, unk_token=" "))
letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
letters.decoder = decoders.Fuse()
letters.save(str(untrained / "tokenizer.json"))

# %% [markdown]
# Training is ordinary JAX: `forward` is a pure function of the parameters.

# %%
LENGTH, BATCH, STEPS = 64, 16, 100
model = load_model(untrained)
tokenizer = TextTokenizer(untrained, vocab_size=VOCAB)
text = tokenize_files(standard_library("calibration"), tokenizer, length=LENGTH, limit=200_000)
train = text.input_ids[text.mask.all(axis=1)]
params = model.params()


def weights(params):
    layers = [layer | {"moe": layer["moe"].params} for layer in params["layers"]]
    return params | {"layers": layers}


def with_weights(weights):
    layers = [
        new | {"moe": replace(old["moe"], params=new["moe"])}
        for old, new in zip(params["layers"], weights["layers"], strict=True)
    ]
    return weights | {"layers": layers}


optimizer = optax.adam(3e-3)


@jax.jit
def step(trained, state, ids):
    def loss(trained):
        logits = forward(model.config, with_weights(trained), ids).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(trained, updates), state, value


trained = weights(params)
state = optimizer.init(trained)
for number in range(STEPS):
    rows = rng.integers(0, len(train), BATCH)
    trained, state, value = step(trained, state, jnp.asarray(train[rows]))
    if number % 50 == 0 or number == STEPS - 1:
        print(f"step {number}: {float(value):.3f} nats a letter")

folder = save_model(
    CausalLM(model.config, with_weights(trained), source=model.source), work / "tiny"
)

# %% [markdown]
# ## Fit
#
# A rule for each layer that uses a fifth fewer experts on calibration text. Layers are read one at a
# time, so a model larger than memory works too. On the command line:
# `moe-jax budget FOLDER --text DIR --rule MinP --target-saving 0.2 --out runs/tiny-20`.

# %%
calibration = tokenize_files(standard_library("calibration"), tokenizer, length=LENGTH, limit=6_000)
budget = fit_budget(folder, calibration.input_ids, calibration.mask, rule="MinP", target_saving=0.2)
save_budget(budget, work / "tiny-20")
for layer, fitted in budget.states.items():
    print(f"layer {layer}: {float(fitted.fit.achieved_mean_k):.3f} of {K} experts a token")

# %% [markdown]
# ## The price
#
# One pass evaluates the trained model, the budget, and two controls that save as much without looking
# at the token, on files that the fit did not see. On the command line:
# `moe-jax evaluate FOLDER --text DIR --budget runs/tiny-20 --controls`.

# %%
held_out = tokenize_files(standard_library("held_out"), tokenizer, length=LENGTH, limit=6_000)
price = compare(folder, held_out, load_budget(work / "tiny-20"), controls=True).report()
for row in price["rules"]:
    line = f"{row['rule']:>18}: mean k {row['mean_k']:.3f}, {row['bits_per_byte']:.4f} bits a byte"
    if "relative" in row:
        line += (
            f", {row['relative']:+.2%} ({row['relative_low']:+.2%} to {row['relative_high']:+.2%})"
        )
    print(line)
assert abs(price["rules"][1]["saving"] - 0.2) < 0.05

# %%
rows = [row for row in price["rules"] if "relative" in row]
figure, axes = plt.subplots(figsize=(6, 2), layout="constrained")
for place, row in enumerate(rows):
    interval = [100 * row["relative_low"], 100 * row["relative_high"]]
    axes.plot(interval, [place, place], color="tab:blue")
    axes.plot(100 * row["relative"], place, "o", color="tab:blue")
axes.set_yticks(range(len(rows)), [row["rule"] for row in rows])
axes.set_xlabel("change in bits a byte, % (95 % interval)")
plt.show()

# %% [markdown]
# ## Use it
#
# The fitted blocks take the place of the trained ones.

# %%
dynamic = load_model(folder)
for layer, block in dynamic.blocks().items():
    dynamic.set_block(layer, budget.block(layer, block))
prompt = jnp.asarray([tokenizer.encode("def __init__(self, ")], jnp.int32)
answer = generate(dynamic, prompt, max_new_tokens=24)
print(tokenizer.decode(answer[0]))
