"""The one fast pass that finds NaN and infinity, against numpy's slow one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from optlm.checkpoint.tensor import _CHUNK, Tensor, is_finite
from optlm.errors import CheckpointError

BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def as_float(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32 if dtype == "F32" else np.float16)


def stored(bits: NDArray[Any], dtype: str) -> NDArray[Any]:
    return bits if dtype == "BF16" else as_float(bits, dtype)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    finite = np.isfinite(as_float(every, dtype))
    found = [is_finite(stored(every[i : i + 1], dtype), dtype) for i in range(2**16)]
    np.testing.assert_array_equal(found, finite)


@pytest.mark.parametrize("dtype", BITS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_random_bits(dtype: str, data: st.DataObject) -> None:
    bits = data.draw(arrays.arrays(BITS[dtype], arrays.array_shapes(min_side=0, max_dims=3)))
    assert is_finite(stored(bits, dtype), dtype) == bool(np.isfinite(as_float(bits, dtype)).all())


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("at", [0, _CHUNK - 1, _CHUNK, 2 * _CHUNK + 5])
def test_the_last_chunk_counts(dtype: str, value: float, at: int) -> None:
    values = np.zeros(2 * _CHUNK + 6, np.float32)
    values[at] = value
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    raw = {"F32": values, "F16": values.astype(np.float16), "BF16": bits}[dtype]
    assert not is_finite(raw, dtype)
    raw[at] = 0
    assert is_finite(raw, dtype)


def test_a_copy_checks_itself() -> None:
    values = np.array([[1.0, np.inf]], np.float32)
    tensor = Tensor(name="w", dtype="F32", shape=(1, 2), source="x", read=lambda: values)
    assert tensor.nbytes == 8
    with pytest.raises(CheckpointError, match="w: holds NaN or infinite"):
        tensor.numpy()
