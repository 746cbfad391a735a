"""The dashboard (G01–G03): importable, every query well formed, every row that was promised."""

import json
import re

import pytest

from deploy.verify import promql

DASHBOARD = json.loads(promql.DASHBOARD.read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_import_asks_for_the_data_source_and_provisioning_finds_one():
    [given] = DASHBOARD["__inputs"]
    assert (given["name"], given["pluginId"]) == ("DS_PROMETHEUS", "prometheus")
    sources = {
        json.dumps(part["datasource"], sort_keys=True)
        for panel in PANELS
        for part in (panel, *panel["targets"])
    }
    assert sources == {'{"type": "prometheus", "uid": "${DS_PROMETHEUS}"}'}
    # A provisioned dashboard is not asked for its inputs: there the variable of the same name answers.
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["DS_PROMETHEUS"]["type"] == "datasource"
    required = {entry["id"] for entry in DASHBOARD["__requires"] if entry["type"] == "panel"}
    assert required == {panel["type"] for panel in PANELS}


def test_rows_and_variables():
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Traffic",
        "Latency",
        "Experts",
        "Budget drift",
        "Cache",
        "Circuit breaker",
        "Resources",
        "Instances",
    ]
    names = [v["name"] for v in DASHBOARD["templating"]["list"]]
    assert names == ["DS_PROMETHEUS", "model", "instance"]  # an instance is chosen within a model


def test_panels_have_ids_titles_queries_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize(("title", "query"), promql.panel_queries())
def test_queries_name_known_variables_and_follow_the_chosen_instances(title, query):
    assert set(re.findall(r"\$(\w+)", query)) <= {"instance", "__rate_interval"}
    assert "$instance" in query or title == "Busiest over mean"  # which is of all of them
    assert promql.metrics_in(query) or promql.recorded_in(query)
    assert "$" not in promql.filled(query)
