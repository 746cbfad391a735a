"""Redis as the second cache level and for shared limits, killed and brought back: L03, K02."""

from __future__ import annotations

import pytest

from moe_jax.serving.engine import Client
from moe_jax.serving.errors import ServingError
from tests.serving.redis_server import RedisServer, needs_redis, patient

pytestmark = needs_redis


@pytest.fixture
def server(tmp_path, monkeypatch):
    patient(monkeypatch)
    made = RedisServer(tmp_path)
    yield made
    made.kill()


def taken(engine, client: Client) -> int:
    count = 0
    try:
        while count < 100:
            engine.admit(client)
            count += 1
    except ServingError:
        return count
    raise AssertionError("no limit was met")


def test_replicas_share_results_and_limits(make_engine, states, server):
    one, two = (make_engine(redis_url=server.url, rate_limit_requests=10) for _ in range(2))
    x = states()
    first, second = one.route(x), two.route(x)
    assert second["production_info"]["cached"]
    assert second["production_info"]["digest"] == first["production_info"]["digest"]
    assert (second["expert_indices"] == first["expert_indices"]).all()
    assert not second["expert_indices"].flags.writeable
    assert two.lookup("router", first["production_info"]["digest"]) is not None
    other = make_engine(redis_url=server.url, seed=5)
    assert not other.route(x)["production_info"]["cached"], "other weights, other answers"
    client = Client("key-1")
    assert taken(one, client) == 10
    assert taken(two, client) == 0, "the limit is the sum"
    assert one.health_check()["components"]["rate_limiter"]["shared"]
    assert "limits_not_shared" not in one.log.events()


def test_replicas_that_answer_alike_share_whatever_else_they_differ_in(make_engine, states, server):
    """Two replicas with other ports, log levels, limits and sizes."""
    one = make_engine(redis_url=server.url)
    two = make_engine(
        redis_url=server.url,
        port=9000,
        host="0.0.0.0",
        log_level="DEBUG",
        environment="staging",
        max_inflight=1,
        max_queue=7,
        cache_size=99,
        rate_limit_requests=5,
        replicas=2,
        request_timeout_seconds=7.0,
        drain_seconds=1.0,
        api_keys="one",
        buckets="64",
    )
    x = states()
    first = one.route(x)["production_info"]
    second = two.route(x)["production_info"]
    assert (second["cached"], second["digest"]) == (True, first["digest"])
    three = make_engine(redis_url=server.url, nonfinite="sanitize")
    assert not three.route(x)["production_info"]["cached"], "it may answer otherwise"


def test_health_forgets_a_lost_redis_once_it_answers(make_engine, server, clock):
    """Without a request in between."""
    engine = make_engine(redis_url=server.url, rate_limit_requests=10)
    server.kill()
    engine.lookup("router", "0" * 32)
    engine.admit(Client("key-1"))
    components = engine.health_check()["components"]
    assert components["cache"]["status"] == components["rate_limiter"]["status"] == "redis_lost"
    server.start()
    assert engine.health_check()["components"]["cache"]["status"] == "redis_lost", "asked rarely"
    clock.now += 3
    health = engine.health_check()
    assert health["components"]["cache"]["status"] == "ok"
    assert health["components"]["rate_limiter"]["status"] == "ok"
    assert health["status"] == "healthy"
    assert engine.log.events().count("redis_back") == 2


def test_replicas_share_results_after_a_redis_that_was_down_at_the_start(
    make_engine, states, server, clock
):
    server.kill()
    one, two = (make_engine(redis_url=server.url) for _ in range(2))
    x = states()
    one.route(x), two.route(x)
    server.start()  # empty, as it has no persistence
    clock.now += 3
    one.route(states(seed=1))
    two.route(states(seed=2))
    first = one.route(states(seed=3))["production_info"]
    second = two.route(states(seed=3))["production_info"]
    assert (second["cached"], second["digest"]) == (True, first["digest"])


def test_redis_killed_and_back(make_engine, states, server, clock, log):
    engine = make_engine(redis_url=server.url, rate_limit_requests=10)
    engine.route(states(seed=0))
    assert engine.health_check()["status"] == "healthy"
    server.kill()
    for seed in range(1, 4):  # answers go on, from this process alone
        assert engine.route(states(seed=seed))["expert_indices"].shape == (2, 5, 4)
    assert engine.route(states(seed=1))["production_info"]["cached"]
    assert taken(engine, Client("key-1")) == 10, "limits go on, in memory"
    health = engine.health_check()
    assert health["status"] == "degraded"
    assert health["components"]["cache"]["status"] == "redis_lost"
    assert health["components"]["rate_limiter"]["status"] == "redis_lost"
    assert log.events().count("redis_lost") == 2, "said once for each use, not for each request"
    server.start()
    clock.now += 3
    engine.route(states(seed=9))
    assert taken(engine, Client("key-2")) == 10
    assert engine.health_check()["status"] == "healthy"
    assert log.events().count("redis_back") == 2
    assert server.url not in log.text()


def test_what_lies_damaged_in_redis_is_not_served(make_engine, states, server, log):
    import redis

    one = make_engine(redis_url=server.url)
    digest = one.route(states())["production_info"]["digest"]
    with redis.Redis.from_url(server.url) as client:
        assert client.set(f"moe:result:{digest}", b"cos\nsystem\n(S'true'\ntR.")
    two = make_engine(redis_url=server.url)
    info = two.route(states())["production_info"]
    assert not info["cached"]
    assert "redis_entry_damaged" in log.events()


def test_successors_are_fetched_from_redis_ahead(make_engine, states, server):  # K03
    make = {"redis_url": server.url, "prefetch": True, "cache_size": 3}
    engine = make_engine(**make)
    sequence = [states(seed=seed) for seed in range(12)]
    hits = []
    for _ in range(3):
        for x in sequence:
            before = engine.cache.gain.saved
            engine.route(x)
            hits.append(engine.cache.gain.saved > before)
            engine.results.prefetcher.settle()
    counts = engine.get_metrics()["prefetch"]
    assert counts["useful"] >= 15, counts
    assert not counts["off"]
    assert 'moe_prefetch_total{result="useful"} ' + str(float(counts["useful"])) in (
        engine.metrics_text().decode()
    )
