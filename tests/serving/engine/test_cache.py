"""The result cache, alone: docs/promises.md K01-K07."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from moe_jax.config import Config
from moe_jax.serving.admission import level_for
from moe_jax.serving.cache import (
    Entry,
    HotInputs,
    Keyer,
    Prefetcher,
    ResultCache,
    Successors,
    from_bytes,
    to_bytes,
)
from moe_jax.serving.cache.gain import ASIDE, TRIAL, WINDOW, Gain
from moe_jax.serving.engine.results import answer_settings
from moe_jax.serving.errors import ServingError


def entry(seconds: float = 1.0, size: int = 4, **fields) -> Entry:
    array = np.arange(size, dtype=np.float32)
    array.flags.writeable = False
    return Entry(arrays={"a": array}, about={"n": 1}, seconds=seconds, version="v", **fields)


def make_cache(clock, **settings) -> ResultCache:
    bounds = {"max_entries": 100, "max_bytes": 10**6, "ttl_seconds": 60.0}
    return ResultCache(clock=clock, **{**bounds, **settings})


def fetch(cache: ResultCache, digest: str, made: Entry | None = None) -> str:
    return cache.fetch(digest, lambda: made or entry(), wait_seconds=60.0)[1]


def test_least_recently_used_goes_first_and_the_reasons_of_misses_are_told(clock):  # K01, K06
    cache = make_cache(clock, max_entries=2)
    assert [fetch(cache, d) for d in "abab"] == ["miss", "miss", "hit", "hit"]
    assert fetch(cache, "c") == "miss"  # a goes
    assert [fetch(cache, d) for d in "bca"] == ["hit", "hit", "miss"]
    clock.now += 61
    assert fetch(cache, "c") == "miss"
    cache.clear()
    assert fetch(cache, "c") == "miss"
    report = cache.report()
    assert report["miss_reasons"] == {"cold": 3, "evicted": 1, "expired": 1, "reloaded": 1}
    assert report["results"] == {"miss": 6, "hit": 4}
    assert report["hit_ratio"] == report["hit_ratio_recent"] == pytest.approx(0.4)


def test_bounded_in_bytes(clock):  # K02
    cache = make_cache(clock, max_bytes=20_000)
    for number in range(50):
        fetch(cache, str(number), entry(size=500))
        assert cache.nbytes <= 20_000
    assert len(cache) == 20_000 // (500 * 4 + 1024)
    assert fetch(cache, "large", entry(size=5000)) == "miss"
    assert fetch(cache, "large", entry(size=5000)) == "miss"
    assert cache.reasons["too_large_to_keep"] == 2


def test_what_is_degraded_or_failed_is_never_kept(clock):
    cache = make_cache(clock)
    assert fetch(cache, "a", entry(cacheable=False)) == "miss"
    assert fetch(cache, "a", entry(cacheable=False)) == "miss"

    def fail() -> Entry:
        raise ServingError("internal", "no")

    with pytest.raises(ServingError):
        cache.fetch("b", fail, wait_seconds=1.0)
    assert fetch(cache, "b") == "miss"
    assert len(cache) == 1


def test_identical_concurrent_misses_run_once(clock):
    cache = make_cache(clock)
    computed, release, results = [], threading.Event(), []

    def compute() -> Entry:
        computed.append(1)
        assert release.wait(60.0)
        return entry()

    def ask() -> None:
        results.append(cache.fetch("a", compute, wait_seconds=60.0)[1])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not computed:
        time.sleep(0.001)
    with pytest.raises(ServingError) as caught:  # a short deadline does not wait for a long one
        cache.fetch("a", compute, wait_seconds=0.01)
    assert caught.value.code == "deadline_exceeded"
    release.set()
    for thread in threads:
        thread.join()
    assert computed == [1]
    assert results.count("miss") == 1
    assert set(results) <= {"miss", "coalesced", "hit"}


def test_another_ones_failure_is_not_ours(clock):
    cache = make_cache(clock)
    begun, release, outcome = threading.Event(), threading.Event(), []

    def fail() -> Entry:
        begun.set()
        assert release.wait(60.0)
        raise ServingError("deadline_exceeded", "its own deadline, not ours")

    def lead() -> None:
        with pytest.raises(ServingError):
            cache.fetch("a", fail, wait_seconds=60.0)

    def follow() -> None:
        outcome.append(fetch(cache, "a"))

    leader = threading.Thread(target=lead)
    leader.start()
    assert begun.wait(60.0)
    follower = threading.Thread(target=follow)
    follower.start()
    release.set()
    leader.join()
    follower.join()
    assert outcome == ["miss"]


def test_the_key_holds_everything_that_the_answer_depends_on():  # K04
    keyer = Keyer(keyed=False)
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    mask = np.array([True, True, False])
    base = keyer.digest(("v1", "c1", "router", False), x, None, client="a")
    assert len(base) == 32
    assert base == keyer.digest(("v1", "c1", "router", False), x.copy(), None, client="b")
    others = [
        keyer.digest(("v2", "c1", "router", False), x, None, client="a"),
        keyer.digest(("v1", "c2", "router", False), x, None, client="a"),
        keyer.digest(("v1", "c1", "moe", False), x, None, client="a"),
        keyer.digest(("v1", "c1", "router", True), x, None, client="a"),
        keyer.digest(("v1", "c1", "router", False), x.reshape(1, 3, 16), None, client="a"),
        keyer.digest(("v1", "c1", "router", False), x.view(np.int32), None, client="a"),
        keyer.digest(("v1", "c1", "router", False), x, mask, client="a"),
        keyer.digest(("v1", "c1", "router", False), x, ~mask, client="a"),
    ]
    for place in (0, 20, 47):  # no part of the content is left out
        changed = x.copy().reshape(-1)
        changed[place] = np.nextafter(changed[place], 9)
        others.append(
            keyer.digest(("v1", "c1", "router", False), changed.reshape(3, 16), None, client="a")
        )
    assert len({base, *others}) == len(others) + 1
    assert base != Keyer(keyed=False).digest(("v1", "c1", "router", False), x, None, client="a")


def test_under_strict_digests_are_keyed_and_differ_by_client():
    keyer, x = Keyer(keyed=True, secret=bytes(32)), np.ones((1, 4), np.float32)
    a = keyer.digest(("v",), x, None, client="a")
    assert a == keyer.digest(("v",), x, None, client="a")
    assert a != keyer.digest(("v",), x, None, client="b")
    assert a != Keyer(keyed=True, secret=bytes([1] * 32)).digest(("v",), x, None, client="a")


def test_the_cache_stands_aside_while_it_only_costs():  # K07
    gain = Gain()
    for _ in range(WINDOW):
        assert gain.takes_part()
        gain.lookup(saved=0.0, spent=1.0)
    assert [gain.takes_part() for _ in range(ASIDE)] == [False] * ASIDE
    for _ in range(TRIAL):  # then it tries again, and now hits pay
        assert gain.takes_part()
        gain.lookup(saved=5.0, spent=1.0)
    assert all(gain.takes_part() for _ in range(2 * WINDOW))
    assert (gain.saved, gain.spent) == (5.0 * TRIAL, WINDOW + TRIAL)


def test_break_even_is_where_savings_meet_costs():
    for hits, aside in ((1, True), (3, False)):  # of 10; a hit saves 4 times what a lookup costs
        gain = Gain()
        for number in range(WINDOW):
            gain.lookup(saved=4.0 if number % 10 < hits else 0.0, spent=1.0)
        assert gain.aside == aside


def test_entries_survive_as_bytes_and_damage_is_refused():
    data = to_bytes(entry(owner="me"))
    again = from_bytes(data)
    assert again.owner == "me"
    assert again.about == {"n": 1}
    assert not again.arrays["a"].flags.writeable
    header = data.find(b"float32")
    for bad in (
        b"",
        b"pickle",
        data[:-1],
        data + b"x",
        data[:20],
        b"moe2" + data[4:],
        data[:header] + b"object_" + data[header + 7 :],
        data.replace(b"[4]", b"[9]"),
        data.replace(b"[4]", b"[-1]"[:3]),
    ):
        with pytest.raises(ValueError, match="cached entry"):
            from_bytes(bad)


# --- prefetching ----------------------------------------------------------------------------


def test_successors_are_bounded_and_kept_apart_by_client():  # K03
    table = Successors(max_clients=2, max_digests=10)
    for digest in "abab":
        table.next_after("one", digest)
    assert table.next_after("one", "a") == "b"
    assert table.next_after("two", "a") is None
    for number in range(100):
        table.next_after("three", str(number))
    assert len(table) <= 10


def test_replayed_traffic_is_fetched_ahead(clock):
    """Results are in a slow store; the second time round most are in memory when asked for."""
    memory: set[str] = set()

    def fetch_one(digest: str) -> bool:
        memory.add(digest)
        return True

    prefetcher = Prefetcher(fetch_one, lambda digest: digest in memory)
    sequence, hits = [f"d{n}" for n in range(20)], 0
    for round_ in range(2):
        memory.clear()
        for digest in sequence:
            is_cached = digest in memory
            hits += is_cached
            if is_cached:
                prefetcher.note_hit(digest)
            prefetcher.asked("client", digest)
            prefetcher.settle()
        assert hits == (0 if round_ == 0 else 19)
    assert prefetcher.counts["useful"] == 19
    assert not prefetcher.off
    prefetcher.close()


def test_prefetching_switches_itself_off_when_most_of_it_is_waste(clock):
    prefetcher = Prefetcher(lambda digest: True, lambda digest: False)
    for round_ in range(2):
        for number in range(200):
            prefetcher.asked("client", f"d{number}")
            if round_:
                prefetcher.settle()
    assert prefetcher.counts["wasted"] >= 50
    assert prefetcher.counts["useful"] == 0
    assert prefetcher.off
    prefetcher.close()


def test_the_hottest_inputs_are_kept_within_bounds():
    hot = HotInputs(max_inputs=2, max_bytes=10**6)
    for digest, hits in (("a", 5), ("b", 1), ("c", 3), ("d", 9)):
        for _ in range(hits):
            hot.hit(digest, np.full(4, ord(digest), np.float32), digest)
    assert [options for _, options in hot.hottest()] == ["d", "a"]
    hot.hit("huge", np.zeros(10**6, np.float32), "huge")
    hot.hit("huge", np.zeros(10**6, np.float32), "huge")
    assert len(hot.hottest()) == 2


# --- what a digest depends on ---------------------------------------------------------------

CHANGES_ANSWERS = {"enable_validation", "security_level", "nonfinite", "max_magnitude"}
# They make other weights, which the version in the digest stands for.
CHANGES_WEIGHTS = {"checkpoint", "checkpoint_router", "seed", "serve_moe", "expert_hidden_dim"}
OTHER = {
    "complexity_estimator": "router_margin",
    "routing_strategy": "threshold",
    "security_level": "strict",
    "nonfinite": "reject",
    "serve_moe": "on",
    "environment": "staging",
    "log_level": "DEBUG",
    "host": "0.0.0.0",
    "buckets": "16",
    "trusted_proxies": "10.0.0.0/8",
    "redis_url": "redis://localhost:1/0",
}


def other_value(name: str, value):
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return "other" if isinstance(value, str) else value + 1


def test_the_digest_holds_the_settings_that_change_an_answer_and_no_others():
    base = Config()

    def settings(config: Config) -> str:
        level = level_for(config.security.security_level, nonfinite=config.serving.nonfinite)
        return answer_settings(config, level)

    changing, seen = set(), set()
    sections = ("performance", "security", "serving")
    for section in sections:
        part = getattr(base, section)
        for field in dataclasses.fields(part):
            value = other_value(field.name, getattr(part, field.name))
            changed = dataclasses.replace(part, **{field.name: value})
            seen.add(field.name)
            if settings(dataclasses.replace(base, **{section: changed})) != settings(base):
                changing.add(field.name)
    for name in ("environment", "log_level"):
        seen.add(name)
        if settings(dataclasses.replace(base, **{name: OTHER[name]})) != settings(base):
            changing.add(name)
    assert changing == CHANGES_ANSWERS
    assert seen >= CHANGES_WEIGHTS | {"port", "host", "max_inflight", "log_level"}
