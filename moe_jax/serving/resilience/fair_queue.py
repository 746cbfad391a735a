"""A queue that is fair between clients.

The algorithm is deficit round robin: M. Shreedhar and G. Varghese, "Efficient fair queueing using
deficit round robin", SIGCOMM 1995.
"""

from __future__ import annotations

import collections
from typing import Generic, TypeVar

T = TypeVar("T")

_SMALLEST_QUANTUM = 64


class FairQueue(Generic[T]):
    """Serves clients in turns of equal cost; the items of one client leave in their order.

    Whoever has few or small items waits for at most one turn of each other client, however many items
    the others have. Not thread-safe: the owner holds a lock.

    Example:
        >>> queue = FairQueue()
        >>> for number in range(3):
        ...     queue.push("greedy", 500, f"large {number}")
        >>> queue.push("modest", 16, "small")
        >>> [queue.pop() for _ in range(4)]
        ['large 0', 'small', 'large 1', 'large 2']
    """

    def __init__(self) -> None:
        self._items: dict[str, collections.deque[tuple[int, T]]] = {}
        self._turns: collections.deque[str] = collections.deque()  # the first has its turn
        self._deficit: dict[str, int] = {}
        self._quantum = _SMALLEST_QUANTUM
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, client: str, cost: int, item: T, *, first: bool = False) -> None:
        """Adds an item.

        Args:
            client: whose turn it uses.
            cost: what it takes of the turn, such as tokens.
            item: anything.
            first: whether it goes before the other items of its client, such as the rest of work that
                has begun.
        """
        # With a quantum of at least every cost, each turn serves at least one item.
        self._quantum = max(self._quantum, cost)
        items = self._items.get(client)
        if items is None:
            items = self._items[client] = collections.deque()
            self._turns.append(client)
            # The only client begins its turn at once; others get their quantum when it is their turn.
            self._deficit[client] = self._quantum if len(self._turns) == 1 else 0
        if first:
            items.appendleft((cost, item))
        else:
            items.append((cost, item))
        self._count += 1

    def pop(self) -> T:
        """Removes and returns the item whose turn it is. Raises IndexError if there is none."""
        client = self._turns[0]
        if self._items[client][0][0] > self._deficit[client]:
            self._turns.rotate(-1)
            client = self._turns[0]
            # It is at least one quantum now, and no item costs more than that.
            self._deficit[client] += self._quantum
        cost, item = self._items[client].popleft()
        self._deficit[client] -= cost
        self._count -= 1
        if not self._items[client]:
            self._leave(client)
        return item

    def remove(self, client: str, item: T) -> bool:
        """Removes an item; returns whether it was in the queue."""
        items = self._items.get(client, ())
        # By identity: two items may be equal, such as two requests for the same tokens.
        for index, (_, other) in enumerate(items):
            if other is item:
                del self._items[client][index]
                self._count -= 1
                if not self._items[client]:
                    self._leave(client)
                return True
        return False

    def _leave(self, client: str) -> None:
        # An unused deficit is lost: a client must not save turns for a burst.
        had_turn = self._turns[0] == client
        self._turns.remove(client)
        del self._items[client], self._deficit[client]
        if not self._turns:
            self._quantum = _SMALLEST_QUANTUM
        elif had_turn:
            self._deficit[self._turns[0]] += self._quantum

    def waiting(self, client: str) -> int:
        """Returns how many items of this client wait."""
        return len(self._items.get(client, ()))

    def longest_last(self) -> T | None:
        """Returns the last item of the client with most items, or None if the queue is empty."""
        if not self._items:
            return None
        return max(self._items.values(), key=len)[-1][1]
