"""Checkpoints, plain ones and those of language models, and their swap: R11, R13, B07."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import checkpoint
from moe_jax.checkpoint import CheckpointError
from moe_jax.config import ConfigError, load_config
from moe_jax.lab.language_model import init, init_states
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.model_files import Model, save_model
from moe_jax.serving.engine.buckets import Buckets, compile_counter
from moe_jax.serving.engine.weights import load_weights
from moe_jax.serving.errors import ServingError
from tests.serving.engine.conftest import WIDTH


def write(
    folder: Path, *, seed: int, width: int = 16, experts: int = 8, spoil: bool = False
) -> str:
    """A checkpoint with one calibrated DynamicK, as ``moe_jax.checkpoint.save`` writes it."""
    router = moe_jax.DynamicK(num_experts=experts, min_k=1, max_k=4, difficulty="activation_norm")
    params = router.init(jax.random.key(seed), width)
    x = jax.random.normal(jax.random.key(seed + 100), (512, width))
    state = router.fit(params, router.init_state(), x, target_mean_k=2.0)
    if spoil:
        params = {"kernel": params["kernel"] * jnp.nan}
    saved = checkpoint.Checkpoint(
        params={"router": params}, routers={"router": router}, states={"router": state}
    )
    return str(checkpoint.save(folder, saved))


def test_a_checkpoint_is_served_with_its_calibration(make_engine, states, tmp_path, log):  # R13
    path = write(tmp_path / "one", seed=1)
    engine = make_engine(checkpoint=path, num_experts=6)
    # What the checkpoint is wins over a configuration that says otherwise, and is told.
    superseded = [facts for _, event, facts in log.lines if event == "configuration_superseded"]
    assert [facts["served"] for facts in superseded] == [{"num_experts": 8}]
    assert engine.health_check()["components"]["router"]["num_experts"] == 8
    health = engine.health_check()
    component, configuration = health["components"]["router"], health["configuration"]
    sizes = {"input_dim": 16, "num_experts": 8, "min_experts": 1, "max_experts": 4}
    assert configuration["router_config"] == sizes, "what is in force, and nothing else"
    assert configuration["superseded"]["router_config"]["num_experts"] == 6
    assert sizes.keys() - configuration["superseded"]["router_config"].keys() == {
        "input_dim",
        "min_experts",
        "max_experts",
    }
    assert component["checkpoint"] == checkpoint.load_metadata(path)["checksum"][:16]
    assert (component["release"], component["chosen_by"]) == ("", "default")
    assert not component["control"]
    assert (component["status"], component["source"]) == ("ok", path)
    assert component["calibration"]["target_mean_k"] == 2.0
    assert (component["layer"], component["layers"]) == ("router", ["router"])
    [ready] = [facts for _, event, facts in log.lines if event == "engine_ready"]
    assert (ready["layer"], ready["chosen_by"]) == ("router", "default")
    assert (ready["version"], ready["checkpoint"]) == (
        component["version"],
        component["checkpoint"],
    )
    result = engine.route(states(8, 60), use_cache=False)
    k, c = result["num_experts_per_token"], result["complexity_scores"]
    assert k.mean() == pytest.approx(2.0, abs=0.25)
    assert (k == np.clip(np.round(1 + 3 * c), 1, 4)).all(), "for calibrated thresholds too"
    assert 'params="' + engine.snapshot.version + '"' in engine.metrics_text().decode()
    drift = next(
        float(line.split()[1])
        for line in engine.metrics_text().decode().splitlines()
        if line.startswith("moe_budget_drift_ratio ")
    )
    assert drift == pytest.approx(k.mean() / 2.0)


def test_defaults_that_the_checkpoint_knows_better_are_no_warning(make_engine, tmp_path, log):
    """The width of 768 and the largest k of 4 are defaults: nobody configured them."""
    make_engine(checkpoint=write(tmp_path / "one", seed=1), input_dim=768)
    assert "configuration_superseded" not in log.events()


def test_a_start_logs_how_many_programs_it_has_to_compile(make_engine, monkeypatch, log):
    monkeypatch.setattr("moe_jax.serving.engine.served._PROGRESS_SECONDS", 0.0)
    make_engine(buckets="16,64")
    started = log.lines[: log.events().index("engine_ready")]
    assert started[0][1] == "loading"
    counts = [
        (facts["compiled"], facts["total"]) for _, event, facts in started if event == "compiling"
    ]
    assert counts == [(0, 2), (1, 2), (2, 2)]


def test_a_missing_checkpoint_names_the_setting(make_engine, tmp_path):
    with pytest.raises(CheckpointError, match=r"MOE_CHECKPOINT \(or --checkpoint\): .*nowhere"):
        make_engine(checkpoint=str(tmp_path / "nowhere"))


def test_a_language_models_layers_are_served_by_name(make_engine, states, tmp_path, log):
    config = LMConfig(
        num_layers=2, d_model=16, num_heads=2, num_experts=8, k=4, d_ff=24, length=8, batch_size=2
    )
    params = init(config, jax.random.key(0))
    router = config.router()
    model = Model(
        config=config,
        params=params,
        routers=(router,) * 2,
        states=init_states(config),
        metadata={},
    )
    path = str(save_model(tmp_path / "lm", model))
    x = states()
    answers = []
    for name in ("layer_0", "layer_1"):
        engine = make_engine(
            checkpoint=path, checkpoint_router=name, buckets="16", serve_moe="auto"
        )
        assert sorted(engine.snapshot.models) == ["moe", "router"], "it has experts"
        answers.append(engine.infer("moe", x).arrays["output"])
        number = int(name[-1])
        layer = jax.tree.map(lambda p, n=number: p[n], params["layers"])["moe"]
        wanted, _ = moe_jax.moe_layer(
            router, config.experts, layer, router.init_state(), jnp.asarray(x)
        )
        np.testing.assert_allclose(answers[-1], wanted, rtol=2e-5, atol=2e-5)
    assert (answers[0] != answers[1]).any()
    only_router = make_engine(checkpoint=path, serve_moe="off", buckets="16")
    # Without a name all layers are served, and routers alone where the setting says so.
    assert sorted(only_router.snapshot.models) == ["layer_0", "layer_1", "router"]
    with pytest.raises(ValueError, match="layer_0, layer_1"):
        make_engine(checkpoint=path, checkpoint_router="layer_7")
    plain = write(tmp_path / "plain", seed=1)
    with pytest.raises(ConfigError, match="expected a checkpoint with experts"):
        make_engine(checkpoint=plain, serve_moe="on")


RULES = {
    "own": moe_jax.TopK(num_experts=8, k=2),
    "control": moe_jax.RandomSkip(num_experts=8, k=2, mean_k=1.5),
    "rule": moe_jax.MinP(num_experts=8, max_k=2),
}


def several(folder: Path, names: list[str]) -> str:
    """A checkpoint with these routers; a name says which rule it has, no rule is the own one."""
    rules = {n: RULES[n.partition("-")[0] if "/" in n else "own"] for n in names}
    saved = checkpoint.Checkpoint(
        params={n: r.init(jax.random.key(i), 16) for i, (n, r) in enumerate(rules.items())},
        routers=rules,
        states={n: r.init_state() for n, r in rules.items()},
    )
    return str(checkpoint.save(folder, saved))


@pytest.mark.parametrize(
    ("names", "asked", "chosen", "layers"),
    [
        # As text, control-10/layer_0 would be first, and layer_10 before layer_3.
        (
            ["control-10/layer_3", "layer_3", "layer_10", "rule-10/layer_3"],
            "",
            "layer_3",
            ["layer_3", "layer_10"],
        ),
        (["control-10/layer_0", "rule-10/layer_0"], "", "rule-10/layer_0", []),
        (["layer_0", "rule-20/layer_10", "rule-20/layer_9"], "rule-20", "rule-20/layer_9", 2),
        (["layer_0", "rule-20/layer_10", "rule-20/layer_9"], "rule-20/layer_10", None, []),
        (["control-10/layer_0", "control-10/layer_1"], "", "control-10/layer_0", 2),
    ],
    ids=["own", "no-control", "rule", "router", "control"],
)
def test_the_served_router_is_the_checkpoints_own_unless_another_is_named(
    tmp_path, names, asked, chosen, layers
):
    path = several(tmp_path / "several", names)
    weights = load_weights(load_config(env={}, checkpoint=path, checkpoint_router=asked))
    assert weights.name == (chosen or asked)
    assert weights.chosen_by == ("MOE_CHECKPOINT_ROUTER" if asked else "default")
    assert len(weights.layers) == (layers if isinstance(layers, int) else len(layers))
    if isinstance(layers, list) and layers:
        assert list(weights.layers) == layers


def test_a_control_that_is_served_is_a_warning_and_an_unknown_rule_names_all(
    make_engine, tmp_path, log
):
    path = several(tmp_path / "several", ["layer_0", "control-10/layer_0", "rule-20/layer_0"])
    engine = make_engine(checkpoint=path, checkpoint_router="control-10", buckets="16")
    [warning] = [facts for _, event, facts in log.lines if event == "control_served"]
    assert warning["serving"] == "control-10/layer_0"
    assert engine.health_check()["components"]["router"]["control"]
    with pytest.raises(
        ConfigError,
        match=r"^MOE_CHECKPOINT_ROUTER: expected one of layer_0, control-10, rule-20, or ",
    ):
        make_engine(checkpoint=path, checkpoint_router="top_p", buckets="16")


def test_the_hint_to_another_rule_names_one_that_the_checkpoint_has(make_engine, tmp_path, log):
    path = several(tmp_path / "several", ["layer_0", "control-10/layer_0", "rule-20/layer_0"])
    make_engine(checkpoint=path, buckets="16")
    [facts] = [facts for _, event, facts in log.lines if event == "serving_one_rule"]
    assert "to a rule, such as rule-20, to serve" in facts["hint"]
    one = several(tmp_path / "routers", ["first", "second"])
    make_engine(checkpoint=one, buckets="16")
    [_, facts] = [facts for _, event, facts in log.lines if event == "serving_one_rule"]
    assert "MOE_CHECKPOINT_ROUTER to a router to serve it alone" in facts["hint"]


def test_a_router_that_the_checkpoint_does_not_have_is_a_matter_of_the_settings(
    make_engine, tmp_path
):
    path = several(tmp_path / "several", ["layer_0", "rule-20/layer_0"])
    settings = {"checkpoint": path, "checkpoint_router": "top_p"}
    engine = make_engine(**settings, engine={"background": True})
    assert engine.served.close(60.0)
    assert engine.load_error.startswith("MOE_CHECKPOINT_ROUTER: expected one of")
    assert engine.readiness() == (False, ["misconfigured"])
    assert engine.cannot_start


@pytest.mark.parametrize("is_described", [True, False])
def test_experts_of_ones_own_are_served_where_metadata_say_what_they_are(
    make_engine, tmp_path, log, is_described
):
    router, experts = moe_jax.TopK(num_experts=8, k=2), moe_jax.FeedForward()
    layer = moe_jax.init_moe_layer(router, experts, jax.random.key(0), d_model=16, d_ff=24)
    saved = checkpoint.Checkpoint(
        params={"mine": layer},
        routers={"mine": router},
        states={"mine": router.init_state()},
        metadata={"experts": {"activation": "gelu_tanh", "gated": False}} if is_described else {},
    )
    path = str(checkpoint.save(tmp_path / "mine", saved))
    engine = make_engine(checkpoint=path, serve_moe="auto", buckets="16")
    assert ("moe" in engine.snapshot.models) is is_described
    assert ("moe_not_served" in log.events()) is not is_described


def test_seeded_experts_do_not_stand_in_the_way_of_a_checkpoint_without_any(make_engine, tmp_path):
    engine = make_engine(serve_moe="auto", expert_hidden_dim=24, buckets="16")
    assert "moe" in engine.snapshot.models
    assert engine.reload(write(tmp_path / "plain", seed=1))["trained"]
    assert list(engine.snapshot.models) == ["router"]


def test_a_reload_swaps_between_requests(make_engine, states, tmp_path, log):
    one, two = write(tmp_path / "one", seed=1), write(tmp_path / "two", seed=2)
    engine = make_engine(checkpoint=one)
    fresh = make_engine(checkpoint=two)
    x = states()
    old = engine.route(x)
    compiled = compile_counter().count
    outcome = engine.reload(two)
    assert outcome["previous"] == old["production_info"]["model_version"]
    assert outcome["version"] == engine.snapshot.version == fresh.snapshot.version
    assert "reloaded" in log.events()
    new = engine.route(x)
    assert not new["production_info"]["cached"], "the cache knows old from new"
    assert (new["expert_indices"] == fresh.route(x)["expert_indices"]).all()
    assert (new["expert_indices"] != old["expert_indices"]).any()
    assert engine.lookup("router", old["production_info"]["digest"]) is None
    assert f'params="{outcome["version"]}"' in engine.metrics_text().decode()
    assert outcome["previous"] not in engine.metrics_text().decode()
    assert engine.reload()["version"] == outcome["previous"], "None is the configured one"
    assert compile_counter().count - compiled <= 1, "an equal rule is not compiled anew"


def test_no_answer_mixes_two_checkpoints(make_engine, states, tmp_path):
    paths = [write(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    engine, x = make_engine(checkpoint=paths[0]), states()
    wanted = {}
    for path in paths:
        engine.reload(path)
        wanted[engine.snapshot.version] = engine.route(x, use_cache=False)["expert_indices"]
    stop, wrong, answered = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            result = engine.route(x)
            answered.append(1)
            version = result["production_info"]["model_version"]
            if (result["expert_indices"] != wanted[version]).any():
                wrong.append(version)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for path in paths * 2:
        engine.reload(path)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(answered) > 10


def corrupt(path: str) -> None:
    files = [file for file in Path(path, "arrays", "params").rglob("*") if file.is_file()]
    file = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_bad_checkpoint_is_refused_and_the_old_one_goes_on(make_engine, states, tmp_path, log):
    engine = make_engine(checkpoint=write(tmp_path / "good", seed=1))
    version, x = engine.snapshot.version, states()
    engine.route(x)
    damaged = write(tmp_path / "damaged", seed=2)
    corrupt(damaged)
    for path, reason in (
        (str(tmp_path / "none"), "expected a checkpoint"),
        (damaged, "damaged or changed"),
        (write(tmp_path / "wide", seed=3, width=24), "width"),
        (write(tmp_path / "many", seed=3, experts=12), "num_experts"),
        (write(tmp_path / "nan", seed=3, spoil=True), "not finite"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            engine.reload(path)
        assert engine.snapshot.version == version
        assert engine.route(x)["production_info"]["cached"], "not even the cache was touched"
    assert log.events().count("reload_refused") == 5
    assert engine.health_check()["status"] == "healthy"


def test_hot_keys_are_computed_anew_after_a_reload(make_engine, states, tmp_path):  # K03
    engine = make_engine(checkpoint=write(tmp_path / "one", seed=1), prefetch=True)
    hot, cold = states(seed=1), states(seed=2)
    for _ in range(4):
        engine.route(hot)
    engine.route(cold)
    before = engine.get_metrics()["router_stats"]["total_batches"]
    assert engine.reload(write(tmp_path / "two", seed=2))["rewarmed"] == 1
    assert engine.get_metrics()["router_stats"]["total_batches"] == before
    assert engine.route(hot)["production_info"]["cached"]
    assert not engine.route(cold)["production_info"]["cached"]


# --- weights that load and are unsound, at the start ----------------------------------------


def spoilt_layer(folder: Path, part: str) -> str:
    """A checkpoint with experts of which one array holds NaN or inf."""
    router, experts = moe_jax.TopK(num_experts=8, k=2), moe_jax.FeedForward()
    layer = moe_jax.init_moe_layer(router, experts, jax.random.key(0), d_model=16, d_ff=24)
    value = jnp.inf if part == "router" else jnp.nan
    layer[part] = jax.tree.map(lambda p: p.at[0].set(value), layer[part])
    saved = checkpoint.Checkpoint(
        params={"mine": layer},
        routers={"mine": router},
        states={"mine": router.init_state()},
        metadata={"experts": {"activation": "gelu_tanh", "gated": False}},
    )
    return str(checkpoint.save(folder, saved))


def unsound(kind: str, folder: Path) -> str:
    if kind == "kernel":
        return write(folder, seed=3, spoil=True)
    return spoilt_layer(folder, kind)


@pytest.mark.parametrize("kind", ["kernel", "router", "experts"])
def test_a_start_refuses_what_a_reload_would_refuse(make_engine, tmp_path, kind):
    path = unsound(kind, tmp_path / "bad")
    with pytest.raises(CheckpointError, match=r"not finite.*They are not served"):
        make_engine(checkpoint=path, serve_moe="auto", buckets="16")


def test_unsound_weights_are_never_ready_and_say_why(make_engine, states, tmp_path, log):
    engine = make_engine(
        checkpoint=write(tmp_path / "bad", seed=3, spoil=True), engine={"background": True}
    )
    deadline = time.monotonic() + 60.0
    while engine.load_error is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.readiness() == (False, ["params_unsound"])
    assert engine.live(), "a restart would not help"
    health = engine.health_check()
    assert health["status"] == "unhealthy"
    assert health["components"]["router"]["status"] == "failed"
    assert "not finite" in health["components"]["router"]["error"]
    [facts] = [facts for _, event, facts in log.lines if event == "load_failed"]
    assert facts["reason"] == "params_unsound"
    with pytest.raises(ServingError) as caught:
        engine.route(states())
    assert (caught.value.code, caught.value.status) == ("warming", 503)
    assert "device" not in caught.value.message
    assert engine.breaker.state == "closed"
    outcome = engine.reload(write(tmp_path / "good", seed=1))
    assert outcome["previous"] is None
    assert engine.readiness() == (True, []), "a good checkpoint ends it"
    assert engine.route(states())["expert_indices"].shape == (2, 5, 4)
    assert engine.health_check()["status"] == "healthy"
    assert b"moe_build_info{" in engine.metrics_text()


def test_a_missing_checkpoint_is_another_reason(make_engine, tmp_path):
    engine = make_engine(checkpoint=str(tmp_path / "none"), engine={"background": True})
    deadline = time.monotonic() + 60.0
    while engine.load_error is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert engine.readiness() == (False, ["params_missing"])


# --- the end of an engine that still starts -------------------------------------------------


def test_shutdown_waits_for_a_start_that_compiles_and_begins_no_more(make_engine, monkeypatch):
    begun, release, sizes = threading.Event(), threading.Event(), []
    real = Buckets.compile

    def compile_slowly(buckets, size):
        sizes.append(size)
        begun.set()
        assert release.wait(60.0)
        real(buckets, size)

    monkeypatch.setattr(Buckets, "compile", compile_slowly)
    monkeypatch.setattr("moe_jax.serving.engine.snapshot._COMPILERS", 1)
    engine = make_engine(engine={"background": True})
    assert begun.wait(60.0)
    assert engine.shutdown(timeout_seconds=0.05) is False, "a compilation cannot be cancelled"
    release.set()
    deadline = time.monotonic() + 60.0
    while any(thread.name == "moe-load" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sizes == [64], "none begins after the shutdown"
    assert engine.load_error is None
    assert "load_stopped" in engine.log.events()


def test_a_drain_ends_a_reload_before_its_next_compilation(make_engine, monkeypatch, tmp_path):
    engine, path = make_engine(), write(tmp_path / "other", seed=1, width=WIDTH)
    version, real, sizes = engine.snapshot.version, Buckets.compile, []

    def compile_one(buckets, size):
        sizes.append(size)
        engine.begin_drain()
        real(buckets, size)

    monkeypatch.setattr(Buckets, "compile", compile_one)
    monkeypatch.setattr("moe_jax.serving.engine.snapshot._COMPILERS", 1)
    with pytest.raises(ServingError, match="shutting down"):
        engine.reload(path)
    assert sizes == [64]
    assert engine.snapshot.version == version


def test_shutdown_of_a_started_engine_leaves_no_thread(make_engine):
    engine = make_engine(engine={"background": True})
    assert engine.shutdown(timeout_seconds=60.0) is True
    assert not [t.name for t in threading.enumerate() if t.name == "moe-load"]
