"""`Tensor`: one stored weight, not yet read.

Dtypes have the names of the safetensors format. numpy has no bfloat16, so BF16 travels as uint16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optlm.checkpoint.faults import fault_error

Array = NDArray[Any]

# Weights come in the first three; the others are known so that messages can name them.
ITEM_SIZE = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
WEIGHT_DTYPES = ("F32", "F16", "BF16")

_STORAGE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_BYTES: np.dtype[Any] = np.dtype("u1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensor:
    """A named weight in a file: `shape` and `dtype` are known, the numbers are read on demand."""

    name: str
    dtype: str  # "F32", "F16" or "BF16" in every tensor of a `Checkpoint`
    shape: tuple[int, ...]
    source: str = field(repr=False)  # file it comes from, for messages
    read: Callable[[], Array] = field(repr=False)  # gives `shape` in the storage dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]

    def raw(self) -> Array:
        """The numbers as stored: a read-only C-ordered array of `shape`, mapped where possible.

        float32, float16, or uint16 that holds bfloat16. Strided tensors and joined parts are
        copies.
        """
        array = np.require(self.read(), requirements=("C", "A"))
        assert array.shape == self.shape, (self.name, array.shape, self.shape)
        view: Array = array.view()
        view.flags.writeable = False
        return view

    def numpy(self) -> NDArray[np.float32]:
        """The numbers as a new C-ordered float32 array of `shape`.

        Raises:
            CheckpointError: a value is NaN or infinite.
        """
        raw = self.raw()
        if not is_finite(raw, self.dtype):
            raise fault_error("non-finite", self.name, "holds NaN or infinite values")
        return as_float(raw, self.dtype).astype(np.float32, copy=self.dtype != "BF16")


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype for stored numbers; single bytes for dtypes that are never weights."""
    return _STORAGE.get(dtype, _BYTES)


# Smallest bit pattern (sign cleared) with all exponent bits set: infinity, NaNs above it.
_INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_CHUNK = 1 << 17  # items; the second pass over a chunk then finds it in cache


def is_finite(raw: Array, dtype: str) -> bool:
    """True when `raw` (as `Tensor.raw` gives it) holds neither NaN nor infinity.

    Read as signed integers, positive non-finite values are the greatest; read as unsigned integers,
    the negative ones are. Two maxima per chunk find both, without temporaries.
    """
    limit = _INFINITY[dtype]
    width = ITEM_SIZE[dtype]
    sign = 1 << (8 * width - 1)
    flat = raw.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        chunk = np.ascontiguousarray(flat[start : start + _CHUNK])
        if (
            chunk.view(f"<i{width}").max() >= limit
            or chunk.view(f"<u{width}").max() >= sign | limit
        ):
            return False
    return True


def as_float(raw: Array, dtype: str) -> Array:
    """`raw` as floating-point numbers: a float32 copy of bfloat16, else `raw` itself."""
    return (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw


def same_bits(a: Array, b: Array) -> bool:
    """True when two C-ordered arrays of one shape and dtype hold the same bit patterns."""
    if a.ctypes.data == b.ctypes.data:  # one storage under two names, as torch saves a tied head
        return True
    bits = f"u{a.itemsize}"
    return np.array_equal(a.view(bits), b.view(bits))
