"""Rules by name: the catalogue, and rules of the user's own in every place that takes one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_jax import ExpertThreshold, MinP, Scoring, TopK
from moe_jax.cli import app
from moe_jax.config import load_config
from moe_jax.interop.rules import TokenTable
from moe_jax.lab.calibration import find_rules
from moe_jax.lab.data import load_corpus
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import load_model
from moe_jax.lab.rule_table import markdown, rule_to_train
from moe_jax.routers import catalog, registry
from moe_jax.routers.registry import known_kinds
from moe_jax.routers.twin import dynamic_twin
from moe_jax.serving.engine.weights import load_weights

ROOT = Path(__file__).parents[2]


def test_a_rule_of_the_users_own_is_named_by_its_module():
    [rule] = find_rules(["moe_jax.routers:MinP"])
    assert (rule.name, rule.label, rule.control) == ("MinP", "MinP", False)
    config = LMConfig(num_experts=4, k=2)
    assert rule.build(config, 1.5) == MinP(num_experts=4, max_k=2, scoring=config.scoring)
    for path, words in (
        ("moe_jax.nowhere:Rule", "module:Class of a rule that can be imported.*nowhere"),
        ("moe_jax.routers:Nothing", "module:Class of a rule that can be imported.*Nothing"),
        (".rules:Rule", "module:Class of a rule that can be imported.*relative import"),
        ("moe_jax.routers:Traits", "expected a routing rule at"),
    ):
        with pytest.raises(ValueError, match=words):
            find_rules([path])


def test_a_built_rule_takes_the_gate_and_scoring_of_the_trained_one():
    trained = TopK(num_experts=4, k=2, scoring=Scoring(norm="sum"))
    own = dynamic_twin(trained, MinP(num_experts=4, max_k=2, ratio=0.3), target_mean_k=1.5)
    assert own == MinP(num_experts=4, max_k=2, ratio=0.3, scoring=Scoring(norm="sum"))
    with pytest.raises(ValueError, match="expected one of num_experts=4"):
        dynamic_twin(trained, MinP(num_experts=8), target_mean_k=1.5)
    assert dynamic_twin(trained, ExpertThreshold, target_mean_k=1.5) == ExpertThreshold(
        num_experts=4, target_k=1.5, max_k=2, scoring=Scoring(norm="sum")
    )
    for rule in (3, int):
        with pytest.raises(TypeError, match="rule: expected a name, a routing rule or its class"):
            dynamic_twin(trained, rule, target_mean_k=1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected defaults for vocab_size of TokenTable"):
        dynamic_twin(trained, TokenTable, target_mean_k=1.5)


def test_a_model_is_trained_with_a_rule_by_name(tmp_path):
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_experts": 4, "k": 3, "d_ff": 8}
    model, out = tmp_path / "model.json", tmp_path / "trained"
    model.write_text(json.dumps({**sizes, "length": 16, "batch_size": 2}), encoding="utf-8")
    command = ["train", "--out", str(out), "--model", str(model), "--steps", "2", "--rule"]
    done = CliRunner().invoke(app, [*command, "moe_jax.routers:MinP"])
    assert done.exit_code == 0, done.output
    loaded = load_model(out)
    assert loaded.config.rule == MinP(num_experts=4, max_k=3)
    assert loaded.routers == (MinP(num_experts=4, max_k=3),)
    assert CliRunner().invoke(app, [*command, "Nothing"]).exit_code == 2


OWN_RULE = """
import dataclasses
from moe_jax import Gate, Scoring
from moe_jax.routers import NoState, TokenChoice

@dataclasses.dataclass(frozen=True, kw_only=True)
class OneLess(TokenChoice):
    num_experts: int
    min_k: int = 1
    max_k: int = 4
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    def init_state(self):
        return NoState()

    def select(self, params, state, slots, x, context):
        keep = slots.slot_probs >= slots.slot_probs[:, self.max_k - 2 : self.max_k - 1]
        return keep, self.weights(slots, keep)
"""


def test_what_an_own_rule_wrote_is_read_by_every_command_that_imports_it(tmp_path, monkeypatch):
    (tmp_path / "rules_of_mine.py").write_text(OWN_RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {"num_layers": 1, "d_model": 16, "num_heads": 2, "num_experts": 4, "k": 3, "d_ff": 8}
    model, own = tmp_path / "model.json", tmp_path / "own"
    model.write_text(json.dumps({**sizes, "length": 16, "batch_size": 2}), encoding="utf-8")
    train = ["train", "--out", str(own), "--model", str(model), "--steps", "2"]
    done = CliRunner().invoke(app, [*train, "--rule", "rules_of_mine:OneLess"])
    assert done.exit_code == 0, done.output
    assert "next: moe-jax --import rules_of_mine evaluate" in done.stdout

    def forget():  # as a new process, which has not imported the rule
        sys.modules.pop("rules_of_mine", None)
        registry._registered.pop("OneLess", None)

    for command in (
        ["inspect", str(own)],
        ["evaluate", str(own), "--limit", "64"],
        ["export", str(own), "--out", str(tmp_path / "backup")],
    ):
        forget()
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2, command
        said = " ".join(refused.stderr.split())
        assert "'OneLess' of the module rules_of_mine, which is not imported" in said, command
        assert "Write moe-jax --import rules_of_mine before" in said, command
        done = CliRunner().invoke(app, ["--import", "rules_of_mine", *command])
        assert done.exit_code == 0, done.output
    assert load_weights(load_config(env={}, checkpoint=str(own))).router.max_k == 3
    forget()
    refused = CliRunner().invoke(app, ["--import", "rules_of_nobody", "inspect", str(own)])
    assert refused.exit_code == 2
    assert "expected a module that can be imported" in " ".join(refused.stderr.split())


def test_a_misspelt_rule_names_the_nearest_and_the_way_to_an_own_one():
    for name in ("Topp", "topp"):
        with pytest.raises(ValueError, match=r"Did you mean TopP.*module:Class"):
            rule_to_train(LMConfig(), name)
    with pytest.raises(ValueError, match=r"Known: .*TopAny"):
        rule_to_train(LMConfig(), "Nothing")


def test_every_rule_of_the_library_is_in_the_catalogue_with_its_source():
    entries = catalog()
    assert set(entries) == set(known_kinds())
    for name, entry in entries.items():
        if entry.module.startswith("moe_jax."):
            assert entry.source, f"{name}: add a line to _SOURCES in moe_jax/routers/catalog.py"
            assert entry.golden, name
            assert entry.summary, name


def test_the_command_shows_rules_and_trains_one(tmp_path):
    shown = CliRunner().invoke(app, ["rules", "--json"])
    assert shown.exit_code == 0, shown.output
    assert {"TopP", "ZeroExperts"} <= {row["rule"] for row in json.loads(shown.stdout)["rules"]}
    own = ["rules", "--rule", "moe_jax.routers:TopK", "--smoke", "--steps", "12", "--json"]
    trained = CliRunner().invoke(app, own)
    assert trained.exit_code == 0, trained.output
    [row] = json.loads(trained.stdout)["rules"]
    assert row["outcome"] == "trains"
    assert row["last"] < row["first"]
    # A second table in a file goes on where the first stopped: the rule is not trained again.
    file = tmp_path / "rules.json"
    kept = {**row, "measured": row["measured"], "last": 0.5}
    other = {"rule": "Another", "outcome": "trains"}
    settings = {"steps": 12, "seed": 0, "data": load_corpus().describe()["fingerprint"]}
    table = {"settings": settings, "rules": [other, kept]}
    file.write_text(json.dumps(table), encoding="utf-8")
    again = CliRunner().invoke(app, [*own, "--rule", "TokenTable", "--out", str(file)])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["rules"][0]["last"] == 0.5
    table = json.loads(file.read_text(encoding="utf-8"))
    assert [row["rule"] for row in table["rules"]] == ["Another", "TokenTable", "TopK"]
    assert table["settings"] == settings
    # Rows of other settings stay as they are: a table has one setting.
    before = file.read_text(encoding="utf-8")
    longer = ["rules", "--rule", "TokenTable", "--smoke", "--steps", "13", "--out", str(file)]
    refused = CliRunner().invoke(app, longer)
    assert refused.exit_code == 2
    assert "expected a table of steps=13" in " ".join(refused.stderr.split())
    assert file.read_text(encoding="utf-8") == before
    file.write_text("[]", encoding="utf-8")
    assert CliRunner().invoke(app, [*own, "--out", str(file)]).exit_code == 2
    refused = CliRunner().invoke(app, ["rules", "--rule", "Nothing"])
    assert refused.exit_code == 2


def test_the_page_has_the_stored_table_of_rules():
    stored = ROOT / "benchmarks" / "results" / "rules_smoke.json"
    rows = json.loads(stored.read_text(encoding="utf-8"))["rules"]
    assert markdown(rows) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_smoke_training_leaves_out_rules_that_read_their_model():
    command = ["rules", "--rule", "TokenTable", "--rule", "DepthRouter", "--smoke", "--json"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    rows = json.loads(run.stdout)["rules"]
    assert [row["outcome"] for row in rows] == ["skipped", "skipped"]
    assert [row["reason"] for row in rows] == [
        "reads token_ids of its model",
        "reads router_states of its model",
    ]
