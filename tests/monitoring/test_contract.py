"""One list of names (M13, M14): whoever asks for a metric asks for one that the service exports."""

import re

import pytest

from deploy.verify import promql
from moe_jax.serving.errors import CODES
from moe_jax.serving.metrics.contract import CONTRACT

METRICS = {metric.name: metric for metric in CONTRACT}
# Of prometheus-client's own process collector; the two that the dashboard and the alerts ask for.
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
TARGET_LABELS = {"job", "instance", "namespace", "pod"}


def samples() -> dict[str, str]:
    """Every sample name that Prometheus sees -> the metric that it belongs to."""
    results = {}
    for metric in CONTRACT:
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        results |= {metric.name + ending: metric.name for ending in endings}
    return results


@pytest.mark.parametrize("who", list(promql.used_by()))
def test_names_are_the_contracts(who):
    asked = promql.used_by()[who]
    # A document may speak of a histogram by its name.
    names = set(samples()) | PROCESS | (set(METRICS) if who == "documents" else set())
    assert asked, who
    assert asked <= names, sorted(asked - names)


def test_the_document_has_every_metric_as_the_code_says_it():
    text = promql.DOCUMENTS[0].read_text()
    for metric in CONTRACT:
        labels = f"{{{','.join(metric.labels)}}}" if metric.labels else ""
        assert f"| `{metric.name}{labels}` | {metric.kind} | {metric.help} |" in text, metric.name


def expressions() -> list[str]:
    queries = [query for _, query in promql.panel_queries()]
    queries += [rule["expr"] for rule in promql.alerts().values()]
    return queries + list(promql.recordings().values())


@pytest.mark.parametrize("expression", expressions())
def test_labels_and_their_values_are_the_contracts(expression):
    for name, selector in re.findall(r"\b(moe_[a-z_]+)\{([^}]*)\}", expression):
        metric = METRICS[samples()[name]]
        for label, operator, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', selector):
            if label in TARGET_LABELS or "$" in value:
                continue
            assert label in metric.labels, f"{name} has no label {label}"
            names = metric.values or (tuple(CODES) if label == "code" else ())
            wanted = value.split("|") if "~" in operator else [value]
            assert not names or set(wanted) <= set(names), f"{name}{{{label}}}: {value}"


def test_every_exported_metric_is_on_the_dashboard():
    asked: set[str] = set()
    for _, query in promql.panel_queries():
        asked |= promql.metrics_in(query)
        for recorded in promql.recorded_in(query):
            asked |= promql.metrics_in(promql.recordings()[recorded])
    # Recording rules that use recording rules.
    for recorded in promql.recordings():
        asked |= promql.metrics_in(promql.recordings()[recorded])
    assert {samples().get(name) for name in asked} >= set(METRICS)


def test_the_error_ratio_counts_the_services_own_faults_and_no_other():
    ratio = promql.recordings()["moe:errors:ratio_rate5m"]
    [counted] = re.findall(r'moe_errors_total\{code=~"([^"]*)"', ratio)
    faults = {code for code, status in CODES.items() if status >= 500}
    # An instance that starts or stops refuses on purpose, and readiness keeps traffic from it.
    assert set(counted.split("|")) == faults - {"draining", "warming"}
