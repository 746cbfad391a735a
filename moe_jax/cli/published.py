"""Commands about published models: budget, generate, and evaluate, which takes checkpoints too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_jax.cli.checkpoint_report import evaluate_checkpoint, is_checkpoint
from moe_jax.cli.output import (
    AllowOtherData,
    AsJson,
    Data,
    Glob,
    Seed,
    library_errors_exit_2,
    moe_jax_with,
    out,
    print_json,
)
from moe_jax.cli.published_options import (
    Batch,
    BudgetFolder,
    Dtype,
    Folder,
    Length,
    Limit,
    MeanK,
    Rule,
    Saving,
    Share,
    Text,
    Work,
    layer_bar,
    note_beyond_positions,
    note_high_loss,
    note_seen_files,
    read_text,
    show_rules,
)

app = typer.Typer()


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
    from moe_jax.models.model_budget import check_budget

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
        note_beyond_positions(opened, length)
        fitted = None if budget is None else load_budget(budget)
        if rule is not None:
            check_budget(
                opened,
                rule=rule,
                target_mean_k=target_mean_k,
                target_saving=target_saving,
                share=share,
            )
        tokens = read_text(opened, text, length, limit)
        other = None if text_2 is None else read_text(opened, text_2, length, limit)
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
                    calibration_files=calibration.file_digests,
                    batch_size=batch,
                    progress=progress,
                    work=None if work is None else work / "fit",
                )
        if fitted is not None:
            seen = fitted.files_fitted_on(tokens)
            note_seen_files(tokens, seen, "the budget was fitted on", "--text")
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
    note_high_loss(trained["loss"], opened.config.vocab_size)
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


@app.command()
def budget(
    context: typer.Context,
    folder: Folder,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder to write the budget to.")],
    rule: Annotated[
        str, typer.Option(help="TopP, MinP, DynamicK, ExpertThreshold or your module:Class.")
    ] = "MinP",
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")
    ] = False,
    work: Work = None,
    as_json: AsJson = False,
) -> None:
    """Fit a rule to a budget in every layer of a published model, on your text, and save it."""
    from moe_jax.checkpoint import check_free
    from moe_jax.models import HubFolder, fit_budget, save_budget
    from moe_jax.models.model_budget import check_budget

    with library_errors_exit_2():
        check_free(out_folder, overwrite)
        opened = HubFolder(folder, dtype=dtype)
        note_beyond_positions(opened, length)
        check_budget(
            opened, rule=rule, target_mean_k=target_mean_k, target_saving=target_saving, share=share
        )
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
                calibration_files=tokens.file_digests,
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
        metadata = {**fitted.metadata, "calibration_files": tokens.files}
        print_json({"budget": str(path), **metadata, **note})
        return
    table = Table("layer", "trained k", "target", "reached")
    for n, mean in fitted.target_mean_k.items():
        row = (str(n), str(fitted.trained_k[n]), f"{mean:.3f}", f"{reached[str(n)]:.3f}")
        table.add_row(*row)
    out.print(table)
    # The price of a budget is read on text that did not fit it; the standard library has such a part.
    on_text = "" if text is None else " --text HELD_OUT_TEXT"
    out.print(
        f"budget in {path}; next: {moe_jax_with(context, rule)} evaluate {folder}{on_text} "
        f"--budget {path} --controls",
        markup=False,
        soft_wrap=True,
    )


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
        wanted = len(ids) + max_new_tokens
        note_beyond_positions(opened, wanted, "--max-new-tokens with the prompt")
        fitted = None if budget is None else load_budget(budget)
        eos_ids = end_of_text(folder)
        model = load_model(opened)
        if fitted is not None:
            for layer, block in model.blocks().items():
                model.set_block(layer, fitted.block(layer, block))
        generated = continuation(
            model,
            jnp.asarray([ids], jnp.int32),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=jax.random.key(seed),
            eos_ids=eos_ids,
        )[0]
    answer = tokenizer.decode(generated.tolist())
    if as_json:
        print_json({"prompt": prompt, "text": answer, "tokens": generated.tolist()})
    else:
        out.print(prompt + answer, markup=False, highlight=False, soft_wrap=True)
