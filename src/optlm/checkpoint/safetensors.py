"""Reading safetensors files: the header is checked in full before anything is mapped.

Format: 8 bytes of header length (little-endian), a JSON object, then the data. Each entry gives
dtype, shape and the range of its bytes in the data; the ranges must tile the data exactly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import map_file
from optlm.checkpoint.jsonfile import RepeatedKeyError, parse_object
from optlm.checkpoint.tensor import ITEM_SIZE, Array, Tensor, storage_dtype
from optlm.errors import Fault

MAX_HEADER_BYTES = 16 * 2**20  # OPT-175B needs 0.2 MB
MAX_DIMENSIONS = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, in file order, mapped and not yet read.

    Raises:
        CheckpointError: the file cannot be opened or breaks the format; all broken entries are
            named.
    """
    data = map_file(path)
    header_bytes = _header_length(path, data)
    entries = _parse_header(path, bytes(data[8 : 8 + header_bytes]))
    metadata = entries.pop("__metadata__", {})
    faults = _metadata_faults(path, metadata)
    for name, entry in entries.items():
        faults += [
            Fault(code=code, where=f"{path.name}: {name}", message=message)
            for code, message in _entry_faults(entry)
        ]
    if not faults:
        faults = _tiling_faults(path, entries, data.size - 8 - header_bytes)
    if faults:
        raise error_of(faults)
    body = data[8 + header_bytes :]
    return {name: _tensor(name, entry, body, path) for name, entry in entries.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a file: texts by name, empty if there is none.

    Raises:
        CheckpointError: the file cannot be opened, or its header breaks the format.
    """
    data = map_file(path)
    metadata = _parse_header(path, bytes(data[8 : 8 + _header_length(path, data)])).get(
        "__metadata__", {}
    )
    if faults := _metadata_faults(path, metadata):
        raise error_of(faults)
    return dict(metadata)


def _header_length(path: Path, data: Array) -> int:
    if data.size < 8:
        raise fault_error(
            "truncated", path, f"has {data.size} bytes; a safetensors file needs 8 or more"
        )
    length = int(data[:8].view("<u8")[0])
    if length < 2:
        raise fault_error(
            "header-length", path, f"the header length is {length}; at least 2 is needed"
        )
    if length > MAX_HEADER_BYTES:
        raise fault_error(
            "header-length",
            path,
            f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES} "
            "(is this a safetensors file?)",
        )
    if length > data.size - 8:
        raise fault_error(
            "truncated",
            path,
            f"the header claims {length} bytes; the file has {data.size - 8} left",
        )
    return length


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except RepeatedKeyError as error:
        raise fault_error("header-duplicate", path, f"the header is ambiguous: {error}") from None
    except ValueError as error:
        raise fault_error(
            "header-json", path, f"the header is not a JSON object: {error}"
        ) from None


def _metadata_faults(path: Path, metadata: object) -> list[Fault]:
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return []
    message = "__metadata__ must map texts to texts"
    return [Fault(code="header-metadata", where=str(path), message=message)]


def _entry_faults(entry: object) -> list[tuple[str, str]]:
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        return [("header-entry", f"the entry must have exactly the keys {sorted(_ENTRY_KEYS)}")]
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    faults = []
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        faults.append(("header-dtype", f"the dtype {dtype!r} is unknown"))
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        faults.append(("header-shape", f"the shape {_short(shape)} is not a list of sizes"))
    if not _naturals(offsets) or len(offsets) != 2:
        faults.append(("header-offsets", f"the offsets {_short(offsets)} are not [begin, end]"))
    elif offsets[0] > offsets[1]:
        faults.append(("header-offsets", f"the offsets {offsets} are reversed"))
    if faults:
        return faults
    claimed, held = math.prod(shape) * ITEM_SIZE[dtype], offsets[1] - offsets[0]
    if claimed != held:
        return [("header-size", f"{dtype} {shape} needs {claimed} bytes, the offsets give {held}")]
    return []


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        for value in values
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tiling_faults(path: Path, entries: dict[str, Any], size: int) -> list[Fault]:
    """Ranges must follow one another from 0 to `size`: no overlap, no gap, nothing past the end."""
    faults = []

    def add(code: str, name: str, message: str) -> None:
        faults.append(Fault(code=code, where=f"{path.name}: {name}", message=message))

    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin < reached:
            add(
                "header-overlap",
                name,
                f"begins at {begin}, inside the tensor before it ({reached})",
            )
        elif begin > reached:
            add("header-gap", name, f"begins at {begin}; bytes from {reached} belong to nothing")
        reached = max(reached, end)
    if reached > size:
        message = f"the tensors need {reached} bytes of data, the file holds {size}"
        faults.append(Fault(code="truncated", where=str(path), message=message))
    elif reached < size:
        message = f"{size - reached} bytes after the last tensor belong to nothing"
        faults.append(Fault(code="header-gap", where=str(path), message=message))
    return faults


def _tensor(name: str, entry: dict[str, Any], body: Array, path: Path) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    stored = storage_dtype(entry["dtype"])

    def read() -> Array:
        return body[begin:end].view(stored).reshape(shape)

    return Tensor(name=name, dtype=entry["dtype"], shape=shape, source=path.name, read=read)
