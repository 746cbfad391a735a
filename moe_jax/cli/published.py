"""Commands about published models: budget, experts, prune, generate, and evaluate, which takes
checkpoints too."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_jax.cli.checkpoint_report import evaluate_checkpoint, is_checkpoint
from moe_jax.cli.output import (
    AllowOtherData,
    AsJson,
    Data,
    Glob,
    Seed,
    library_errors_exit_2,
    notes,
    out,
    print_json,
)

app = typer.Typer()

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
Rule = Annotated[str | None, typer.Option(help="TopP, MinP, DynamicK or ExpertThreshold.")]
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
    """Shows a bar on standard error and yields the function that moves it."""
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


@app.command()
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint of this library, or folder of a published model.")
    ],
    data: Data = None,
    glob: Glob = None,
    allow_other_data: AllowOtherData = False,
    variant: Annotated[
        str, typer.Option(help="Checkpoint: which of its sets of rules; see moe-jax inspect.")
    ] = "",
    text: Text = None,
    text_2: Annotated[
        Path | None, typer.Option("--other-text", help="Second text, to measure drift on.")
    ] = None,
    rule: Rule = None,
    target_saving: Saving = None,
    target_mean_k: MeanK = None,
    share: Share = "uniform",
    budget: BudgetFolder = None,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="Text that --rule is fitted on; without it, the standard library's."),
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also evaluate both controls at the same saving.")
    ] = False,
    length: Length = 512,
    limit: Limit = None,
    batch: Batch = 4,
    dtype: Dtype = None,
    work: Work = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure the loss of a checkpoint, or of a published model on your text.

    A checkpoint is measured on held-out files of its own text: loss with its interval, the change
    against the trained k, two controls at the same mean k, mean k of each layer, tails. Takes about
    half a minute on two CPU cores. A published model is measured as trained or under a budget, layer by
    layer.
    """
    with library_errors_exit_2():
        if is_checkpoint(folder):
            published = {
                "--text": text,
                "--other-text": text_2,
                "--rule": rule,
                "--target-saving": target_saving,
                "--target-mean-k": target_mean_k,
                "--budget": budget,
                "--calibration-text": calibration_text,
                "--controls": controls or None,
                "--dtype": dtype,
                "--work": work,
            }
            evaluate_checkpoint(
                folder,
                data=data,
                glob=glob,
                allow_other_data=allow_other_data,
                variant=variant,
                limit=limit,
                seed=seed,
                as_json=as_json,
                unused=[name for name, value in published.items() if value is not None],
            )
            return
        if data is not None or glob is not None or allow_other_data or variant:
            raise ValueError(
                f"{folder}: expected --text for a published model, got --data, --glob, "
                "--allow-other-data or --variant, which are for checkpoints of this library. Use "
                "--text."
            )
    from moe_jax.models import HubFolder, compare, fit_budget, load_budget

    with library_errors_exit_2():
        if rule is not None and budget is not None:
            raise ValueError(
                "--rule: expected it without --budget, which has a rule. Leave one out."
            )
        if rule is None and (target_saving is not None or target_mean_k is not None):
            raise ValueError(
                "--target-saving: expected it with --rule, got it alone. Name the rule."
            )
        opened = HubFolder(folder, dtype=dtype)
        tokens = read_text(opened, text, length, limit)
        other = None if text_2 is None else read_text(opened, text_2, length, limit)
        fitted = None if budget is None else load_budget(budget)
        layers = opened.config.num_layers
        if rule is not None:
            calibration = read_text(opened, calibration_text, length, limit, part="calibration")
            with layer_bar(layers, "fit") as progress:
                fitted = fit_budget(
                    opened,
                    calibration.input_ids,
                    calibration.mask,
                    rule=rule,
                    target_saving=target_saving,
                    target_mean_k=target_mean_k,
                    share=share,
                    batch_size=batch,
                    progress=progress,
                    work=None if work is None else work / "fit",
                )
        with layer_bar(layers, "evaluate") as progress:
            result = compare(
                opened,
                tokens,
                fitted,
                controls=controls,
                other_text=other,
                batch_size=batch,
                progress=progress,
                work=None if work is None else work / "evaluate",
            )
    report = result.report()
    trained = report["rules"][0]
    if as_json:
        # The trained model's own figures are at the top as well.
        head = ("loss", "perplexity", "bits_per_byte")
        flat = {name: trained[name] for name in head}
        print_json({**flat, "experts_per_token": trained["mean_k_per_layer"], **report})
        return
    out.print(
        f"{report['tokens']} tokens of {report['files']} files: loss {trained['loss']:.4f} nats, "
        f"perplexity {trained['perplexity']:.3f}, {trained['bits_per_byte']:.4f} bits a byte"
    )
    if fitted is not None:
        show_rules(report)


def show_rules(report: dict[str, Any]) -> None:
    """Prints the rows of ``Comparison.report`` as a table, with tails and drift below it."""
    table = Table(
        "rule", "mean k", "saved", "bits/byte", "change (95 %)", "verdict", "expert FLOPs", "time"
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
            f"{used:.1%} used, {executed:.1%} executed",
            f"{row['seconds']:.1f} s",
        )
    out.print(table)
    for row in report["rules"][1:2]:
        tails = row["tails"]
        layers = ", ".join(f"{n}: {k:.2f}" for n, k in row["mean_k_per_layer"].items())
        out.print(f"mean k by layer: {layers}", soft_wrap=True)
        out.print(
            f"worst 1 % of tokens: {tails['worst_1_percent_tokens_nats']:+.3f} nats each; worst file: "
            f"{tails['worst_file']} ({tails['worst_file_relative']:+.2%})",
            soft_wrap=True,
        )
    for row in report.get("drift", [])[1:2]:
        word = "drifted" if row["drifted"] else "within 3 %"
        out.print(
            f"on the second text: mean k {row['mean_k']:.3f} ({row['mean_k_drift']:+.1%}, {word}), "
            f"{row['bits_per_byte']:.4f} bits a byte ({row['relative_loss']:+.2%} against trained)"
        )
    out.print(f"Intervals: {report['interval']}.")


@app.command()
def budget(
    folder: Folder,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write the budget to.")],
    rule: Annotated[str, typer.Option(help="TopP, MinP, DynamicK or ExpertThreshold.")] = "MinP",
    target_saving: Saving = None,
    target_mean_k: MeanK = None,
    share: Share = "uniform",
    text: Text = None,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts", help="Save the experts too, so that the service computes outputs."
        ),
    ] = False,
    length: Length = 512,
    limit: Limit = None,
    batch: Batch = 4,
    dtype: Dtype = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint at --out.")] = False,
    work: Work = None,
    as_json: AsJson = False,
) -> None:
    """Fit a rule to a budget in every layer of a published model, on your text, and save it."""
    from moe_jax.checkpoint import check_free
    from moe_jax.models import HubFolder, fit_budget, save_budget

    with library_errors_exit_2():
        check_free(out_folder, overwrite)
        opened = HubFolder(folder, dtype=dtype)
        tokens = read_text(opened, text, length, limit, part="calibration")
        # Without --work an interrupted run continues all the same, from beside the result.
        work = out_folder.parent / f".{out_folder.name}.work" if work is None else work
        with layer_bar(opened.config.num_layers, "fit") as progress:
            fitted = fit_budget(
                opened,
                tokens.input_ids,
                tokens.mask,
                rule=rule,
                target_saving=target_saving,
                target_mean_k=target_mean_k,
                share=share,
                batch_size=batch,
                progress=progress,
                work=work,
            )
        path = save_budget(
            fitted, out_folder, model=folder if experts else None, overwrite=overwrite
        )
    reached = {
        str(n): float(state.fit.achieved_mean_k) if mean < fitted.trained_k[n] else float(mean)
        for (n, mean), state in zip(
            fitted.target_mean_k.items(), fitted.states.values(), strict=True
        )
    }
    if as_json:
        targets = {str(n): k for n, k in fitted.target_mean_k.items()}
        note = {"target_mean_k_per_layer": targets, "calibration_mean_k_per_layer": reached}
        print_json({"budget": str(path), **fitted.metadata, **note})
        return
    table = Table("layer", "trained k", "target", "reached")
    for n, mean in fitted.target_mean_k.items():
        row = (str(n), str(fitted.trained_k[n]), f"{mean:.3f}", f"{reached[str(n)]:.3f}")
        table.add_row(*row)
    out.print(table)
    out.print(
        f"budget in {path}; next: moe-jax evaluate {folder} --budget {path} --controls",
        soft_wrap=True,
    )


@app.command()
def experts(
    folder: Folder,
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder for index.html and experts.json.")
    ],
    text: Text = None,
    budget: BudgetFolder = None,
    shown: Annotated[
        int, typer.Option(help="Tokens that the page shows one by one.", min=1)
    ] = 1500,
    length: Length = 512,
    limit: Limit = None,
    batch: Batch = 4,
    dtype: Dtype = None,
    work: Work = None,
    as_json: AsJson = False,
) -> None:
    """Show which expert fires where on your text: one HTML page, and its numbers as JSON."""
    from moe_jax.models import HubFolder, load_budget
    from moe_jax.models.experts_page import experts_page
    from moe_jax.models.experts_report import experts_report
    from moe_jax.models.text import TextTokenizer

    with library_errors_exit_2():
        opened = HubFolder(folder, dtype=dtype)
        fitted = None if budget is None else load_budget(budget)
        tokens = read_text(opened, text, length, limit)
        tokenizer = TextTokenizer(folder, vocab_size=opened.config.vocab_size)
        with layer_bar(opened.config.num_layers, "experts") as progress:
            report = experts_report(
                opened,
                tokens,
                tokenizer,
                fitted,
                shown=shown,
                title=f"Experts by token: {folder.name}",
                batch_size=batch,
                progress=progress,
                work=work,
            )
        rule = "as trained" if fitted is None else f"under {fitted.metadata['rule']}"
        source = "the Python standard library" if text is None else text.name
        note = f"{opened.config.model_type}, {rule}, on {source}: {tokens.files} files."
        page = experts_page(report, out_folder / "index.html", note=note)
        values = report.to_json()
        with (out_folder / "experts.json").open("w") as file:
            json.dump(values, file, allow_nan=False)
    if as_json:
        print_json({"page": str(page), **values})
        return
    table = Table("layer", "mean k", "most loaded", "least loaded", "unused")
    for n, load, mean in zip(report.layers, report.load, report.mean_k, strict=True):
        ratio = load / max(load.mean(), 1e-9)
        table.add_row(
            str(n),
            f"{mean:.3f}",
            f"{ratio.argmax()} ({ratio.max():.2f} x mean)",
            f"{ratio.argmin()} ({ratio.min():.2f} x mean)",
            str(int((load == 0).sum())),
        )
    out.print(table)
    out.print(f"page in {page}", soft_wrap=True)


@app.command()
def prune(
    folder: Folder,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write the model to.")],
    keep: Annotated[float, typer.Option(help="Share of the experts to keep.")] = 0.5,
    method: Annotated[str, typer.Option(help="reap, frequency or mean_weight.")] = "reap",
    counts: Annotated[
        str,
        typer.Option(
            help="uniform, or sensitivity: layers keep different numbers, which transformers cannot "
            "open."
        ),
    ] = "uniform",
    text: Text = None,
    held_out_text: Annotated[
        Path | None,
        typer.Option(help="Text to measure the loss on; without it, the standard library's."),
    ] = None,
    length: Length = 512,
    limit: Limit = None,
    batch: Batch = 4,
    work: Work = None,
    as_json: AsJson = False,
) -> None:
    """Remove the experts that matter least on your text, and say what that costs on other text."""
    from moe_jax.models import HubFolder, compare
    from moe_jax.models.prune import (
        expert_saliency,
        experts_to_keep,
        prune_block,
        pruning_limits,
        write_pruned,
    )
    from moe_jax.models.save import check_new

    with library_errors_exit_2():
        check_new(out_folder)
        opened = HubFolder(folder)
        least, groups = pruning_limits(opened)
        tokens = read_text(opened, text, length, limit, part="calibration")
        held_out = read_text(opened, held_out_text, length, limit)
        layers = opened.config.num_layers
        with layer_bar(layers, "saliency") as progress:
            saliency = expert_saliency(
                opened,
                tokens.input_ids,
                tokens.mask,
                batch_size=batch,
                progress=progress,
                work=None if work is None else work / "saliency",
            )
        kept = experts_to_keep(
            saliency, keep, method=method, counts=counts, least=least, groups=groups
        )
        path = write_pruned(opened, kept, out_folder)
        with layer_bar(layers, "evaluate") as progress:
            result = compare(
                opened,
                held_out,
                changes={"pruned": lambda layer, block: prune_block(block, kept[layer])},
                batch_size=batch,
                progress=progress,
                work=None if work is None else work / "evaluate",
            )
    report = result.report()
    report |= {
        "model": str(path),
        "method": method,
        "kept": {str(layer): rows.tolist() for layer, rows in kept.items()},
    }
    if as_json:
        print_json(report)
        return
    numbers = ", ".join(f"{layer}: {len(rows)}" for layer, rows in kept.items())
    out.print(f"experts kept by layer: {numbers}", soft_wrap=True)
    show_rules(report)
    out.print(f"model in {path}; next: moe-jax evaluate {path} --text DIR", soft_wrap=True)


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    budget: BudgetFolder = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest, up to this sum.")] = 1.0,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text with a published model, as trained or under a budget."""
    import jax
    import jax.numpy as jnp

    from moe_jax.models import HubFolder, Sampling, load_budget, load_model
    from moe_jax.models import generate as continuation
    from moe_jax.models.load import end_of_text
    from moe_jax.models.text import TextTokenizer

    with library_errors_exit_2():
        sampling = Sampling(temperature=temperature, top_p=top_p)
        opened = HubFolder(folder, dtype=dtype)
        tokenizer = TextTokenizer(folder, vocab_size=opened.config.vocab_size)
        ids = tokenizer.encode(prompt)
        if not ids:
            raise ValueError("prompt: expected some text, got none. Give at least one word.")
        fitted = None if budget is None else load_budget(budget)
        model = load_model(folder, dtype=dtype)
        if fitted is not None:
            for layer, block in model.blocks().items():
                model.set_block(layer, fitted.block(layer, block))
        generated = continuation(
            model,
            jnp.asarray([ids], jnp.int32),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=jax.random.key(seed),
            eos_ids=end_of_text(folder),
        )[0]
    answer = tokenizer.decode(generated.tolist())
    if as_json:
        print_json({"prompt": prompt, "text": answer, "tokens": generated.tolist()})
    else:
        out.print(prompt + answer, markup=False, highlight=False)
