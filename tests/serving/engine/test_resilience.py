"""Breaker, bulkhead, retry: docs/promises.md X01, X02, X04, X05."""

from __future__ import annotations

import threading
import time

import pytest

from moe_jax.serving.errors import ServingError
from moe_jax.serving.resilience import (
    BreakerPolicy,
    Bulkhead,
    CircuitBreaker,
    is_transient,
    retry_once,
)
from tests.serving.engine.deadlines import passing_at_work


def refusal(call, code: str) -> ServingError:
    with pytest.raises(ServingError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def calls(breaker: CircuitBreaker, *, good: int = 0, bad: int = 0, slow: int = 0) -> None:
    for _ in range(good):
        breaker.acquire().success(0.01)
    for _ in range(slow):
        breaker.acquire().success(60.0)
    for _ in range(bad):
        breaker.acquire().failure(0.01)


# --- the breaker's truth table --------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "slow", "bad", "state"),
    [
        (0, 0, 19, "closed"),  # too few to say anything
        (0, 0, 20, "open"),
        (11, 0, 9, "closed"),
        (10, 0, 10, "open"),  # half of them
        (51, 0, 49, "closed"),
        (50, 0, 50, "open"),
        (100, 0, 99, "closed"),  # see below: the window turns
        (4, 16, 0, "open"),  # four fifths are slow
        (5, 15, 0, "closed"),
        (10_000, 0, 0, "closed"),
    ],
)
def test_when_the_breaker_opens(clock, good, slow, bad, state):
    breaker = CircuitBreaker(BreakerPolicy(), clock=clock)
    if good == 100:  # only the last 100 calls count, so old successes do not dilute forever
        calls(breaker, good=100, bad=49)
        assert breaker.state == "closed"
        breaker.acquire().failure(0.0)
        assert breaker.state == "open"
        return
    calls(breaker, good=good, slow=slow, bad=bad)
    assert breaker.state == state


def test_the_breakers_way_back(clock):
    moves: list[str] = []
    breaker = CircuitBreaker(BreakerPolicy(), clock=clock, on_transition=moves.append)
    calls(breaker, bad=20)
    for seconds in (10, 20, 40, 60, 60):  # doubles with each failed probe, up to a minute
        assert breaker.state == "open"
        assert refusal(breaker.acquire, "circuit_open").retry_after == pytest.approx(seconds)
        clock.now += seconds - 0.5
        assert not breaker.would_admit()
        clock.now += 0.5
        assert breaker.would_admit()
        assert breaker.state == "open", "asking changes nothing"
        probe = breaker.acquire()
        assert probe.probe
        assert breaker.state == "half_open"
        refusal(breaker.acquire, "circuit_open")
        probe.failure(0.1)
        probe.success(0.1)  # only the first report counts
    clock.now += 60
    breaker.acquire().success(0.01)
    assert breaker.state == "closed"
    calls(breaker, bad=19)
    assert breaker.state == "closed", "the window starts anew"
    calls(breaker, bad=1)
    assert refusal(breaker.acquire, "circuit_open").retry_after == pytest.approx(10), "and the wait"
    assert moves == [*["open", "half_open"] * 6, "closed", "open"]


def test_a_probe_that_was_never_made_makes_room_for_another(clock):
    breaker = CircuitBreaker(BreakerPolicy(), clock=clock)
    calls(breaker, bad=20)
    clock.now += 10
    breaker.acquire().cancel()
    assert breaker.state == "half_open"
    breaker.acquire().success(0.01)
    assert breaker.state == "closed"


def test_a_slow_probe_is_a_failed_one(clock):
    breaker = CircuitBreaker(BreakerPolicy(slow_seconds=1.0), clock=clock)
    calls(breaker, bad=20)
    clock.now += 10
    breaker.acquire().success(1.5)
    assert breaker.state == "open"


def test_what_began_before_the_breaker_opened_says_nothing_after(clock):
    breaker = CircuitBreaker(BreakerPolicy(), clock=clock)
    late = [breaker.acquire() for _ in range(30)]
    calls(breaker, bad=20)
    clock.now += 10
    probe = breaker.acquire()
    for ticket in late:
        ticket.success(0.01)
    assert breaker.state == "half_open"
    probe.failure()
    assert breaker.state == "open"


def test_exactly_one_probe_under_32_threads(clock):
    breaker = CircuitBreaker(BreakerPolicy(), clock=clock)
    for round_ in range(20):
        calls(breaker, bad=20)
        clock.now += 60
        gate, tickets = threading.Barrier(32), []

        def ask(gate=gate, tickets=tickets):
            gate.wait()
            try:
                tickets.append(breaker.acquire())
            except ServingError:
                tickets.append(None)

        threads = [threading.Thread(target=ask) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        admitted = [ticket for ticket in tickets if ticket is not None]
        assert (len(tickets), len(admitted)) == (32, 1), round_
        admitted[0].success(0.01)


# --- the bulkhead ---------------------------------------------------------------------------


@pytest.fixture
def bulkhead():
    made = Bulkhead(workers=2, queue=1)
    yield made
    made.close(timeout=60.0)


def occupy(bulkhead: Bulkhead, count: int) -> tuple[threading.Event, list[threading.Thread]]:
    """Takes ``count`` places until the event is set."""
    done = threading.Event()
    threads = [
        threading.Thread(target=lambda: bulkhead.run(done.wait, timeout=60.0)) for _ in range(count)
    ]
    for number, thread in enumerate(threads):
        thread.start()
        places = min(number + 1, 2), max(number - 1, 0)
        while (bulkhead.inflight, bulkhead.pending) != places:
            time.sleep(0.001)
    return done, threads


def test_the_bulkhead_bounds_what_is_under_way_and_what_waits(bulkhead):
    done, threads = occupy(bulkhead, 3)
    assert (bulkhead.inflight, bulkhead.pending, bulkhead.full) == (2, 1, True)
    error = refusal(lambda: bulkhead.run(lambda: 1, timeout=60.0), "queue_full")
    assert error.retry_after
    done.set()
    for thread in threads:
        thread.join()
    assert bulkhead.run(lambda: 1, timeout=60.0)[0] == 1
    assert not bulkhead.full


def test_a_deadline_holds_the_place_until_the_work_ends(bulkhead):
    release, abandoned = threading.Event(), []
    with passing_at_work() as begins:
        error = refusal(
            lambda: bulkhead.run(
                lambda: (begins(), release.wait(60.0)),
                timeout=60.0,
                on_abandon=lambda: abandoned.append(1),
            ),
            "deadline_exceeded",
        )
    assert "at work" in error.message
    assert abandoned == [1]
    assert bulkhead.inflight == 1, "the work goes on, and so does its hold on the place"
    first = bulkhead.oldest_seconds()
    time.sleep(0.01)
    assert bulkhead.oldest_seconds() >= first + 0.01
    release.set()
    while bulkhead.inflight:
        time.sleep(0.001)


def test_work_whose_deadline_passed_in_the_queue_is_never_begun(bulkhead):
    done, threads = occupy(bulkhead, 2)
    ran, abandoned = [], []
    error = refusal(
        lambda: bulkhead.run(
            lambda: ran.append(1), timeout=0.02, on_abandon=lambda: abandoned.append(1)
        ),
        "deadline_exceeded",
    )
    assert "waited" in error.message
    assert bulkhead.pending == 0
    done.set()
    for thread in threads:
        thread.join()
    bulkhead.run(lambda: None, timeout=60.0)
    assert ran == []
    assert abandoned == [], "nothing was begun, so the device is not to blame"


def test_closing_waits_for_what_is_under_way(bulkhead):
    done, threads = occupy(bulkhead, 1)
    assert not bulkhead.close(timeout=0.02)
    refusal(lambda: bulkhead.run(lambda: 1, timeout=1.0), "draining")
    done.set()
    assert bulkhead.close(timeout=60.0)
    threads[0].join()


def test_the_functions_own_error_comes_through(bulkhead):
    with pytest.raises(ZeroDivisionError):
        bulkhead.run(lambda: 1 / 0, timeout=60.0)


# --- retries --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (RuntimeError("UNAVAILABLE: device"), True),
        (RuntimeError("INTERNAL: a bug"), False),
        (RuntimeError("INVALID_ARGUMENT: UNAVAILABLE"), False),
        (ValueError("UNAVAILABLE"), False),
        (ServingError("malformed", "UNAVAILABLE"), False),
    ],
)
def test_what_is_tried_again(error, transient):
    assert is_transient(error) == transient
    tried, slept = [], []

    def fail():
        tried.append(1)
        raise error

    with pytest.raises(type(error)):
        retry_once(fail, seconds_left=lambda: 1.0, sleep=slept.append, uniform=lambda a, b: b)
    assert len(tried) == (2 if transient else 1), "at most one more"
    assert slept == ([pytest.approx(0.03)] if transient else [])


def test_a_retry_stays_within_the_deadline_and_can_succeed():
    state = {"tries": 0}

    def flaky():
        state["tries"] += 1
        if state["tries"] % 2:
            raise RuntimeError("ABORTED: try again")
        return "done"

    assert retry_once(flaky, seconds_left=lambda: 1.0, sleep=lambda s: None) == "done"
    with pytest.raises(RuntimeError):
        retry_once(flaky, seconds_left=lambda: 0.001, sleep=lambda s: None)
    assert state["tries"] == 3


def test_a_caller_works_itself_only_where_the_deadline_is_far_and_then_fills_a_workers_place():
    bulkhead = Bulkhead(workers=1, queue=1)

    def thread() -> int:
        return threading.get_ident()

    own = threading.get_ident()
    assert bulkhead.run(thread, timeout=3600.0, may_run_inline=True)[0] != own, (
        "nothing is known yet"
    )
    assert bulkhead.run(thread, timeout=3600.0, may_run_inline=True)[0] == own
    assert bulkhead.run(thread, timeout=60.0)[0] != own, "not asked for"
    near = bulkhead.run(thread, timeout=0.9, may_run_inline=True)[0]
    assert near != own, "a near deadline is watched"
    with pytest.raises(ZeroDivisionError):
        bulkhead.run(lambda: 1 // 0, timeout=3600.0, may_run_inline=True)

    begun, release = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert release.wait(60.0)

    holder = threading.Thread(
        target=lambda: bulkhead.run(hold, timeout=3600.0, may_run_inline=True)
    )
    holder.start()
    assert begun.wait(60.0)
    assert bulkhead.inflight == 1
    refused = []
    with pytest.raises(ServingError) as caught:
        bulkhead.run(lambda: refused.append(1), timeout=0.02)
    assert caught.value.code == "deadline_exceeded"
    assert not refused, "the only place is taken"
    assert bulkhead.close(timeout=0.01) is False
    release.set()
    holder.join(60.0)
    assert bulkhead.close(timeout=60.0)
    assert bulkhead.inflight == 0
