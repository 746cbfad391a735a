"""Commands about the service: serve, smoke, reload, and routing over a URL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli.output import (
    AsJson,
    ConfigFile,
    library_errors_exit_2,
    notes,
    out,
    plain,
    print_json,
)

app = typer.Typer()

Url = Annotated[str, typer.Argument(help="URL of the service, e.g. http://127.0.0.1:8000.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="ROUTER_API_KEY", help="API key, if the service requires one."),
]
AdminKey = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        envvar=["ROUTER_ADMIN_KEY", "MOE_ADMIN_KEY"],
        help="Admin key, if the service has one.",
    ),
]


@contextmanager
def _needs(extra: str) -> Iterator[None]:
    """Turns a library that is not installed into exit code 2 and what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moe_jax"):
            raise
        notes.print(
            f"[red]error:[/red] expected the {extra} libraries, got no {error.name}. "
            rf"Install them: pip install 'moe_jax\[{extra}]'",
            soft_wrap=True,
        )
        raise typer.Exit(2) from None


def _admin_key_hint(what: str, key: str | None) -> str:
    if key is None:
        return f"{what} needs the admin key: --admin-key KEY, or MOE_ADMIN_KEY."
    return "The key that was sent is not the admin key of this service."


@app.command()
def serve(
    config: ConfigFile = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; without one, seeded untrained weights.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 takes a free one. Default 8000.")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Serve gRPC too, on this port; 0 takes a free one.")
    ] = None,
) -> None:
    """Serve the router over HTTP (Open Inference Protocol v2), until SIGTERM drains it."""
    with _needs("serve"):
        from moe_jax.serving.http.process import run
    with _needs("grpc" if grpc_port is not None else "serve"), library_errors_exit_2():
        run(
            config_file=config,
            grpc_port=grpc_port,
            host=host,
            port=port,
            checkpoint=None if checkpoint is None else str(checkpoint),
        )


def route_over(url: str, key: str | None, file: Path, save: Path | None) -> dict[str, Any]:
    """Routes a file over a running service; returns a report like that of ``route_report``."""
    import numpy as np

    from moe_jax.lab.hidden_states import load_hidden_states
    from moe_jax.serving.http.client import Refused, Service

    with library_errors_exit_2():
        x = load_hidden_states(file)
        service = Service(url, key=key)
        shaped = x.reshape(-1, x.shape[-2], x.shape[-1]) if x.ndim > 2 else x[None]
        try:
            _, experts = service.sizes("router")
            arrays, facts = service.infer("router", {"hidden_states": shaped})
        except Refused as error:
            raise ValueError(str(error)) from None
        if save is not None:
            np.savez(save, allow_pickle=False, **arrays)
    return remote_report(arrays, experts, facts)


def remote_report(arrays: Any, num_experts: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns JSON values about a routed batch: counts i32[B, S] and indices i32[B, S, K]."""
    import numpy as np

    counts, indices = arrays["num_experts_per_token"].reshape(-1), arrays["expert_indices"]
    most = int(indices.shape[-1])
    histogram = np.bincount(counts, minlength=most + 1) / counts.size
    load = np.bincount(indices[indices >= 0].reshape(-1), minlength=num_experts)
    mean, share = float(counts.mean()), load / max(int(load.sum()), 1)
    spread = float(np.square(share * num_experts - 1.0).mean())
    return {
        "router": {"kind": "of the service"},
        "min_k": int(counts.min()),
        "num_experts": num_experts,
        "tokens": int(counts.size),
        "mean_experts_per_token": mean,
        "experts_per_token_histogram": [float(h) for h in histogram],
        "expert_utilization": [float(u) for u in share],
        "load_balance_score": 1.0 / (1.0 + spread),
        "flop_reduction": 1.0 - mean / most,
        "flop_baseline": f"top_max={most}",
        "answer": facts,
    }


@app.command()
def smoke(
    url: Url,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint it should serve; its routing is compared.")
    ] = None,
    router_name: Annotated[
        str | None,
        typer.Option(
            "--router", help="Router of the checkpoint to compare with. Default: the one it serves."
        ),
    ] = None,
    key: Key = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Check a running service: health, one routed batch, metrics. Exit code 1 if a check fails.

    The batch is random numbers: its experts per token say nothing about a calibrated budget.
    """
    from moe_jax.serving.http.smoke import check

    with library_errors_exit_2():
        checks = check(
            url,
            key=key,
            admin_key=admin_key,
            checkpoint=checkpoint,
            router_name=router_name,
        )
    good = all(c["ok"] for c in checks)
    if as_json:
        print_json({"url": url, "ok": good, "checks": checks})
    else:
        for c in checks:
            mark = "[green]good[/green]" if c["ok"] else "[red]bad[/red] "
            detail = str(c["detail"]).replace("[", r"\[")
            out.print(f"{mark} {c['check']}: {detail}", highlight=False, soft_wrap=True)
    if not good:
        raise typer.Exit(1)


@app.command()
def reload(
    url: Url,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Folder on the machine of the service. Default: the configured one."),
    ] = None,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Swap another checkpoint into a running service; exit code 1 if it refuses."""
    from moe_jax.serving.http.client import Refused, Service

    with library_errors_exit_2():
        service = Service(url, key=admin_key, timeout_seconds=600.0)
        try:
            asked = {} if checkpoint is None else {"checkpoint": checkpoint}
            answer = service.post_json("/admin/reload", asked)
        except Refused as error:
            notes.print(f"[red]refused:[/red] {plain(error)}", highlight=False, soft_wrap=True)
            if error.status == 401:
                notes.print(_admin_key_hint("A reload", admin_key))
            elif error.status == 422 and checkpoint is None:
                notes.print(
                    "The configured folder still leads to the refused checkpoint, and the next start "
                    "would read it. Run moe-jax rollback RELEASES, or put a good checkpoint there.",
                    soft_wrap=True,
                )
            raise typer.Exit(1) from None
    if as_json:
        print_json(answer)
    else:
        out.print("reloaded")
        for word, value in answer.items():
            text = json.dumps(round(value, 3) if isinstance(value, float) else value)
            out.print(f"{word}: {text}", soft_wrap=True, markup=False, highlight=False)
