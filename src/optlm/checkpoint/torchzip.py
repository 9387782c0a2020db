"""Reading the zip files of ``torch.save`` without PyTorch and without executing their pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.pickleobjects import BadPickleError, TensorRef
from optlm.checkpoint.tensor import ITEM_SIZE, Array, Tensor, storage_dtype
from optlm.checkpoint.unpickle import load
from optlm.checkpoint.ziparchive import open_zip
from optlm.errors import Fault, UnsafeFileError


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """What one file holds: the pickled object, and the records its tensors point to."""

    path: Path
    root: object
    records: Mapping[str, Array]  # storage key -> bytes


def open_torch(path: Path) -> TorchFile:
    """Open a ``.bin`` or ``.pt`` file.

    Raises:
        UnsafeFileError: its pickle asks for more than tensors and settings.
        CheckpointError: it is broken.
    """
    entries = open_zip(path)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise fault_error("zip", path, "holds no data.pkl; it was not written by torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(prefix + "byteorder")
    if order is not None and order.tobytes() != b"little":
        raise fault_error("byte-order", path, "was written on a big-endian machine; save it again")
    records = {
        name.removeprefix(prefix + "data/"): data
        for name, data in entries.items()
        if name.startswith(prefix + "data/")
    }
    try:
        root = load(entries[pickles[0]].tobytes())
    except UnsafeFileError as error:
        raise fault_error("unsafe-pickle", path, str(error)) from None
    except BadPickleError as error:
        raise fault_error("pickle", path, str(error)) from None
    return TorchFile(path=path, root=root, records=records)


def read_torch(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file that holds a state dictionary, mapped and not yet read."""
    file = open_torch(path)
    return tensors_of(file, file.root)


def tensors_of(file: TorchFile, state: object) -> dict[str, Tensor]:
    """The tensors of one dictionary in the file.

    Raises:
        CheckpointError: a value is no tensor, or its view leaves its storage; all are named.
    """
    if not isinstance(state, dict):
        raise fault_error("not-tensors", file.path, "does not hold a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    faults = []
    for name, value in state.items():
        where = f"{file.path.name}: {name if isinstance(name, str) else '(a key that is no text)'}"
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            message = f"is a {type(value).__name__}, not a named tensor"
            faults.append(Fault(code="not-tensors", where=where, message=message))
            continue
        problem = _view_problem(value, file.records)
        if problem:
            faults.append(Fault(code="tensor-bounds", where=where, message=problem))
            continue
        tensors[name] = _tensor(name, value, file)
    if faults:
        raise error_of(faults)
    return tensors


def _view_problem(ref: TensorRef, records: Mapping[str, Array]) -> str | None:
    storage = ref.storage
    if storage.key not in records:
        return f"its storage {storage.key[:40]!r} is not in the file"
    held = records[storage.key].size
    if storage.length * ITEM_SIZE[storage.dtype] != held:
        claim = f"{storage.length} items of {storage.dtype}"
        return f"its storage claims {claim}, the file holds {held} bytes"
    count = math.prod(ref.shape)
    if count > storage.length:
        return f"its shape {list(ref.shape)} repeats a storage of {storage.length} items"
    last = ref.offset + sum(
        (size - 1) * stride for size, stride in zip(ref.shape, ref.strides, strict=True)
    )
    if count and last >= storage.length:
        return f"it reaches item {last} of a storage of {storage.length} items"
    return None


def _tensor(name: str, ref: TensorRef, file: TorchFile) -> Tensor:
    record = file.records[ref.storage.key]
    stored = storage_dtype(ref.storage.dtype)

    def read() -> Array:
        items = record.view(stored)[ref.offset :]
        strides = [stride * stored.itemsize for stride in ref.strides]
        return np.lib.stride_tricks.as_strided(items, ref.shape, strides, writeable=False)

    return Tensor(
        name=name, dtype=ref.storage.dtype, shape=ref.shape, source=file.path.name, read=read
    )
