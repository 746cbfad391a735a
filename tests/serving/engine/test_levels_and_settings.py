"""Every level by every row of the security table, and every setting by what it changes.

docs/promises.md S07-S10, C01-C20, L01-L03.
"""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.config import load_config
from moe_jax.config.settings import SETTINGS
from moe_jax.serving.engine import Client
from moe_jax.serving.errors import ServingError

LEVEL_NAMES = ("minimal", "standard", "strict")
CLIENT = Client("key-1")


def outcome(call) -> str:
    try:
        call()
    except ServingError as error:
        return error.code
    return "ok"


def with_value(states, value: float) -> np.ndarray:
    x = states()
    x[1, 2, 3] = value
    return x


# --- the table: row by row, what each level does --------------------------------------------


def always_checked(engine, states) -> object:
    bad = (states()[0], states().astype(np.float64), states()[..., :4])
    return tuple(outcome(lambda x=x: engine.infer("router", x)) for x in bad)


def nonfinite(engine, states) -> object:
    results = []
    code = outcome(lambda: results.append(engine.infer("router", with_value(states, np.nan))))
    if code != "ok":
        return code
    info = results[0].info
    used = int(results[0].arrays["num_experts_per_token"][1, 2])
    return info["nonfinite_tokens"], info["sanitized"], used > 0


def magnitude(engine, states) -> object:
    return outcome(lambda: engine.infer("router", with_value(states, 1e7)))


def limits(engine, states) -> object:
    count = 0
    while count < 700 and outcome(lambda: engine.admit(CLIENT)) == "ok":
        count += 1
    return count


def tokens(engine, states) -> object:
    shape = (1, 400_001)
    view = np.broadcast_to(np.float32(0), (*shape, 16))
    if engine.level.tokens_per_minute is None:
        return "unlimited"
    if engine.level.tokens_per_minute > 400_001:
        engine.admit(CLIENT, requests=0, tokens=1_999_999)
        return outcome(lambda: engine.admit(CLIENT, requests=0, tokens=2))
    return outcome(lambda: engine.infer("router", view))


def blocks(engine, states) -> object:
    for count in range(1, 31):
        engine.violation(CLIENT, "malformed")
        with_block = outcome(lambda: engine.admit(CLIENT))
        if with_block == "blocked":
            with pytest.raises(ServingError) as caught:
                engine.admit(CLIENT)
            return count, round(caught.value.retry_after or 0)
    return "never"


def api_key(engine, states) -> object:
    return tuple(
        outcome(lambda k=k: engine.identify(api_key=k, peer="192.0.2.1"))
        for k in (None, "wrong", "right")
    )


def cache_key(engine, states) -> object:
    x = states()
    mine = engine.infer("router", x, client=Client("a")).info["digest"]
    other = engine.infer("router", x, client=Client("b")).info
    return (
        mine == other["digest"],
        other["cached"],
        (engine.lookup("router", mine, client=Client("b")) is not None),
    )


TABLE = {
    always_checked: [("malformed",) * 3] * 3,
    nonfinite: [(1, False, True), (1, True, False), "invalid_values"],
    magnitude: ["ok", "ok", "invalid_values"],
    limits: [700, 600, 120],
    tokens: ["unlimited", "rate_limited", "too_large"],
    blocks: ["never", (10, 60), (5, 300)],
    api_key: [("ok", "unauthorized", "ok")] * 2 + [("unauthorized", "unauthorized", "ok")],
    cache_key: [(True, True, True)] * 2 + [(False, False, False)],
    lambda engine, states: engine.level.metrics_need_bearer: [False, False, True],
    lambda engine, states: engine.level.terse_errors: [False, False, True],
}


@pytest.mark.parametrize("level", LEVEL_NAMES)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.__name__)
def test_every_level_by_every_row(make_engine, states, level, row):
    engine = make_engine(security_level=level, api_keys="right")
    assert row(engine, states) == TABLE[row][LEVEL_NAMES.index(level)]


def test_minimal_flags_what_it_lets_through(make_engine, states):
    engine = make_engine(security_level="minimal")
    result = engine.route(with_value(states, np.inf))
    assert result["production_info"]["nonfinite_tokens"] == 1


# --- settings -------------------------------------------------------------------------------


def width(engine, states):
    return engine.describe("router")["inputs"][0]["shape"][-1]


def weights_shape(engine, states):
    return engine.snapshot.weights.params["kernel"].shape


def ks(engine, states):
    actual = engine.route(states(4, 16))["num_experts_per_token"]
    return int(actual.min()), int(actual.max())


def rule(engine, states):
    return type(engine.snapshot.router).__name__


def router_json(engine, states):
    return engine.snapshot.router.to_json()


def cached_twice(engine, states):
    engine.route(states())
    return engine.route(states())["production_info"]["cached"]


def monitored(engine, states):
    engine.route(states())
    return engine.get_metrics()["router_stats"] != {}, len(engine.metrics_text()) > 1000


def kept(engine, states):
    for seed in range(4):
        engine.route(states(seed=seed))
    return len(engine.cache)


def expired(engine, states):
    engine.route(states())
    engine.clock.now += 100
    return engine.route(states())["production_info"]["cached"]


def sizes(engine, states):
    return engine.snapshot.models["router"].sizes


def checked(engine, states):
    result = engine.route(with_value(states, np.nan))
    return result["production_info"]["sanitized"]


def batch_of_4(engine, states):
    return outcome(lambda: engine.route(states(4, 2)))


def nan_outcome(engine, states):
    return outcome(lambda: engine.route(with_value(states, np.nan)))


def deadline(engine, states):
    run = engine.device.run

    def slow(*order):
        import time

        time.sleep(0.05)
        return run(*order)

    engine.device.run = slow
    return outcome(lambda: engine.route(states(seed=77)))


def static(engine, states):
    def broken(*order):
        raise RuntimeError("INTERNAL: injected")

    engine.device.run = broken
    return outcome(lambda: engine.route(states()))


def logged(engine, states):
    return engine.log.events()


def untrained_level(engine, states):
    return [level for level, event, _ in engine.log.lines if event == "untrained_weights"]


def admitted(engine, states):
    return limits(engine, states)


def token_limit(engine, states):
    return outcome(lambda: engine.admit(CLIENT, tokens=20))


def forwarded(engine, states):
    return engine.identify(peer="10.0.0.1", forwarded_for="192.0.2.7").id


def strict_key(engine, states):
    return outcome(lambda: engine.identify(api_key="right", peer="192.0.2.1"))


def wrong_key(engine, states):
    return outcome(lambda: engine.identify(api_key="wrong", peer="192.0.2.1"))


def admin(engine, states):
    return engine.is_admin("boss")


def version(engine, states):
    return engine.snapshot.version


def models(engine, states):
    return sorted(engine.snapshot.models)


def queue(engine, states):
    return engine.bulkhead._queue_size, engine.bulkhead._workers


def reads_config(name):
    def read(engine, states):
        section, _ = SETTINGS[name]
        return getattr(getattr(engine.config, section) if section else engine.config, name)

    read.__name__ = f"read_{name}"
    return read


# setting -> (another value, what shows it, further settings). What only the transport or the log's
# renderer acts on is read back here and tested where it acts: test_engine (log_level), the tests of
# the HTTP side (host, port, drain_seconds), test_redis and test_reload (redis_url, checkpoint ...).
SHOWN = {
    "input_dim": (24, width, {}),
    "num_experts": (12, weights_shape, {}),
    "min_experts": (2, ks, {}),
    "max_experts": (3, ks, {}),
    "complexity_estimator": ("router_entropy", router_json, {}),
    "routing_strategy": ("threshold", rule, {}),
    "load_balancing": (False, router_json, {}),
    "noise_factor": (0.2, router_json, {}),
    "enable_caching": (False, cached_twice, {}),
    "enable_monitoring": (False, monitored, {}),
    "cache_size": (2, kept, {}),
    "cache_ttl_seconds": (50.0, expired, {}),
    "parallel_threshold": (20, sizes, {"buckets": ""}),
    "enable_validation": (False, checked, {"security_level": "standard"}),
    "max_tensor_size": (100, batch_of_4, {}),
    "max_batch_size": (3, batch_of_4, {}),
    "security_level": ("strict", nan_outcome, {}),
    "request_timeout_seconds": (0.01, deadline, {}),
    "max_inflight": (2, queue, {}),
    "max_queue": (3, queue, {}),
    "nonfinite": ("reject", nan_outcome, {}),
    "max_magnitude": (0.5, nan_outcome, {"security_level": "strict", "nonfinite": "mask"}),
    "rate_limit_requests": (7, admitted, {}),
    "rate_limit_tokens": (10, token_limit, {}),
    "replicas": (3, logged, {}),
    "environment": ("production", untrained_level, {}),
    "cache_max_bytes": (1100, kept, {}),
    "prefetch": (True, lambda engine, states: engine.results._hot is not None, {}),
    "trusted_proxies": ("10.0.0.0/8", forwarded, {}),
    "seed": (3, version, {}),
    "serve_moe": ("on", models, {"buckets": "16", "expert_hidden_dim": 24}),
    "expert_hidden_dim": (24, version, {"buckets": "16", "serve_moe": "on"}),
    "buckets": ("16", sizes, {}),
    "fallback_static_top_k": (True, static, {}),
    "slow_call_seconds": (1.0, lambda e, s: e.breaker.policy.slow_seconds, {}),
    "api_keys": ("right", wrong_key, {}),
    "admin_key": ("boss", admin, {}),
    **{
        name: (value, reads_config(name), {})
        for name, value in {
            "log_level": "DEBUG",
            "host": "0.0.0.0",
            "port": 1,
            "drain_seconds": 1.0,
        }.items()
    },
}
# Their tests are in test_redis.py, test_reload.py and http/test_access.py.
ELSEWHERE = {"redis_url", "checkpoint", "checkpoint_router", "reload_folder"}


def test_every_setting_is_in_the_table():
    assert set(SHOWN) | ELSEWHERE == set(SETTINGS)
    assert not set(SHOWN) & ELSEWHERE


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_every_setting_changes_something_that_shows(make_engine, states, monkeypatch, name):
    value, show, rest = SHOWN[name]
    before = show(make_engine(**rest), states)
    word = str(value).lower() if isinstance(value, bool) else str(value)
    # as a variable: the engine gets what the environment says
    settings = {"input_dim": 16, "buckets": "16,64", **rest}
    settings.pop(name, None)
    config = load_config(env={"MOE_" + name.upper(): word}, **settings)
    section, _ = SETTINGS[name]
    given = getattr(getattr(config, section) if section else config, name)
    assert given == value
    after = show(make_engine(**{**rest, name: given}), states)
    assert after != before, name
