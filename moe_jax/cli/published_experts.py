"""Commands about the experts of published models: experts, which shows them, and prune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_jax.bench.options import writable
from moe_jax.bench.text_tables import print_whole
from moe_jax.cli.output import AsJson, library_errors_exit_2, out, print_json
from moe_jax.cli.published_options import (
    Batch,
    BudgetFolder,
    Dtype,
    Folder,
    Length,
    Limit,
    Text,
    Work,
    layer_bar,
    note_beyond_positions,
    note_seen_files,
    read_text,
    show_rules,
    text_name,
)

app = typer.Typer()


def _page_folder(folder: Path) -> Path:
    """Returns the folder if its page can be written, before the minutes that it takes."""
    writable(folder / "index.html")
    return folder


@app.command()
def experts(
    folder: Folder,
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", callback=_page_folder, help="Folder for index.html and experts.json."
        ),
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report at --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which expert fires where on your text: one HTML page, and its numbers as JSON."""
    from moe_jax.models import HubFolder, load_budget
    from moe_jax.models.experts_page import experts_page
    from moe_jax.models.experts_report import experts_report
    from moe_jax.models.text import TextTokenizer

    with library_errors_exit_2():
        for file in (out_folder / "index.html", out_folder / "experts.json"):
            if file.exists() and not overwrite:
                raise FileExistsError(
                    f"--out: expected a folder without a report, got one with {file}. Choose another, "
                    "or add --overwrite."
                )
        opened = HubFolder(folder, dtype=dtype)
        note_beyond_positions(opened, length)
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
        note = f"{opened.config.model_type}, {rule}, on {text_name(text)}: {tokens.files} files."
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
    print_whole(out, table)
    out.print(f"page in {page}", markup=False, soft_wrap=True)


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
    from moe_jax.models.expert_saliency import expert_saliency
    from moe_jax.models.prune import (
        check_pruning,
        experts_to_keep,
        prune_block,
        pruning_limits,
        write_pruned,
    )
    from moe_jax.models.save import check_new

    with library_errors_exit_2():
        check_new(out_folder)
        opened = HubFolder(folder)
        note_beyond_positions(opened, length)
        least, groups = pruning_limits(opened)
        totals = {n: opened.num_experts(n) for n in opened.config.moe_layers}
        check_pruning(totals, keep, method=method, counts=counts, least=least, groups=groups)
        tokens = read_text(opened, text, length, limit, part="calibration")
        held_out = read_text(opened, held_out_text, length, limit)
        seen = held_out.files_among(tokens.file_digests)
        note_seen_files(held_out, seen, "experts are removed by", "--held-out-text")
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
        "text": text_name(text, "calibration"),
        "held_out_text": text_name(held_out_text),
        "fitted_on_files": seen,
        "kept": {str(layer): rows.tolist() for layer, rows in kept.items()},
    }
    if as_json:
        print_json(report)
        return
    numbers = ", ".join(f"{layer}: {len(rows)}" for layer, rows in kept.items())
    out.print(f"experts kept by layer: {numbers}", soft_wrap=True)
    out.print(
        f"experts chosen on {report['text']}; loss measured on {report['held_out_text']}: "
        f"{held_out.files} files",
        soft_wrap=True,
        highlight=False,
    )
    show_rules(report)
    out.print(
        f"model in {path}; next: moe-jax evaluate {path} --text DIR", markup=False, soft_wrap=True
    )
