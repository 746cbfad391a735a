"""The measurement of the service runs, and its rows are about what was measured."""

from moe_jax.bench.http import CASES, bench_http


def test_every_case_is_measured_against_both_floors():
    rows = bench_http(shape=(1, 8, 16), clients=(2,), rounds=1, seconds=0.02)
    assert [row["case"] for row in rows] == list(CASES)
    for row in rows:
        assert row["clients"] == 2
        for name in ("ratio", "ratio_sink", "times_json", "ms", "echo_ms", "sink_ms", "route_ms"):
            assert row[name] > 0, name
    assert rows[-1]["times_json"] == 1.0
