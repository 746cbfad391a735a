"""The measurements: rounds that end in time, and other people's layers that may fail."""

import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from moe_jax.bench import batch_sizes, peers
from moe_jax.bench.baseline import read_baseline
from moe_jax.bench.batch_sizes import bench_batch
from moe_jax.bench.layer_cost import PROMISED, bench_layer
from moe_jax.bench.measure import Timing, interleave, write_results
from moe_jax.bench.ratio_plot import plot_ratios
from moe_jax.bench.text_tables import print_rows


def test_rounds_end_after_the_seconds_given_but_not_before_three():
    def thunk():
        time.sleep(0.01)
        return jnp.zeros(())

    done: list[int] = []
    timings, floors = interleave(
        thunk, {"case": thunk}, rounds=50, most_seconds=0.0, after_round=done.append
    )
    assert done == [1, 2, 3]
    assert len(timings["case"].ratios) == 3
    assert len(floors) == 6


SMALL = dict(
    tokens=16,
    d_model=8,
    d_ff=8,
    experts=[4],
    k=2,
    dtypes=["f32"],
    loads=["uniform"],
    passes=["fwd"],
    implementations=[],
    rounds=2,
    peers=True,
)


def one_peer(monkeypatch, step):
    monkeypatch.setattr(peers, "jax_peers", lambda expert_fn: {"peer": step})
    monkeypatch.setattr(peers, "installed", lambda module: False)


def test_a_peer_that_fails_is_a_row_that_says_so(monkeypatch):
    def broken(params, x, routing):
        raise RuntimeError("no kernel for this card")

    one_peer(monkeypatch, broken)
    rows = {row["implementation"]: row for row in bench_layer(**SMALL)}
    assert rows["tiered"]["ratio"] > 0
    assert rows["peer"]["ratio"] is None
    assert "no kernel for this card" in rows["peer"]["not_run"]
    assert set(PROMISED) <= rows["peer"].keys()


def test_a_peer_that_would_not_fit_is_not_started(monkeypatch):
    def never(params, x, routing):
        pytest.fail("started although it does not fit")

    one_peer(monkeypatch, never)
    monkeypatch.setattr(peers, "free_memory", lambda: 1000)
    rows = {row["implementation"]: row for row in bench_layer(**SMALL)}
    assert "are free" in rows["peer"]["not_run"]


def test_a_peer_that_runs_is_timed(monkeypatch):
    one_peer(monkeypatch, lambda params, x, routing: jax.nn.relu(x))
    monkeypatch.setattr(peers, "_PACKAGES", {"peer": ("jax",)})
    monkeypatch.setattr(peers, "installed", lambda module: module == "jax")
    rows = {row["implementation"]: row for row in bench_layer(**SMALL)}
    assert rows["peer"]["ratio"] > 0
    assert rows["peer"]["version"] == f"jax {jax.__version__}"


def test_a_file_of_layer_rows_is_a_baseline_and_holds_every_point(monkeypatch, tmp_path):
    def broken(params, x, routing):
        raise RuntimeError("no kernel")

    one_peer(monkeypatch, broken)
    file = tmp_path / "layer.json"
    points: list[int] = []

    def save(rows):
        points.append(len(rows))
        write_results(file, bench="layer", settings={}, rows=rows, promised=PROMISED)

    bench_layer(**{**SMALL, "loads": ["uniform", "zipf"]}, so_far=save)
    assert points == [2, 3]
    rows = read_baseline(file)["rows"]
    assert [row["load"] for row in rows] == ["uniform", "zipf"]  # without the peer that failed
    assert all(len(row["spread"]) == 2 for row in rows)


def test_a_picture_of_several_token_counts_says_which_bar_is_which(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    row = dict(
        implementation="tiered",
        ratio=1.0,
        spread=[0.9, 1.1],
        tokens=16,
        experts=4,
        dtype="f32",
        load="uniform",
    )
    row["pass"] = "fwd"
    peer = {**row, "implementation": "peer", "tokens": 32}
    for rows in ([row], [row, {**row, "tokens": 32}, peer]):
        plot_ratios(rows, tmp_path / "rows.png")

    def words(figure: Figure) -> list[str]:
        return [tick.get_text().split()[0] for tick in figure.axes[0].get_xticklabels()]

    assert words(drawn[0]) == ["E=4"]
    assert words(drawn[1]) == ["T=16", "T=32"]
    legend = drawn[1].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["tiered", "peer"]


def test_batch_sizes_are_compared_with_the_first_in_the_same_round(monkeypatch):
    """Drift hits both of a round alike: round by round 1.5 times the latency, in all medians 3.0."""
    seconds = {"2": (1.0, 2.0, 4.0), "4": (1.5, 3.0, 30.0), "8": (5.0, 10.0, 20.0)}

    def timed(floor, cases, *, rounds):
        assert list(cases) == list(seconds)
        for case in (floor, *cases.values()):
            assert jnp.isfinite(case()).all()
        return {n: Timing(seconds=seconds[n], ratios=(1.0,)) for n in cases}, ()

    monkeypatch.setattr(batch_sizes, "interleave", timed)
    rows, advice = bench_batch(
        sizes=[2, 4, 8], sequence=8, d_model=8, d_ff=16, experts=4, k=2, rounds=3
    )
    assert [row["latency_ratio"] for row in rows] == [1.0, 1.5, 5.0]
    assert [row["relative_throughput"] for row in rows] == [1.0, 1.3333, 0.8]
    assert [row["tokens_per_second"] for row in rows] == [8, 11, 6]
    # 8 is below 80 % of the best throughput, and the range starts with the first that is above.
    assert (advice["from"], advice["to"]) == (4, 4)


def test_a_table_in_80_columns_cuts_no_name_and_no_figure(capsys):
    columns = [
        "implementation",
        "experts",
        "dtype",
        "load",
        "pass",
        "ratio",
        "ratio_balanced",
        "ms",
        "temp_mb",
        "dropped",
        "rounds",
    ]
    values = [
        ("capacity", 8, "bf16", "uniform", "fwd", 1.2345, 12.34, 1234.5, 1057.1, 0.2969, 10),
        ("balanced", 64, "bf16", "zipf", "bwd", 1.0, 1.0, 1.0, None, 0.0, 10),
    ]
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    print_rows(Console(width=80), "bench layer", columns, rows)
    printed, *lines = capsys.readouterr().out.splitlines()
    assert printed == "bench layer: dtype bf16, rounds 10"
    assert not any("…" in line for line in lines)
    assert max(len(line) for line in lines) <= 80
    assert any("1.234" in line and "1057" in line and "0.2969" in line for line in lines)
    print_rows(Console(width=30), "bench layer", columns, rows)
    assert capsys.readouterr().out.splitlines()[1:] == lines  # wider than the console, and whole
