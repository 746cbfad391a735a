"""R12: the guide's ``expert_weights`` are the softmax over the experts that a token uses."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.config import load_config
from moe_jax.serving.engine import RouterEngine, make_logger


def test_an_engine_inside_a_program_leaves_standard_output_to_it(capsys):
    make_logger("INFO", "development").info("ready")
    make_logger("INFO", "production", stream="stdout").info("served")
    printed = capsys.readouterr()
    assert '"event": "ready"' in printed.err
    assert '"event": "served"' in printed.out
    assert "ready" not in printed.out


@pytest.fixture(scope="module")
def answer():
    config = load_config(
        env={},
        input_dim=16,
        num_experts=6,
        max_experts=3,
        buckets="32",
        enable_caching=False,
        serve_moe="off",
    )
    x = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    with RouterEngine(config) as engine:
        yield engine.route(x, return_router_logits=True)


def test_weights_are_the_softmax_over_the_selected_and_zero_in_padding(answer):
    indices, logits = answer["expert_indices"], answer["router_logits"]
    used = indices >= 0
    own = np.take_along_axis(logits, np.where(used, indices, 0), axis=-1)
    raw = np.where(used, np.exp(own - own.max(axis=-1, keepdims=True)), 0.0)
    expected = raw / raw.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(answer["expert_weights"], expected, atol=1e-6)
    assert (answer["expert_weights"][~used] == 0).all()


def test_slots_descend_by_logit_and_k_follows_the_complexity(answer):
    k, c = answer["num_experts_per_token"], answer["complexity_scores"]
    assert set(np.unique(k)) == {1, 2, 3}
    np.testing.assert_array_equal(k, np.clip(np.round(1 + 2 * c), 1, 3))
    assert (np.diff(answer["expert_weights"], axis=-1) <= 0).all()
