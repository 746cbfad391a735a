"""The engine on real, small routers: R11, R12, R15, P01, M12, H01-H06, Y01-Y06, T01-T08."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.config import ConfigError
from moe_jax.routers import catalog
from moe_jax.serving import metrics
from moe_jax.serving.engine import Client
from moe_jax.serving.engine.buckets import bucket_sizes, compile_counter
from moe_jax.serving.engine.weights import check_servable
from moe_jax.serving.errors import CODES, ServingError


def refusal(call, code: str) -> ServingError:
    with pytest.raises(ServingError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


# --- the result of route --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_experts": 2, "max_experts": 6},
        {"complexity_estimator": "router_entropy"},
        {"routing_strategy": "threshold"},
        {"min_experts": 3, "max_experts": 3},
    ],
    ids=["default", "2-6", "entropy", "threshold", "fixed"],
)
def test_result_of_route(make_engine, states, settings):  # R02, R12
    engine = make_engine(**settings)
    x = states(4, 13)
    result = engine.route(x, return_router_logits=True)
    router = engine.snapshot.router
    low, high, experts = router.min_k, router.max_k, router.num_experts
    indices, weights = result["expert_indices"], result["expert_weights"]
    k, c = result["num_experts_per_token"], result["complexity_scores"]
    logits = result["router_logits"]
    assert (indices.shape, indices.dtype) == ((4, 13, high), np.int32)
    assert (weights.shape, weights.dtype) == ((4, 13, high), np.float32)
    assert (k.shape, k.dtype) == ((4, 13), np.int32)
    assert (c.shape, c.dtype) == ((4, 13), np.float32)
    assert (logits.shape, logits.dtype) == ((4, 13, experts), np.float32)
    assert ((c >= 0) & (c <= 1)).all()
    # k is what the guide says it is
    assert (k == np.clip(np.round(low + (high - low) * c), low, high)).all()
    if high > low:
        assert len(np.unique(k)) >= 3
    assert (k == (indices >= 0).sum(axis=-1)).all()
    # -1 pads, at the end, with weight 0; weights are positive elsewhere
    unused = np.arange(high) >= k[..., None]
    assert (indices[unused] == -1).all()
    assert (weights[unused] == 0).all()
    assert (weights[~unused] > 0).all()
    # by descending logit
    own = np.take_along_axis(logits, np.where(unused, 0, indices), axis=-1)
    assert (own[..., :-1] >= own[..., 1:])[~unused[..., 1:]].all()

    info = result["routing_info"]
    assert info["total_expert_calls"] == k.sum()
    assert info["avg_experts_per_token"] == pytest.approx(k.mean())
    assert sum(info["expert_utilization"]) == pytest.approx(1)
    assert info["flop_baseline"] == f"top_max={high}"
    assert info["flop_reduction"] == pytest.approx(1 - k.mean() / high)
    stats = info["complexity_stats"]
    assert stats["mean"] == pytest.approx(float(c.mean()))
    assert stats["min"] <= stats["mean"] <= stats["max"]
    produced = result["production_info"]
    assert {
        "request_id",
        "processing_time_ms",
        "router_health",
        "cached",
        "fallback_used",
        "sanitized",
    } <= set(produced)
    json.dumps([info, produced], allow_nan=False)
    for array in (indices, weights, k, c, logits):  # K05
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert "router_logits" not in engine.route(x)


def test_the_answer_is_that_of_the_library(make_engine, states):
    engine = make_engine()
    x, snapshot = states(3, 7), engine.snapshot
    direct = snapshot.router(
        snapshot.weights.params, snapshot.weights.state, jax.numpy.asarray(x.reshape(-1, 16))
    )
    result = engine.route(x)
    indices = np.asarray(direct.expert_indices)
    assert (result["expert_indices"].reshape(-1, 4) == np.where(indices < 8, indices, -1)).all()
    np.testing.assert_allclose(
        result["expert_weights"].reshape(-1, 4), direct.combine_weights, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_routed_in_float32(make_engine, states, dtype):
    engine = make_engine()
    x = states().astype(dtype)
    half, full = engine.route(x), engine.route(x.astype(np.float32))
    assert half["expert_weights"].dtype == np.float32
    assert (half["expert_indices"] == full["expert_indices"]).all()
    assert (half["expert_weights"] == full["expert_weights"]).all()


def test_a_token_mask_leaves_tokens_out_and_the_others_alone(make_engine, states):
    engine = make_engine()
    x = states(2, 6)
    mask = np.ones((2, 6), bool)
    mask[:, 4:] = False
    masked, whole = engine.route(x, token_mask=mask), engine.route(x)
    assert (masked["expert_indices"][~mask] == -1).all()
    assert not masked["num_experts_per_token"][~mask].any()
    assert (masked["expert_indices"][mask] == whole["expert_indices"][mask]).all()
    refusal(lambda: engine.route(x, token_mask=mask[:1]), "malformed")
    refusal(lambda: engine.route(x, token_mask=mask.astype(int)), "malformed")


def test_other_inputs_are_taken_or_refused_by_name(make_engine, states):
    engine = make_engine()
    x = states()
    assert (
        engine.route(jax.numpy.asarray(x))["expert_indices"]
        == engine.route(np.asfortranarray(x))["expert_indices"]
    ).all()
    for bad in (None, [[[1.0]]], "text", x[0], x.astype(np.float64), x[..., :8], x[:0]):
        assert "expected" in refusal(lambda bad=bad: engine.route(bad), "malformed").message
    refusal(lambda: engine.infer("moe", x), "not_found")
    refusal(lambda: engine.describe("nothing"), "not_found")


# --- buckets --------------------------------------------------------------------------------


def test_bucket_sizes():
    assert bucket_sizes(1000) == (16, 32, 64, 128, 256, 512, 1024)
    assert bucket_sizes(1000, (64, 512)) == (64, 512)
    assert bucket_sizes(1) == (16,)


def test_nothing_compiles_after_the_warm_up(make_engine, states):
    """Counted by JAX itself, so that a stray operation outside of the buckets would be seen too."""
    engine = make_engine()
    before = compile_counter().count
    text_before = engine.metrics_text()
    for sequence in (*range(1, 40), 63, 64, 65, 200):
        engine.route(states(1, sequence, seed=sequence), return_router_logits=sequence % 2 == 0)
    engine.route(states(3, 5), token_mask=np.ones((3, 5), bool))
    engine.health_check(), engine.get_metrics(), engine.diagnostics()
    assert compile_counter().count == before

    def compilations(text: bytes) -> str:
        return next(
            line for line in text.decode().splitlines() if line.startswith("moe_compilations_total")
        )

    assert compilations(engine.metrics_text()) == compilations(text_before)


def test_large_batches_are_split_with_the_same_answer(make_engine, states):  # P01, P02
    """64 tokens at most in one piece, against an engine that takes all 400 at once."""
    split, whole = make_engine(), make_engine(buckets="16,64,400")
    x = states(8, 50)
    mask = np.random.default_rng(1).random((8, 50)) < 0.9
    for options in ({}, {"token_mask": mask}):
        a = split.route(x, return_router_logits=True, **options)
        b = whole.route(x, return_router_logits=True, **options)
        for name in ("expert_indices", "num_experts_per_token"):
            assert (a[name] == b[name]).all(), name
        # XLA may order sums differently for another number of rows: the last bit, no more.
        for name in ("expert_weights", "complexity_scores", "router_logits"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_logits_that_nobody_asked_for_are_neither_fetched_nor_kept(make_engine, states):
    engine = make_engine()
    x = states(4, 16)
    buckets = engine.snapshot.models["router"]
    rows = x.reshape(-1, x.shape[-1])
    assert "router_logits" not in buckets.run(rows, None)
    assert "router_logits" in buckets.run(rows, None, logits=True)
    held = engine.infer("router", x).arrays
    # the arrays look into one buffer, which a cached answer keeps alive as a whole
    assert held["expert_indices"].nbytes + held["expert_weights"].nbytes == 2 * 64 * 4 * 4
    buffer = held["expert_indices"]
    while isinstance(buffer.base, np.ndarray):
        buffer = buffer.base
    assert buffer.nbytes == sum(array.nbytes for array in held.values())
    assert all(array.flags.c_contiguous and not array.flags.writeable for array in held.values())


def test_rules_whose_tokens_depend_on_each_other_are_refused(make_engine, tmp_path):
    router = moe_jax.ExpertChoiceRouter(num_experts=4, mean_k=1.0)
    saved = checkpoint.Checkpoint(
        params={"router": router.init(jax.random.key(0), 16)},
        routers={"router": router},
        states={"router": router.init_state()},
    )
    checkpoint.save(tmp_path / "ec", saved)
    with pytest.raises(ConfigError, match="do not depend on each other"):
        make_engine(checkpoint=str(tmp_path / "ec"))


def test_every_rule_that_looks_at_its_batch_is_kept_from_the_cache():
    """A cached answer would be that of another batch: the service takes no such rule."""
    for name, entry in catalog().items():
        if not entry.traits.batch_invariant:
            with pytest.raises(ConfigError, match=f"each other, got {name}. Requests are .*cached"):
                check_servable(entry.example)
    refused = {n for n, e in catalog().items() if not e.traits.batch_invariant}
    assert {"Piggyback", "Sinkhorn", "SeqTopK", "ExpertChoiceRouter"} <= refused


@pytest.mark.parametrize("word", ["attention_entropy", "perplexity_proxy"])
def test_estimators_that_need_more_than_a_request_brings_are_refused(make_engine, word):
    with pytest.raises(ConfigError, match="complexity_estimator"):
        make_engine(complexity_estimator=word)


# --- the model moe --------------------------------------------------------------------------


def test_without_a_checkpoint_both_models_are_served_and_experts_change_no_decision(
    make_engine, states
):
    both = make_engine(serve_moe="auto", expert_hidden_dim=24, buckets="16")
    alone = make_engine(buckets="16")
    assert (sorted(both.snapshot.models), list(alone.snapshot.models)) == (
        ["moe", "router"],
        ["router"],
    )
    assert both.infer("moe", states()).arrays["output"].shape == states().shape
    for name, actual in alone.infer("router", states()).arrays.items():
        np.testing.assert_array_equal(actual, both.infer("router", states()).arrays[name])


def test_the_model_moe_answers_the_layers_output(make_engine, states):  # R17
    engine = make_engine(serve_moe="on", expert_hidden_dim=24, buckets="16")
    x, snapshot = states(2, 5), engine.snapshot
    result = engine.infer("moe", x)
    weights = snapshot.weights
    assert weights.layer is not None
    assert weights.layer["experts"]["up"].shape == (8, 16, 24)
    wanted, _ = moe_jax.moe_layer(
        weights.router, weights.experts, weights.layer, weights.state, jax.numpy.asarray(x)
    )
    np.testing.assert_allclose(result.arrays["output"], wanted, rtol=2e-5, atol=2e-5)
    assert set(result.arrays) == {"output"}
    assert engine.infer("moe", x).info["cached"]
    assert engine.describe("moe")["outputs"][0]["shape"] == [-1, -1, 16]
    assert engine.lookup("moe", result.info["digest"]) is not None
    assert engine.lookup("router", result.info["digest"]) is None


# --- weights --------------------------------------------------------------------------------


def test_untrained_weights_say_so_everywhere(make_engine, log):  # R11
    engine = make_engine()
    component = engine.health_check()["components"]["router"]
    assert (component["status"], component["trained"]) == ("untrained", False)
    assert "untrained_weights" in log.events()
    assert f'params="untrained-{engine.snapshot.version}"' in engine.metrics_text().decode()


def test_the_seed_decides_and_nothing_else_does(make_engine, states):
    x = states()
    a, b, c = make_engine(), make_engine(enable_caching=False), make_engine(seed=1)
    assert a.snapshot.version == b.snapshot.version != c.snapshot.version
    assert (a.route(x)["expert_indices"] == b.route(x)["expert_indices"]).all()
    assert (a.route(x)["expert_indices"] != c.route(x)["expert_indices"]).any()


# --- metrics, health, diagnostics -----------------------------------------------------------


def test_router_stats_are_the_guides(make_engine, states):  # M12, R15
    engine = make_engine(enable_caching=False)
    load = np.zeros(8, int)
    for seed in range(5):
        result = engine.route(states(seed=seed))
        indices = result["expert_indices"]
        load += np.bincount(indices[indices >= 0], minlength=8)
    stats = engine.get_metrics()["router_stats"]
    assert stats["total_batches"] == 5
    assert stats["avg_usage_per_expert"] == pytest.approx((load / load.sum()).tolist())
    assert stats["usage_variance"] == pytest.approx((load / load.sum()).var())
    assert (stats["most_used_expert"], stats["least_used_expert"]) == (load.argmax(), load.argmin())
    score = load.sum() ** 2 / (8 * (load**2).sum())
    assert stats["load_balance_score"] == pytest.approx(score)


def test_probes_change_no_statistic(make_engine, states):  # H06
    engine = make_engine()
    engine.route(states())
    before = json.dumps([engine.get_metrics()[k] for k in ("router_stats", "requests", "cache")])
    text = [line for line in engine.metrics_text().decode().splitlines() if line.startswith("moe_")]
    for _ in range(20):
        engine.health_check(), engine.readiness(), engine.live(), engine.diagnostics()
        engine.describe("router"), engine.metrics_text()
    after = json.dumps([engine.get_metrics()[k] for k in ("router_stats", "requests", "cache")])
    assert after == before
    assert [
        line for line in engine.metrics_text().decode().splitlines() if line.startswith("moe_")
    ] == text


def test_the_exposition_is_the_contract(make_engine, states):  # M14
    from prometheus_client.parser import text_string_to_metric_families as parse

    engine = make_engine()
    engine.route(states())
    families = {f.name: f for f in parse(engine.metrics_text().decode())}
    exported = {name for name in families if name.startswith("moe_")}
    assert exported == {
        m.name.removesuffix("_total") if m.kind == "counter" else m.name for m in metrics.CONTRACT
    }
    for metric in metrics.CONTRACT:
        name = metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name
        assert families[name].type == metric.kind
        labels = {label for sample in families[name].samples for label in sample.labels} - {"le"}
        assert labels == set(metric.labels), metric.name
        if metric.values:
            assert {s.labels[metric.labels[0]] for s in families[name].samples} == set(
                metric.values
            )
    codes = {s.labels["code"] for s in families["moe_errors"].samples}
    assert codes == set(CODES), "every code is there at 0 before it happens"
    assert any(name.startswith("process_") for name in families)


def test_what_is_exported_is_what_happened(make_engine, states):
    engine = make_engine()
    exporter = engine.recorder.exporter
    assert exporter is not None
    x = states(2, 5)
    x[0, 0, 0] = np.nan
    k = engine.route(x)["num_experts_per_token"]
    engine.route(x)
    engine.route(x, use_cache=False)
    refusal(lambda: engine.route(x[0]), "malformed")
    text = engine.metrics_text().decode()
    for line in (
        'moe_requests_total{outcome="ok"} 3.0',
        'moe_requests_total{outcome="client_error"} 1.0',
        'moe_errors_total{code="malformed"} 1.0',
        "moe_tokens_total 27.0",  # the masked token is none
        "moe_nonfinite_tokens_total 3.0",
        'moe_cache_requests_total{result="hit"} 1.0',
        'moe_cache_requests_total{result="miss"} 1.0',
        'moe_cache_requests_total{result="bypass"} 1.0',
        f"moe_experts_per_token_sum {3.0 * k.sum()}",
        "moe_experts_per_token_count 27.0",
        f'moe_experts_per_token_bucket{{le="2.0"}} {3.0 * ((k > 0) & (k <= 2)).sum()}',
        'moe_circuit_state{state="closed"} 1.0',
        'moe_circuit_state{state="open"} 0.0',
        "moe_request_duration_seconds_count 3.0",
        "moe_route_duration_seconds_count 2.0",
    ):
        assert line in text, line


def test_what_left_the_window_stays_in_the_totals():
    now = [0.0]
    traffic = metrics.Traffic(num_experts=2, max_k=2, clock=lambda: now[0])
    counts = {"load": np.array([3, 1]), "histogram": np.array([0, 2, 1])}
    for _ in range(100):  # 1000 s of requests, 300 s of which are the window
        traffic.answered(0.1, **counts)
        traffic.failed(0.1)
        now[0] += 10.0
    recent, totals, stats = traffic.recent(), traffic.totals(), traffic.router_stats()
    assert (recent["requests"], recent["errors"], recent["batches"]) == (60, 30, 30)
    assert (recent["tokens"], recent["mean_experts_per_token"]) == (90, pytest.approx(4 / 3))
    assert (totals["answered"], totals["failed"], totals["tokens"]) == (100, 100, 300)
    assert totals["load"].tolist() == [300, 100]
    assert totals["histogram"].tolist() == [0, 200, 100]
    assert (stats["total_batches"], stats["total_tokens"]) == (100, 300)
    assert stats["avg_usage_per_expert"] == [0.75, 0.25]
    assert len(traffic._slots) <= 32


def test_many_experts_share_a_label():
    exporter = metrics.Exporter(
        num_experts=1000, codes=(), build=dict(version="", jax="", backend="", params="")
    )
    exporter.mirror_experts(np.arange(1000))
    lines = [
        line
        for line in exporter.text().decode().splitlines()
        if line.startswith("moe_expert_assignments_total{")
    ]
    assert len(lines) == metrics.MAX_EXPERT_LABELS + 1
    assert f'{{expert="other"}} {float(sum(range(64, 1000)))}' in "\n".join(lines)


def test_health_has_what_the_guide_names(make_engine, states, clock):  # H01-H06
    engine = make_engine()
    engine.route(states())
    clock.now += 42
    health = engine.health_check()
    assert health["status"] == "healthy"
    assert health["uptime_seconds"] == 42
    assert health["configuration"]["router_config"]["input_dim"] == 16
    assert health["memory"]["rss_bytes"] > 10**7
    assert health["performance"]["requests"] == 1
    assert health["performance"]["p95_ms"] > 0
    assert set(health["components"]) == {
        "router",
        "device",
        "circuit_breaker",
        "cache",
        "rate_limiter",
        "monitoring",
        "security",
    }
    json.dumps(health, allow_nan=False)


def test_the_bundle_holds_no_secret_and_no_tensor(make_engine, states, log):  # T08
    x = states() + np.float32(12345.678)
    engine = make_engine(
        api_keys="hunter2,hunter3", admin_key="hunter4", security_level="strict", log_level="DEBUG"
    )
    client = engine.identify(api_key="hunter2", peer="192.0.2.1")
    engine.infer("router", x, client=client)
    refusal(lambda: engine.identify(api_key="hunter9", peer="192.0.2.1"), "unauthorized")
    text = json.dumps(engine.diagnostics(), allow_nan=False)
    for output in (text, log.text(), engine.metrics_text().decode(), repr(engine.access.keys)):
        assert "hunter" not in output
        assert "12345." not in output
    assert '"api_keys": true' in text
    assert client.id.startswith("key-")


def test_logs_are_json_lines_at_the_level_asked_for(capsys, states):  # T01
    seen: dict[str, list[dict[str, Any]]] = {}
    for level in ("DEBUG", "INFO", "ERROR"):
        with moe_jax.RouterFactory.create_from_environment(
            input_dim=16, buckets="16,64", log_level=level, serve_moe="off"
        ) as engine:
            engine.route(states(), request_id="my-request")
        printed = capsys.readouterr()
        assert printed.out == "", "standard output is the program's own"
        seen[level] = [json.loads(line) for line in printed.err.splitlines()]
    assert seen["ERROR"] == []
    assert {line["environment"] for lines in seen.values() for line in lines} == {"development"}
    assert {"untrained_weights", "engine_ready"} <= {line["event"] for line in seen["INFO"]}
    assert not any(line["level"] == "debug" for line in seen["INFO"])
    (answered,) = [line for line in seen["DEBUG"] if line["event"] == "answered"]
    assert (answered["request_id"], answered["shape"]) == ("my-request", [2, 5, 16])


# --- the five alerts ------------------------------------------------------------------------


def active(engine) -> set[str]:
    return {alert["alert"] for alert in engine.health_check()["alerts"]}


def test_alerts_fire_and_clear_on_real_traffic(make_engine, states, clock, log):  # A01-A06
    engine = make_engine(enable_caching=False)
    x = states(1, 2)
    for _ in range(30):
        engine.route(x)
    assert active(engine) <= {"poor_load_balance"}

    # one token over and over: few experts, all the load
    assert active(engine) == {"poor_load_balance"}
    run = engine.device.run
    engine.device.run = lambda *order: (_ for _ in ()).throw(RuntimeError("INTERNAL: broken"))
    for _ in range(20):
        refusal(lambda: engine.route(x), "device_error")
    seen = {alert["alert"]: alert["seen"] for alert in engine.health_check()["alerts"]}
    assert "in the last 5 minutes, over 5%" in seen["high_error_rate"]
    assert engine.health_check()["status"] == "degraded"
    for _ in range(20):
        try:
            engine.route(x)
        except ServingError as error:
            code = error.code
    assert code == "circuit_open"
    assert "circuit_open" in active(engine)

    engine.device.run = run
    clock.now += 400  # the window passes, the breaker allows a probe
    for seed in range(30):
        engine.route(states(4, 16, seed=seed))
    assert active(engine) == set()
    assert engine.health_check()["status"] == "healthy", "recovered by itself"
    for name in ("high_error_rate", "circuit_open", "poor_load_balance"):
        for event in ("alert_fired", "alert_cleared"):
            assert (event, name) in {(e, f.get("alert")) for _, e, f in log.lines}


def test_latency_and_memory_alerts_fire_and_clear(make_engine, states, clock):
    engine = make_engine(enable_caching=False)
    run = engine.device.run

    def slow(*order):
        slept.wait(0.52)
        return run(*order)

    slept = threading.Event()
    engine.device.run = slow
    threads = [
        threading.Thread(target=lambda s=s: engine.route(states(2, 8, seed=s))) for s in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "high_latency" in active(engine)
    engine.device.run = run
    clock.now += 400
    for seed in range(20):
        engine.route(states(2, 8, seed=seed))
    assert active(engine) == set()

    rss = [100.0]
    engine.system.stop()  # else it may take a sample between two of these
    engine.system._read = lambda: (int(rss[0]), 0.0)
    engine.system._history.clear()
    for value, fires in ((100, False), (100, False), (151, True), (110, False)):
        rss[0] = value
        engine.system.sample()
        assert ("memory_spike" in active(engine)) == fires


def test_memory_that_loading_takes_is_no_spike():
    rss = [100]
    sampler = metrics.SystemSampler(read=lambda: (rss[0], 0.0))
    for value in (100, 100, 200):
        rss[0] = value
        sampler.sample()
        assert sampler.spike_ratio() == 1
    sampler.mark_ready()
    assert sampler.spike_ratio() == 1, "the samples of loading are dropped"
    rss[0] = 400
    sampler.sample()
    assert sampler.spike_ratio() > 1


# --- readiness and the end ------------------------------------------------------------------


def test_readiness_gives_reasons(make_engine, states, clock, tmp_path):
    engine = make_engine(max_inflight=1, max_queue=1)
    assert engine.readiness() == (True, [])
    for _ in range(20):
        engine.breaker.acquire().failure()
    assert engine.readiness() == (False, ["circuit_open"])
    assert engine.live(), "an open circuit is no reason to restart"
    clock.now += 10
    assert engine.readiness() == (True, []), "requests are wanted again: one of them is the probe"
    engine.begin_drain()
    assert engine.readiness() == (False, ["draining"])
    engine.route(states())  # still answered
    engine.shutdown()
    refusal(lambda: engine.route(states()), "draining")
    refusal(lambda: engine.admit(Client("a")), "draining")
    engine.shutdown()  # twice is no harm

    lost = make_engine(checkpoint=str(tmp_path / "none"), engine={"background": True})
    while not lost.load_error:
        time.sleep(0.001)
    assert lost.readiness() == (False, ["params_missing"])
    assert lost.health_check()["status"] == "unhealthy"
    refusal(lambda: lost.route(states()), "warming")
    with pytest.raises(ValueError, match="checkpoint"):
        make_engine(checkpoint=str(tmp_path / "none"))


def test_many_threads_get_their_own_answers(make_engine, states):
    engine = make_engine(max_inflight=4, max_queue=64)
    wanted = {seed: engine.route(states(seed=seed), use_cache=False) for seed in range(6)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            actual = engine.route(states(seed=seed))
            if (actual["expert_indices"] != wanted[seed]["expert_indices"]).any():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(n % 6,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
