"""Intervals of a change cover it as often as they say."""

from __future__ import annotations

import numpy as np

from moe_jax.models.confidence import paired_bootstrap, verdict


def test_bootstrap_covers_a_known_shift_as_often_as_it_says():
    draw = np.random.default_rng(0)
    shift, hits, widths = 0.01, 0, []
    for seed in range(100):
        size = draw.integers(200, 2000, 80).astype(float)
        before = size * (1.5 + 0.3 * draw.normal(size=80))  # files differ widely ...
        after = before + size * (shift * np.log(2) + 0.02 * draw.normal(size=80))  # ... not the gap
        change = paired_bootstrap(after, before, size, resamples=1000, seed=seed)
        hits += change["low"] <= shift <= change["high"]
        widths.append(change["high"] - change["low"])
    assert 87 <= hits <= 100
    assert np.mean(widths) < 0.02  # an unpaired interval would be ten times as wide


def test_bootstrap_of_no_change_is_no_change_and_empty_files_do_not_matter():
    before = np.array([3.0, 5.0, 0.0])
    change = paired_bootstrap(before, before, np.array([2.0, 2.0, 0.0]))
    assert set(change.values()) == {0.0}


def test_verdicts():
    assert verdict(-0.001, 0.002) == "equal"
    assert verdict(0.001, 0.003) == "not shown"
    assert verdict(0.0021, 0.003) == "worse"
