"""The gain of a cache: time saved by hits minus time spent on all lookups."""

from __future__ import annotations

import collections

WINDOW = 256  # lookups over which the gain is measured
ASIDE = 1024  # requests that skip the cache after a window without gain
TRIAL = 64  # lookups after that, over which it is measured again


class Gain:
    """Measures a cache's gain, and lets it stand aside while there is none. Its owner holds a lock.

    Hashing 1.5 MB can take a tenth of the time of routing it, so below some hit ratio a cache only
    costs time. The ratio depends on the machine and the requests, and so it is measured.

    Example:
        >>> gain = Gain()
        >>> for _ in range(WINDOW):
        ...     _ = gain.takes_part()
        ...     gain.lookup(saved=0.0, spent=1e-4)
        >>> gain.takes_part(), gain.aside
        (False, True)
    """

    def __init__(self) -> None:
        self.saved = 0.0
        self.spent = 0.0
        self.aside = False
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._skipped = 0
        self._needed = WINDOW

    def takes_part(self) -> bool:
        """Returns whether the next request should look into the cache."""
        if not self.aside:
            return True
        self._skipped += 1
        if self._skipped <= ASIDE:
            return False
        self.aside = False
        self._recent.clear()
        self._needed = TRIAL
        return True

    def lookup(self, *, saved: float, spent: float) -> None:
        """Counts a lookup with the seconds that it saved and those that it took."""
        self.saved += saved
        self.spent += spent
        self._recent.append(saved - spent)
        if len(self._recent) >= self._needed:
            if sum(self._recent) < 0:
                self.aside, self._skipped = True, 0
            self._needed = WINDOW
