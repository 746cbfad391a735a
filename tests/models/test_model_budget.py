"""A budget of a whole model: fitted by layer, resumed, saved, priced beside the controls, served."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint, save
from moe_jax.models import (
    compare,
    evaluate,
    fit_budget,
    load_budget,
    load_model,
    save_budget,
)
from moe_jax.models.text import TokenizedText

MODELS = Path(__file__).parents[1] / "goldens" / "models"
OLMOE = MODELS / "olmoe"


def text(seed: int, rows: int = 8, high: int = 96) -> TokenizedText:
    """Random tokens as two files; one row has padding."""
    ids = np.random.default_rng(seed).integers(0, high, (rows, 12)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    mask[-1, 8:] = False
    owner = (np.arange(rows) >= rows // 2).astype(np.int32)
    tokens = np.bincount(owner, mask.sum(axis=1)).astype(np.int64)
    return TokenizedText(
        input_ids=ids,
        mask=mask,
        file_index=owner,
        paths=("a.txt", "b.txt"),
        file_bytes=3 * tokens,
        file_tokens=tokens,
    )


FITTED_ON = text(0)


def fit(model=OLMOE, **options):
    options = {"rule": "MinP", "target_saving": 0.2, "batch_size": 4} | options
    return fit_budget(model, FITTED_ON.input_ids, FITTED_ON.mask, **options)


@pytest.fixture(scope="module")
def budget():
    return fit()


def test_every_layer_is_fitted_to_the_target_on_what_reaches_it(budget):
    assert set(budget.routers) == {0, 1}
    for state in budget.states.values():
        assert float(state.fit.achieved_mean_k) == pytest.approx(1.6, abs=0.02)
        assert int(state.fit.token_count) == FITTED_ON.mask.sum()
    result = compare(OLMOE, FITTED_ON, budget, batch_size=4).evaluations["budget"]
    # The same text, evaluated: later layers saw the fitted rules of earlier ones in the fit too.
    assert result.mean_k == pytest.approx(1.6, abs=0.02)


def test_an_interrupted_fit_continues_with_the_next_layer(tmp_path, budget):
    class Interrupted(Exception):
        pass

    def stop(done, total, word):
        raise Interrupted

    with pytest.raises(Interrupted):
        fit(work=tmp_path / "work", progress=stop)
    with pytest.raises(ValueError, match="another"):
        fit(work=tmp_path / "work", target_saving=0.3)
    seen = []
    again = fit(work=tmp_path / "work", progress=lambda done, *_: seen.append(done))
    assert seen == [2], "the first layer is not passed again"
    assert not (tmp_path / "work").exists()
    for left, right in zip(
        jax.tree.leaves(dict(budget.states)), jax.tree.leaves(dict(again.states)), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    # Other weights of the same config are another model.
    model = load_model(OLMOE)
    with pytest.raises(Interrupted):
        fit(model, work=tmp_path / "memory", progress=stop)
    scale = model.ends["norm"]["scale"]
    scale.set_value(2 * scale.get_value())
    with pytest.raises(ValueError, match="another"):
        fit(model, work=tmp_path / "memory")


def test_a_saved_budget_is_the_same_and_knows_its_model(tmp_path, budget):
    folder = save_budget(budget, tmp_path / "budget")
    again = load_budget(folder)
    assert dict(again.routers) == dict(budget.routers)
    assert dict(again.target_mean_k) == dict(budget.target_mean_k)
    for left, right in zip(
        jax.tree.leaves(dict(budget.states)), jax.tree.leaves(dict(again.states)), strict=True
    ):
        np.testing.assert_array_equal(left, right)
    with pytest.raises(ValueError, match="layer 0: expected the router"):
        compare(MODELS / "mixtral", FITTED_ON, again)
    save(tmp_path / "other", Checkpoint(params={"w": np.ones(1, np.float32)}))
    with pytest.raises(CheckpointError, match="moe-jax budget"):
        load_budget(tmp_path / "other")


def test_a_budget_serves_routers_and_with_the_models_experts_outputs(tmp_path, budget):
    stored = open_checkpoint(save_budget(budget, tmp_path / "routers")).layer("layer_1")
    assert stored.experts is None
    whole = open_checkpoint(save_budget(budget, tmp_path / "whole", model=OLMOE)).layer("layer_1")
    assert whole.experts is not None
    assert whole.layer is not None
    assert set(whole.layer) == {"router", "experts"}
    np.testing.assert_array_equal(whole.params["kernel"], stored.params["kernel"])


@pytest.mark.parametrize("share", ["measured", "profile"])
def test_layers_share_a_target_where_it_changes_least(share):
    shared = fit(share=share, steps=3)
    means = list(shared.target_mean_k.values())
    assert np.mean(means) == pytest.approx(1.6, abs=1e-6)
    assert means[0] != means[1]
    with pytest.raises(ValueError, match="between 1 and the trained k"):
        fit(share=share, steps=2, target_saving=None, target_mean_k=2.0)


def test_a_comparison_is_the_evaluation_of_each_rule_and_controls_save_as_much(budget):
    held_out, other = text(1), text(2, high=24)
    actual = compare(OLMOE, held_out, budget, controls=True, other_text=other, batch_size=4)
    plain = evaluate(OLMOE, held_out.input_ids, held_out.mask, batch_size=4)
    ruled = evaluate(
        OLMOE, held_out.input_ids, held_out.mask, change_block=budget.block, batch_size=4
    )
    assert actual.evaluations["trained"].loss == pytest.approx(plain.loss, abs=1e-6)
    assert actual.evaluations["budget"].loss == pytest.approx(ruled.loss, abs=1e-6)
    assert actual.evaluations["budget"].experts_per_token == ruled.experts_per_token
    apart = evaluate(OLMOE, other.input_ids, other.mask, batch_size=4)
    assert actual.other["trained"].loss == pytest.approx(apart.loss, abs=1e-6)
    report = actual.report()
    rows = {row["rule"]: row for row in report["rules"]}
    assert set(rows) == {"trained", "budget", "mix of k and k-1", "random drop"}
    assert "sequences" in report["interval"]
    for name, row in rows.items():
        if name == "trained":
            continue
        assert row["relative_low"] <= row["relative"] <= row["relative_high"]
        # Chance on 92 tokens is coarse; the mean that is asked for is the budget's.
        assert row["mean_k"] == pytest.approx(rows["budget"]["mean_k"], abs=0.2)
        used = row["expert_flops_used"] / rows["trained"]["expert_flops_used"]
        assert used < 1
        assert row["tails"]["worst_file"] in held_out.paths
    assert rows["budget"]["relative"] == pytest.approx(ruled.loss / plain.loss - 1, abs=1e-6)
    drift = {row["rule"]: row for row in report["drift"]}
    assert drift["trained"]["mean_k_drift"] == 0
    assert drift["budget"]["mean_k"] == actual.other["budget"].mean_k


def test_wrong_requests_are_named(budget):
    with pytest.raises(ValueError, match="share"):
        fit(share="even")
    with pytest.raises(ValueError, match="target"):
        fit(target_mean_k=1.5)
    with pytest.raises(ValueError, match="controls"):
        compare(OLMOE, FITTED_ON, controls=True)
    cut = dataclasses.replace(FITTED_ON, input_ids=FITTED_ON.input_ids[:, :9])
    with pytest.raises(ValueError, match="other_text"):
        compare(OLMOE, FITTED_ON, budget, other_text=cut)
