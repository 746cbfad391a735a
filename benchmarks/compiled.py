"""What the compilers of TPUs and GPUs make of expert layers, as one table; no accelerator is needed.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json [--targets v5e:2x4,h100]
                                  [--layers mixtral,olmoe] [--implementations default,ragged]

Rows are written one by one. A row that the file has already is not compiled again, so the command can
be stopped and started. Prints the table of all rows as Markdown. A row takes seconds to minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import jax

from moe_jax.experts import IMPLEMENTATIONS
from moe_jax.parallel.target_layers import LAYERS, experts_program
from moe_jax.parallel.targets import open_target

TARGETS = ("v5e:2x4", "h100", "v6e:2x4", "v5p:2x2x1")
# In order of interest. `active` is for a few tokens and is left out: these layers have thousands.
ORDER = ("default", "ragged", "capacity", "dense", "tiered")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| target | layer | implementation | passes | work / 1× | temp MB | fits | kernels "
        "| E× buffer | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['target']} | {row['what']} | {row['implementation']} | {row['passes']} |"
        if "error" in row:
            lines.append(f"{start} does not compile: {row['error'][:90]} | | | | | |")
            continue
        work = "–" if row["work"] is None else f"{row['work']:.2f}"
        kernels = ", ".join(f"{n} {name}" for name, n in row["kernels"].items()) or "–"
        expanded = "?" if not row["readable"] else "yes" if row["expanded"] else "no"
        lines.append(
            f"{start} {work} | {row['temp_mb']:,.0f} | {'yes' if row['fits'] else 'no'} | {kernels} "
            f"| {expanded} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--layers", default="olmoe,mixtral,deepseek_v3")
    parser.add_argument("--implementations", default=",".join(ORDER))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the compilers need no device
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax reports every untuned shape
    names = args.implementations.split(",")
    unknown = sorted(set(names) - {"default", *IMPLEMENTATIONS})
    if unknown:
        parser.error(
            f"--implementations: expected default, {', '.join(IMPLEMENTATIONS)}, got {unknown}"
        )
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    done = {(r["target"], r["what"], r["asked"], r["passes"]) for r in rows}
    for name in names:
        for target_name in args.targets.split(","):
            target = open_target(target_name)
            for layer in args.layers.split(","):
                for gradient in (False, True):
                    passes = "forward + backward" if gradient else "forward"
                    if (target_name, layer, name, passes) in done:
                        continue
                    program = experts_program(
                        target,
                        layer,
                        LAYERS[layer],
                        implementation=None if name == "default" else name,
                        gradient=gradient,
                    )
                    rows.append({"asked": name, **program.summary()})
                    settings = {"jax": jax.__version__, "dtype": "bfloat16"}
                    text = json.dumps(
                        {"bench": "compiled", "settings": settings, "rows": rows}, indent=1
                    )
                    args.out.write_text(text + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
