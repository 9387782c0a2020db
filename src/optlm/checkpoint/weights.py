"""Finding and reading the weight files of a folder, in any format, with their stored names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from optlm.checkpoint.faults import error_of, fault_error, faults_of
from optlm.checkpoint.files import list_folder, present
from optlm.checkpoint.jsonfile import read_object
from optlm.checkpoint.metaseq import find_parts, read_metaseq
from optlm.checkpoint.safetensors import read_safetensors
from optlm.checkpoint.tensor import Tensor
from optlm.checkpoint.torchzip import read_torch
from optlm.errors import CheckpointError, Fault

INDEX_LIMIT = 16 * 2**20
SHARD_NAME = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors under their stored names."""

    tensors: Mapping[str, Tensor]
    layout: str  # "safetensors", "sharded torch", "metaseq in 2 parts", ...
    settings: object = None  # metaseq's training settings, inert


Reader = Callable[[Path], dict[str, Tensor]]

# First match wins: safetensors before pickles, one file before shards, as Hugging Face does.
_NAMES: tuple[tuple[str, str, Reader], ...] = (
    ("model.safetensors", "safetensors", read_safetensors),
    ("model.safetensors.index.json", "sharded safetensors", read_safetensors),
    ("pytorch_model.bin", "torch", read_torch),
    ("pytorch_model.bin.index.json", "sharded torch", read_torch),
)


def weight_file(names: list[str] | set[str]) -> str | None:
    """The file among `names` that says where the weights are (itself or an index)."""
    return next((name for name, _, _ in _NAMES if name in names), None)


def read_weights(folder: Path) -> Weights:
    """Read the headers of a folder's weights.

    Raises:
        CheckpointError: no weights, or files that are broken; every fault found is named.
    """
    for name, layout, reader in _NAMES:
        path = folder / name
        if not present(path):
            continue
        if name.endswith(".index.json"):
            return Weights(tensors=_read_shards(folder, path, reader), layout=layout)
        return Weights(tensors=reader(path), layout=layout)
    parts = find_parts(folder)
    if parts:
        model = read_metaseq(parts)
        layout = "metaseq" if len(parts) == 1 else f"metaseq in {len(parts)} parts"
        return Weights(tensors=model.tensors, layout=layout, settings=model.settings)
    raise fault_error(
        "no-weights",
        folder,
        "holds no weights: expected "
        + ", ".join(name for name, _, _ in _NAMES)
        + " or metaseq .pt parts",
    )


def _read_shards(folder: Path, index: Path, reader: Reader) -> dict[str, Tensor]:
    weight_map = shard_map(index)
    faults = []
    found: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        try:
            tensors = reader(folder / shard)
        except CheckpointError as error:
            faults += faults_of(error, shard)
            continue
        faults += _disagreements(shard, tensors, weight_map, index.name)
        found |= {name: tensor for name, tensor in tensors.items() if weight_map.get(name) == shard}
    faults += _extra_shards(folder, index, set(weight_map.values()))
    if faults:
        raise error_of(faults)
    return found


def shard_map(index: Path) -> dict[str, str]:
    """Tensor name to file name from an index; file names are plain names of the same folder.

    Raises:
        CheckpointError: the index is no JSON object, has no weight_map, or points outside its
            folder.
    """
    weight_map = read_object(index, INDEX_LIMIT, "index-json").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault_error("index-map", index, "has no weight_map from tensor names to file names")
    suffix = ".safetensors" if "safetensors" in index.name else ".bin"
    wrong = {str(shard)[:80] for shard in weight_map.values() if not _is_plain_name(shard, suffix)}
    if wrong:
        message = "is not the name of a {} file in the same folder; it was not opened"
        raise error_of(
            [
                Fault(
                    code="index-path", where=f"{index.name}: {name}", message=message.format(suffix)
                )
                for name in sorted(wrong)
            ]
        )
    return weight_map


def _is_plain_name(name: object, suffix: str) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}", name) is not None
    )


def _disagreements(
    shard: str, tensors: Mapping[str, Tensor], weight_map: Mapping[str, str], index: str
) -> list[Fault]:
    listed = {name for name, file in weight_map.items() if file == shard}
    missing = [
        Fault(
            code="index-missing", where=f"{shard}: {name}", message=f"{index} promises this tensor"
        )
        for name in sorted(listed - set(tensors))
    ]
    extra = [
        Fault(
            code="index-extra", where=f"{shard}: {name}", message=f"{index} does not list it here"
        )
        for name in sorted(set(tensors) - listed)
    ]
    return missing + extra


def _extra_shards(folder: Path, index: Path, used: set[str]) -> list[Fault]:
    suffix = next(iter(used)).rsplit(".", 1)[-1]
    present = {name for name in list_folder(folder) if SHARD_NAME.fullmatch(name)}
    return [
        Fault(code="extra-shard", where=name, message=f"is not mentioned in {index.name}")
        for name in sorted(present - used)
        if name.endswith("." + suffix)
    ]
