"""Safetensors files, read by memory mapping: nothing is loaded before it is used, nothing executed.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header,
the header (name -> dtype, shape, offsets), then the raw numbers.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "C64": np.complex64,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_LARGEST_HEADER = 100_000_000
_INDEX = "model.safetensors.index.json"


class _Entry(NamedTuple):
    """Where a tensor lies in the bytes after the header."""

    dtype: str  # as the file spells it; it may be one that numpy does not have
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile(Mapping[str, np.ndarray]):
    """One file as a mapping from name to array; arrays are read-only views of the mapped file.

    A tensor of a dtype that this library does not read (packed 4-bit floats, say) does not hinder the
    others: taking it raises ValueError.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is cut off or not of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise self._broken(f"a header of {length} bytes in a file of {size}")
            try:
                header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            except (ValueError, RecursionError):
                raise self._broken("a header that is not JSON, or names a tensor twice") from None
        if not isinstance(header, dict):
            raise self._broken("a header that is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._start = 8 + length
        self._header = {n: self._entry(n, e, size - self._start) for n, e in header.items()}
        self._check_overlaps()
        self._bytes: np.ndarray | None = None

    def _entry(self, name: str, entry: Any, room: int) -> _Entry:
        try:
            dtype, shape, (begin, end) = (
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            # `type(n) is int` because JSON's true is an int to isinstance.
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            if not (isinstance(dtype, str) and dtype and whole):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"an unreadable entry for {name!r}: {entry}") from None
        # How many bytes a number of an unknown dtype takes is unknown too.
        itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else None
        fits = itemsize is None or end - begin == math.prod(shape) * itemsize
        if not (begin <= end <= room and fits):
            raise self._broken(
                f"{name!r} at bytes {begin} to {end} of {room} for {dtype}{list(shape)}"
            )
        return _Entry(dtype, shape, begin, end)

    def _check_overlaps(self) -> None:
        before, last = 0, ""
        for name, entry in sorted(self._header.items(), key=lambda item: item[1].begin):
            if entry.begin == entry.end:
                continue
            if entry.begin < before:
                raise self._broken(f"{last!r} and {name!r} in the same bytes")
            before, last = entry.end, name

    def _broken(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: expected a whole safetensors file, got {what}. Download it again."
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return self._header[name].shape

    def release(self) -> None:
        """Lets go of the mapped file; it is mapped again when a tensor is asked for.

        What was read stays in memory until every view of it is gone too.
        """
        self._bytes = None

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: expected {name!r} in one of the dtypes {', '.join(DTYPES)}, got "
                f"{entry.dtype}. Take a checkpoint without this quantisation, or dequantise it with "
                "the tool that made it."
            )
        if entry.begin == entry.end:  # a file without numbers cannot be mapped
            return _read_only(np.empty(entry.shape, DTYPES[entry.dtype]))
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, mode="r", offset=self._start)
        numbers = self._bytes[entry.begin : entry.end].view(DTYPES[entry.dtype])
        return numbers.reshape(entry.shape).view(np.ndarray)

    def __contains__(self, name: object) -> bool:
        return name in self._header

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def forget_pages(view: np.ndarray) -> None:
    """Takes the pages of the file behind a view out of this process; a later access reads them again.

    Does nothing for arrays without a mapped file, or where the system has no such call.
    """
    # A view of a view of the mapping: the mapping is at the end of the chain of bases.
    owner: Any = view
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """All tensors of a checkpoint folder, from one file or from shards with an index.

    A shard is opened when its first tensor is taken, so shards that are not needed may be missing.

    Raises:
        FileNotFoundError: no safetensors in the folder, or the shard of a tensor is missing.
        ValueError: the index or a file is broken, or they disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, SafetensorsFile] = {}
        index = self.folder / _INDEX
        files = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if index.is_file():
            self._where = self._read_index(index)
        elif len(files) == 1 or "model.safetensors" in files:
            name = "model.safetensors" if "model.safetensors" in files else files[0]
            self._where = dict.fromkeys(self._file(name), name)
        else:
            pickled = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = (
                f" There is {pickled[0]}, a pickle, which can run any code when read: convert it to "
                "safetensors where you trust it."
                if pickled
                else " Give the folder that holds config.json and the weights."
            )
            raise FileNotFoundError(
                f"{self.folder}: expected model.safetensors or {_INDEX}, got {files or 'neither'}."
                f"{hint}"
            )

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
            where = dict(weight_map.items())
            if not all(isinstance(file, str) for file in where.values()):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{path}: expected a JSON object with a 'weight_map' from tensor to file, got "
                "something else. Download it again."
            ) from None
        outside = [f for f in where.values() if Path(f).name != f or not f]
        if outside:
            raise ValueError(
                f"{path}: expected names of files in this folder, got {outside[0]!r}. The index is "
                "not one that the Hub writes."
            )
        return where

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._open:
            try:
                self._open[name] = SafetensorsFile(self.folder / name)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self.folder}: expected the shard {name!r}, which {_INDEX} names, got no such "
                    "file. Download it into the folder."
                ) from None
        return self._open[name]

    def unlisted(self, names: Iterable[str]) -> list[str]:
        """Tensors that the shards of ``names`` hold and the index does not list, sorted.

        Raises:
            FileNotFoundError, ValueError: a shard is missing or broken.
        """
        shards = {self._where[name] for name in names}
        return sorted({n for shard in shards for n in self._file(shard) if n not in self._where})

    def __getitem__(self, name: str) -> np.ndarray:
        shard = self._where[name]
        file = self._file(shard)
        if name not in file:
            raise ValueError(
                f"{self.folder}: expected {name!r} in the shard {shard!r}, as {_INDEX} says, got a "
                f"shard without it. Index and shards are of different checkpoints: download both again."
            )
        return file[name]

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def release(self) -> None:
        """Lets go of all mapped files, see ``SafetensorsFile.release``."""
        for file in self._open.values():
            file.release()

    def check_shards(self) -> None:
        """Checks that every file that the index names is there, without opening any.

        Raises:
            FileNotFoundError: a file is missing; all that are missing are named.
        """
        missing = sorted(f for f in set(self._where.values()) if not (self.folder / f).is_file())
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: expected every shard that {_INDEX} names, got none of "
                f"{', '.join(missing[:4])}. Download them into the folder."
            )

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._where[name]

    def metadata_of(self, file: str) -> dict[str, str]:
        """The metadata of one file, e.g. ``{"format": "pt"}``."""
        return dict(self._file(file).metadata)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    get: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, a tensor at a time.

    Args:
        path: of the file.
        tensors: name -> (dtype, shape).
        get: a tensor by its name; called once for each, in the order of the file.
        metadata: kept beside the tensors.

    Raises:
        ValueError: a dtype that the format does not have, or a tensor of another dtype or shape.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
        >>> write_safetensors(path, {"a": (np.dtype("float32"), (2,))}, lambda name: np.ones(2, "f4"))
        >>> SafetensorsFile(path)["a"].tolist()
        [1.0, 1.0]
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Widest first, so that every tensor begins at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = tensors[name]
        if dtype not in names:
            raise ValueError(f"{name!r}: expected a dtype of the format, got {dtype}. Convert it.")
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Numbers begin at a multiple of 8 bytes, so that a mapped file can be viewed in any dtype.
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            array = get(name)
            if (array.dtype, array.shape) != tensors[name]:
                raise ValueError(
                    f"{name!r}: expected {tensors[name][0]}{list(tensors[name][1])}, got "
                    f"{array.dtype}{list(array.shape)}."
                )
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
