"""metaseq's own files: one ``.pt``, or model-parallel parts that are joined here.

Part n of N holds slices of the large matrices and copies of everything small. A matrix that was
split by output rows is joined along axis 0, one split by inputs along axis 1, and a fused
`qkv_proj` per third, since each part stores its own K, V and Q. Copies are compared: parts that
drifted apart are not one model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import list_folder
from optlm.checkpoint.flat import FLAT, Shard, unflatten
from optlm.checkpoint.names import split_fused
from optlm.checkpoint.tensor import Array, Tensor, same_bits
from optlm.checkpoint.torchzip import open_torch, tensors_of
from optlm.errors import Fault

_PART = re.compile(
    r"(?P<stem>.*?)(?:-model_part-(?P<part>\d{1,4}))?(?:-shard(?P<shard>\d{1,4}))?\.pt"
)
_AXIS_0 = re.compile(r".*(embed_tokens\.weight|fc1\.(weight|bias)|[kvq]_proj\.(weight|bias))")
_AXIS_1 = re.compile(r".*(fc2|out_proj)\.weight")
_HEAD = re.compile(r".*output_projection\.weight")


@dataclass(frozen=True, kw_only=True)
class MetaseqModel:
    """Joined tensors under metaseq's names, and the training settings of part 0 (inert data)."""

    tensors: dict[str, Tensor]
    settings: object


def find_parts(folder: Path) -> list[list[Path]]:
    """The ``.pt`` files of a folder: a list of FSDP shards for each model part, in order.

    Empty when there are none.

    Raises:
        CheckpointError: several models in one folder, or a part or shard that is missing.
    """
    files = sorted(name for name in list_folder(folder) if name.endswith(".pt"))
    matches = [match for name in files if (match := _PART.fullmatch(name))]
    stems = sorted({match["stem"] for match in matches})
    if len(stems) > 1:
        message = f"holds .pt files of several models: {', '.join(stems[:5])}"
        raise fault_error("several-models", folder, message)
    parts: dict[int, dict[int, Path]] = {}
    for match in matches:
        shards = parts.setdefault(int(match["part"] or 0), {})
        shards[int(match["shard"] or 0)] = folder / match.string
    _check_row("model part", parts, folder)
    for shards in parts.values():
        _check_row("shard", shards, folder)
    return [[shards[n] for n in sorted(shards)] for _, shards in sorted(parts.items())]


def _check_row(kind: str, numbers: Iterable[int], folder: Path) -> None:
    present = sorted(numbers)
    if present != list(range(len(present))):
        message = f"holds {kind}s {present[:20]}; they must run from 0 without a gap"
        raise fault_error("missing-part", folder, message)


def read_metaseq(parts: Sequence[Sequence[Path]]) -> MetaseqModel:
    """Read and join model-parallel parts, each of one or more shards.

    Raises:
        CheckpointError: a file is broken, or the parts disagree; every such tensor is named.
    """
    states = [_read_part(shards) for shards in parts]
    first = open_torch(parts[0][0]).root
    settings = (first.get("cfg") or first.get("args")) if isinstance(first, dict) else None
    return MetaseqModel(tensors=_join(states), settings=settings)


def _read_part(paths: Sequence[Path]) -> dict[str, Tensor]:
    shards = []
    for path in paths:
        file = open_torch(path)
        root = file.root if isinstance(file.root, dict) else {}
        tensors = tensors_of(file, root.get("model", file.root))
        shards.append(Shard(file=path.name, tensors=tensors, metadata=root.get("shard_metadata")))
    if len(shards) > 1 or any(FLAT in name for name in shards[0].tensors):
        return unflatten(shards)
    return dict(shards[0].tensors)


def _join(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(states) == 1:
        return dict(states[0])
    faults = _name_faults(states)
    joined: dict[str, Tensor] = {}
    for name in states[0]:
        pieces = [state[name] for state in states if name in state]
        if len(pieces) == len(states):
            tensors, found = _join_one(name, pieces, states[0])
            joined |= tensors
            faults += found
    if faults:
        raise error_of(faults)
    return joined


def _name_faults(states: Sequence[Mapping[str, Tensor]]) -> list[Fault]:
    everywhere = set.intersection(*(set(state) for state in states))
    anywhere = set().union(*states)
    message = "is in some model parts only"
    return [
        Fault(code="part-names", where=name, message=message)
        for name in sorted(anywhere - everywhere)
    ]


def _join_one(
    name: str, pieces: Sequence[Tensor], first: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Fault]]:
    thirds = [split_fused(piece) for piece in pieces]
    if thirds[0]:
        tensors: dict[str, Tensor] = {}
        faults: list[Fault] = []
        for third in thirds[0]:
            joined, found = _concatenate(third, [split.get(third) for split in thirds], 0)
            tensors |= joined
            faults += found
        return tensors, faults
    axis = _axis(name, pieces, first)
    return _copy(name, pieces) if axis is None else _concatenate(name, pieces, axis)


def _axis(name: str, pieces: Sequence[Tensor], first: Mapping[str, Tensor]) -> int | None:
    """Axis along which the pieces of a weight lie, or None for copies."""
    if _AXIS_0.fullmatch(name):
        return 0
    if _AXIS_1.fullmatch(name):
        return 1
    if _HEAD.fullmatch(name):
        # Some versions of metaseq keep the whole head in every part, some only the part's own rows.
        embedding = first.get(name.replace("output_projection", "embed_tokens"))
        return 0 if embedding is not None and embedding.shape == pieces[0].shape else None
    return None


def _concatenate(
    name: str, pieces: Sequence[Tensor | None], axis: int
) -> tuple[dict[str, Tensor], list[Fault]]:
    whole = [piece for piece in pieces if piece is not None]
    kinds = {
        (p.dtype, len(p.shape), *(n for a, n in enumerate(p.shape) if a != axis)) for p in whole
    }
    if len(kinds) != 1 or len(whole) != len(pieces) or len(whole[0].shape) <= axis:
        message = f"its model parts have shapes {_shapes(whole)}, which cannot be joined"
        return {}, [Fault(code="part-shape", where=name, message=message)]
    shape = list(whole[0].shape)
    shape[axis] = sum(piece.shape[axis] for piece in whole)

    def read() -> Array:
        return np.concatenate([piece.raw() for piece in whole], axis=axis)

    joined = Tensor(
        name=name, dtype=whole[0].dtype, shape=tuple(shape), source=whole[0].source, read=read
    )
    return {name: joined}, []


def _copy(name: str, pieces: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Fault]]:
    first = pieces[0]
    for part, piece in enumerate(pieces[1:], start=1):
        if (piece.dtype, piece.shape) != (first.dtype, first.shape):
            message = f"is a copy in every part, with differing shapes {_shapes(pieces)}"
            return {}, [Fault(code="part-shape", where=name, message=message)]
        if not same_bits(first.raw(), piece.raw()):
            message = f"should be the same in every part, but part {part} differs from part 0"
            return {}, [Fault(code="part-drift", where=name, message=message)]
    return {name: first}, []


def _shapes(pieces: Sequence[Tensor]) -> str:
    return ", ".join(f"{piece.dtype} {list(piece.shape)}" for piece in pieces[:4])
