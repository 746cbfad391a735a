"""Budgets after the fact: fair, paired, calibrated, and the same in a fresh process."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

import moe_jax
from moe_jax.checkpoint import CheckpointError, open_checkpoint
from moe_jax.lab import calibration, demo, frontier, model_files, model_report, seeds
from moe_jax.lab import language_model as model_of
from moe_jax.lab import training as lm
from moe_jax.lab.data import load_corpus
from moe_jax.lab.lm_config import LMConfig
from moe_jax.models.confidence import avoided_share, paired_bootstrap

TINY = LMConfig(
    num_layers=2,
    d_model=32,
    num_heads=2,
    num_experts=8,
    k=4,
    d_ff=16,
    length=32,
    batch_size=8,
    learning_rate=1e-2,
    balance_rate=1e-3,
)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def source(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("lm") / "model"
    return lm.train(TINY, path, 30, 0, False, corpus=corpus)[0]


@pytest.fixture(scope="module")
def model(source):
    return model_files.load_model(source)


@pytest.fixture(scope="module")
def fitting_text(corpus):
    return calibration.calibration_blocks(TINY, corpus, tokens=4096)


@pytest.fixture(scope="module")
def held_out(corpus):
    return frontier.held_out_blocks(TINY, corpus, tokens=4096)


def test_the_trained_rule_costs_exactly_nothing(model, held_out):
    base = frontier.evaluate(model, held_out)
    # Rebuilt, not the same object: equal by value is what counts.
    again = frontier.evaluate(model, held_out, routers=(TINY.router(),) * 2, states=model.states)
    change = paired_bootstrap(again.nats_per_file, base.nats_per_file, base.bytes_per_file)
    assert set(change.values()) == {0.0}
    assert base.mean_k == TINY.k
    assert base.bytes_per_file.sum() == held_out.num_tokens


def test_evaluation_equals_the_forward_pass(model, held_out):
    blocks = held_out.take(8)
    actual = frontier.evaluate(model, blocks)
    forward = jax.jit(model_of.forward, static_argnums=0)
    out = forward(TINY, model.params, model.states, blocks.inputs, mask=blocks.mask)
    nats = np.asarray(model_of.nats(out.logits, blocks.targets))[blocks.mask].sum()
    assert actual.nats_per_file.sum() == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("rule", calibration.RULES)
def test_a_fitted_rule_reaches_its_budget_layer_by_layer(model, fitting_text, rule):
    target = 2.8
    routers = (calibration.RULES[rule].build(TINY, target),) * 2
    states = calibration.fit_layers(model, routers, fitting_text, target)
    actual = frontier.evaluate(model, fitting_text, routers=routers, states=states)
    # A control decides by chance, and bytes in equal context share their lot.
    near = 0.03 if calibration.RULES[rule].control else 0.01
    for layer, mean in enumerate(actual.mean_k_per_layer):
        assert mean == pytest.approx(target, rel=near)
        fit = states[layer].fit
        assert float(fit.achieved_mean_k) == pytest.approx(mean, abs=2e-3)
        assert int(fit.token_count) == fitting_text.num_tokens
    assert actual.histogram.sum(axis=1) == pytest.approx(1.0)
    assert actual.counts.max() <= TINY.k


@pytest.mark.parametrize("rule", ["dynamic_k_entropy", "dynamic_k_margin", "top_p", "min_p"])
def test_on_real_activations_every_k_is_in_use(model, fitting_text, held_out, rule):
    routers = (calibration.RULES[rule].build(TINY, 2.8),) * 2
    states = calibration.fit_layers(model, routers, fitting_text, 2.8)
    actual = frontier.evaluate(model, held_out, routers=routers, states=states)
    assert (actual.histogram[:, 0] == 0).all()
    used = (actual.histogram[:, 1:] > 0).sum(axis=1)
    # Thresholds on calibrated difficulty promise every k; a cut on probabilities only that k varies.
    assert (used >= (TINY.k if rule.startswith("dynamic_k") else 2)).all()


def test_the_trained_selection_bias_is_carried_over(model, fitting_text):
    bias = np.linspace(-0.1, 0.1, 8, dtype=np.float32)
    states = tuple(dataclasses.replace(s, expert_bias=s.expert_bias + bias) for s in model.states)
    biased = dataclasses.replace(model, states=states)
    routers = (calibration.RULES["top_p"].build(TINY, 3.0),) * 2
    fitted = calibration.fit_layers(biased, routers, fitting_text, 3.0)
    np.testing.assert_array_equal(fitted[1].expert_bias, states[1].expert_bias)


def test_calibrate_saves_rules_with_their_provenance(tmp_path, source, corpus):
    path, report = calibration.calibrate(
        source,
        tmp_path / "c",
        ["TopP", "dynamic_k_margin"],
        target_saving=0.25,
        tokens=2048,
        progress=False,
        corpus=corpus,
    )
    assert report["rules"] == ["top_p", "dynamic_k_margin"]
    assert report["target_mean_k"] == 3.0
    one = model_files.load_model(path)
    fit = one.states[1].fit.describe()
    assert fit == report["fits"]["top_p"][1]
    assert fit["achieved_mean_k"] == pytest.approx(3.0, rel=0.01)
    # The first rule has a name too, for a variant and for the router of a service.
    assert model_files.load_model(path, "top_p").routers == one.routers
    assert open_checkpoint(path).router_name("top_p") == "layer_0"
    with pytest.raises(ValueError, match="one of dynamic_k_margin, trained, top_p, got 'min_p'"):
        model_files.load_model(path, "min_p")
    with pytest.raises(
        ValueError, match="one of top_p, layer_0, layer_1, dynamic_k_margin, trained"
    ):
        open_checkpoint(path).router_name("min_p")
    assert model_files.load_model(path, "trained").routers == (TINY.router(),) * 2
    assert model_files.load_model(path, "dynamic_k_margin").routers[0].difficulty == "router_margin"
    # What was calibrated once can be calibrated again, from the trained rule.
    again, _ = calibration.calibrate(
        path, tmp_path / "d", target_mean_k=2.5, tokens=2048, progress=False, corpus=corpus
    )
    assert model_files.load_model(again).config == TINY


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rule": "topp", "target_saving": 0.1}, "rule: expected some of top_p.*got topp"),
        ({}, "exactly one of target_mean_k and target_saving"),
        ({"target_saving": 0.1, "target_mean_k": 3.0}, "exactly one of"),
        ({}, "--target-mean-k, --target-saving"),
        ({"target_saving": 1.5}, r"target_saving: expected above 0 and below 0\.75 .*got 1\.5"),
        ({"target_saving": -0.2}, r"target_saving: expected above 0 .*got -0\.2"),
        ({"target_mean_k": 5.0}, "strictly between min_k=1 and max_k=4, got 5.0"),
    ],
)
def test_calibrate_refuses_what_makes_no_sense(tmp_path, source, corpus, wrong, says):
    with pytest.raises(ValueError, match=says):
        calibration.calibrate(source, tmp_path / "c", progress=False, corpus=corpus, **wrong)


def test_the_whole_demo(tmp_path, corpus):
    settings = demo.Settings(
        model=TINY,
        steps=80,
        rules=("top_p", "dynamic_k_entropy", "drop_lowest", "drop_random"),
        savings=(0.1, 0.35),
        calibration_tokens=2048,
        held_out_tokens=4096,
    )
    console = Console(record=True, width=120, file=io.StringIO())
    results = demo.run(tmp_path / "out", console=console, settings=settings, corpus=corpus)
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == results
    # The trained rule and eight fitted ones, two layers each, by another interpreter.
    assert results["fresh_process"] == {"compared": 18, "tokens": 256, "equal": True}
    assert len(results["rows"]) == 8
    for row in results["rows"]:
        near = 0.03 if row["control"] else 0.01
        assert row["calibrated_mean_k"] == pytest.approx(row["target_mean_k"], rel=near)
        assert row["relative_low"] <= row["relative"] <= row["relative_high"]
    for name in results["pictures"]:
        assert (out / name).stat().st_size > 5_000
    shown = console.export_text()
    assert "Equal quality" in shown
    assert "Next: moe-jax" in shown


def test_a_share_of_a_controls_loss_has_an_interval_over_files_and_seeds():
    draw = np.random.default_rng(0)
    control = 2.0 + 0.5 * draw.normal(size=(3, 60))
    rule = 0.5 * control + 0.1 * draw.normal(size=(3, 60))
    share, low, high = avoided_share(rule, control)
    assert low < share < high
    assert share == pytest.approx(0.5, abs=0.03)
    # The same draw for both: the interval is far narrower than that of either alone.
    assert high - low < 0.06
    apart = rule + np.array([[-0.5], [0.0], [0.5]])
    wide = avoided_share(apart, control)
    assert wide[2] - wide[1] > 3 * (high - low)


def test_a_control_that_may_cost_nothing_leaves_the_interval_open():
    control = np.array([3.0, -2.5, 1.0, -1.0, 0.2])
    assert avoided_share(0.1 * control, control)[1] == -np.inf


def write_demo(out, seed, **changed):
    """The files of a demo with one rule and one control, without the demo."""
    draw = np.random.default_rng(seed)
    size = np.full(40, 100.0)
    before = 200.0 + draw.normal(size=40)
    rises = {"top_p-35": 1.0, "drop_lowest-35": 2.0}
    after = {name: before + rise + 0.3 * draw.normal(size=40) for name, rise in rises.items()}
    out.mkdir(parents=True)
    np.savez(out / "measurements.npz", bytes=size, trained=before, **after)
    rows = [
        {
            "variant": name,
            "rule": name.removesuffix("-35"),
            "label": name,
            "control": name.startswith("drop"),
            "saving": 0.35,
            "achieved_saving": 0.35,
            "drift": 0.0,
            "relative": float(nats.sum() / before.sum() - 1),
            "recovered": {} if name.startswith("drop") else {"drop_lowest": 0.5},
        }
        for name, nats in after.items()
    ]
    results = {
        "library_version": "1",
        "quick": False,
        "seed": seed,
        "model": {},
        "data": {},
        "calibration_tokens": 1,
        "held_out_files": 40,
        "trained": {"k": 4, "bits_per_byte": 2.9},
        "seconds": {"total": 1.0},
        "rows": rows,
        **changed,
    }
    demo.write_results(out, results)


def test_the_demo_over_seeds_pools_and_refuses_to_lose_a_full_one(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda out, seed, **rest: write_demo(out, seed))
    console = Console(record=True, width=120, file=io.StringIO())
    results = seeds.run_seeds(tmp_path, [0, 1, 2], console=console)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    [row] = [row for row in results["rows"] if row["rule"] == "top_p"]
    assert row["relative_low"] < row["relative"] < row["relative_high"]
    assert row["relative"] == pytest.approx(np.mean(row["relative_by_seed"]), rel=0.01)
    low, high = row["avoided_interval"]["drop_lowest"]
    assert low < row["avoided"]["drop_lowest"] < high
    assert row["avoided"]["drop_lowest"] == pytest.approx(0.5, abs=0.1)
    assert "seeds 0, 1, 2" in console.export_text()
    assert (tmp_path / "frontier.png").stat().st_size > 5_000
    for folder in (tmp_path, tmp_path / "seed_0"):
        with pytest.raises(CheckpointError, match="results of a full demo"):
            demo.check_place(folder, quick=True)
    demo.check_place(tmp_path, quick=False)
    with pytest.raises(ValueError, match="at least two different numbers"):
        seeds.run_seeds(tmp_path, [0, 0])
    write_demo(tmp_path / "other", 3, model={"k": 2})
    with pytest.raises(ValueError, match="differ in their seed only, got different model"):
        seeds.pool([tmp_path / "seed_0", tmp_path / "other"])


def test_a_demo_over_seeds_goes_on_with_what_an_equal_run_finished(tmp_path, monkeypatch, corpus):
    settings = demo.Settings(model=TINY, steps=3)
    same = {
        "library_version": moe_jax.__version__,
        "model": TINY.to_json(),
        "data": corpus.describe(),
        "training": {"steps": 3},
    }
    ran = []

    def run(out, seed, **rest):
        ran.append(seed)
        shutil.rmtree(out, ignore_errors=True)
        write_demo(out, seed, **same)

    monkeypatch.setattr(demo, "run", run)
    write_demo(tmp_path / "seed_0", 0, **same)
    write_demo(tmp_path / "seed_1", 1, **{**same, "training": {"steps": 2}})
    for seed in (0, 1):  # as a demo writes them: measurements last
        os.utime(tmp_path / f"seed_{seed}" / "measurements.npz")
    console = Console(record=True, width=120, file=io.StringIO())
    options = {"console": console, "settings": settings, "corpus": corpus}
    seeds.run_seeds(tmp_path, [0, 1, 2], resume=True, **options)
    assert ran == [1, 2]
    assert "seed 0 (1 of 3), kept from an earlier run" in console.export_text()
    seeds.run_seeds(tmp_path, [0, 1], **options)
    assert ran == [1, 2, 0, 1]


def test_a_checkpoint_is_measured_with_its_controls_and_tails(tmp_path, source, corpus):
    fitted, _ = calibration.calibrate(
        source, tmp_path / "c", "MinP", target_saving=0.25, tokens=2048, progress=False
    )
    report = model_report.evaluate_checkpoint(fitted, corpus=corpus, tokens=4096, progress=False)
    assert report["interval"][0] < report["bits_per_byte"] < report["interval"][1]
    assert report["change"]["relative"] == pytest.approx(
        report["bits_per_byte"] / report["trained"]["bits_per_byte"] - 1, abs=1e-9
    )
    means = [layer["mean_k"] for layer in report["layers"]]
    assert [layer["target_mean_k"] for layer in report["layers"]] == [3.0, 3.0]
    for control in report["controls"].values():
        assert control["mean_k"] == pytest.approx(np.mean(means), rel=0.03)
    assert set(report["controls"]) == {"drop_lowest", "drop_random"}
    k = report["tails"]["mean_k_of_sequences"]
    assert k["p5"] <= k["median"] <= k["p95"] <= k["p99"] <= k["max"] <= TINY.k
    files = report["tails"]["change_of_files"]
    assert files["median"] <= files["p95"] <= files["max"]
    json.dumps(report, allow_nan=False)
    plain = model_report.evaluate_checkpoint(source, corpus=corpus, tokens=4096, progress=False)
    assert plain["bits_per_byte"] == pytest.approx(report["trained"]["bits_per_byte"])
    assert (plain["controls"], plain["change"]) == ({}, {})


def test_the_page_has_every_byte_once(model, corpus):
    data = corpus.held_out[3].data[:150]
    choices = demo.choose_experts(model, data)
    assert choices.shape == (2, data.size, TINY.k)
    assert ((choices >= 0) & (choices < TINY.num_experts)).all()


def test_a_character_of_several_bytes_is_shown_once():
    assert demo.byte_characters("a\u00e9".encode() + b"\xff") == ["a", "\u00e9", "", "\ufffd"]
