"""Alerts (A01–A06): each fires and clears, by promtool; a changed rule fails those tests."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.verify import promql

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool did not run: apt-get install prometheus",
)


def promtool(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )


@needs_promtool
def test_prometheus_takes_its_configuration_and_rules():
    for name in ("prometheus.yml", "prometheus.compose.yml"):
        done = promtool("check", "config", name, folder=MONITORING)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_and_clears():
    done = promtool("test", "rules", "tests/rules_test.yml", folder=MONITORING)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_that_it_fires_and_one_that_it_does_not():
    tests = yaml.safe_load((MONITORING / "tests" / "rules_test.yml").read_text())["tests"]
    fires: dict[str, set[bool]] = {}
    for case in (c for test in tests for c in test["alert_rule_test"]):
        fires.setdefault(case["alertname"], set()).add(bool(case.get("exp_alerts")))
    assert fires == {name: {True, False} for name in promql.alerts()}


# The guide's five thresholds, and what must not change without a test that notices.
MUTATIONS = [
    ("MoeHighErrorRate", "> 0.05", "> 0.5"),
    ("MoeHighErrorRate", "> 0.05", "> 0.03"),
    ("MoeHighErrorRate", "> 0.05", "< 0.05"),
    ("MoeHighLatency", "p95_5m > 0.5", "p50_5m > 0.8"),
    ("MoeHighLatency", "> 0.5", "> 5"),
    ("MoePoorLoadBalance", "< 0.5", "< 0.05"),
    ("MoePoorLoadBalance", "and on (job, instance) moe:tokens:rate5m > 0", ""),
    ("MoeMemorySpike", "> 1.5", "> 2.5"),
    ("MoeMemorySpike", "and on (job, instance) moe_build_info", ""),
    ("MoeCircuitOpen", "== 1 or", "== 2 or"),
    ("MoeCircuitOpen", "> 2", "> 20"),
    # Its Enum would have named the label after the metric: an alert on that never fires.
    ("MoeCircuitOpen", 'state="open"', 'moe_circuit_state="open"'),
    ("MoeBudgetDrift", "abs(moe_budget_drift_ratio - 1)", "(moe_budget_drift_ratio - 1)"),
    ("MoeBudgetDrift", "> 0.15", "> 0.05"),
    ("MoeInstanceSkew", "> 1.5", "> 1.9"),
    ("MoeCacheLoss", "< 0.5 *", "< 0.05 *"),
    ("MoeCacheLoss", "> 0.2", "> 0.001"),
    ("MoeInstanceDown", 'job=~"dynamic-moe-router.*"', 'job=~".*"'),
]


def mutated(text: str, alert: str, old: str, new: str) -> str:
    start = text.index(f"- alert: {alert}\n")
    end = text.find("- alert: ", start + 1)
    rule = text[start : end if end > 0 else len(text)]
    assert old in rule, f"{alert} has no {old!r} to change"
    return text[:start] + rule.replace(old, new) + text[start + len(rule) :]


def survives(tmp_path: Path, name: str, text: str, alerts: set[str]) -> bool:
    """Whether the tests of these alerts still pass with one file of rules replaced."""
    for rules in ("alerts.yml", "recording-rules.yml"):
        shutil.copy(MONITORING / rules, tmp_path)
    (tmp_path / name).write_text(text)
    tests = yaml.safe_load((MONITORING / "tests" / "rules_test.yml").read_text())
    tests["rule_files"] = ["recording-rules.yml", "alerts.yml"]
    tests["tests"] = [
        test
        for test in tests["tests"]
        if alerts & {case["alertname"] for case in test["alert_rule_test"]}
    ]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests))
    return promtool("test", "rules", "rules_test.yml", folder=tmp_path).returncode == 0


@needs_promtool
@pytest.mark.parametrize(("alert", "old", "new"), MUTATIONS)
def test_a_changed_alert_fails_its_tests(tmp_path, alert, old, new):
    text = mutated((MONITORING / "alerts.yml").read_text(), alert, old, new)
    assert not survives(tmp_path, "alerts.yml", text, {alert})


@needs_promtool
@pytest.mark.parametrize("alert", list(promql.alerts()))
def test_an_alert_that_does_not_wait_fails_its_tests(tmp_path, alert):
    text = (MONITORING / "alerts.yml").read_text()
    wait = promql.alerts()[alert]["for"]
    text = mutated(text, alert, f"for: {wait}", "for: 0s")
    assert not survives(tmp_path, "alerts.yml", text, {alert})


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "old", "new"),
    [
        ("MoeHighErrorRate", 'code=~"internal|', 'code=~".*|'),
        ("MoeHighErrorRate", "or moe:requests:rate5m * 0", ""),
        ("MoeHighErrorRate", "record: moe:errors:ratio_rate5m", "record: moe:errors:ratio"),
        ("MoeHighLatency", "histogram_quantile(0.95,", "histogram_quantile(0.5,"),
        ("MoeCacheLoss", '"hit|coalesced"', '"hits"'),
        ("MoeCacheLoss", 'result!="bypass"', 'result!="miss"'),
        ("MoeInstanceSkew", "max by (job)", "min by (job)"),
    ],
)
def test_a_changed_recording_rule_fails_an_alerts_test(tmp_path, alert, old, new):
    text = (MONITORING / "recording-rules.yml").read_text()
    assert old in text
    assert not survives(tmp_path, "recording-rules.yml", text.replace(old, new), {alert})


def test_alerts_and_dashboard_use_only_recorded_names():
    recorded = set(promql.recordings())
    asked = [rule["expr"] for rule in promql.alerts().values()]
    asked += [query for _, query in promql.panel_queries()]
    for expression in asked:
        assert promql.recorded_in(expression) <= recorded, expression


def test_every_alert_has_a_runbook():
    text = (ROOT / "docs" / "operations.md").read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for name, rule in promql.alerts().items():
        file, anchor = rule["annotations"]["runbook"].split("#")
        assert file == "docs/operations.md"
        assert anchor == name.lower()
        assert anchor in headings, f"{name} has no section in {file}"


def test_the_guides_five_alerts_with_its_thresholds():
    expressions = {name: rule["expr"] for name, rule in promql.alerts().items()}
    assert "> 0.05" in expressions["MoeHighErrorRate"]
    assert "p95_5m > 0.5" in expressions["MoeHighLatency"]
    assert "moe_load_balance_score < 0.5" in expressions["MoePoorLoadBalance"]
    assert "process_resident_memory_bytes" in expressions["MoeMemorySpike"]
    assert 'moe_circuit_state{state="open"} == 1' in expressions["MoeCircuitOpen"]


def test_shorter_windows_are_valid_rules_with_the_same_thresholds(tmp_path):
    rules = promql.scaled_rules(MONITORING / "alerts.yml", 30, "1s")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    for before, after in zip(promql.alerts().values(), rules["groups"][0]["rules"], strict=True):
        assert re.findall(r"[<>]=? [\d.]+", before["expr"]) == re.findall(
            r"[<>]=? [\d.]+", after["expr"]
        )
    if shutil.which("promtool") is None:
        pytest.skip("promtool did not run: apt-get install prometheus")
    done = promtool("check", "rules", "rules.yml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
