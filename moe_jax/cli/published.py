"""Commands about published models: evaluate, generate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from moe_jax.cli.output import AsJson, Seed, library_errors_exit_2, notes, out, print_json

app = typer.Typer()

Folder = Annotated[Path, typer.Argument(help="Folder of the model: config.json and weights.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16; by default that of the weights.")
]


@app.command()
def evaluate(
    folder: Folder,
    text: Annotated[Path, typer.Option(help="Text file, or folder of text files.")],
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    limit: Annotated[int | None, typer.Option(help="Stop after about so many tokens.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences that run at a time.", min=1)] = 4,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Loss of a published model on your text, with one layer in memory at a time."""
    from moe_jax.models import HubFolder
    from moe_jax.models import evaluate as loss_of
    from moe_jax.models.text import TextTokenizer, tokenize_files

    with library_errors_exit_2():
        opened = HubFolder(folder, dtype=dtype)
        tokenizer = TextTokenizer(folder, vocab_size=opened.config.vocab_size)
        tokens = tokenize_files(text, tokenizer, length=length, limit=limit)
        with Progress(console=notes, transient=True) as bar:
            task = bar.add_task("layers", total=opened.config.num_layers)
            result = loss_of(
                opened,
                tokens.input_ids,
                tokens.mask,
                batch_size=batch,
                progress=lambda done, total, what: bar.update(task, completed=done),
            )
    report = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        # The first token of a sequence has no prediction; it is counted as costing the mean.
        "bits_per_byte": result.loss / math.log(2) * tokens.tokens / tokens.bytes,
        "tokens": result.tokens,
        "bytes": tokens.bytes,
        "files": tokens.files,
        "experts_per_token": {str(k): v for k, v in result.experts_per_token.items()},
    }
    if as_json:
        print_json(report)
        return
    out.print(
        f"{result.tokens} tokens of {tokens.files} files: loss {result.loss:.4f} nats, perplexity "
        f"{result.perplexity:.3f}, {report['bits_per_byte']:.4f} bits a byte"
    )


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest, up to this sum.")] = 1.0,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text with a published model."""
    import jax
    import jax.numpy as jnp

    from moe_jax.models import Sampling, load_model
    from moe_jax.models import generate as continuation
    from moe_jax.models.load import end_of_text
    from moe_jax.models.text import TextTokenizer

    with library_errors_exit_2():
        sampling = Sampling(temperature=temperature, top_p=top_p)
        model = load_model(folder, dtype=dtype)
        tokenizer = TextTokenizer(folder, vocab_size=model.config.vocab_size)
        ids = tokenizer.encode(prompt)
        if not ids:
            raise ValueError("prompt: expected some text, got none. Give at least one word.")
        made = continuation(
            model,
            jnp.asarray([ids], jnp.int32),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=jax.random.key(seed),
            eos_ids=end_of_text(folder),
        )[0]
    answer = tokenizer.decode(made.tolist())
    if as_json:
        print_json({"prompt": prompt, "text": answer, "tokens": made.tolist()})
    else:
        out.print(prompt + answer, markup=False, highlight=False)
