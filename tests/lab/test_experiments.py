"""Declared experiments: what a file may say, resuming, and the tables."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from scipy.stats import rankdata, spearmanr
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.lab.calibration import calibration_blocks, find_rules
from moe_jax.lab.data import DataError, load_corpus, part_of
from moe_jax.lab.experiments.budget_table import interval
from moe_jax.lab.experiments.declaration import declared, experiment_files, load
from moe_jax.lab.experiments.difficulty_table import (
    correlation,
    correlation_within,
    partial_correlation,
)
from moe_jax.lab.experiments.drift_texts import REFERENCE, drift_text
from moe_jax.lab.experiments.layer_shares import STEPS, change_curves, shared_rule
from moe_jax.lab.experiments.measures import MEASURES
from moe_jax.lab.experiments.recipes import distil
from moe_jax.lab.experiments.runner import _check_models, run_experiment
from moe_jax.lab.experiments.tables import page_of, write_page, write_results
from moe_jax.lab.language_model import init, init_states
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, load_model
from moe_jax.routers import TopK

ROOT = Path(__file__).parents[2]


ELASTIC = {"kind": "Elastic", "num_experts": 4, "k": 3}
TINY = {
    "kind": "budgets",
    "title": "Tiny",
    "question": "Does it run?",
    "expectations": ["It does."],
    "model": {
        "num_layers": 1,
        "d_model": 16,
        "num_heads": 2,
        "num_experts": 4,
        "k": 3,
        "d_ff": 8,
        "length": 16,
        "batch_size": 2,
    },
    "steps": 2,
    "seeds": [0],
    "reference": "fixed",
    "recipes": {
        "fixed": {},
        "router_only": {"base": "fixed", "rule": ELASTIC, "steps": 2},
    },
    "rules": ["as_trained"],
    "savings": [0.35],
    "calibration_tokens": 256,
    "held_out_tokens": 256,
}


def changed(**fields):
    return {**copy.deepcopy(TINY), **fields}


def test_an_experiment_runs_resumes_and_writes_its_tables(tmp_path):
    file, out = tmp_path / "tiny.json", tmp_path / "runs"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    command = ["experiment", str(file), "--out", str(out)]
    stopped = CliRunner().invoke(app, [*command, "--minutes", "0", "--json"])
    assert stopped.exit_code == 0, stopped.output
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "2 of 2 runs" in first.output
    assert "It does." in first.output
    folder = out / "tiny"
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {(r["recipe"], r["rule"], r["saving"]) for r in rows} == {
        ("fixed", "as_trained", 0.0),
        ("router_only", "as_trained", 0.0),
        ("router_only", "as_trained", 0.35),
    }
    assert len((folder / "results.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(rows)
    saving = next(r for r in rows if r["saving"])
    assert abs(saving["mean_k"] / (3 * 0.65) - 1) < 0.1
    assert saving["training_cost"] > 1.0

    # Nothing but the routers moved, and they did.
    before, after = (load_model(folder / "models" / f"{n}-0") for n in ("fixed", "router_only"))
    kernels = [m.params["layers"]["moe"]["router"]["kernel"] for m in (before, after)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    np.testing.assert_array_equal(before.params["embedding"], after.params["embedding"])
    np.testing.assert_array_equal(before.params["norm"], after.params["norm"])

    units = sorted((folder / "units").iterdir())
    written = [unit.stat().st_mtime_ns for unit in units]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert [unit.stat().st_mtime_ns for unit in units] == written
    # A model that was trained for another number of steps is not taken for the declared one.
    longer = declared("tiny", changed(steps=3))
    with pytest.raises(ValueError, match="expected the model of recipe fixed, got another number"):
        run_experiment(longer, folder, progress=False)
    # Another declaration of the same name measures again what it changed.
    other = declared("tiny", changed(rules=["drop_lowest"]))
    assert write_results(other, [], tmp_path / "other")["done"] == 0


def test_a_partial_report_names_the_command_that_goes_on(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    words = ["experiment", str(file), "--rule", "top_p", "--seeds", "0,1", "--minutes", "0"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"`moe-jax experiment {file} --rule top_p --seeds 0,1` · 0 of" in done.stdout


def test_a_copy_with_other_sizes_does_not_train_into_the_models_of_another_experiment(tmp_path):
    for name in experiment_files():
        _check_models(load(name))  # what is declared fits
    copied = declared("mine", changed(models="e2", recipes={"fixed_4": {}}, reference="fixed_4"))
    with pytest.raises(
        ValueError, match=r"recipes of e2.*got another fixed_4. Remove the line models"
    ):
        run_experiment(copied, tmp_path / "mine", progress=False)
    assert not (tmp_path / "e2").exists()


def test_outside_of_a_clone_the_message_says_where_experiments_are(monkeypatch):
    monkeypatch.setattr("moe_jax.lab.experiments.declaration.experiment_files", dict)
    with pytest.raises(ValueError, match="in configs/experiments of a clone of the repository"):
        load("e1")


def test_a_decode_experiment_counts_distinct_experts(tmp_path):
    rules = {
        "top 1": {"kind": "Piggyback", "num_experts": 4, "k": 1},
        "piggyback": {"kind": "Piggyback", "num_experts": 4, "k": 3, "keep_k": 1},
        "re-route": {"kind": "Reroute", "num_experts": 4, "k": 3, "min_similarity": -1.0},
    }
    fields = {"kind": "decode", "recipes": {"fixed": {}}, "rules": [], "savings": []}
    experiment = declared("tiny", changed(**fields, batch_sizes=[2], batch_rules=rules))
    results = run_experiment(experiment, tmp_path, progress=False)
    rows = {row["rule"]: row for row in results["rows"]}
    assert rows["as trained"]["mean_k"] == pytest.approx(3.0)
    assert rows["as trained"]["distinct_saving"] == 0.0
    assert rows["top 1"]["mean_k"] == pytest.approx(1.0)
    # Two tokens load at most two experts, and both use what is loaded.
    assert 1.0 < rows["piggyback"]["distinct_experts"] <= 2.0
    assert rows["piggyback"]["distinct_experts"] == rows["top 1"]["distinct_experts"]
    assert rows["re-route"]["distinct_experts"] == rows["top 1"]["distinct_experts"]
    assert "| piggyback | 2 |" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_results_say(tmp_path):
    stored = sorted((ROOT / "benchmarks" / "results" / "experiments").glob("*.json"))
    assert stored
    assert (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8") == page_of(stored)
    empty = [tmp_path, tmp_path / "data", tmp_path / "page.md"]
    with pytest.raises(ValueError, match=r"expected NAME/results\.json in"):
        write_page(*empty)


def test_a_distilled_recipe_needs_an_elastic_rule():
    recipes = {"fixed": {}, "router_only": {"base": "fixed"}}
    experiment = declared("tiny", changed(recipes=recipes))
    with pytest.raises(ValueError, match="expected rule to be an Elastic one"):
        distil(None, experiment.recipes["router_only"], 0, None, cost=0.0)  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"colour": 1}, "got colour besides"),
        ({"kind": "tea"}, "expected a kind of budgets, decode"),
        ({"reference": "none"}, "a reference among fixed"),
        ({"recipes": {"fixed": {"parts": ["experts"]}}}, "parts among router, norms"),
        ({"recipes": {"fixed": {"layers": 2}}}, "recipe fixed: LMConfig: expected fields among"),
        ({"recipes": {"fixed": {"base": "gone"}}}, "expected base to be one of fixed"),
        ({"recipes": {"fixed": {"distill": 1.0}}}, "distill: expected a schedule with it"),
        ({"recipes": ["fixed"]}, "recipes: expected an object of objects"),
        ({"recipes": {"fixed": 1}}, "recipes: expected an object of objects"),
        ({"recipes": {"fixed": {"steps": "2"}}}, "recipe fixed: steps: expected .* type int"),
        ({"seeds": 3}, "seeds: expected a list of numbers from 0 to .*, got 3"),
        ({"savings": ["0.1"]}, "savings: expected a list of numbers"),
        ({"steps": 0}, "steps: expected a whole number above 0"),
        ({"title": None}, "title: expected a text, got null"),
        ({"rules": "top_p"}, "rules: expected a list of texts"),
        ({"savings": [1.5]}, "savings: expected a list of numbers from 0.0 to 0.99"),
        ({"savings": [float("nan")]}, "savings: expected a list of numbers from 0.0 to 0.99"),
        ({"seeds": [-1]}, "seeds: expected a list of numbers from 0"),
        ({"batch_sizes": [0]}, "batch_sizes: expected a list of numbers from 1"),
        (
            {"recipes": {"fixed": {"base": "fixed"}}},
            "base that is trained without it, got fixed from",
        ),
        (
            {"recipes": {"fixed": {}, "a": {"base": "b"}, "b": {"base": "a"}}},
            "expected a base that is trained without it, got a from b from a",
        ),
    ],
)
def test_a_bad_declaration_is_refused_by_its_field(fields, words):
    with pytest.raises(ValueError, match=words):
        declared("tiny", changed(**fields))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "top_q"], "expected some of top_p"),
        (["--seeds", "0,a"], "--seeds: expected different numbers from 0"),
        (["--seeds", "1,1"], "--seeds: expected different numbers from 0"),
        (["--out", "FILE"], "got one under the file"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, options, words
):
    from moe_jax.lab.experiments import runner

    monkeypatch.setattr(runner, "load_corpus", lambda: pytest.fail("the text was read"))
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    words_given = [str(file) if word == "FILE" else word for word in options]
    result = CliRunner().invoke(
        app, ["experiment", str(file), "--out", str(tmp_path), *words_given]
    )
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())


DRIFT = {
    "kind": "drift",
    "recipes": {"fixed": {}},
    "rules": ["top_p"],
    "texts": ["code"],
    "controllers": {"top_p": {"kp": 0.5}},
    "fallback": {"band": 0.1},
}
PIGGYBACK = {"kind": "Piggyback", "num_experts": 4, "k": 3}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"per_layer": ["top_q"]}, "expected some of top_p"),
        ({**DRIFT, "texts": ["gone.txt"]}, "expected code, prose, reference or the path"),
        ({**DRIFT, "texts": []}, "expected one saving and at least one text"),
        ({**DRIFT, "savings": []}, "expected one saving and at least one text"),
        ({**DRIFT, "controllers": {"min_p": {}}}, "controllers: expected rules among top_p"),
        (
            {**DRIFT, "controllers": {"top_p": {"kq": 1}}},
            "controllers: top_p: expected fields among",
        ),
        ({**DRIFT, "controllers": {"top_p": {"kp": "a"}}}, "kp: expected a number"),
        ({**DRIFT, "fallback": {"bnd": 0.1}}, "fallback: expected band and decay, got bnd"),
        ({**DRIFT, "fallback": {"band": -1}}, "expected band > 0"),
        ({**DRIFT, "fallback": {"band": "a"}}, "band: expected a number"),
        (
            {"kind": "decode", "batch_rules": {"x": {"kind": "TopK", "num_experts": 4, "k": 3}}},
            "batch_rules: x: expected a rule that looks at its batch",
        ),
        (
            {"kind": "decode", "batch_rules": {"x": {**PIGGYBACK, "num_experts": 8}}},
            "batch_rules: x: expected num_experts=4 as in recipe fixed",
        ),
    ],
)
def test_settings_that_cannot_be_run_are_refused_before_anything_is_trained(
    tmp_path, monkeypatch, fields, words
):
    from moe_jax.lab.experiments import runner

    monkeypatch.setattr(runner, "load_corpus", lambda: pytest.fail("the text was read"))
    with pytest.raises((TypeError, ValueError, DataError), match=words):
        run_experiment(declared("tiny", changed(**fields)), tmp_path, progress=False)


def test_a_terminal_gets_tables_and_a_pipe_gets_markdown(tmp_path, monkeypatch):
    from moe_jax.cli import experiments

    text = "## Tiny\n\n| recipe | change |\n|---|---|\n| fixed | 0 |\n"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "results.md").write_text(text, encoding="utf-8")
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    done = {"done": 2, "planned": 2}
    monkeypatch.setattr("moe_jax.lab.experiments.runner.run_experiment", lambda *_, **__: done)
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        monkeypatch.setattr(experiments, "out", console)
        CliRunner().invoke(app, ["experiment", str(file), "--out", str(tmp_path)])
        shown[terminal] = console.file.getvalue()
    assert "|---|" in shown[False]
    assert "|---|" not in shown[True]
    assert "fixed" in shown[True]


def test_every_declared_experiment_is_valid():
    names = experiment_files()
    assert "e2" in names
    for name in names:
        experiment = load(name)
        assert experiment.expectations, f"{name}: state what is expected before it runs"
        assert set(experiment.core) <= set(experiment.recipes)


def test_an_interval_over_seeds_is_students():
    got = interval([0.01, 0.03])
    assert got.mean == pytest.approx(0.02)
    assert got.high - got.mean == pytest.approx(12.706 * 0.01, rel=1e-3)
    # (t for 97.5 % + t for 80 %) * standard error
    assert got.detectable == pytest.approx((12.706 + 1.376) * 0.01, rel=1e-3)
    assert interval([0.01]).high == np.inf


def unit(recipe: str, seed: int, bits: list[float]) -> dict:
    rows = [
        {
            "rule": "as_trained" if i == 0 else "top_p",
            "label": "x",
            "control": False,
            "saving": 0.0 if i == 0 else 0.2,
            "mean_k": 3.0 - i,
            "bits_per_byte": value,
            "nats_per_file": [value * 100, value * 50],
            "seconds": 1.0,
            "mean_k_per_layer": [3.0],
        }
        for i, value in enumerate(bits)
    ]
    machine = {"cores": 2, "processor": "p", "device": "cpu", "jax": "0", "moe_jax": "0", "load": 1}
    return {
        "recipe": recipe,
        "seed": seed,
        "training": {"cost": 2.0 if seed else 1.0, "seconds": 1.0},
        "machine": machine,
        "data": "",
        "seconds": 60.0,
        "rows": rows,
    }


def test_rows_are_paired_by_seed_with_the_reference(tmp_path):
    units = [
        unit("fixed", 0, [2.0, 2.1]),
        unit("fixed", 1, [3.0, 3.15]),
        unit("router_only", 0, [2.02]),
        unit("router_only", 1, [3.03]),
    ]
    results = write_results(declared("tiny", changed(seeds=[0, 1])), units, tmp_path)
    rows = {(r["recipe"], r["saving"]): r for r in results["rows"]}
    assert rows["fixed", 0.2]["relative"] == pytest.approx(0.05)
    assert rows["fixed", 0.2]["worst_file"] == pytest.approx(0.05)
    assert rows["router_only", 0.0]["relative"] == pytest.approx(0.01)
    # Equal in both seeds: the interval has no width.
    assert rows["router_only", 0.0]["relative_high"] == pytest.approx(0.01)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| fixed | x | +5.00 % (+5.00 to +5.00) |" in text
    assert (tmp_path / "results.png").stat().st_size > 1000
    # A reference without its seed leaves no row to compare with.
    alone = write_results(declared("tiny", TINY), units[2:], tmp_path / "alone")
    assert alone["rows"] == []


def test_rules_are_paired_with_the_blind_mix_at_the_same_saving(tmp_path):
    units = [unit("fixed", seed, [2.0, bits]) for seed, bits in ((0, 2.2), (1, 2.4))]
    for one, mixed in zip(units, (2.0, 2.0), strict=True):
        one["rows"].append({**one["rows"][1], "rule": "drop_lowest", "bits_per_byte": mixed})
    experiment = declared("tiny", changed(recipes={"fixed": {}}, seeds=[0, 1]))
    results = write_results(experiment, units, tmp_path)
    rows = {row["rule"]: row for row in results["rows"]}
    assert rows["top_p"]["mix"] == pytest.approx(0.15)
    assert rows["top_p"]["mix_high"] == pytest.approx(0.15 + 12.706 * 0.05, rel=1e-3)
    assert "mix" not in rows["drop_lowest"]
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| x | +15.00 % (" in text.partition("Change against the mix of k and k-1")[2]


def test_a_difficulty_experiment_correlates_k_with_losses(tmp_path):
    fields = {"kind": "difficulty", "recipes": {"fixed": {}}, "rules": ["top_p", "drop_lowest"]}
    experiment = declared("tiny", changed(**fields))
    rows = run_experiment(experiment, tmp_path, progress=False)["rows"]
    assert [(r["rule"], r["layer"]) for r in rows] == [
        ("top-p", 0),
        ("mix of k and k-1 (control)", 0),
    ]
    assert all(abs(r[name]) <= 1 for r in rows for name in MEASURES["difficulty"].values)
    assert "| top-p | 0 | 1 |" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_a_cost_experiment_says_what_activations_become(tmp_path):
    fields = {"kind": "cost", "recipes": {"fixed": {}}, "rules": ["top_p"]}
    experiment = declared("tiny", changed(**fields))
    (row,) = run_experiment(experiment, tmp_path, progress=False)["rows"]
    assert row["activations"] == pytest.approx(0.35, abs=0.15)
    # The router's operations do not fall, so the share of all that falls is smaller.
    assert 0 < row["flops"] < row["activations"]
    assert "| top-p | 35% | 1 |" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_correlations_are_those_of_scipy_and_of_residuals():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4, 300)
    a = rng.integers(1, 5, 300) + group
    b = rng.normal(size=300) + group
    assert correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    ranks = [rankdata(v) for v in (a, b, group)]
    line = np.stack([ranks[2], np.ones(300)], axis=1)
    rest = [v - line @ np.linalg.lstsq(line, v, rcond=None)[0] for v in ranks[:2]]
    want = np.corrcoef(*rest)[0, 1]
    assert partial_correlation(a, b, group) == pytest.approx(want)
    # Both follow the group and nothing else does.
    assert correlation(a, b) > 0.3
    assert abs(correlation_within(a, b, group)) < 0.15


def test_a_drift_experiment_reads_texts_with_and_without_steering(tmp_path):
    (tmp_path / "digits.txt").write_text("0123456789 " * 200, encoding="utf-8")
    fields = {
        "kind": "drift",
        "recipes": {"fixed": {}},
        "rules": ["top_p"],
        "texts": ["code", str(tmp_path / "digits.txt")],
        "controllers": {"top_p": {"kp": 0.5, "ki": 0.5}},
        "fallback": {"band": 0.02, "decay": 0.0},
        "held_out_tokens": 1024,
    }
    results = run_experiment(declared("tiny", changed(**fields)), tmp_path / "out", progress=False)
    rows = {(row["variant"], Path(row["text"]).stem): row for row in results["rows"]}
    variants = ("as fitted", "controller", "fallback", "controller and fallback")
    assert list(rows) == [(variant, text) for variant in variants for text in ("code", "digits")]
    fitted, steered, watched = (rows[name, "digits"] for name in variants[:3])
    assert fitted["drift"] == pytest.approx(fitted["mean_k"] / (3 * 0.65) - 1)
    assert fitted["worst_window"] >= abs(fitted["drift"]) - 1e-6
    # Ten digits over and over are no code: the mean leaves its target, and the trained rule takes over.
    assert abs(fitted["drift"]) > 0.05
    assert fitted["fallback"] == 0.0
    assert watched["fallback"] > 0.0
    assert watched["mean_k"] > steered["mean_k"]


def test_texts_of_a_drift_experiment_are_no_training_text():
    corpus = load_corpus()
    code, prose, reference = (drift_text(n, corpus) for n in ("code", "prose", "reference"))
    trained = {file.path for file in corpus.train}
    assert not trained & {file.path for file in code}
    assert part_of(REFERENCE) == "held_out"
    assert REFERENCE not in {file.path for file in code}
    for files in (prose, reference):
        text = b"".join(file.data.tobytes() for file in files)
        assert len(text) > 24_576
        # Sentences, not statements: many more full stops than assignments.
        assert text.count(b". ") > 2 * text.count(b" = ")
    with pytest.raises(DataError, match="expected code, prose, reference or the path"):
        drift_text("gone", corpus)


def test_layers_share_a_budget_by_what_their_outputs_change():
    config = LMConfig(**{**TINY["model"], "num_layers": 2})
    model = Model(
        config=config,
        params=init(config, jax.random.key(0)),
        routers=(config.router(),) * 2,
        states=init_states(config),
    )
    blocks = calibration_blocks(config, load_corpus(), tokens=512)
    (rule,) = find_rules(["min_p"])
    curves = change_curves(model, rule, blocks)
    assert all(len(c) == STEPS and c == sorted(c) and c[0] == 0 < c[-1] for c in curves.values())
    # A layer whose output hardly changes saves first; the other keeps its trained rule.
    steep = {0: [0.0, 1.0, 2.0], 1: [0.0, 9.0, 18.0]}
    routers, states = shared_rule(model, rule, steep, blocks, target_mean_k=2.5)
    assert isinstance(routers[1], TopK)
    assert float(states[0].fit.achieved_mean_k) == pytest.approx(2.0, abs=0.02)
