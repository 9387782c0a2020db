"""Tensors cut into pieces over several files: the form in which distributed training saves.

A folder of ``shard-00001-model-00001-of-00001.safetensors``, ``shard-00002-...``, one for each
process. A file holds pieces of tensors; where each begins in its tensor stands in the metadata.
This is the safetensors form of `torch.distributed.checkpoint` (its `HuggingFaceStorageReader` loads
such a folder). Its other form keeps the same facts in a pickle, and optlm executes none.

Nothing here imports PyTorch, joins processes or holds more than one tensor in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import list_folder
from optlm.checkpoint.layout import Piece
from optlm.checkpoint.safetensors import read_metadata, read_safetensors
from optlm.checkpoint.tensor import ITEM_SIZE, Array, Tensor, storage_dtype
from optlm.errors import Fault

__all__ = ["PieceFile", "Pieces", "file_name", "is_piece_file", "open_pieces"]

_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"
_NAME = re.compile(r"shard-(\d{5,})-model-00001-of-00001\.safetensors")
_ALIGNMENT = 64  # bytes


def file_name(rank: int) -> str:
    """Name of the file that the process `rank` writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def is_piece_file(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


# ---- writing -----------------------------------------------------------------------------------


class PieceFile:
    """One process's pieces of many tensors: what goes into one file.

    Example: ``file = PieceFile(); file.add(name, "F32", piece, read); file.write(stream)``.
    """

    def __init__(self) -> None:
        self._header: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, list[int]]] = {}
        self._reads: list[Callable[[], Array]] = []
        self._end = 0

    def add(self, name: str, dtype: str, piece: Piece, read: Callable[[], Array]) -> None:
        """Put a piece into the file. `read` gives its numbers when they are written, C-ordered."""
        begin = self._end
        self._end += math.prod(piece.sizes) * ITEM_SIZE[dtype]
        self._header[name] = {
            "dtype": dtype,
            "shape": list(piece.sizes),
            "data_offsets": [begin, self._end],
        }
        self._offsets[name] = {_OFFSETS: list(piece.offsets)}
        self._reads.append(read)

    def write(self, stream: IO[bytes]) -> str:
        """Write the file, one piece in memory at a time; return its sha256."""
        information = json.dumps(self._offsets, separators=(",", ":"))
        metadata = {"format": "pt", "DCP_VERSION": "1.0", _INFO: information}
        text = json.dumps(
            {"__metadata__": metadata, **self._header}, separators=(",", ":")
        ).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        digest = hashlib.sha256()
        for data in (len(text).to_bytes(8, "little"), text):
            stream.write(data)
            digest.update(data)
        for read in self._reads:
            numbers = np.ascontiguousarray(read()).reshape(-1).view(np.uint8)
            stream.write(numbers.data)
            digest.update(numbers.data)
        return digest.hexdigest()


# ---- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A tensor of `shape` whose pieces lie in files, mapped and not yet read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Tensor], ...]  # offsets of each piece, and its numbers

    def read(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
        """A new array of the box of `sizes` that begins at `offsets`."""
        box = np.empty(sizes, storage_dtype(self.dtype))
        for begin, part in self.parts:
            source, target = [], []
            for at, length, wanted, size in zip(begin, part.shape, offsets, sizes, strict=True):
                low, high = max(at, wanted), min(at + length, wanted + size)
                source.append(slice(low - at, max(low, high) - at))
                target.append(slice(low - wanted, max(low, high) - wanted))
            box[tuple(target)] = part.raw()[tuple(source)]
        return box

    def tensor(self) -> Tensor:
        """The whole tensor, joined when it is read."""
        whole = (0,) * len(self.shape)
        return Tensor(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            source=self.parts[0][1].source,
            read=lambda: self.read(whole, self.shape),
        )


def open_pieces(folder: Path) -> dict[str, Pieces]:
    """All tensors of a folder, by name.

    Raises:
        CheckpointError: a file is damaged, or the pieces of a tensor overlap or leave gaps; all
            such tensors are named.
    """
    found: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for name in filter(is_piece_file, list_folder(folder)):
        path = folder / name
        offsets = _saved_offsets(path)
        for key, tensor in read_safetensors(path).items():
            begin = offsets.get(key)
            if not isinstance(begin, list) or len(begin) != len(tensor.shape):
                raise fault_error("pieces", f"{path}: {key}", "has no offsets in its metadata")
            found.setdefault(key, []).append((tuple(begin), tensor))
    if not found:
        raise fault_error("missing-file", folder, f"holds no {file_name(0)} and so on")
    tensors, faults = {}, []
    for key, parts in found.items():
        shape = tuple(max(o[a] + t.shape[a] for o, t in parts) for a in range(len(parts[0][0])))
        if message := _wrong(shape, parts):
            faults.append(Fault(code="pieces", where=f"{folder}: {key}", message=message))
        dtype = parts[0][1].dtype
        tensors[key] = Pieces(name=key, dtype=dtype, shape=shape, parts=tuple(parts))
    if faults:
        raise error_of(faults)
    return tensors


def _saved_offsets(path: Path) -> dict[str, Any]:
    try:
        information = json.loads(read_metadata(path)[_INFO])
        return {name: entry[_OFFSETS] for name, entry in information.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise fault_error(
            "pieces",
            path,
            f"does not say where its pieces belong ({type(error).__name__}: {error})",
        ) from error


def _wrong(shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Tensor]]) -> str | None:
    """What keeps the pieces from tiling a box of `shape`; None if they do.

    All cuts go through the whole tensor, so each piece is one cell of a grid.
    """
    if len({tensor.dtype for _, tensor in parts}) != 1:
        return f"its pieces have different dtypes: {sorted({t.dtype for _, t in parts})}"
    cuts = [sorted({offsets[a] for offsets, _ in parts}) for a in range(len(shape))]
    following = [dict(zip(c, [*c[1:], n], strict=True)) for c, n in zip(cuts, shape, strict=True)]
    for offsets, tensor in parts:
        ends = tuple(following[a][offsets[a]] for a in range(len(shape)))
        if ends != tuple(o + n for o, n in zip(offsets, tensor.shape, strict=True)):
            return f"its piece at {list(offsets)}, {list(tensor.shape)}, leaves a gap or overlaps"
    cells = math.prod(map(len, cuts))
    if any(c[0] for c in cuts) or len(parts) != cells:
        return f"has {len(parts)} pieces; {cells} would fill its shape {list(shape)}"
    if len({offsets for offsets, _ in parts}) != len(parts):
        return "a piece is there twice"
    return None
