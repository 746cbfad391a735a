"""Fairness between clients: one client's work must not make another's wait for all of it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from moe_jax.serving.engine import Call, Client
from moe_jax.serving.errors import ServingError
from moe_jax.serving.resilience import Bulkhead, FairQueue
from tests.serving.engine.conftest import WIDTH, clock, log, make_engine  # noqa: F401  # fixtures

# --- the queue ------------------------------------------------------------------------------


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_each_client_has_turns_of_equal_cost():
    queue: FairQueue[str] = FairQueue()
    for number in range(4):
        queue.push("large", 512, f"L{number}")
    for number in range(40):
        queue.push("small", 16, f"s{number}")
    order = drained(queue)
    assert order[0] == "L0"
    assert order[1:33] == [f"s{number}" for number in range(32)], "32 of 16 cost as much as one 512"
    assert order[33] == "L1"
    assert [name for name in order if name[0] == "L"] == ["L0", "L1", "L2", "L3"]
    assert len(queue) == 0


def test_a_newcomer_waits_for_at_most_one_turn_of_each_other_client():
    queue: FairQueue[str] = FairQueue()
    for client in "abc":
        for number in range(50):
            queue.push(client, 100, f"{client}{number}")
    queue.pop()
    queue.push("new", 1, "new")
    assert drained(queue).index("new") <= 3


def test_the_rest_of_begun_work_goes_before_its_clients_other_work():
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 10, "second")
    queue.push("b", 10, "other")
    queue.push("a", 10, "rest of the first", first=True)
    order = drained(queue)
    assert order.index("rest of the first") < order.index("second")
    assert sorted(order) == ["other", "rest of the first", "second"]


def test_idle_time_does_not_save_up_turns():
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):  # alone, and so always served at once
        queue.push("a", 64, "a")
        queue.pop()
    queue.push("b", 64, "b0")
    for number in range(5):
        queue.push("a", 64, f"a{number}")
    queue.push("b", 64, "b1")
    assert drained(queue)[:4] == ["b0", "a0", "b1", "a1"]


def test_what_is_removed_leaves_no_trace():
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 5, "a")
    queue.push("b", 5, "b")
    assert queue.remove("a", "a")
    assert not queue.remove("a", "a")
    assert (queue.waiting("a"), queue.waiting("b"), len(queue)) == (0, 1, 1)
    assert queue.longest_last() == "b"
    assert drained(queue) == ["b"]
    assert queue.longest_last() is None
    with pytest.raises(IndexError):
        queue.pop()


# --- the bulkhead ---------------------------------------------------------------------------


@pytest.fixture
def bulkhead():
    made = Bulkhead(workers=1, queue=30)
    yield made
    assert made.close(timeout=60.0)


class Crowd:
    """Threads that ask one bulkhead; ``done`` lists what ended or failed, in order."""

    def __init__(self, bulkhead: Bulkhead) -> None:
        self.bulkhead, self.done = bulkhead, []
        self.threads: list[threading.Thread] = []

    def ask(
        self, client: str, function, *, cost: int, call: Call | None = None, evicts: bool = False
    ) -> None:
        """Submits a work and returns once it holds a place, waits in the queue or is refused."""
        before = self.bulkhead.pending + self.bulkhead.inflight

        def work() -> None:
            try:
                value = self.bulkhead.run(
                    function, timeout=60.0, client=client, cost=cost, call=call
                )[0]
                self.done.append(value)
            except ServingError as error:
                self.done.append((client, error.code))

        thread = threading.Thread(target=work)
        self.threads.append(thread)
        thread.start()
        deadline = time.monotonic() + 60.0
        while self.bulkhead.pending + self.bulkhead.inflight == before and not evicts:
            if not thread.is_alive():
                return
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60.0)


def pieces(name: str, count: int, ran: list[str], first=lambda: None):
    """Work of ``count`` pieces that notes each of them."""

    def work():
        for number in range(count):
            if number:
                yield 512
            else:
                first()
            ran.append(f"{name}.{number}")
        return name

    return work


@pytest.mark.parametrize("own_threads", [False, True])
def test_small_work_passes_between_the_pieces_of_large_work(bulkhead, own_threads):
    ran: list[str] = []
    release, crowd = threading.Event(), Crowd(bulkhead)
    call = Call() if own_threads else None
    crowd.ask("greedy", pieces("g0", 5, ran, lambda: release.wait(60.0)), cost=512, call=call)
    for number in range(1, 24):
        crowd.ask("greedy", pieces(f"g{number}", 5, ran), cost=512, call=call)
    crowd.ask("modest", lambda: ran.append("m") or "m", cost=16, call=call)
    assert (bulkhead.inflight, bulkhead.pending) == (1, 24)
    release.set()
    crowd.join()
    assert ran.index("m") <= 2, "after the piece that ran and at most one turn of the other client"
    large = [name for name in ran if name != "m"]
    assert large == [f"g{n}.{piece}" for n in range(24) for piece in range(5)], "in their order"
    assert len(crowd.done) == 25


def test_a_full_queue_of_one_client_has_room_for_another(bulkhead):
    release, crowd = threading.Event(), Crowd(bulkhead)
    crowd.ask("greedy", lambda: release.wait(60.0), cost=16)
    for _ in range(30):
        crowd.ask("greedy", lambda: "greedy", cost=16)
    assert bulkhead.full
    crowd.ask("greedy", lambda: "one more", cost=16)
    assert crowd.done == [("greedy", "queue_full")]
    crowd.ask("modest", lambda: "modest", cost=16, evicts=True)
    deadline = time.monotonic() + 60.0
    while len(crowd.done) < 2:  # the evicted thread notes its refusal
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert crowd.done == [("greedy", "queue_full")] * 2, "the last one of the greedy makes room"
    assert bulkhead.pending == 30
    release.set()
    crowd.join()
    assert crowd.done.count("greedy") == 29
    assert "modest" in crowd.done


def test_a_deadline_that_passes_between_two_pieces_ends_the_work(bulkhead):
    ran: list[str] = []
    closed, release = [], threading.Event()
    crowd = Crowd(bulkhead)
    begun, hold, other = threading.Event(), threading.Event(), threading.Event()

    def large():
        begun.set()
        assert release.wait(60.0)
        try:
            yield 512
            ran.append("second piece")
        except GeneratorExit:
            closed.append(1)
            raise

    call = Call()
    crowd.ask("a", large, cost=512, call=call)
    assert begun.wait(60.0)
    crowd.ask("b", lambda: other.set() or (hold.wait(60.0) and "b"), cost=16)
    release.set()
    assert other.wait(60.0), "the other work runs between the pieces"
    assert (bulkhead.inflight, bulkhead.pending) == (1, 1)
    call.leave()
    assert closed == [1]
    hold.set()
    crowd.join()
    assert ran == []
    assert sorted(map(str, crowd.done)) == ["('a', 'deadline_exceeded')", "b"]


def test_whoever_waits_for_a_call_can_leave_while_its_thread_works(bulkhead):
    release, abandoned = threading.Event(), []
    call, begun, ended = Call(), threading.Event(), []

    def hold():
        begun.set()
        release.wait(60.0)

    def ask():
        try:
            bulkhead.run(hold, timeout=60.0, call=call, on_abandon=lambda: abandoned.append(1))
        except ServingError as error:
            ended.append(error.code)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(60.0)
    call.leave()
    assert abandoned == [1], "counted when the caller leaves, not when the work ends"
    assert bulkhead.inflight == 1, "the place stays taken"
    release.set()
    thread.join(60.0)
    assert ended == ["deadline_exceeded"]
    assert bulkhead.inflight == 0


# --- the engine -----------------------------------------------------------------------------


def test_24_large_requests_of_one_client_do_not_hold_up_a_small_one(make_engine):  # noqa: F811
    engine = make_engine(
        max_inflight=1, enable_caching=False, security_level="minimal", buckets="16,512"
    )
    x = np.ones((1, 6400, WIDTH), np.float32)
    small = np.ones((1, 16, WIDTH), np.float32)
    run, ran = engine.device.run, []
    release, begun = threading.Event(), threading.Event()

    def device(snapshot, model, values, logits, meanwhile):
        if not ran:
            begun.set()
            assert release.wait(60.0)
        ran.append(len(values[0]))
        return run(snapshot, model, values, logits, meanwhile)

    engine.device.run = device
    answers = []

    def ask(hidden, client):
        answers.append(engine.infer("router", hidden, client=Client(client)))

    threads = [threading.Thread(target=ask, args=(x, "greedy")) for _ in range(24)]
    for thread in threads:
        thread.start()
    assert begun.wait(60.0)
    deadline = time.monotonic() + 60.0
    while engine.bulkhead.pending < 23:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    threads.append(threading.Thread(target=ask, args=(small, "modest")))
    threads[-1].start()
    while engine.bulkhead.pending < 24:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    release.set()
    for thread in threads:
        thread.join(60.0)
    assert ran.index(16) <= 2, "two pieces of 512 tokens before it, not 24 requests of 6,400"
    assert len(answers) == 25
    assert ran.count(512) == 24 * 12
    assert ran.count(256) == 24, "6,400 tokens are 12 pieces of 512 and one of 256"


def test_pieces_do_not_change_an_answer(make_engine):  # noqa: F811
    engine = make_engine(enable_caching=False, buckets="16,512")
    x = np.random.default_rng(0).standard_normal((2, 700, WIDTH)).astype(np.float32)
    x[1, 600] = np.nan  # the check replaces values while the first piece is under way
    mask = np.ones((2, 700), bool)
    mask[0, 650:] = False
    whole = engine.infer("router", x, token_mask=mask, return_router_logits=True)
    for row in range(2):
        alone = engine.infer(
            "router", x[row : row + 1], token_mask=mask[row : row + 1], return_router_logits=True
        )
        for name, array in alone.arrays.items():
            np.testing.assert_array_equal(array[0], whole.arrays[name][row], name)
    assert whole.info["nonfinite_tokens"] == 1
    assert (whole.arrays["num_experts_per_token"][0, 650:] == 0).all()
