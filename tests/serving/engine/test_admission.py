"""Admission: checks of requests, rate limits, blocks, identity. Promises S01-S10, L01-L03."""

from __future__ import annotations

import ipaddress
import threading
import tracemalloc

import numpy as np
import pytest

from moe_jax.serving.admission import (
    LEVELS,
    ClientBlocks,
    Keys,
    Limits,
    RateLimiter,
    TrustedProxies,
    check_array,
    check_shape,
    check_values,
    client_id,
    identity,
    level_for,
    parse_address,
)
from moe_jax.serving.engine import Client
from moe_jax.serving.errors import ServingError

LIMITS = Limits(width=16, max_batch_size=4, max_tensor_size=640, max_tokens=30)


def code(call) -> str:
    try:
        call()
    except ServingError as error:
        return error.code
    return "ok"


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted"),
    [
        ((2, 5, 16), "float32", "ok"),
        ((2, 5, 16), "float16", "ok"),
        ((2, 5, 16), "bfloat16", "ok"),
        ((2, 5, 16), "float64", "malformed"),
        ((2, 5, 16), "int32", "malformed"),
        ((2, 5, 16), "object", "malformed"),
        ((5, 16), "float32", "malformed"),
        ((1, 2, 5, 16), "float32", "malformed"),
        ((), "float32", "malformed"),
        ((2, 5, 17), "float32", "malformed"),
        ((0, 5, 16), "float32", "malformed"),
        ((2, 0, 16), "float32", "malformed"),
        ((-1, -5, 16), "float32", "malformed"),
        ((5, 1, 16), "float32", "too_large"),
        ((1, 31, 16), "float32", "too_large"),
        ((1, 41, 16), "float32", "too_large"),
        ((2**40, 2**40, 16), "float32", "too_large"),
        ((2, 2**62, 16), "float32", "too_large"),  # the product would wrap around in 64 bits
    ],
)
def test_shape_dtype_and_size_are_checked_without_touching_a_byte(shape, dtype, wanted):  # S01-S03
    assert code(lambda: check_shape(shape, dtype, LIMITS)) == wanted


def test_a_huge_array_is_refused_before_it_is_copied():
    view = np.broadcast_to(np.float32(0), (1, 10**9, 16))  # 64 GB if anything looked at it
    tracemalloc.start()
    assert code(lambda: check_array(view, LIMITS)) == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert code(lambda: check_array([[1.0]], LIMITS)) == "malformed"
    assert code(lambda: check_array(None, LIMITS)) == "malformed"


# --- values ---------------------------------------------------------------------------------

POLICY = {"nonfinite": "off", "magnitude": "off", "max_magnitude": 1e6}


def poisoned() -> np.ndarray:
    x = np.ones((4, 16), np.float32)
    x[1, 3], x[2, 0] = np.nan, np.inf
    return x


def test_nonfinite_policies():  # S04, S05
    x = poisoned()
    off = check_values(x, None, **POLICY)
    assert (off.nonfinite_tokens, off.sanitized, off.token_mask) == (2, False, None)
    clean = check_values(x, None, **POLICY | {"nonfinite": "sanitize"})
    assert np.isfinite(clean.x).all()
    assert (clean.nonfinite_tokens, clean.sanitized, clean.token_mask) == (2, True, None)
    assert clean.x[1, 0] == 1, "only the bad values go"
    masked = check_values(x, None, **POLICY | {"nonfinite": "mask"})
    assert masked.token_mask is not None
    assert masked.token_mask.tolist() == [True, False, False, True]
    assert not masked.x[1].any()
    assert code(lambda: check_values(x, None, **POLICY | {"nonfinite": "reject"})) == (
        "invalid_values"
    )
    assert np.isnan(x[1, 3]), "the caller's array is its own"


@pytest.mark.parametrize("policy", ["off", "sanitize", "mask", "reject"])
def test_padding_may_hold_anything(policy):
    x, mask = poisoned(), np.array([True, False, False, True])
    checked = check_values(x, mask, **POLICY | {"nonfinite": policy})
    assert checked.nonfinite_tokens == 0
    assert np.isfinite(checked.x).all()


@pytest.mark.parametrize("value", [3e38, -3e38, 1e6 * 1.01])
def test_values_that_would_overflow_are_caught(value):  # S05
    x = np.ones((4, 16), np.float32)
    x[2, 2] = value
    counted = check_values(x, None, **POLICY | {"magnitude": "count"})
    assert (counted.large_tokens, counted.nonfinite_tokens) == (1, 0)
    assert code(lambda: check_values(x, None, **POLICY | {"magnitude": "reject"})) == (
        "invalid_values"
    )
    assert check_values(x, None, **POLICY).large_tokens == 0


def test_many_moderate_values_are_not_taken_for_a_huge_one():
    x = np.full((4, 16), 9e5, np.float32)  # their squares sum to more than the bound's
    checked = check_values(x, None, nonfinite="reject", magnitude="reject", max_magnitude=1e6)
    assert checked.large_tokens == 0


# --- limits ---------------------------------------------------------------------------------


def test_exactly_n_are_admitted_under_8_threads():  # L01
    limiter = RateLimiter(requests_per_minute=100, tokens_per_minute=None)
    outcomes: list[str] = []
    gate = threading.Barrier(8)

    def work():
        gate.wait()
        for _ in range(50):
            outcomes.append(code(lambda: limiter.take("one")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 400
    assert outcomes.count("ok") == 100
    assert code(lambda: limiter.take("another")) == "ok"


def test_tokens_cost_beside_requests():  # L03
    limiter = RateLimiter(requests_per_minute=10, tokens_per_minute=100)
    assert code(lambda: limiter.take("a", tokens=60)) == "ok"
    assert code(lambda: limiter.take("a", requests=0, tokens=41)) == "rate_limited"
    assert code(lambda: limiter.take("a", requests=0, tokens=40)) == "ok"
    with pytest.raises(ServingError) as caught:
        limiter.take("a", tokens=1)
    assert caught.value.retry_after is not None
    assert 1 <= caught.value.retry_after <= 120


def test_what_can_never_pass_is_too_large_and_costs_nothing():
    limiter = RateLimiter(requests_per_minute=5, tokens_per_minute=10)
    for _ in range(20):
        with pytest.raises(ServingError) as caught:
            limiter.take("a", requests=1, tokens=11)
        assert (caught.value.code, caught.value.retry_after) == ("too_large", None)
    assert code(lambda: limiter.take("a", tokens=10)) == "ok", "neither limit was touched"
    limiter = RateLimiter(requests_per_minute=5, tokens_per_minute=None)
    assert code(lambda: limiter.take("a", requests=6)) == "too_large"


@pytest.mark.parametrize(
    "request_of",
    [
        lambda engine, client, x: engine.admit(client, requests=0, tokens=20),
        lambda engine, client, x: engine.infer("router", x(1, 20), client=client),
        lambda engine, client, x: engine.route(x(1, 20), client=client),
        lambda engine, client, x: engine.infer("router", x(5, 1), client=client),
        lambda engine, client, x: engine.violation(client, "too_large"),
    ],
    ids=["tokens of a minute", "tokens", "route", "batch", "a transport's limit"],
)
def test_what_can_never_pass_is_no_violation(make_engine, states, request_of):
    engine = make_engine(security_level="standard", rate_limit_tokens=10, max_batch_size=4)
    client = Client("192.0.2.1")
    for _ in range(30):
        refusal = ("too_large", None)
        try:
            request_of(engine, client, states)
        except ServingError as error:
            refusal = error.code, error.retry_after
        assert refusal == ("too_large", None)
    assert code(lambda: engine.admit(client, tokens=10)) == "ok"
    assert engine.get_metrics()["errors_by_code"] == {"too_large": 30}


def test_a_crowd_of_clients_does_not_grow_memory():  # L03
    limiter = RateLimiter(requests_per_minute=5, tokens_per_minute=5, max_clients=100)
    blocks = ClientBlocks(
        after=2,
        window=300,
        first_seconds=60,
        longest_seconds=3600,
        clock=lambda: 0.0,
        max_clients=100,
    )
    for number in range(5000):
        limiter.take(f"client {number}", tokens=1)
        blocks.violation(f"client {number}", "malformed")
    assert limiter.clients == 100
    assert len(limiter._memory.storage.storage) <= 400  # two kinds, two windows
    assert len(blocks) == 100


# --- blocks ---------------------------------------------------------------------------------


def make_blocks(clock, after=10):
    return ClientBlocks(
        after=after, window=300, first_seconds=60, longest_seconds=3600, clock=clock
    )


def test_blocks_double_and_expire(clock):  # L02
    blocks = make_blocks(clock)
    for length in (60, 120, 240, 480, 960, 1920, 3600, 3600):
        for _ in range(9):
            assert not blocks.violation("a", "malformed")
        assert code(lambda: blocks.check("a")) == "ok"
        assert blocks.violation("a", "malformed")
        with pytest.raises(ServingError) as caught:
            blocks.check("a")
        assert caught.value.retry_after == pytest.approx(length)
        assert blocks.blocked == 1
        assert code(lambda: blocks.check("b")) == "ok"
        clock.now += length - 1
        assert code(lambda: blocks.check("a")) == "blocked"
        clock.now += 1
        assert code(lambda: blocks.check("a")) == "ok"
        assert blocks.blocked == 0
    clock.now += 3601  # an hour of good behaviour, and the next block is short again
    for _ in range(10):
        blocks.violation("a", "malformed")
    with pytest.raises(ServingError) as caught:
        blocks.check("a")
    assert caught.value.retry_after == pytest.approx(60)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (["rate_limited"] * 3, "refused: 3 rate_limited. When the block ends, wait as long as"),
        (["malformed"] * 3, "refused: 3 malformed. When the block ends, correct the requests."),
        (
            ["unauthorized", "rate_limited", "rate_limited"],
            "2 rate_limited, 1 unauthorized. When the block ends, wait as long as Retry-After says "
            "after each 429 and correct the other requests.",
        ),
    ],
)
def test_a_block_says_which_refusals_led_to_it_and_when_it_ends(clock, codes, said):
    blocks = make_blocks(clock, after=3)
    for before in (["invalid_values"] * 3, codes):  # what led to an earlier block does not count
        for one in before:
            blocks.violation("a", one)
        with pytest.raises(
            ServingError, match=r"blocked for \d+ more seconds, because 3"
        ) as caught:
            blocks.check("a")
        clock.now += blocks.seconds_left("a")
    assert said in caught.value.message


def test_violations_decay(clock):  # S06
    blocks = make_blocks(clock)
    for _ in range(200):  # never ten within five minutes
        clock.now += 34
        assert not blocks.violation("a", "malformed")
    assert code(lambda: blocks.check("a")) == "ok"


# --- who it is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "header", "expected"),
    [
        ("192.0.2.1", "6.6.6.6", "192.0.2.1"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "192.0.2.7", "192.0.2.7"),
        ("10.0.0.1", "6.6.6.6, 192.0.2.7", "192.0.2.7"),
        ("10.0.0.1", "6.6.6.6, 192.0.2.7, 10.9.9.9", "192.0.2.7"),
        ("10.0.0.1", "10.1.1.1, 10.9.9.9", "10.1.1.1"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.7, nonsense", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.7,, ", "192.0.2.7"),  # RFC 9110, 5.6.1: empty elements are ignored
        ("10.0.0.1", ",", "10.0.0.1"),
        ("10.0.0.1", "6.6.6.6," * 5000 + "192.0.2.7", "192.0.2.7"),
        ("fd00::1", "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.9", None, "192.0.2.9"),
        ("", None, "unknown"),
        # How proxies write an address: Azure and IIS with a port, RFC 7239 in quotes and brackets.
        ("10.0.0.1", "203.0.113.7:52344", "203.0.113.7"),
        ("10.0.0.1", "[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("10.0.0.1", "[2001:db8:1:2::9]", "2001:db8:1:2::/64"),
        ("10.0.0.1", '"[2001:db8:1:2::9]:443"', "2001:db8:1:2::/64"),
        ("10.0.0.1", "::ffff:203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "[::ffff:203.0.113.7]:80", "203.0.113.7"),
        ("10.0.0.1", "203.0.113.7:52344, 10.2.2.2:80, [fd00::7]:9", "203.0.113.7"),
        # A service on "::" sees its IPv4 peers as mapped addresses.
        ("::ffff:10.0.0.1", "192.0.2.7", "192.0.2.7"),
        ("::ffff:a00:1", "192.0.2.7", "192.0.2.7"),
        ("fd00::1%eth0", "192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", None, "fe80::/64"),
        # What only looks like an address is none.
        ("10.0.0.1", "192.0.2.7:port", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.7:1:2", "10.0.0.1"),
        ("10.0.0.1", "[192.0.2.7", "10.0.0.1"),
        ("10.0.0.1", "[2001:db8::1]443", "10.0.0.1"),
        ("10.0.0.1", "1" * 5000, "10.0.0.1"),
    ],
)
def test_the_longest_chain_of_trusted_proxies_is_believed_and_no_more(peer, header, expected):
    proxies = TrustedProxies(["10.0.0.0/8", "fd00::/8"])
    assert proxies.client_address(peer, header) == expected


@pytest.mark.parametrize("network", ["::ffff:10.0.0.0/104", "10.1.2.3/8", "10.0.0.1"])
@pytest.mark.parametrize("peer", ["10.0.0.1", "::ffff:10.0.0.1"])
def test_a_network_may_be_written_in_any_form(network, peer):
    assert TrustedProxies([network]).client_address(peer, "192.0.2.7") == "192.0.2.7"


def test_nobody_is_trusted_by_default():
    assert TrustedProxies([]).client_address("10.0.0.1", "192.0.2.7") == "10.0.0.1"


@pytest.mark.parametrize(
    "text",
    ["", " ", "unknown", "_hidden", "[]", "[]:1", ":", ":80", "1.2.3", "999.1.1.1", "1.2.3.4:"],
)
def test_what_is_no_address_is_none(text):
    assert parse_address(text) is None


def test_identity_and_admission_parse_nothing_twice(make_engine, monkeypatch):
    """Networks are parsed when the engine is built, an address when it is first seen."""
    engine = make_engine(
        security_level="standard",
        rate_limit_requests=10**9,
        trusted_proxies="10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fd00::/8",
    )

    def ask() -> None:
        engine.admit(engine.identify(peer="10.0.0.1", forwarded_for="192.0.2.77, 10.0.0.2"))

    parsed = []
    for name in ("ip_address", "ip_network"):
        parse = getattr(ipaddress, name)
        monkeypatch.setattr(
            ipaddress,
            name,
            lambda *args, parse=parse, **kwargs: parsed.append(args) or parse(*args, **kwargs),
        )
    identity.parse_address.cache_clear()
    ask()
    assert {args[0] for args in parsed} == {"10.0.0.1", "10.0.0.2", "192.0.2.77"}
    parsed.clear()
    for _ in range(3):
        ask()
    assert parsed == []


def test_keys_that_are_not_required_are_logged_at_the_start(make_engine, log):
    for level, expected in (("standard", 1), ("strict", 0)):
        log.lines.clear()
        make_engine(api_keys="one", security_level=level)
        lines = [facts for _, event, facts in log.lines if event == "api_keys_optional"]
        assert len(lines) == expected
        assert all("MOE_SECURITY_LEVEL=strict" in facts["hint"] for facts in lines)


def test_a_proxy_that_is_not_trusted_is_logged_once(make_engine, log):
    for trusted, peer, expected in [
        ("", "10.0.0.1", 1),
        ("192.168.0.0/16", "10.0.0.1", 1),
        ("10.0.0.0/8", "::ffff:10.0.0.1", 0),
    ]:
        log.lines.clear()
        engine = make_engine(trusted_proxies=trusted)
        engine.identify(peer=peer)
        assert "proxy_not_trusted" not in log.events()
        for _ in range(3):
            engine.identify(peer=peer, forwarded_for="192.0.2.7")
        lines = [facts for _, event, facts in log.lines if event == "proxy_not_trusted"]
        assert len(lines) == expected
        assert all(
            peer in facts["peer"] and "MOE_TRUSTED_PROXIES" in facts["hint"] for facts in lines
        )


def test_keys_are_hashed_and_compared():
    keys = Keys(["alpha", "beta"])
    assert keys.valid("alpha")
    assert not any(keys.valid(key) for key in ("alph", "alphaa", "", None, "\udcff"))
    assert not Keys([]).valid("alpha")
    assert "alpha" not in repr(keys) + client_id("alpha")
    assert client_id("alpha") != client_id("beta")


def test_levels_get_stricter_and_can_be_tuned():  # S07-S10
    minimal, standard, strict = LEVELS.values()
    assert [level.nonfinite for level in LEVELS.values()] == ["off", "mask", "reject"]
    assert [level.magnitude for level in LEVELS.values()] == ["off", "count", "reject"]
    assert [lv.requests_per_minute for lv in LEVELS.values()] == [None, 600, 120]
    assert [(lv.block_after, lv.block_seconds) for lv in (standard, strict)] == [(10, 60), (5, 300)]
    assert minimal.block_after is None
    tuned = level_for("strict", nonfinite="mask", requests_per_minute=7, tokens_per_minute=9)
    assert (tuned.nonfinite, tuned.requests_per_minute, tuned.tokens_per_minute) == ("mask", 7, 9)
