"""The name of a request: everything that its answer depends on, in 128 bits.

Nothing is sampled: a hash over part of the content once served stale answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3


class Keyer:
    """Turns requests into digests.

    Args:
        keyed: whether digests are keyed by ``secret`` and differ from client to client, so that
            nobody can make two inputs collide or learn what others asked (blake3); otherwise
            xxh3, seeded by the secret, which is 20 times faster.
        secret: 32 bytes; None draws them, which makes digests those of this process.

    Example:
        >>> keyer = Keyer(keyed=False, secret=bytes(32))
        >>> x = np.ones((2, 4), np.float32)
        >>> a = keyer.digest(("v1", "router"), x, None, client="a")
        >>> a == keyer.digest(("v1", "router"), x.copy(), None, client="b")
        True
        >>> a == keyer.digest(("v2", "router"), x, None, client="a")
        False
    """

    def __init__(self, *, keyed: bool, secret: bytes | None = None) -> None:
        self.keyed = keyed
        self._secret = secrets.token_bytes(32) if secret is None else secret
        self._seed = int.from_bytes(self._secret[:8], "little")

    def digest(
        self, parts: Sequence[object], x: np.ndarray, mask: np.ndarray | None, *, client: str
    ) -> str:
        """32 hex digits.

        Args:
            parts: what else the answer depends on: version, options.
            x: the hidden states, contiguous.
            mask: bool[...] or None.
            client: who asks; matters only when keyed.
        """
        said = (*map(str, parts), str(x.dtype), str(x.shape), "" if mask is None else "masked")
        header = "\x1f".join((*said, client) if self.keyed else said).encode()
        if self.keyed:
            own = blake3(len(header).to_bytes(4, "little") + header, key=self._secret)
            own.update(_bytes(x))
            if mask is not None:
                own.update(_bytes(mask))
            return own.hexdigest(length=16)
        fast = xxhash.xxh3_128(len(header).to_bytes(4, "little") + header, seed=self._seed)
        fast.update(_bytes(x))
        if mask is not None:
            fast.update(_bytes(mask))
        return fast.hexdigest()


def _bytes(array: np.ndarray) -> Any:
    return array.reshape(-1).view(np.uint8)
