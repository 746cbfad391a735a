"""The table of rules for people, and a smoke training of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moe_jax.lab.data import Batches, Corpus, load_corpus
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.training import init_training, train_step
from moe_jax.routers import Router, TopK, catalog
from moe_jax.routers.catalog import CatalogEntry, entry_of, example_rule
from moe_jax.routers.registry import load_rule, rule_class
from moe_jax.routers.twin import dynamic_twin
from moe_jax.routing.scoring import Scoring

# A rule has collapsed if fewer than this share of the experts carries the load, or tokens have none.
LEAST_BALANCE = 0.25
SMOKE = LMConfig(
    num_layers=1, d_model=32, num_heads=2, num_experts=8, k=2, d_ff=32, length=64, batch_size=8
)


def entries(rules: Sequence[str] | None = None) -> list[CatalogEntry]:
    """Returns the catalogue's rows, or those of some rules: names, or ``module:Class`` of your own.

    Raises:
        ValueError: an unknown name, or one that cannot be imported.
    """
    rules_by_name = catalog()
    if not rules:
        return list(rules_by_name.values())
    chosen = []
    for name in rules:
        if ":" in name:
            chosen.append(entry_of(load_rule(name)))
        elif name in rules_by_name:
            chosen.append(rules_by_name[name])
        else:
            raise ValueError(f"rule: expected one of {', '.join(rules_by_name)}, got {name!r}.")
    return chosen


def rule_to_train(config: LMConfig, rule: str) -> LMConfig:
    """Returns the configuration with a rule to train with: a name, or ``module:Class`` of your own.

    A class is built with the experts, k and gate of ``config``, and with its scoring unless the class
    has another default; k is also its target where it has one.

    Raises:
        ValueError, TypeError: an unknown rule, or one that cannot be built by itself.

    Example:
        >>> rule_to_train(LMConfig(), "ReLURouter").rule
        ReLURouter(num_experts=16, target_k=4, max_k=16)
    """
    rule_type = load_rule(rule) if ":" in rule else rule_class(rule)
    plain = dataclasses.replace(config, rule=None, schedule=None, distill=0.0).router()
    assert isinstance(plain, TopK)
    fields = {f.name: f.default for f in dataclasses.fields(rule_type)}
    default_scoring = fields.get("scoring", Scoring())
    if isinstance(default_scoring, Scoring) and default_scoring != Scoring():
        # For example ReLU scores: no other fits the rule.
        plain = dataclasses.replace(plain, scoring=default_scoring)
    # A rule that steers to a target needs room above it.
    most = config.num_experts if "target_k" in fields else config.k
    built = dynamic_twin(plain, rule_type, target_mean_k=config.k, max_k=most)
    return dataclasses.replace(config, rule=built)


def table(chosen: Sequence[CatalogEntry]) -> list[dict[str, Any]]:
    """Returns the rows as JSON values."""
    return [
        {
            "rule": entry.name,
            **dataclasses.asdict(entry.traits),
            "calibrated": entry.calibrated,
            "source": entry.source,
            "golden": entry.golden,
            "summary": entry.summary,
        }
        for entry in chosen
    ]


def smoke(
    chosen: Sequence[CatalogEntry],
    *,
    steps: int = 60,
    seed: int = 0,
    corpus: Corpus | None = None,
    note: Callable[[dict[str, Any]], None] = lambda row: None,
    file: Path | None = None,
) -> list[dict[str, Any]]:
    """Trains a tiny language model with each rule, and says whether its routing collapsed.

    Args:
        chosen: rows of the catalogue.
        steps: training steps each.
        seed: of parameters and batches.
        corpus: the text; None is the standard library's source.
        note: called with each row as it is measured.
        file: JSON that keeps the table. Rows of it that were measured with the same rule, settings and
            text are not measured again, and it is written after each row, so a run that was stopped
            continues. Rows of rules that are not chosen stay, so the file must be of these settings.

    Returns:
        For each rule ``rule``, ``outcome`` (``trains``, ``collapsed`` or ``skipped``), ``reason``,
        ``measured`` (a hash of the rule, the settings and the text), and where it was trained ``first``
        and ``last`` bits per byte, ``mean_k`` and ``balance`` (the share of experts that carry the
        load).

    Raises:
        ValueError: the file is no such table, or one of other settings or another text.
    """
    corpus = load_corpus() if corpus is None else corpus
    settings = {"steps": steps, "seed": seed, "data": str(corpus.describe()["fingerprint"])}
    kept = {} if file is None else _kept_rows(file, settings)
    rows = []
    for entry in chosen:
        router = _smoke_rule(entry)
        config = dataclasses.replace(SMOKE, rule=router, num_experts=router.num_experts)
        text = json.dumps([config.to_json(), settings], sort_keys=True)
        measured = hashlib.sha256(text.encode()).hexdigest()[:16]
        row = kept.get(entry.name)
        if row is None or row.get("measured") != measured:
            row = {**_smoke_one(entry, config, steps, seed, corpus), "measured": measured}
            kept[entry.name] = row
            if file is not None:
                _write_rows(file, kept, settings)
        rows.append(row)
        note(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of ``smoke`` in Markdown, as ``docs/results.md`` has it."""
    lines = [
        "| rule | outcome | bits a byte, first → last step | mean k | balance |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        outcome = f"{row['outcome']}: {row['reason']}" if row["reason"] else row["outcome"]
        cells = ["", "", ""]
        if "last" in row:
            cells = [
                f"{row['first']:.2f} → {row['last']:.2f}",
                f"{row['mean_k']:.2f}",
                f"{row['balance']:.2f}",
            ]
        filled = (f"| {cell} " if cell else "| " for cell in (row["rule"], outcome, *cells))
        lines.append(f"{''.join(filled)}|")
    return "\n".join(lines) + "\n"


def _kept_rows(file: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        rows, had = {row["rule"]: row for row in table["rules"]}, dict(table["settings"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file}: expected the JSON of an earlier table, got something else ({error}). Name "
            "another file, or remove this one."
        ) from None
    if had != settings:
        raise ValueError(
            f"{file}: expected a table of {_listed(settings)}, got one of {_listed(had)}. Name another "
            "file: a table has rows of one setting."
        )
    return rows


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _write_rows(file: Path, rows: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    table = {
        "command": f"moe-jax rules --smoke --steps {settings['steps']} --seed {settings['seed']} "
        f"--out {file.name}",
        "settings": dict(settings),
        "rules": [rows[name] for name in sorted(rows)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _smoke_rule(entry: CatalogEntry) -> Router:
    router: Router = entry.example
    if router.num_experts != SMOKE.num_experts and entry.name != "ProductKeys":
        router = example_rule(type(entry.example), num_experts=SMOKE.num_experts)
    return router


def _smoke_one(
    entry: CatalogEntry, config: LMConfig, steps: int, seed: int, corpus: Corpus
) -> dict[str, Any]:
    row: dict[str, Any] = {"rule": entry.name, "outcome": "skipped", "reason": ""}
    needs = entry.example.context_keys
    if entry.module.startswith("moe_jax.interop") and (needs is None or needs):
        return {**row, "reason": f"reads {', '.join(sorted(needs or ['context']))} of its model"}
    batches = Batches(corpus.train, batch_size=config.batch_size, length=config.length, seed=seed)
    state = init_training(config, steps, seed)
    seen: list[dict[str, Any]] = []
    for step in range(steps):
        try:
            state, metrics = train_step(config, steps, state, jnp.asarray(batches[step]))
        except ValueError as error:
            # A rule that needs a value of its model says so when it is traced.
            if not str(error).startswith("context: expected"):
                raise
            key = str(error).split("'")[1]
            return {**row, "reason": f"reads {key} of its model"}
        seen.append(metrics)
    first, last = (float(metrics["bits_per_byte"]) for metrics in (seen[0], seen[-1]))
    balance = float(seen[-1]["load_balance_score"])
    mean_k = float(seen[-1]["mean_experts_per_token"])
    reasons = [
        text
        for broken, text in (
            (not math.isfinite(last), "the loss is not a number"),
            (not last < first - 0.5, "the loss does not fall"),
            (balance < LEAST_BALANCE, "few experts carry the load"),
            (mean_k < 0.05, "tokens have no experts"),
        )
        if broken
    ]
    return {
        "rule": entry.name,
        "outcome": "collapsed" if reasons else "trains",
        "reason": "; ".join(reasons),
        "first": round(first, 4),
        "last": round(last, 4),
        "mean_k": round(mean_k, 4),
        "balance": round(balance, 4),
    }
