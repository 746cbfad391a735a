"""The benchmark of rules that look at the batch counts what they load."""

from __future__ import annotations

from moe_jax.bench.batch_rules_cost import COLUMNS, bench_batch_rules


def test_rows_say_how_many_experts_a_rule_loads():
    rows = bench_batch_rules(tokens=[4], experts=8, k=4, d_model=8, d_ff=8, rounds=1)
    by = {row["rule"]: row for row in rows}
    assert all(set(COLUMNS) <= row.keys() for row in rows)
    assert by["top 2"]["mean_k"] == 2.0
    # The same experts are loaded, and every token uses more of them.
    pair = by["top 2"], by["piggyback, keep 2"]
    assert pair[0]["distinct_experts"] == pair[1]["distinct_experts"]
    assert pair[0]["mean_k"] < pair[1]["mean_k"] <= 4.0
    assert by["piggyback, keep 1"]["fewer_bytes"] > by["piggyback, keep 2"]["fewer_bytes"] > 0
