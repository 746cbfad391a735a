"""What the compilers of TPUs and GPUs make of expert layers, as one table; no accelerator is needed.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json [--targets v5e:2x4,h100]
                                  [--layers mixtral,olmoe] [--implementations default,ragged]
                                  [--seconds 300]
    python benchmarks/compiled.py --out benchmarks/results/compiled.json --check
    python benchmarks/compiled.py --out benchmarks/results/compiled.json --skip "no time was left"

Rows are written one by one. A row that the file has already is not compiled again, so the command can
be stopped and started. Each row is compiled by a process of its own, which ends after ``--seconds``. An
implementation that refuses a target is a row with its reason; name it alone to compile it. ``--skip``
compiles nothing and adds the rows that the file lacks, with a reason; a later call compiles them.

Prints the table of all rows as Markdown. Exits with 1 if a default row does not compile, does not fit,
has an array of all rows and all experts, or does more than 1.1 times the work, with the padding to
tiles added at its most. ``--check`` compiles nothing and checks the rows of the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
from typing import Any

import jax

from moe_jax.bench.script_options import at_least, file_to_write, read_rows, some_of
from moe_jax.parallel.target_layers import LAYERS, experts_program, refusal, tile_padding
from moe_jax.parallel.targets import open_target

TARGETS = ("v5e:2x4", "h100", "v6e:2x4", "v5p:2x2x1")
ORDER = ("default", "ragged", "capacity", "tiered", "dense", "active")  # of interest
LAYERS_OF_THE_TABLE = ("olmoe", "mixtral", "deepseek_v3")
PASSES = ("forward", "forward + backward")
MOST_WORK = 1.1


def key_of(row: dict[str, Any]) -> tuple[int, ...]:
    """Where a row stands in the table."""
    return (
        TARGETS.index(row["target"]),
        LAYERS_OF_THE_TABLE.index(row["what"]),
        ORDER.index(row["asked"]),
        PASSES.index(row["passes"]),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: those that were compiled, and below them those that were not, by reason."""
    lines = [
        "| target | layer | implementation | passes | work / 1× | temp MB | fits | kernels "
        "| E× buffer | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    without: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=key_of):
        start = f"| {row['target']} | {row['what']} | {row['implementation']} | {row['passes']} |"
        if "refused" in row or "skipped" in row:
            word = "refused" if "refused" in row else "skipped"
            reason = f"`{row['asked']}` {word}: {row[word]}"
            without.setdefault(reason, []).append(row)
            continue
        if "error" in row:
            lines.append(f"{start} {_failure(row['error'])} | | | | | |")
            continue
        work = "–" if row["work"] is None else f"{row['work']:.2f}"
        kernels = ", ".join(f"{n} {name}" for name, n in row["kernels"].items()) or "–"
        expanded = "?" if not row["readable"] else "yes" if row["expanded"] else "no"
        lines.append(
            f"{start} {work} | {row['temp_mb']:,.0f} | {'yes' if row['fits'] else 'no'} | {kernels} "
            f"| {expanded} | {row['seconds']:.0f} |"
        )
    lines += [""] if without else []
    lines += [f"- {reason}: {places(some)}." for reason, some in without.items()]
    return "\n".join(lines)


def _failure(error: str) -> str:
    """A compiler's error, cut to what a table has room for."""
    if "CompileTimeHbmOom" in error:
        needs = re.search(r"\((\S+)G\) exceeds available HBM \((\S+)G\)", error)
        detail = f": {needs[1]} GiB of temporaries, {needs[2]} GiB of memory" if needs else ""
        return f"does not fit{detail}"
    return f"does not compile: {error[:90]}"


def places(rows: list[dict[str, Any]]) -> str:
    """The targets of some rows, with their layers and passes unless those are all."""
    words = []
    for target in TARGETS:
        some = [r for r in rows if r["target"] == target]
        if len(some) == len(LAYERS_OF_THE_TABLE) * len(PASSES):
            words.append(target)
        else:
            words += [f"{target} {r['what']} {r['passes']}" for r in some]
    return ", ".join(words)


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the default rows, one sentence each."""
    sentences = []
    for row in rows:
        if row["asked"] != "default":
            continue
        where = f"{row['target']}, {row['what']}, {row['passes']}"
        if "error" in row or "skipped" in row:
            reason = row.get("error") or row["skipped"]
            sentences.append(f"{where}: does not compile: {reason}")
            continue
        # Kernels count a tile that two experts share once, and compute it for both.
        most = (
            None if row["work"] is None else row["work"] * (1 + tile_padding(LAYERS[row["what"]]))
        )
        if most is None or most > MOST_WORK:
            sentences.append(f"{where}: expected at most {MOST_WORK} times the work, got {most}")
        if row["expanded"]:
            sentences.append(f"{where}: has an array of all rows and all experts")
        if not row["fits"]:
            sentences.append(f"{where}: does not fit")
    return sentences


def compile_row(target_name: str, layer: str, name: str, gradient: bool) -> dict[str, Any]:
    """One row, compiled by this process."""
    jax.config.update("jax_platforms", "cpu")  # the compilers need no device
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax reports every untuned shape
    program = experts_program(
        open_target(target_name),
        layer,
        LAYERS[layer],
        implementation=None if name == "default" else name,
        gradient=gradient,
    )
    return program.summary()


def row_of(
    key: tuple[str, str, str, str], *, refuse: bool, seconds: float, skip: str | None = None
) -> dict[str, Any]:
    """One row: the reason of a refusal or of ``skip``, or what a process of its own compiles."""
    target, layer, name, passes = key
    start = {"target": target, "what": layer, "passes": passes, "implementation": name, "ok": False}
    if name != "default" and refuse:
        platform = "cuda" if target.startswith("h100") else "tpu"
        reason = refusal(platform, LAYERS[layer], name)
        if reason is not None:
            return {**start, "refused": reason}
    if skip is not None:
        return {**start, "skipped": skip}
    command = [sys.executable, __file__, "--row", json.dumps(key)]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=os.environ, check=False
        )
    except subprocess.TimeoutExpired:
        return {**start, "error": f"not compiled after {seconds:.0f} s"}
    if ran.returncode != 0:
        last = (ran.stderr.strip() or "no message").splitlines()[-1]
        return {**start, "error": f"the compiler ended with {ran.returncode}: {last[:200]}"}
    return json.loads(ran.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    """The versions of the compilers and of the kernels' library that are installed."""
    names = ("jax", "libtpu", "jax-cuda12-plugin", "tokamax")
    return {
        name: importlib.metadata.version(name)
        for name in names
        if any(importlib.metadata.distributions(name=name))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=file_to_write)
    for option, words in (
        ("--targets", TARGETS),
        ("--layers", LAYERS_OF_THE_TABLE),
        ("--implementations", ORDER),
    ):
        parser.add_argument(option, type=some_of(words), default=list(words))
    parser.add_argument("--passes", choices=("forward", "both"), default="both")
    parser.add_argument("--seconds", type=at_least(1.0), default=300.0, help="the most for one row")
    parser.add_argument("--check", action="store_true", help="check the rows of the file only")
    parser.add_argument(
        "--skip", metavar="REASON", help="add the rows that are missing, with a reason"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        target, layer, name, passes = json.loads(args.row)
        print(json.dumps(compile_row(target, layer, name, passes != "forward")))
        return
    if args.out is None:
        parser.error("--out: expected the file of the rows, got nothing.")
    names = args.implementations
    rows: list[dict[str, Any]] = []
    if args.out.exists() or args.check:  # a check of no rows would hold
        fields = {"target": TARGETS, "what": LAYERS_OF_THE_TABLE, "asked": ORDER, "passes": PASSES}
        try:
            rows = read_rows(args.out, "compiled", fields)
        except ValueError as error:
            parser.error(f"--out: {error}")
    if not args.check:
        rows = [r for r in rows if "skipped" not in r]
    done = {(r["target"], r["what"], r["asked"], r["passes"]) for r in rows}
    keys = [
        (target, layer, name, passes)
        for name in names
        for target in args.targets
        for layer in args.layers
        for passes in PASSES[: 1 if args.passes == "forward" else 2]
    ]
    for key in keys if not args.check else ():
        if key in done:
            continue
        row = row_of(key, refuse=len(names) > 1, seconds=args.seconds, skip=args.skip)
        rows.append({"asked": key[2], **row})
        rows.sort(key=key_of)
        settings = {**versions(), "dtype": "bfloat16"}
        text = json.dumps({"bench": "compiled", "settings": settings, "rows": rows}, indent=1)
        args.out.write_text(text + "\n")
    print(table(rows))
    wrong = faults(rows)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
