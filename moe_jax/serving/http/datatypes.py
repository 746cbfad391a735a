"""The protocol's datatypes and numpy's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import ml_dtypes
import numpy as np

DATATYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "UINT8": np.dtype("<u1"),
        "UINT16": np.dtype("<u2"),
        "UINT32": np.dtype("<u4"),
        "UINT64": np.dtype("<u8"),
        "INT8": np.dtype("<i1"),
        "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"),
        "INT64": np.dtype("<i8"),
        "FP16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "FP32": np.dtype("<f4"),
        "FP64": np.dtype("<f8"),
    }
)
"""Name in the protocol -> dtype on the wire, little-endian. BYTES is not among them: nothing here
takes or gives strings."""

NO_JSON = frozenset({"FP16", "BF16"})
"""Datatypes that travel as binary data only, as on Triton."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


def datatype_of(array: np.ndarray) -> str:
    """The protocol's name of an array's dtype.

    Example:
        >>> datatype_of(np.zeros(2, np.int32))
        'INT32'
    """
    native = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else array.dtype
    return _NAMES[native]
