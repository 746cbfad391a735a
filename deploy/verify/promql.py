"""What the dashboard, the rules and the manifests ask of Prometheus, as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "monitoring" / "grafana-dashboard.json"
RECORDING = ROOT / "monitoring" / "recording-rules.yml"
ALERTS = ROOT / "monitoring" / "alerts.yml"
KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCUMENTS = [ROOT / "docs" / "operations.md"]

_DURATION = re.compile(r"(?<![\w.])(\d+)(ms|s|m|h|d)(?![\w])")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"')


def metrics_in(text: str) -> set[str]:
    """Names of the service's own metrics and of its process's in an expression or a document.

    >>> sorted(metrics_in('sum(rate(moe_requests_total{a="moe_not_me"}[5m])) / moe:requests:rate5m'))
    ['moe_requests_total']
    """
    bare = _STRINGS.sub('""', text)
    return set(re.findall(r"(?<![\w:.$/-])(?:moe_(?!jax\b)|process_)[a-z0-9_]+(?![\w:*(])", bare))


def recorded_in(text: str) -> set[str]:
    """Names of recording rules (level:metric:operation) in an expression.

    >>> recorded_in('moe:requests:rate5m{instance="a"} > 0')
    {'moe:requests:rate5m'}
    """
    return set(re.findall(r"\bmoe:[a-z0-9_]+:[a-z0-9_]+", _STRINGS.sub('""', text)))


def scaled(expression: str, factor: float) -> str:
    """The expression with every duration divided by ``factor``, so that an hour passes in a minute.

    Names of recording rules keep their windows: ``rate5m`` is a name and no duration.

    >>> scaled('rate(a[5m]) / avg_over_time(b[1h] offset 5m) > moe:c:rate5m', 30)
    'rate(a[10000ms]) / avg_over_time(b[120000ms] offset 10000ms) > moe:c:rate5m'
    """

    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[1]) * _SECONDS[match[2]] / factor
        return f"{max(1, round(1000 * seconds))}ms"

    return _DURATION.sub(shorter, expression)


def scaled_rules(file: Path, factor: float, interval: str) -> dict[str, Any]:
    """A rule file whose windows, offsets and ``for`` are shorter; thresholds stay as they are."""
    rules = yaml.safe_load(file.read_text())
    for group in rules["groups"]:
        group["interval"] = interval
        for rule in group["rules"]:
            rule["expr"] = scaled(rule["expr"], factor)
            if "for" in rule:
                rule["for"] = scaled(rule["for"], factor)
    return rules


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def recordings() -> dict[str, str]:
    groups = yaml.safe_load(RECORDING.read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def panel_queries() -> list[tuple[str, str]]:
    """Every query of the dashboard with the title of its panel."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


def filled(expression: str, *, instance: str = ".+", interval: str = "1m") -> str:
    """A panel's query as Grafana would send it with every instance chosen."""
    return expression.replace("$instance", instance).replace("$__rate_interval", interval)


def used_by() -> dict[str, set[str]]:
    """Who asks for which metrics: the contract that a live /metrics must keep."""
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
    [keda] = yaml.safe_load_all((KUBERNETES / "keda.yaml").read_text())
    asked = {
        "dashboard": [query for _, query in panel_queries()],
        "alerts": [rule["expr"] for rule in alerts().values()],
        "recording rules": list(recordings().values()),
        "autoscaler": [
            text
            for rule in adapter["rules"]["custom"]
            for text in rule.values()
            if isinstance(text, str)
        ],
        "KEDA": [t["metadata"].get("query", "") for t in keda["spec"]["triggers"]],
        "documents": [file.read_text() for file in DOCUMENTS if file.is_file()],
    }
    return {who: set().union(*map(metrics_in, texts)) for who, texts in asked.items()}
