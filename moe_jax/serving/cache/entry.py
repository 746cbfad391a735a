"""A cached answer, and its bytes for Redis: no pickle, and every size is checked when read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_MAGIC = b"moe1"
_DTYPES = ("int32", "int64", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A cached answer. Its arrays are read-only.

    Attributes:
        arrays: by name.
        about: plain JSON values that belong to the answer.
        seconds: how long computing it took.
        version: version of the weights that computed it.
        owner: id of the only client that may read it, or "" for all.
        cacheable: whether it may be kept; False for a degraded answer.
        memo: values that a reader derived from the arrays and may need again.
    """

    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]
    seconds: float
    version: str
    owner: str = ""
    cacheable: bool = True
    memo: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, and an estimate for the rest."""
        return sum(int(a.nbytes) for a in self.arrays.values()) + 1024


def to_bytes(entry: Entry) -> bytes:
    """Returns an entry as bytes."""
    head = {
        "arrays": [[n, str(a.dtype), list(a.shape)] for n, a in entry.arrays.items()],
        "about": dict(entry.about),
        "seconds": entry.seconds,
        "version": entry.version,
        "owner": entry.owner,
    }
    text = json.dumps(head).encode()
    parts = [_MAGIC, len(text).to_bytes(4, "little"), text]
    parts += [np.ascontiguousarray(a).tobytes() for a in entry.arrays.values()]
    return b"".join(parts)


def from_bytes(data: bytes) -> Entry:
    """Returns the entry that ``to_bytes`` wrote.

    Raises:
        ValueError: the bytes are not a whole entry: data in Redis may be damaged, or another program's.

    Example:
        >>> entry = Entry(arrays={"a": np.ones(2, np.float32)}, about={}, seconds=0.1, version="v")
        >>> from_bytes(to_bytes(entry)).arrays["a"].tolist()
        [1.0, 1.0]
    """
    size = int.from_bytes(data[4:8], "little")
    if data[:4] != _MAGIC or size > len(data) - 8:
        raise ValueError("cached entry: expected one that this service wrote, got something else.")
    try:
        head = json.loads(data[8 : 8 + size])
        arrays, at = {}, 8 + size
        for name, dtype, shape in head["arrays"]:
            if dtype not in _DTYPES or any(type(s) is not int or s < 0 for s in shape):
                raise ValueError(f"dtype {dtype!r}, shape {shape!r}")
            count = int(np.prod([int(s) for s in shape], dtype=object)) if shape else 1
            array = np.frombuffer(data, dtype, count=count, offset=at).reshape(shape)
            at += array.nbytes
            arrays[str(name)] = array  # read-only, because it is a view of `bytes`
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes left over")
        return Entry(
            arrays=arrays,
            about=head["about"],
            seconds=float(head["seconds"]),
            version=str(head["version"]),
            owner=str(head["owner"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cached entry: expected a whole one, got a damaged one: {error}"
        ) from None
