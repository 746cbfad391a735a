"""Digests of requests: 128 bits over everything that an answer depends on.

All of the content is hashed. With a hash over a sample, one request could get another's answer.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from blake3 import blake3


class Keyer:
    """Computes the digests of requests.

    Args:
        keyed: whether digests are keyed by ``secret`` and differ between clients, so that nobody can
            make two inputs collide or learn what others asked (blake3). Otherwise they are xxh3
            seeded by the secret, which is 20 times faster.
        secret: 32 bytes; None draws them, so that digests are valid in this process only.

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
        """Returns 32 hex digits.

        Args:
            parts: what else the answer depends on: version, options.
            x: the hidden states, contiguous.
            mask: bool[...] or None.
            client: who asks; used only if keyed.
        """
        fields = (*map(str, parts), _name(x.dtype), str(x.shape), "" if mask is None else "masked")
        header = "\x1f".join((*fields, client) if self.keyed else fields).encode()
        if self.keyed:
            strong = blake3(len(header).to_bytes(4, "little") + header, key=self._secret)
            strong.update(_bytes(x))
            if mask is not None:
                strong.update(_bytes(mask))
            return strong.hexdigest(length=16)
        fast = xxhash.xxh3_128(len(header).to_bytes(4, "little") + header, seed=self._seed)
        fast.update(_bytes(x))
        if mask is not None:
            fast.update(_bytes(mask))
        return fast.hexdigest()


@functools.cache
def _name(dtype: np.dtype) -> str:
    """The name of a dtype, kept because NumPy takes longer to make it than the cache to answer."""
    return str(dtype)


def _bytes(array: np.ndarray) -> Any:
    return array.reshape(-1).view(np.uint8)
