"""Weights that fairscale's FSDP flattened into one vector per module, and cut over several files.

Each file says beside its weights what its vectors are made of (`shard_metadata`): for every module
the names, shapes and sizes of its weights in order, and how many zeros pad the vector in this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.pickleobjects import Opaque
from optlm.checkpoint.tensor import Array, Tensor
from optlm.errors import CheckpointError

FLAT = "flat_param"
_WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its tensors, and its `shard_metadata` as inert data."""

    file: str
    tensors: Mapping[str, Tensor]
    metadata: object


def unflatten(shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The weights of one model part under metaseq's names.

    Raises:
        CheckpointError: the description is absent, or does not fit the vectors.
    """
    modules = [_modules(shard) for shard in shards]
    tensors: dict[str, Tensor] = {}
    described = set()
    for number, module in enumerate(modules[0]):
        for flat_name, content in module["params"].items():
            key = _join(module["fsdp_path"], flat_name)
            pieces = []
            for shard, others in zip(shards, modules, strict=True):
                padding = _params(shard, others, number).get(flat_name, {}).get("padding")
                pieces.append(_piece(shard, key, padding))
            described.add(key)
            for tensor in _cut(shards[0].file, key, pieces, module["fsdp_path"], content):
                tensors[tensor.name] = tensor
    left = [name for name in shards[0].tensors if FLAT in name and name not in described]
    if left:
        raise _unfit(shards[0].file, f"says nothing of {left[0]!r}")
    whole = {name: t for name, t in shards[0].tensors.items() if FLAT not in name}
    return whole | tensors


def _modules(shard: Shard) -> list[dict[str, Any]]:
    metadata = shard.metadata if isinstance(shard.metadata, dict) else {}
    modules = metadata.get("param_metadata")
    if not isinstance(modules, list):
        raise fault_error(
            "flat-parameters",
            shard.file,
            "holds weights flattened by FSDP and no shard_metadata that says in which order; "
            "unflatten them with metaseq's reshard_fsdp script first",
        )
    for module in modules:
        sound = isinstance(module, dict) and isinstance(module.get("fsdp_path"), str)
        if not sound or not isinstance(module.get("params"), dict):
            raise _unfit(shard.file, "is not in fairscale's form")
        if not all(isinstance(content, dict) for content in module["params"].values()):
            raise _unfit(shard.file, "is not in fairscale's form")
    return modules


def _params(shard: Shard, modules: list[dict[str, Any]], number: int) -> dict[str, Any]:
    if number >= len(modules):
        raise _unfit(shard.file, "describes fewer modules than the first shard's")
    params: dict[str, Any] = modules[number]["params"]
    return params


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _unfit(file: str, what: str) -> CheckpointError:
    return fault_error("flat-metadata", file, f"its shard_metadata {what}")


def _piece(shard: Shard, key: str, padding: object) -> Tensor:
    """A shard's vector without its padding."""
    tensor = shard.tensors.get(key)
    if tensor is None or len(tensor.shape) != 1 or type(padding) is not int:
        raise _unfit(shard.file, f"does not fit {key!r}")
    length = tensor.shape[0] - padding
    if not 0 <= length <= tensor.shape[0]:
        raise _unfit(shard.file, f"pads {key!r} by {padding} of {tensor.shape[0]} values")

    def read() -> Array:
        values: Array = tensor.raw()[:length]
        return values

    return Tensor(name=key, dtype=tensor.dtype, shape=(length,), source=tensor.source, read=read)


def _cut(
    file: str, key: str, pieces: Sequence[Tensor], path: str, content: Mapping[str, Any]
) -> list[Tensor]:
    names, shapes = content.get("names"), content.get("shapes")
    if not isinstance(names, (list, tuple)) or not isinstance(shapes, (list, tuple)):
        raise _unfit(file, f"lacks the names or shapes of {key!r}")
    sizes = [_shape(shape) for shape in shapes]
    if len(names) != len(sizes) or not all(isinstance(name, str) for name in names):
        raise _unfit(file, f"lacks the names or shapes of {key!r}")
    held = sum(piece.shape[0] for piece in pieces)
    needed = sum(math.prod(size) for size in sizes if size is not None)
    if None in sizes or held != needed or len({piece.dtype for piece in pieces}) != 1:
        raise _unfit(file, f"asks for {needed} values of {key!r}, the files hold {held}")
    tensors = []
    begin = 0
    for name, size in zip(names, sizes, strict=True):
        assert size is not None
        tensors.append(_slice(_plain(_join(path, name)), size, pieces, begin))
        begin += math.prod(size)
    return tensors


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _shape(value: object) -> tuple[int, ...] | None:
    """A shape, pickled as tuple, list or torch.Size."""
    if isinstance(value, Opaque) and value.type.name == "torch.Size":
        arguments = value.arguments
        value = arguments[0] if isinstance(arguments, tuple) and arguments else None
    if not isinstance(value, (tuple, list)) or len(value) > 8:
        return None
    if not all(type(size) is int and 0 <= size < 2**63 for size in value):
        return None
    return tuple(value)


def _slice(name: str, shape: tuple[int, ...], pieces: Sequence[Tensor], begin: int) -> Tensor:
    end = begin + math.prod(shape)

    def read() -> Array:
        found = []
        at = 0
        for piece in pieces:
            length = piece.shape[0]
            if at < end and begin < at + length:
                found.append(piece.raw()[max(0, begin - at) : end - at])
            at += length
        if not found:
            found = [pieces[0].raw()[:0]]
        return (found[0] if len(found) == 1 else np.concatenate(found)).reshape(shape)

    return Tensor(name=name, dtype=pieces[0].dtype, shape=shape, source=pieces[0].source, read=read)
