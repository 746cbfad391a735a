"""The measurement of the service runs, and its rows state what was measured."""

from moe_jax.bench.http_cost import CASES, bench_http, summarise


def test_every_case_is_measured_against_both_floors():
    rows = bench_http(shape=(1, 8, 16), clients=(2,), rounds=1, seconds=0.02)
    assert [row["case"] for row in rows] == list(CASES)
    for row in rows:
        assert row["clients"] == 2
        for name in ("ratio", "ratio_sink", "times_json", "ms", "echo_ms", "sink_ms", "route_ms"):
            assert row[name] > 0, name
        # Little's law: two clients that never pause have two requests under way. Bounds for a
        # single short round on a busy machine.
        assert 0.2 < row["requests_per_second"] * row["ms"] / 1e3 < 6.0
    assert rows[-1]["times_json"] == 1.0


def test_rows_are_medians_of_the_ratios_of_each_round():
    """With numbers chosen by hand: the second round runs on a machine ten times slower."""
    slower = (1.0, 10.0, 1.0)
    one = {"echo": 2.0, "sink": 1.0, "route": 2.0, "binary hit": 2.0, "json off": 12.0}
    taken = {
        name: [(one.get(name, 6.0) * s, 2.0 * one.get(name, 6.0) * s) for s in slower]
        for name in ("echo", "sink", "route", *CASES)
    }
    rows = {row["case"]: row for row in summarise(taken, 4)}
    assert list(rows) == list(CASES)
    assert rows["binary off"] == {
        "case": "binary off",
        "clients": 4,
        "ratio": 1.5,  # 6 / (2 + 2) in every round
        "ratio_sink": 2.0,  # 6 / (1 + 2)
        "times_json": 2.0,  # 12 / 6
        "ms": 12000.0,
        "requests_per_second": 0.2,
        "echo_ms": 2000.0,
        "sink_ms": 1000.0,
        "route_ms": 2000.0,
    }
    assert (rows["binary hit"]["ratio"], rows["binary hit"]["times_json"]) == (0.5, 6.0)
    assert (rows["json off"]["ratio"], rows["json off"]["times_json"]) == (3.0, 1.0)
