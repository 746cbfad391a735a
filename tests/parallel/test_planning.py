"""The plans on paper: buffers as the layer sizes them, and copies of hot experts."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.parallel.collectives import CollectiveTraffic, collectives_of
from moe_jax.parallel.memory_cost import memory_cost
from moe_jax.parallel.planning import break_even_width, exchange_cost, plan_placement


def test_copies_of_hot_experts_even_the_load_out():
    load = 1.0 / np.arange(1, 257)  # Zipf over 256 experts
    plan = plan_placement(load, devices=32, replicas=32)
    assert plan.imbalance_before > 14
    assert plan.imbalance_after < 1.02
    assert plan.experts.shape == (32, 9)
    assert (np.bincount(plan.experts.reshape(-1), minlength=256) == plan.copies).all()
    assert plan.copies.sum() == 288
    np.testing.assert_allclose(plan.load.sum(), load.sum())
    for device, held in enumerate(plan.experts):
        np.testing.assert_allclose(plan.load[device], (load / plan.copies)[held].sum())


def test_an_even_load_needs_nothing():
    plan = plan_placement(np.ones(16), devices=4, replicas=0)
    assert plan.imbalance_before == plan.imbalance_after == 1.0
    assert (plan.copies == 1).all()


@pytest.mark.parametrize(
    ("load", "devices", "replicas", "says"),
    [
        ([], 2, 0, "load: expected tokens of each expert"),
        ([1.0, -1.0], 2, 0, "load: expected tokens of each expert"),
        ([0.0, 0.0], 2, 0, "load: expected tokens of each expert"),
        ([1.0, 1.0, 1.0], 2, 0, "The next that fits is 1 or more by 2"),
    ],
)
def test_loads_that_cannot_be_placed_are_refused(load, devices, replicas, says):
    with pytest.raises(ValueError, match=says):
        plan_placement(load, devices, replicas)


def test_what_is_sent_grows_with_k_and_width_and_not_with_experts():
    common = {"tokens": 4096, "d_model": 1024, "devices": 16, "capacity_factor": 1.0}
    base = exchange_cost(num_experts=64, k=2, **common)
    assert exchange_cost(num_experts=64, k=4, **common).forward_bytes == pytest.approx(
        2 * base.forward_bytes, rel=0.01
    )
    assert exchange_cost(num_experts=256, k=2, **common).forward_bytes == pytest.approx(
        base.forward_bytes, rel=0.01
    )
    # Two rows a token, there and back, of which a sixteenth stays.
    assert base.forward_bytes_per_token == pytest.approx(2 * 2 * 1024 * 2 * 15 / 16, rel=0.01)


def test_a_smaller_load_chooses_a_smaller_buffer():
    common = {"tokens": 4096, "num_experts": 64, "k": 2, "d_model": 1024, "devices": 16}
    sizes = [exchange_cost(**common, size=i) for i in range(4)]
    assert [c.buffer_rows for c in sizes] == sorted(c.buffer_rows for c in sizes)
    assert sizes[0].forward_bytes < 0.45 * sizes[-1].forward_bytes


def test_narrow_experts_wait_for_the_network():
    slow = break_even_width(flops_per_second=5e14, bytes_per_second=5e10)
    fast = break_even_width(flops_per_second=5e14, bytes_per_second=4e11)
    assert slow == pytest.approx(8 * fast)


PROGRAM = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%small (p: (f32[2,4])) -> (f32[8,4]) {
  %x = f32[2,4]{1,0} all-to-all(%y), replica_groups={{0,1}}, dimensions={0}
}

%large (p: (f32[8,4])) -> (f32[8,4]) {
  %x = f32[8,4]{1,0} all-to-all(%y), replica_groups={{0,1}}, dimensions={0}
}

%body (c: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %w = (f32[8,4]{1,0}) conditional(%i, %p, %q), branch_computations={%small, %large}
}

%condition (c: (s32[], f32[8,4])) -> pred[] {
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %t = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body, backend_config={TRIPS}
  %r = (bf16[4]{0}, s32[2]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
}
""".replace("TRIPS", '"known_trip_count":{"n":"3"}')


def test_a_loop_counts_as_often_as_it_runs_and_of_branches_the_dearest():
    assert collectives_of(PROGRAM) == {
        "all-to-all": CollectiveTraffic(count=3, num_bytes=3 * 8 * 4 * 4),
        "all-reduce": CollectiveTraffic(count=1, num_bytes=4 * 2 + 2 * 4),
    }


def test_a_loop_up_to_a_constant_counts_where_the_compiler_does_not_write_how_often_it_runs():
    unwritten = PROGRAM.replace('"known_trip_count":{"n":"3"}', "")
    assert collectives_of(unwritten)["all-to-all"].count == 1
    bounded = unwritten.replace("  ROOT %l =", "  %n = s32[] constant(4)\n  ROOT %l =")
    assert collectives_of(bounded)["all-to-all"].count == 4


# --- memory -------------------------------------------------------------------------------------

# Four experts on two devices, 256 rows each: S = 512 rows for each device and one of counts, which a
# TPU stores as 520. Rows X = 2 * 512 * 256, rows with counts A = 2 * 520 * 256 and one projection
# G = 1024 * 128, two bytes each.
SMALL = {"tokens": 1024, "num_experts": 4, "k": 1, "d_model": 256, "d_ff": 128, "devices": 2}
X, A, G = 524_288, 532_480, 262_144


def test_memory_of_a_layer_is_arguments_results_and_the_step_that_holds_most():
    forward = memory_cost(**SMALL, capacity_factor=1.0, gradient=False)
    arguments = 2 * 3 * 256 * 128 * 2 + 256 * 4 * 4 + 1024 * 256 * 2  # experts, router, tokens
    assert forward.argument_bytes == arguments
    assert forward.output_bytes == 1024 * 256 * 2
    assert (forward.temp_bytes, forward.step) == (2 * A, "send")  # sent and arrived
    both = memory_cost(**SMALL, capacity_factor=1.0, gradient=True)
    assert both.output_bytes == 1024 * 256 * 2 + arguments
    # Rows, gate, up and hidden are kept; the outputs meet the float32 gradient of y, once per row.
    assert (both.temp_bytes, both.step) == (X + 3 * G + X + 2 * X, "gradient of the weights")
    assert both.held_bytes == both.argument_bytes + both.output_bytes + both.temp_bytes


def test_counts_beside_few_wide_rows_take_a_tile_of_columns_and_none_of_rows():
    """DeepSeek-V3 on 256 devices: S = 32 rows do not become 40."""
    sizes = {"tokens": 1024, "num_experts": 256, "k": 8, "d_model": 7168, "devices": 256}
    cost = exchange_cost(**sizes, capacity_factor=1.0)
    assert cost.buffer_rows == 32
    assert cost.forward_bytes == 256 * 32 * (7168 + 128 + 7168) * 2
    assert cost.backward_bytes == 256 * 32 * 2 * 7168 * 2
    forward = memory_cost(**sizes, d_ff=2048, capacity_factor=1.0, gradient=False)
    assert (forward.temp_bytes, forward.step) == (2 * 256 * 32 * (7168 + 128) * 2, "send")


def test_wide_experts_hold_most_between_their_products():
    wide = SMALL | {"d_ff": 2048}
    forward = memory_cost(**wide, capacity_factor=1.0, gradient=False)
    assert (forward.temp_bytes, forward.step) == (X + 2 * 16 * G, "project")
    both = memory_cost(**wide, capacity_factor=1.0, gradient=True)
    assert both.temp_bytes == X + 3 * 16 * G + X + 2 * X
    assert both.step == "gradient of the weights"


def test_a_gradient_that_is_summed_over_a_data_axis_takes_memory_beside_its_sum():
    few = SMALL | {"tokens": 128, "d_ff": 1024, "capacity_factor": 1.0, "gradient": True}
    rows, hidden, matrix = 2 * 64 * 256 * 2, 128 * 1024 * 2, 2 * 256 * 1024 * 2
    alone, summed = memory_cost(**few), memory_cost(**few, data=2)
    assert alone.temp_bytes == rows + 3 * hidden + rows + 2 * rows
    # The rows and their gradients, gate, up and hidden, and the device's own gradient of one matrix.
    assert (summed.temp_bytes, summed.step) == (2 * rows + 3 * hidden + matrix, "gradient of down")
    assert summed.output_bytes == alone.output_bytes
    # Forward nothing is summed.
    forward = few | {"gradient": False}
    assert memory_cost(**forward, data=2) == memory_cost(**forward)


def test_memory_of_rows_follows_tokens_and_capacity():
    base = memory_cost(**SMALL, capacity_factor=1.0, gradient=True)
    more = memory_cost(**SMALL | {"tokens": 2048}, capacity_factor=1.0, gradient=True)
    assert more.temp_bytes == 2 * base.temp_bytes
    slack = memory_cost(**SMALL, capacity_factor=2.0, gradient=True)
    # Twice the rows: rows; gate, up and hidden; outputs, and the same in the order of tokens.
    assert slack.temp_bytes == 2 * X + 3 * 2 * G + 2 * 2 * X
    assert slack.step == "unsort"
    # The gradient of y by token leaves the chip where it is too large.
    scale = 128
    large = memory_cost(**SMALL | {"tokens": 1024 * scale}, capacity_factor=1.0, gradient=True)
    assert large.temp_bytes == scale * base.temp_bytes + 4 * 1024 * scale * 256
