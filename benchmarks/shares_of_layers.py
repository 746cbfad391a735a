"""How layers share a budget: uniform, measured on text, or profiled without text, on made models.

    python benchmarks/shares_of_layers.py --json benchmarks/results/shares-of-layers.json [--seeds 3]

Each seed makes an OLMoE-shaped decoder, trains it on letters of the standard library, fits one rule to
a budget with each ``share`` of ``fit_budget`` on calibration files, and evaluates all of them on
held-out files in one pass. A change is in bits per byte against the trained k, with a paired bootstrap
over files.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.bench.script_options import at_least, file_to_write
from moe_jax.interop import moe_block_from_hf
from moe_jax.models import CausalLM, compare, decoder_config, fit_budget
from moe_jax.models.causal_lm import forward
from moe_jax.models.confidence import paired_bootstrap
from moe_jax.models.model_budget import SHARES
from moe_jax.models.text import TokenizedText, standard_library, tokenize_files

CONFIG: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
}
LENGTH, BATCH = 64, 16


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of printable ASCII that reads the first ``most`` characters of a file."""

    most: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        codes = [ord(c) - 32 if " " <= c <= "~" else 95 + (c == "\n") for c in text]
        return codes[: self.most]

    def encode_start(self, text: str, limit: int) -> tuple[list[int], str]:
        """The ids of the first characters, and these."""
        text = text[: min(limit, self.most)]
        return self.encode(text), text


def made_model(seed: int) -> CausalLM:
    """A decoder with random weights."""
    config = decoder_config(CONFIG)
    d, f, e = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["num_experts"]
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (shape[-1] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)

    def layer() -> dict[str, Any]:
        tensors = {"gate.weight": draw(e, d)}
        for i in range(e):
            for part, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                tensors[f"experts.{i}.{part}_proj.weight"] = draw(*shape)
        attention = {name: {"kernel": jnp.asarray(draw(d, d))} for name in "qkvo"}
        norms = {name: {"scale": jnp.ones(d)} for name in ("q_norm", "k_norm")}
        return {
            "attention": attention | norms,
            "attention_norm": {"scale": jnp.ones(d)},
            "mlp_norm": {"scale": jnp.ones(d)},
            "moe": moe_block_from_hf(CONFIG, tensors),
        }

    params = {
        "embedding": jnp.asarray(draw(config.vocab_size, d)),
        "layers": [layer() for _ in config.layers],
        "norm": {"scale": jnp.ones(d)},
        "head": {"kernel": jnp.asarray(draw(d, config.vocab_size))},
    }
    return CausalLM(config, params)


def trained(model: CausalLM, text: TokenizedText, steps: int, seed: int) -> CausalLM:
    """The model after ``steps`` steps of Adam."""
    rows = text.input_ids[text.mask.all(axis=1)]
    params = model.params()
    blocks = [layer["moe"] for layer in params["layers"]]
    weights = params | {
        "layers": [x | {"moe": b.params} for x, b in zip(params["layers"], blocks, strict=True)]
    }

    def with_blocks(weights: Any) -> Any:
        layers = [
            layer | {"moe": dataclasses.replace(block, params=layer["moe"])}
            for layer, block in zip(weights["layers"], blocks, strict=True)
        ]
        return weights | {"layers": layers}

    optimizer = optax.adam(3e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, ids: Any) -> Any:
        def loss(weights: Any) -> Any:
            logits = forward(model.config, with_blocks(weights), ids).logits[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state, value

    # A copy, because the first step donates what it gets.
    weights = jax.tree.map(jnp.copy, weights)
    state, draw = optimizer.init(weights), np.random.default_rng(seed)
    for i in range(steps):
        ids = jnp.asarray(rows[draw.integers(0, len(rows), BATCH)])
        weights, state, value = step(weights, state, ids)
        if i % 200 == 0 or i == steps - 1:
            print(f"seed {seed}, step {i}: {float(value):.3f} nats a letter", flush=True)
    return CausalLM(model.config, with_blocks(weights))


def between(after: Any, before: Any, text: TokenizedText) -> dict[str, float]:
    """The change from one evaluation to another, resampled over files."""
    nats = [
        np.bincount(
            text.file_index,
            np.nan_to_num(one.sequence_loss) * one.sequence_tokens,
            minlength=text.files,
        )
        for one in (after, before)
    ]
    change = paired_bootstrap(*nats, text.file_bytes)
    return {k: change[k] for k in ("relative", "relative_low", "relative_high")}


def one_seed(seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: each share at each saving."""
    whole: Any = Letters(2**31)
    # The beginning of many files instead of a few whole ones: intervals resample files.
    start: Any = Letters(args.letters_per_file)
    files = {part: standard_library(part) for part in ("calibration", "held_out")}
    learned = tokenize_files(files["calibration"], whole, length=LENGTH, limit=2_000_000)
    model = trained(made_model(seed), learned, args.steps, seed)
    calibration, held_out = (
        tokenize_files(files[part], start, length=LENGTH, limit=args.tokens) for part in files
    )
    rows = []
    for saving in args.savings:
        budgets = {
            share: fit_budget(
                model,
                calibration.input_ids,
                calibration.mask,
                rule=args.rule,
                target_saving=saving,
                share=share,
                batch_size=64,
            )
            for share in SHARES
        }
        # One pass of the layers evaluates all of them on the same tokens.
        lanes = {share: budget.block for share, budget in budgets.items()}
        result = compare(model, held_out, changes=lanes, batch_size=64)
        report = {row["rule"]: row for row in result.report()["rules"]}
        for share, budget in budgets.items():
            row = report[share]
            rows.append(
                {
                    "seed": seed,
                    "saving": saving,
                    "share": share,
                    "bits_per_byte_trained": report["trained"]["bits_per_byte"],
                    "measured_saving": row["saving"],
                    **{k: row[k] for k in ("relative", "relative_low", "relative_high")},
                    "over_uniform": None
                    if share == "uniform"
                    else between(
                        result.evaluations[share], result.evaluations["uniform"], held_out
                    ),
                    "layer_mean_k": [round(k, 3) for k in budget.target_mean_k.values()],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=file_to_write)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=600)
    parser.add_argument("--tokens", type=at_least(1), default=150_000, help="of each text")
    parser.add_argument("--letters-per-file", type=at_least(1), default=3_000)
    parser.add_argument("--rule", default="MinP")
    parser.add_argument("--savings", type=float, nargs="+", default=[0.2, 0.4])
    args = parser.parse_args()
    if not all(0 < saving < 1 for saving in args.savings):
        parser.error(f"--savings: expected shares between 0 and 1, got {args.savings}.")
    rows = [row for seed in range(args.seeds) for row in one_seed(seed, args)]
    if args.json is not None:
        result = {
            "bench": "shares_of_layers",
            "machine": {"python": platform.python_version(), "jax": jax.__version__},
            "settings": {
                **CONFIG,
                "steps": args.steps,
                "batch": BATCH,
                "length": LENGTH,
                "tokens": args.tokens,
                "letters_per_file": args.letters_per_file,
                "rule": args.rule,
            },
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
