"""Eight devices give one device's answer, with the messages that theory asks for and no more.

eight_devices.py measures everything once, in a separate process that runs beside the other tests
(measurement.py); the tests of this file judge the result.
"""

from __future__ import annotations

import functools
import itertools

import pytest

from moe_jax.experts.exchange import CountsPlace, counts_place
from moe_jax.parallel.planning import exchange_cost
from tests.parallel import eight_devices, measurement

TOLERANCE = 1e-5
MATRIX = [eight_devices.label(*case) for case in eight_devices.MATRIX]


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    return measurement.measured(tmp_path_factory.getbasetemp())


def test_the_matrix_has_every_pair_of_rule_mesh_and_dropping():
    """Each pair once at least; a fault of all three together is left to the pairs."""
    rules, words = eight_devices.RULES, ("dropless", "dropping")
    layouts = [*((mesh, 8) for mesh in eight_devices.MESHES), ("2x4", 6)]
    cases = [(rule, word, (mesh, e)) for rule, word, mesh, e in eight_devices.MATRIX]
    for one, other, first, second in (
        (0, 1, rules, words),
        (0, 2, rules, layouts),
        (1, 2, words, layouts),
    ):
        assert {(c[one], c[other]) for c in cases} == set(itertools.product(first, second))


@pytest.mark.parametrize("case", MATRIX)
def test_eight_devices_give_one_devices_answer(measured, case):
    values = measured[case]
    for what in ("output", "loss", "losses", "gradient", "update", "stats"):
        assert values[what] <= TOLERANCE, (what, values)
    assert (values["dropped"] > 0) == ("dropping" in case)
    assert values["moved"] > 1e-4, "the controller stood still, so its equality says nothing"
    if "null" in case:
        assert values["empty"] > 0, "no token went without expert, so the case is not what it says"


@pytest.mark.parametrize(
    "case",
    [
        "shared expert, expert x tensor x data",
        "two levels",
        "61 tokens",
        "further rounds",
        "ragged, factor None",
        "ragged, factor 0.75",
    ],
)
def test_other_layouts_give_one_devices_answer(measured, case):
    values = measured[case]
    for what in ("output", "loss", "losses", "gradient", "update", "stats"):
        assert values[what] <= TOLERANCE, (what, values)


@pytest.mark.parametrize("mesh", [{"expert": 8}, {"data": 2, "expert": 2, "model": 2}])
def test_quantised_experts_give_one_devices_answer(measured, mesh):
    values = measured[f"quantised, {mesh}"]
    assert values["output"] <= TOLERANCE
    assert values["gradient"] <= TOLERANCE


@pytest.mark.parametrize("factor", [1.0, None])
def test_rows_with_their_counts_beside_them_give_one_devices_answer(measured, factor):
    values = measured[f"wide rows, factor {factor}"]
    assert values["output"] <= TOLERANCE
    assert values["gradient"] <= TOLERANCE


def test_two_levels_move_the_same_rows_as_one(measured):
    values = measured["two levels against one"]
    assert values["output"] == 0.0
    assert values["gradient"] == 0.0


def test_accumulated_gradients_and_statistics_are_those_of_one_device(measured):
    values = measured["accumulated"]
    assert values["halves"] <= TOLERANCE
    assert values["whole"] <= TOLERANCE


def test_a_users_own_shard_map_has_global_losses_and_one_devices_gradient(measured):
    assert measured["own shard_map"]["difference"] <= TOLERANCE


def test_set_mesh_is_enough(measured):
    assert measured["own shard_map"]["set_mesh"] <= TOLERANCE


def test_a_flax_module_takes_a_mesh(measured):
    assert measured["flax module"]["difference"] <= TOLERANCE
    assert measured["flax module"]["arrays"] > 4, "gradients are among what is compared"


def test_every_device_draws_its_own_noise(measured):
    assert measured["noise differs by device"]["distinct"] == 8


def test_counts_travel_where_they_begin_no_new_tile_of_a_tpu():
    place = functools.partial(counts_place, width=4096)
    assert place(size=16, local=1) == CountsPlace(rows=0, columns=128)
    assert place(size=17, local=1) == CountsPlace(rows=1, columns=0)  # a tile has room for it
    assert place(size=32, local=1) == CountsPlace(rows=1, columns=0)  # as many numbers as a row
    assert place(size=16, local=43) == CountsPlace(rows=1, columns=0)  # 129 digits
    assert place(size=8, local=1, width=4100) == CountsPlace(rows=1, columns=0)  # no whole tiles
    assert place(size=8, local=8, width=16) == CountsPlace(rows=2, columns=0)


# --- messages and memory --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "forward", "both"),
    [("dropping", 2, 4), ("dropless", 2, 4), ("dropless, one size", 2, 4), ("two levels", 4, 8)],
)
def test_two_all_to_alls_forward_four_with_backward(measured, case, forward, both):
    """A level of the all-to-all counts once each way; no tokens or experts are gathered."""
    one = measured[f"program: {case}, forward"]
    two = measured[f"program: {case}, forward and backward"]
    assert one["sends"]["all-to-all"][0] == forward
    assert two["sends"]["all-to-all"][0] == both
    for values in (one, two):
        assert set(values["sends"]) <= {"all-to-all", "all-reduce"}
    if case == "dropping":  # one size: not even the text has more
        assert one["in the text"] == 2
        assert two["in the text"] == 4
        assert set(one["sends"]) == {"all-to-all"}
        assert two["sends"]["all-reduce"] == [1, 8 * 16 * 4], "the router's gradient alone"
    if case.startswith("dropless"):
        assert one["sends"]["all-reduce"] == [1, 4], "one number, by which all choose one size"


def test_memory_of_experts_and_rows_falls_as_the_devices_grow(measured):
    """Each doubling of the devices halves what one of them holds, within a tenth.

    Arguments and results are experts, tokens and their gradients; temporary is what the rows need on
    their way. A single device sends nothing, so its temporary memory is no part of that row.
    """
    for what, devices in (
        ("arguments", (1, 2, 4, 8)),
        ("results", (1, 2, 4, 8)),
        ("temporary", (2, 4, 8)),
    ):
        sizes = [measured[f"memory: {n}"][what] for n in devices]
        for more, fewer in itertools.pairwise(sizes):
            assert fewer <= more / 2 * 1.1, (what, sizes)


def cost_of(*, num_experts, d_model, factor, shares):
    """The model of a layer in float32 over eight devices, 64 tokens each."""
    sizes = dict(num_experts=num_experts, d_model=d_model, tokens=64, k=2, devices=8, itemsize=4)
    return exchange_cost(**sizes, capacity_factor=factor, send_shares=shares)


@pytest.mark.parametrize(
    ("case", "factor", "shares"),
    [("dropping", 1.25, None), ("dropless", None, None), ("dropless, one size", None, (1.5,))],
)
def test_the_cost_model_is_the_compiled_program_to_the_byte(measured, case, factor, shares):
    """Of a conditional the largest size is counted, which is what the model gives too."""
    cost = cost_of(num_experts=16, d_model=8, factor=factor, shares=shares)
    assert sent(measured, case) == (cost.forward_bytes, cost.backward_bytes)


@pytest.mark.parametrize(("factor", "shares", "rows"), [(1.0, None, 16), (None, (0.5,), 24)])
def test_the_cost_model_knows_the_counts_beside_the_rows(measured, factor, shares, rows):
    cost = cost_of(num_experts=8, d_model=4096, factor=factor, shares=shares)
    assert cost.buffer_rows == rows
    assert cost.forward_bytes == 8 * 4 * rows * (4096 + 128 + 4096)
    assert sent(measured, f"wide rows, factor {factor}") == (
        cost.forward_bytes,
        cost.backward_bytes,
    )


def sent(measured, case):
    """Bytes of the all-to-alls, forward and backward."""
    forward = measured[f"program: {case}, forward"]["sends"]["all-to-all"][1]
    both = measured[f"program: {case}, forward and backward"]["sends"]["all-to-all"][1]
    return forward, both - forward
