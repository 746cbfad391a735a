"""``moe-jax bench ...``: the measurements as commands.

Library errors pass through these commands; ``moe_jax.cli`` prints them as it does for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe_jax.bench.options import check_k, picture, split_numbers, split_words, writable
from moe_jax.bench.text_tables import print_not_run, print_rows

app = typer.Typer(help="Measure this machine, always against a floor.")
notes, out = Console(stderr=True), Console()

Json = Annotated[
    Path | None,
    typer.Option("--json", callback=writable, help="Write rows and machine to this file."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", callback=picture, help="Draw the ratios into this .png file."),
]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; 10 or more for figures to quote.")]
Size = Annotated[int, typer.Option(min=1)]


@contextmanager
def _progress() -> Iterator[Any]:
    """Yields a function that takes what is measured now; a log gets a line for each."""
    if not notes.is_terminal:
        # Rounds of one case would fill the log, so they share the line of their case.
        case = ""

        def line(label: str) -> None:
            nonlocal case
            if label.partition(", round")[0] != case:
                case = label.partition(", round")[0]
                notes.print(case, highlight=False, soft_wrap=True)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda label: bar.update(task, description=label)


def _finish(
    bench: str,
    rows: list[dict[str, Any]],
    columns: list[str],
    settings: dict[str, Any],
    json: Path | None,
    plot: Path | None = None,
    promised: tuple[str, ...] = (),
) -> None:
    from moe_jax.bench.measure import write_results

    print_rows(out, f"bench {bench}", columns, rows)
    print_not_run(notes, rows)
    if json is not None:
        write_results(json, bench=bench, settings=settings, rows=rows, promised=promised)
        notes.print(f"rows written to {json}", markup=False, soft_wrap=True)
    if plot is not None:
        from moe_jax.bench.ratio_plot import plot_ratios

        plot_ratios(rows, plot)
        notes.print(f"picture written to {plot}")


@app.callback(invoke_without_command=True)
def against(
    context: typer.Context,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="Take this baseline's measurement again; exit code 1 if anything is slower. "
            "A file of --json, or an export that holds one.",
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Slowdown that is tolerated: 0.1 is 10 %.")
    ] = 0.1,
    rounds: Annotated[
        int | None, typer.Option(min=2, help="Rounds; the baseline's own by default.")
    ] = None,
    json: Json = None,
) -> None:
    """Measure this machine, always against a floor; or against a baseline taken earlier."""
    if context.invoked_subcommand is not None:
        if baseline is not None:
            raise typer.BadParameter(
                "the baseline says what is measured; leave the subcommand out",
                param_hint="--against",
            )
        return
    if baseline is None:
        out.print(context.get_help())
        raise typer.Exit(0)
    from moe_jax.bench.baseline_report import measure_against

    if measure_against(
        baseline,
        tolerance=tolerance,
        rounds=rounds,
        json=json,
        progress_bar=_progress,
        out=out,
        notes=notes,
    ):
        raise typer.Exit(1)


@app.command()
def layer(
    tokens: Size = 8192,
    d_model: Size = 512,
    d_ff: Size = 2048,
    experts: Annotated[str, typer.Option(help="E, e.g. 8,64.")] = "8,64",
    k: Size = 2,
    dtype: Annotated[str, typer.Option(help="f32,bf16")] = "f32",
    load: Annotated[str, typer.Option(help="uniform,zipf")] = "uniform,zipf",
    passes: Annotated[str, typer.Option("--pass", help="fwd,bwd")] = "fwd,bwd",
    implementations: Annotated[
        str,
        typer.Option(
            help="Beside the default; balanced, sliced and separate are references, not layers."
        ),
    ] = "capacity,balanced",
    mean_k: Annotated[
        float | None, typer.Option(min=1, help="Dynamic k with this mean, at most k.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Row budget for the layer.")] = None,
    activation: str = "gelu_tanh",
    gated: bool = False,
    peers: Annotated[bool, typer.Option(help="Also time installed peers (uniform load).")] = False,
    rounds: Rounds = 10,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="Seconds after which a case of the grid ends, with fewer rounds."),
    ] = 120.0,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """The layer after routing against one dense feed-forward over the same rows.

    The default grid has 16 points: about 16 minutes on two idle CPU cores. --seconds bounds each point.
    """
    from moe_jax.bench.layer_cost import PROMISED, bench_layer
    from moe_jax.bench.measure import write_results
    from moe_jax.bench.peers import missing
    from moe_jax.bench.workload import DTYPES, LOADS, REFERENCES
    from moe_jax.experts import ACTIVATIONS, IMPLEMENTATIONS

    settings: dict[str, Any] = dict(
        tokens=tokens,
        d_model=d_model,
        d_ff=d_ff,
        experts=split_numbers(experts, "--experts"),
        k=k,
        dtypes=split_words(dtype, tuple(DTYPES), "--dtype"),
        loads=split_words(load, LOADS, "--load"),
        passes=split_words(passes, ("fwd", "bwd"), "--pass"),
        implementations=split_words(
            implementations, (*IMPLEMENTATIONS, *REFERENCES), "--implementations"
        ),
        activation=split_words(activation, tuple(ACTIVATIONS), "--activation")[0],
        gated=gated,
        mean_k=mean_k,
        max_rows=max_rows,
        peers=peers,
        rounds=rounds,
        most_seconds=seconds,
    )

    check_k(k, min(settings["experts"]), mean_k)
    if peers and ("uniform" not in settings["loads"] or (mean_k, max_rows) != (None, None)):
        raise typer.BadParameter(
            "expected a uniform load, and neither --mean-k nor --max-rows: peers decide their own "
            "routing. Add --load uniform, or leave out what does not go with it.",
            param_hint="--peers",
        )
    if peers and (lacking := missing()):
        notes.print(f"peers not installed: pip install {' '.join(lacking)}", highlight=False)

    def save(rows: list[dict[str, Any]]) -> None:
        if json is not None:
            write_results(json, bench="layer", settings=settings, rows=rows, promised=PROMISED)

    with _progress() as progress:
        rows = bench_layer(**settings, progress=progress, so_far=save)
    columns = [
        "implementation",
        "experts",
        "dtype",
        "load",
        "pass",
        "ratio",
        "ratio_balanced",
        "ms",
        "temp_mb",
        "dropped",
        "rounds",
    ]
    _finish("layer", rows, columns, settings, json, plot, PROMISED)


@app.command()
def decode(
    tokens: Annotated[str, typer.Option(help="T, e.g. 1,8.")] = "1,8",
    experts: Size = 64,
    k: Size = 2,
    d_model: Size = 512,
    d_ff: Size = 2048,
    dtype: str = "f32",
    gated: bool = False,
    implementations: Annotated[str, typer.Option(help="Beside the default.")] = "",
    batch_rules: Annotated[
        bool, typer.Option("--batch-rules", help="Rules that look at the batch, against top-k.")
    ] = False,
    rounds: Rounds = 30,
    json: Json = None,
) -> None:
    """A few tokens against reading the active experts' weights once.

    With --batch-rules, rules that load fewer distinct experts against top-k on the same tokens.
    """
    from moe_jax.bench.batch_rules_cost import COLUMNS, bench_batch_rules
    from moe_jax.bench.decode_cost import bench_decode
    from moe_jax.bench.workload import DTYPES
    from moe_jax.experts import IMPLEMENTATIONS

    check_k(k, experts)
    others = (
        split_words(implementations, tuple(IMPLEMENTATIONS), "--implementations")
        if implementations
        else []
    )
    settings: dict[str, Any] = dict(
        tokens=split_numbers(tokens, "--tokens"),
        experts=experts,
        k=k,
        d_model=d_model,
        d_ff=d_ff,
        gated=gated,
        dtype=split_words(dtype, tuple(DTYPES), "--dtype")[0],
        rounds=rounds,
    )
    if batch_rules:
        with _progress() as progress:
            rows = bench_batch_rules(**settings, progress=progress)
        _finish("decode", rows, COLUMNS, settings, json)
        return
    settings["implementations"] = others
    with _progress() as progress:
        rows = bench_decode(**settings, progress=progress)
    columns = [
        "implementation",
        "default",
        "tokens",
        "active_experts",
        "ratio",
        "ms",
        "floor_ms",
        "floor_gb_per_s",
    ]
    _finish("decode", rows, columns, settings, json)


@app.command()
def dynamic(
    tokens: Size = 8192,
    d_model: Size = 512,
    d_ff: Size = 2048,
    experts: Size = 8,
    k: Size = 2,
    mean_k: Annotated[str, typer.Option(help="Means below k, e.g. 1.3,1.6.")] = "1.3",
    load: Annotated[str, typer.Option(help="uniform or zipf")] = "uniform",
    passes: Annotated[str, typer.Option("--pass", help="fwd or bwd")] = "fwd",
    rounds: Rounds = 10,
    json: Json = None,
) -> None:
    """How much of what a dynamic k saves in operations becomes time."""
    from moe_jax.bench.dynamic_k_cost import bench_dynamic
    from moe_jax.bench.workload import LOADS

    check_k(k, experts)
    try:
        means = [float(m) for m in mean_k.split(",")]
    except ValueError:
        means = []
    if not means or not all(1 <= m < k for m in means):
        raise typer.BadParameter(
            f"expected means from 1 to below k={k}, got {mean_k!r}", param_hint="--mean-k"
        )
    settings: dict[str, Any] = dict(
        tokens=tokens,
        d_model=d_model,
        d_ff=d_ff,
        experts=experts,
        k=k,
        mean_ks=means,
        load=split_words(load, LOADS, "--load")[0],
        backward=split_words(passes, ("fwd", "bwd"), "--pass")[0] == "bwd",
        rounds=rounds,
    )
    with _progress() as progress:
        rows = bench_dynamic(**settings, progress=progress)
    columns = ["way", "implementation", "mean_k", "pass", "flops_fall", "time_fall", "share"]
    _finish("dynamic", rows, [*columns, "dropped"], settings, json)


@app.command()
def route(
    tokens: Size = 4096,
    d_model: Size = 768,
    experts: Size = 8,
    k: Size = 2,
    rounds: Rounds = 30,
    json: Json = None,
) -> None:
    """Routing alone against its own logits product and top-k."""
    from moe_jax.bench.routing_cost import bench_route

    check_k(k, experts)
    settings: dict[str, Any] = dict(
        tokens=tokens, d_model=d_model, experts=experts, k=k, rounds=rounds
    )
    with _progress() as progress:
        rows = bench_route(**settings, progress=progress)
    columns = ["rule", "ratio", "ms", "floor_ms", "tokens_per_second"]
    _finish("route", rows, columns, settings, json)


@app.command()
def batch(
    sizes: Annotated[str, typer.Option(help="Batch sizes.")] = "1,2,4,8,16,32",
    sequence: Size = 128,
    d_model: Size = 512,
    d_ff: Size = 1024,
    experts: Size = 8,
    k: Size = 2,
    training: Annotated[bool, typer.Option(help="Forward and backward.")] = False,
    rounds: Rounds = 5,
    json: Json = None,
) -> None:
    """Find the batch sizes that this machine likes."""
    from moe_jax.bench.batch_sizes import bench_batch

    check_k(k, experts)
    settings: dict[str, Any] = dict(
        sizes=split_numbers(sizes, "--sizes"),
        sequence=sequence,
        d_model=d_model,
        d_ff=d_ff,
        experts=experts,
        k=k,
        training=training,
        rounds=rounds,
    )
    with _progress() as progress:
        rows, advice = bench_batch(**settings, progress=progress)
    columns = ["batch", "tokens", "ms", "latency_ratio", "relative_throughput"]
    _finish("batch", rows, columns, {**settings, "advice": advice}, json)
    out.print(
        f"For {advice['work']} on this machine: batches of [bold]{advice['from']} to "
        f"{advice['to']}[/bold] ({advice['latency_ms']:.1f} ms, "
        f"{advice['tokens_per_second']:,} tokens/s at {advice['from']})."
    )


@app.command()
def serve(
    batch: Size = 4,
    sequence: Size = 128,
    d_model: Size = 768,
    parts: Annotated[str, typer.Option("--part", help="wrapper,http")] = "wrapper,http",
    clients: Annotated[str, typer.Option(help="At once over HTTP, e.g. 1,8.")] = "1,8",
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="Of load a case and round.")
    ] = 0.4,
    rounds: Rounds = 5,
    json: Json = None,
) -> None:
    """What the service adds: the engine to the bare route, HTTP to a bare echo plus the route."""
    from moe_jax.bench.http_cost import bench_http
    from moe_jax.bench.wrapper_cost import bench_wrapper

    settings: dict[str, Any] = dict(
        batch=batch,
        sequence=sequence,
        d_model=d_model,
        parts=split_words(parts, ("wrapper", "http"), "--part"),
        clients=split_numbers(clients, "--clients"),
        seconds=seconds,
        rounds=rounds,
    )
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        if "wrapper" in settings["parts"]:
            result = bench_wrapper(
                batch=batch,
                sequence=sequence,
                d_model=d_model,
                rounds=max(rounds, 20),
                progress=progress,
            )
            rows += [{"part": "wrapper", **row} for row in result]
        if "http" in settings["parts"]:
            result = bench_http(
                shape=(batch, sequence, d_model),
                clients=settings["clients"],
                rounds=rounds,
                seconds=seconds,
                progress=progress,
            )
            rows += [{"part": "http", **row} for row in result]
    columns = ["part", "case", "clients", "ratio", "ratio_sink", "times_json", "ms"]
    _finish("serve", rows, columns, settings, json)
