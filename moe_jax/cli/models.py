"""Commands about models and their routers: demo, train, calibrate, route, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from moe_jax.cli.output import (
    AllowOtherData,
    AsJson,
    ConfigFile,
    Data,
    Glob,
    Seed,
    library_errors_exit_2,
    moe_jax_with,
    notes,
    numbers,
    out,
    print_json,
)
from moe_jax.cli.service import Key, route_over

app = typer.Typer()


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for results and pictures; runs/demo, or runs/demo-quick if quick."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller model: about a minute on two CPU cores.")
    ] = False,
    data: Data = None,
    glob: Glob = None,
    seed: Seed = 0,
    seeds: Annotated[
        str | None,
        typer.Option(help="Several seeds, such as 0,1,2: each is run, and results are pooled."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --seeds: keep the seeds that finished in --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a small model on real text, calibrate budgets, and see what each saving costs.

    Takes about five minutes a seed on two CPU cores; with --quick about one.
    """
    from moe_jax.lab import demo as job
    from moe_jax.lab.data import load_corpus
    from moe_jax.lab.seeds import run_seeds

    folder = folder or Path("runs/demo-quick" if quick else "runs/demo")
    console = notes if as_json else out
    with library_errors_exit_2():
        several = None if seeds is None else numbers("--seeds", seeds)
        if resume and several is None:
            raise ValueError(
                "--resume: expected it with --seeds, got it alone. One seed starts at the beginning: "
                "leave it out."
            )
        job.check_place(folder, quick)
        corpus = None if (data, glob) == (None, None) else load_corpus(data, glob=glob)
        size = job.QUICK if quick else job.FULL
        minutes = "about a minute" if quick else "about five minutes"
        notes.print(
            f"demo: {size.model.summary()}, {size.steps} steps; {minutes} a seed on two CPU cores"
        )
        if several is not None:
            results = run_seeds(folder, several, quick, console, corpus=corpus, resume=resume)
        else:
            results = job.run(folder, quick=quick, seed=seed, console=console, corpus=corpus)
    if as_json:
        print_json(results)


@app.command()
def route(
    file: Annotated[Path, typer.Argument(help="Hidden states, float [..., width], as .npy.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; without one, seeded untrained weights.")
    ] = None,
    router_name: Annotated[
        str | None, typer.Option("--router", help="Name of a router in the checkpoint.")
    ] = None,
    config: ConfigFile = None,
    target_mean_k: Annotated[
        float | None, typer.Option(help="Without a checkpoint: experts per token to calibrate to.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the routing to this .npz file.")] = None,
    url: Annotated[str | None, typer.Option(help="Ask a running service instead.")] = None,
    key: Key = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Route a file of hidden states and show where the tokens went."""
    import numpy as np

    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.lab import hidden_states

    if save is not None:
        with library_errors_exit_2():
            hidden_states.check_save(save)
    if url is not None:
        with library_errors_exit_2():
            if (checkpoint, router_name, config, target_mean_k) != (None,) * 4:
                raise ValueError(
                    "--url: expected it without --checkpoint, --router, --config and "
                    "--target-mean-k, which are the service's own. Leave them out."
                )
        report = route_over(url, key, file, save)
        if as_json:
            print_json(report)
        else:
            _show_route(report)
        return
    with library_errors_exit_2():
        if checkpoint is None and router_name is not None:
            raise ValueError(
                f"--router: expected it with --checkpoint, got --router {router_name} alone. "
                "Name the checkpoint whose router it is, or leave it out."
            )
        if checkpoint is not None and (target_mean_k, config) != (None, None):
            raise ValueError(
                "--target-mean-k, --config: expected neither with --checkpoint, whose routers have "
                "a budget and sizes of their own. Leave them out; for another budget see "
                "moe-jax calibrate."
            )
        x = hidden_states.load_hidden_states(file)
        if checkpoint is not None:
            source = open_checkpoint(checkpoint).layer(router_name)
            hidden_states.check_width(source, x, file=file, checkpoint=checkpoint)
        else:
            source = hidden_states.untrained_router(
                x, config_file=config, target_mean_k=target_mean_k, seed=seed
            )
        report, arrays = hidden_states.route_report(source, x)
        if save is not None:
            np.savez(save, allow_pickle=False, **arrays)
    if as_json:
        print_json(report)
        return
    if not report["trained"]:
        notes.print(
            "[yellow]untrained weights[/yellow]: seeded at random, thresholds calibrated on this "
            "file. Pass --checkpoint for a trained router."
        )
    _show_route(report)
    if save is not None:
        notes.print(f"routing written to {save}")


def _show_route(report: dict[str, Any]) -> None:
    out.print(
        f"[bold]{report['tokens']}[/bold] tokens, [bold]{report['mean_experts_per_token']:.3f}"
        f"[/bold] experts each (of {report['num_experts']}), rule {report['router']['kind']}"
        + (f", router {report['layer']}" if report.get("layer") else ""),
        soft_wrap=True,
    )
    table = Table("experts used", "share of tokens", "", title="Experts per token")
    for k, share in enumerate(report["experts_per_token_histogram"]):
        if share or k >= report["min_k"]:
            table.add_row(str(k), f"{share:.1%}", "█" * round(40 * share))
    out.print(table)
    table = Table("expert", "share of calls", "", title="Utilisation")
    top = max(report["expert_utilization"]) or 1.0
    for e, share in enumerate(report["expert_utilization"]):
        table.add_row(str(e), f"{share:.1%}", "█" * round(40 * share / top))
    out.print(table)
    out.print(
        f"load balance score {report['load_balance_score']:.3f} (1 is balanced), "
        f"{report['flop_reduction']:+.1%} expert calls saved against {report['flop_baseline']}"
    )


@app.command()
def train(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--out", help="Checkpoint folder to write.")],
    data: Data = None,
    glob: Glob = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps: about half a second each on two CPU cores.")
    ] = 350,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint of the same options to continue from.")
    ] = None,
    until: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many steps of the schedule.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Also save every this many steps.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Sizes and rates (JSON, fields of LMConfig).")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Train with this rule: TopP, ReLURouter, your module:Class.")
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="Several processes: HOST:PORT of process 0.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    process_id: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0,
    expert_devices: Annotated[
        int | None,
        typer.Option(min=1, help="Devices that share the experts; the rest splits data."),
    ] = None,
    host_devices: Annotated[
        int | None, typer.Option(min=1, help="CPU only: devices to simulate in this process.")
    ] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds of silence after which a process counts as lost.")
    ] = 20.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train the small language model on the standard library's source, or on your own text.

    The default model takes about three minutes on two CPU cores. Several devices and processes share
    the work if their options are given.
    """
    from moe_jax.cli.devices import training_mesh
    from moe_jax.lab.data import load_corpus
    from moe_jax.lab.lm_config import LMConfig
    from moe_jax.lab.rule_table import rule_to_train
    from moe_jax.lab.training import train as job

    hint = f"Start all again with --resume {folder} --overwrite." if save_every else ""
    with (
        library_errors_exit_2(),
        training_mesh(
            coordinator,
            processes,
            process_id,
            expert_devices=expert_devices,
            host_devices=host_devices,
            patience=patience,
            hint=hint,
        ) as mesh,
    ):
        config = LMConfig() if model is None else _model_config(model)
        if rule is not None:
            config = rule_to_train(config, rule)
        corpus = None if (data, glob) == (None, None) else load_corpus(data, glob=glob)
        if process_id == 0:
            minutes = "; about three minutes on two CPU cores"
            notes.print(
                f"train: {config.summary()}, {steps} steps on {data or 'the standard library'}"
                f"{minutes if (model, steps) == (None, 350) else ''}",
                highlight=False,
                soft_wrap=True,
            )
        path, summary = job(
            config,
            folder,
            steps,
            seed,
            process_id == 0,
            mesh=mesh,
            save_every=save_every,
            resume=resume,
            until=until,
            overwrite=overwrite,
            console=notes,
            corpus=corpus,
        )
    if process_id == 0:
        # A dynamic rule is fitted to a fixed k; another rule that was trained is measured as it is.
        then = f"calibrate {path} --rule MinP --target-saving 0.2 --out {path}-20"
        if config.rule is not None:
            then = f"evaluate {path}"
        _print_checkpoint(path, summary, as_json, hint=f"{moe_jax_with(context, rule)} {then}")


def _model_config(file: Path) -> Any:
    """The LMConfig that the file of ``--model`` describes. Raises ValueError if it describes none."""
    from moe_jax.lab.lm_config import LMConfig

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        got = str(error.strerror)
    except (ValueError, RecursionError) as error:
        got = f"no JSON ({error})"
    else:
        if isinstance(fields, dict):
            try:
                return LMConfig.from_json(fields)
            except ValueError as error:
                raise ValueError(f"--model {file}: {error}") from None
            except TypeError as error:
                got = f"a value of another type ({error})"
        else:
            got = f"a {type(fields).__name__}"
    raise ValueError(
        f"--model {file}: expected a file with a JSON object of LMConfig's fields, such as "
        f'{{"num_layers": 2}}, got {got}. Correct the file, or leave it out for the defaults.'
    )


@app.command()
def calibrate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a trained model.")],
    folder: Annotated[Path, typer.Option("--out", help="Checkpoint folder to write.")],
    rule: Annotated[
        list[str], typer.Option(help="top_p, min_p, TopP ...; repeat the option for several.")
    ] = ["top_p"],  # noqa: B006 - typer copies it
    target_mean_k: Annotated[float | None, typer.Option(help="Experts per token, mean.")] = None,
    target_saving: Annotated[
        float | None, typer.Option(help="Share of expert calls to save against the trained k.")
    ] = None,
    data: Data = None,
    glob: Glob = None,
    allow_other_data: AllowOtherData = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint at --out.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit dynamic rules to a budget on calibration text and save them with their provenance.

    The text is that of the checkpoint's training, from files that training did not use. Takes about
    ten seconds a rule on two CPU cores.
    """
    from moe_jax.checkpoint import check_free
    from moe_jax.lab.calibration import calibrate as job
    from moe_jax.lab.calibration import check_request
    from moe_jax.lab.model_files import corpus_for

    with library_errors_exit_2():
        check_free(folder, overwrite)
        check_request(rule, target_mean_k, target_saving)
        corpus = None
        if data is not None or glob is not None or allow_other_data:
            corpus = corpus_for(checkpoint, data, glob=glob, allow_other=allow_other_data)
        path, summary = job(
            checkpoint,
            folder,
            rule,
            target_mean_k=target_mean_k,
            target_saving=target_saving,
            seed=seed,
            overwrite=overwrite,
            console=notes,
            corpus=corpus,
        )
    _print_checkpoint(
        path, summary, as_json, hint=f"{moe_jax_with(context, *rule)} evaluate {path}"
    )


def _print_checkpoint(path: Path, summary: dict[str, Any], as_json: bool, *, hint: str) -> None:
    if as_json:
        print_json({"checkpoint": str(path), **summary})
    else:
        out.print(f"checkpoint in {path}; next: {hint}", markup=False, soft_wrap=True)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each layer, not only each rule.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: routers, budgets and their provenance, sizes."""
    from moe_jax.checkpoint import open_checkpoint
    from moe_jax.checkpoint.description import describe_checkpoint, routers_by_rule

    with library_errors_exit_2():
        report = describe_checkpoint(open_checkpoint(checkpoint))
    if as_json:
        print_json(report)
        return
    out.print(
        f"[bold]{escape(str(checkpoint))}[/bold]: format {report['format']}, moe_jax "
        f"{report['library_version']}, {report['parameters']:,} parameters, verified, "
        f"checkpoint {report['checksum'][:16]}",
        soft_wrap=True,
    )
    table = Table(Column("rule", overflow="fold"), "budget", "reached", "tokens", "data", "weights")
    # With --layers names are what route --router takes, so they are never cut: each has the first
    # column to itself.
    groups = routers_by_rule(report["routers"], layers=layers)
    for label, group in groups.items():
        fits = [router["fit"] for router in group if router["fit"] and router["fit"]["fitted"]]
        budget = [
            _span([fit["target_mean_k"] for fit in fits], ".3f"),
            _span([fit["achieved_mean_k"] for fit in fits], ".3f"),
            _span([fit["token_count"] for fit in fits], ","),
            *(
                _same([fit[word][:8] for fit in fits])
                for word in ("data_fingerprint", "router_fingerprint")
            ),
        ]
        table.add_row(f"[bold]{escape(label)}[/bold]\n{escape(group[0]['summary'])}", *budget)
    out.print(table)
    if len(groups) < len(report["routers"]):
        out.print(f"{len(report['routers'])} routers in all; each on its own: add --layers.")
    for key, value in report["metadata"].items():
        out.print(f"{key}: {_brief(value)}", soft_wrap=True, markup=False)
    out.print("Everything, fingerprints in full: add --json.")


def _span(values: list[Any], shown: str) -> str:
    """From the lowest to the highest, or the one that all are."""
    ends = [format(end(values), shown) for end in (min, max)] if values else [""]
    return "-".join(dict.fromkeys(ends))


def _same(words: list[str]) -> str:
    """The one fingerprint that all have; layers have their own, since each sees other inputs."""
    kinds = sorted(set(words))
    return kinds[0] if len(kinds) == 1 else "by layer" if kinds else ""


def _brief(value: Any) -> str:
    """A value of the metadata in words: plain values of a mapping, and how much else is in it."""
    if isinstance(value, dict):
        return ", ".join(
            f"{name} ({len(item)} values)"
            if isinstance(item, dict | list) and item
            else f"{name}={item}"
            for name, item in value.items()
        )
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    return f"{len(value)} values" if isinstance(value, list) else str(value)
