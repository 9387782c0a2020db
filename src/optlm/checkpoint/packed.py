"""The packed form: weights as the native engine runs them, mapped instead of read and converted.

A packed folder holds ``config.json``, tokenizer files and ``weights.optlm``: one page with a JSON
header, then the engine's weight memory as it stands. What the bytes mean is the core's affair
(``csrc/tensor.h``); the header says for which configuration and format they were made.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.files import map_file
from optlm.checkpoint.jsonfile import parse_object
from optlm.checkpoint.tensor import Array
from optlm.config import OPTConfig

__all__ = ["PACKED_NAME", "PackedWeights", "check_packed_target", "read_packed", "save_packed"]

PACKED_NAME = "weights.optlm"
_FORMAT = "optlm-packed"
_VERSION = 1  # raised whenever csrc lays weights out differently
_PAGE = 4096
_DTYPES = ("f32", "f16", "bf16", "int8")
_POSITIONS_DTYPES = ("F32", "F16", "BF16")
_KEYS = {"format", "version", "dtype", "positions_dtype", "bytes", "sha256", "config"}


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeights:
    """The contents of a ``weights.optlm``."""

    data: Array  # (bytes,) uint8, mapped read-only, page-aligned
    dtype: str  # "f32", "bf16" or "int8"
    positions_dtype: str  # "F32", "F16" or "BF16"
    sha256: str

    def is_intact(self) -> bool:
        """Read everything once and compare with the hash in the header."""
        return _sha256(self.data) == self.sha256


def save_packed(
    folder: str | Path,
    config: OPTConfig,
    data: Array,
    *,
    dtype: str,
    positions_dtype: str,
    tokenizer_from: str | Path,
) -> Path:
    """Write a packed folder, whole or not at all (`staged_folder`).

    Raises:
        CheckpointError: the target is no folder, cannot be written, or holds other weights.
    """
    # reading needs none of it
    from optlm.checkpoint.save import TOKENIZER_FILES, atomic_file, copy_tokenizer
    from optlm.checkpoint.staging import staged_folder

    folder = Path(folder)
    check_packed_target(folder)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "dtype": dtype,
        "positions_dtype": positions_dtype,
        "bytes": data.size,
        "sha256": _sha256(data),
        "config": dataclasses.asdict(config),
    }
    with staged_folder(folder, replaces=TOKENIZER_FILES) as stage:
        copy_tokenizer(Path(tokenizer_from), stage)
        with atomic_file(stage / PACKED_NAME) as file:
            file.write(json.dumps(header).encode().ljust(_PAGE))
            file.write(data.data)
        with atomic_file(stage / "config.json") as file:
            file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())
    return folder


def check_packed_target(folder: Path) -> None:
    """Refuse a folder that cannot take packed weights, before they are made.

    Raises:
        CheckpointError: as `save_packed`.
    """
    from optlm.checkpoint.staging import check_target

    check_target(folder)
    others = [
        path.name for kind in ("*.safetensors", "*.bin", "*.pt") for path in folder.glob(kind)
    ]
    if others:
        message = f"already holds {others[0]}; pack into another folder"
        raise fault_error("packed-beside-others", folder, message)


def _sha256(data: Array) -> str:
    import hashlib

    return hashlib.sha256(data.data).hexdigest()


def read_packed(path: Path, config: OPTConfig) -> PackedWeights:
    """Map a ``weights.optlm``.

    Raises:
        CheckpointError: the file is damaged, of another version, or made for another configuration.
    """
    mapped = map_file(path)
    if mapped.size < _PAGE:
        raise fault_error(
            "truncated", path, f"has {mapped.size} bytes; the header alone has {_PAGE}"
        )
    header = _parse_header(path, bytes(mapped[:_PAGE]))
    if header["version"] != _VERSION:
        raise fault_error(
            "packed-version",
            path,
            f"is of packed version {header['version']!r}, this optlm reads {_VERSION}; "
            "convert again",
        )
    if header["dtype"] not in _DTYPES or header["positions_dtype"] not in _POSITIONS_DTYPES:
        kinds = f"{header['dtype']!r:.40} and {header['positions_dtype']!r:.40}"
        raise fault_error("packed-header", path, f"names formats that do not exist: {kinds}")
    if header["config"] != dataclasses.asdict(config):
        raise fault_error("packed-config", path, "was made for another config.json; convert again")
    if header["bytes"] != mapped.size - _PAGE:
        raise fault_error(
            "truncated",
            path,
            f"the header claims {header['bytes']!r} bytes of weights, "
            f"the file has {mapped.size - _PAGE}",
        )
    return PackedWeights(
        data=mapped[_PAGE:],
        dtype=str(header["dtype"]),
        positions_dtype=str(header["positions_dtype"]),
        sha256=str(header["sha256"]),
    )


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = parse_object(raw)
    except ValueError as error:
        raise fault_error("packed-header", path, f"the header is not JSON: {error}") from None
    if header.get("format") != _FORMAT or set(header) != _KEYS:
        raise fault_error("packed-header", path, "does not begin with the header of packed weights")
    return header
