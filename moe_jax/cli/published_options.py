"""What the commands about published models share: options, text, a bar, the table of rules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_jax.bench.text_tables import print_whole
from moe_jax.cli.output import notes, out

Folder = Annotated[Path, typer.Argument(help="Folder of the model: config.json and weights.")]
Text = Annotated[
    Path | None,
    typer.Option(help="Text file or folder; without it, Python's standard library."),
]
Length = Annotated[int, typer.Option(help="Tokens a sequence.", min=2)]
Limit = Annotated[int | None, typer.Option(help="Stop after so many tokens.", min=1)]
Batch = Annotated[int, typer.Option(help="Sequences that run at a time.", min=1)]
Dtype = Annotated[
    str | None, typer.Option(help="float32 or bfloat16; by default that of the weights.")
]
Work = Annotated[
    Path | None,
    typer.Option(help="Keep the state after each layer here; the same command continues from it."),
]
Rule = Annotated[
    str | None, typer.Option(help="TopP, MinP, DynamicK, ExpertThreshold or your module:Class.")
]
Saving = Annotated[
    float | None, typer.Option("--target-saving", help="Share of expert calls to save, e.g. 0.2.")
]
MeanK = Annotated[float | None, typer.Option("--target-mean-k", help="Experts per token, mean.")]
Share = Annotated[
    str,
    typer.Option(
        help="How layers share the target: uniform, measured (on the text) or profile (no text)."
    ),
]
BudgetFolder = Annotated[
    Path | None, typer.Option("--budget", help="Folder that moe-jax budget wrote.")
]


@contextlib.contextmanager
def layer_bar(layers: int, what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields the function that reports layers that are done, on standard error.

    A terminal gets a bar, anything else a line for every tenth of the layers.
    """
    if not notes.is_terminal:
        shown = 0

        def line(done: int, total: int, word: str) -> None:
            nonlocal shown
            if 10 * done // total != shown:
                shown = 10 * done // total
                notes.print(f"{what}: {done} of {total} layers", highlight=False)

        yield line
        return
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(what, total=layers)
        yield lambda done, total, word: bar.update(task, completed=done, total=total)


def read_text(
    opened: Any, text: Path | None, length: int, limit: int | None, *, part: str = "held_out"
) -> Any:
    """The tokens of a text, or of a part of the standard library where no text is given."""
    from moe_jax.models.text import TextTokenizer, standard_library, tokenize_files

    tokenizer = TextTokenizer(opened.folder, vocab_size=opened.config.vocab_size)
    if text is not None:
        return tokenize_files(text, tokenizer, length=length, limit=limit)
    files = standard_library(part)
    limit = 32_768 if limit is None else limit
    return tokenize_files(files, tokenizer, length=length, limit=limit)


def note_beyond_positions(opened: Any, length: int, got: str = "--length") -> None:
    """Prints a note if sequences of ``length`` tokens are longer than those of the training."""
    longest = opened.raw.get("max_position_embeddings")
    if longest and length > longest:
        notes.print(
            f"note: {got} asks for up to {length} tokens a sequence; config.json states "
            f"max_position_embeddings {longest}. Beyond them the model may predict poorly.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def text_name(text: Path | None, part: str = "held_out") -> str:
    """What ``read_text`` reads, for reports."""
    if text is not None:
        return text.name
    return f"Python's standard library, {part.replace('_', '-')} part"


def note_seen_files(text: Any, seen: Sequence[str], what: str, option: str) -> None:
    """Prints a note if files of a text are among those that ``what`` was done on."""
    if seen:
        shown = ", ".join(seen[:3]) + (", ..." if len(seen) > 3 else "")
        notes.print(
            f"note: {len(seen)} of {text.files} files ({shown}) are files that {what}. The price of "
            f"the saving is measured on other text: name some with {option}.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def note_high_loss(loss: float, vocab_size: int) -> None:
    """Prints a note if a uniform guess of every token would have a lower loss."""
    guess = math.log(vocab_size)
    if loss > guess:
        notes.print(
            f"note: the loss, {loss:.2f} nats a token, is above the {guess:.2f} of a uniform guess. "
            "The tokenizer may be another model's, or the weights are not those of a trained model.",
            highlight=False,
            soft_wrap=True,
        )


def show_rules(report: dict[str, Any]) -> None:
    """Prints the rows of ``Comparison.report`` as a table, with tails and drift below it."""
    # Headings of short words, which wrap where the terminal is narrow.
    table = Table(
        "rule",
        "mean k",
        "saved",
        "bits a byte",
        "change (95 %)",
        "verdict",
        "used",
        "run",
        "time",
        pad_edge=False,
    )
    base = report["rules"][0]
    for row in report["rules"]:
        change = verdict = "-"
        if "relative" in row:
            low, high = row["relative_low"], row["relative_high"]
            change = f"{row['relative']:+.2%} ({low:+.2%} to {high:+.2%})"
            verdict = row["verdict"]
        used = row["expert_flops_used"] / base["expert_flops_used"]
        executed = row["expert_flops_executed"] / base["expert_flops_executed"]
        table.add_row(
            row["rule"],
            f"{row['mean_k']:.3f}",
            f"{row['saving']:.1%}",
            f"{row['bits_per_byte']:.4f}",
            change,
            verdict,
            f"{used:.0%}",
            f"{executed:.0%}",
            f"{row['seconds']:.1f} s",
        )
    print_whole(out, table)
    if report["fitted_on_files"]:
        out.print(
            f"{len(report['fitted_on_files'])} of {report['files']} files are not new to the rule: the "
            "change is no price on other text.",
            soft_wrap=True,
        )
    for row in report["rules"][1:2]:
        tails = row["tails"]
        layers = ", ".join(f"{n}: {k:.2f}" for n, k in row["mean_k_per_layer"].items())
        out.print(f"mean k by layer: {layers}", soft_wrap=True)
        out.print(
            f"worst 1 % of tokens: {tails['worst_1_percent_tokens_nats']:+.3f} nats each; worst file: "
            f"{tails['worst_file']} ({tails['worst_file_relative']:+.2%})",
            markup=False,
            soft_wrap=True,
        )
    for row in report.get("drift", [])[1:2]:
        word = "drifted" if row["drifted"] else "within 3 %"
        out.print(
            f"on the second text: mean k {row['mean_k']:.3f} ({row['mean_k_drift']:+.1%}, {word}), "
            f"{row['bits_per_byte']:.4f} bits a byte ({row['relative_loss']:+.2%} against trained)"
        )
    out.print(
        "used: operations of the experts that tokens chose, against those of the trained rule; run: "
        f"what this machine computed for them, padding included. Intervals: {report['interval']}.",
        soft_wrap=True,
    )
