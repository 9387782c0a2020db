"""From many files to one and back: weights are cut anew without changing a bit.

A streaming tool: tensors pass through one at a time, so the memory needed is that of the largest.
It joins no processes and needs neither a GPU nor PyTorch. When all is written, it is read again and
the sha256 of every tensor is compared with the source's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import list_folder
from optlm.checkpoint.jsonfile import parse_object
from optlm.checkpoint.layout import Grid, check_tensor_parallel, piece_of
from optlm.checkpoint.load import open_checkpoint, resolve
from optlm.checkpoint.names import Named, fit
from optlm.checkpoint.pieces import PieceFile, file_name, is_piece_file, open_pieces
from optlm.checkpoint.safetensors import read_safetensors
from optlm.checkpoint.save import atomic_file, copy_tokenizer, save_checkpoint
from optlm.checkpoint.staging import staged_folder
from optlm.checkpoint.tensor import Array, Tensor
from optlm.config import OPTConfig
from optlm.errors import ConfigError, Fault

__all__ = ["Resharded", "reshard"]

WEIGHTS = ("average", "model")  # of a training checkpoint; the first that is there by default
_HASH_TOGETHER = 1 << 24  # bytes


@dataclass(frozen=True, kw_only=True)
class Resharded:
    """One tensor that was written, with the hash it has in the source and in the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str  # of its numbers in C order, little-endian


@dataclass(frozen=True, kw_only=True)
class _Source:
    config: OPTConfig
    tensors: Mapping[str, Tensor]
    tokenizer_from: Path


def reshard(
    source: str | Path,
    out: Path,
    *,
    grid: Grid | None = None,
    weights: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Resharded]:
    """Write the weights of `source` into the folder `out`.

    Args:
        source: a distributed checkpoint (``RUN/step-00000012.parts``), a folder this function
            wrote, or any checkpoint that `open_checkpoint` takes.
        grid: write one file for each of ``grid.data * grid.tensor`` processes; None: one
            ``model.safetensors`` in Hugging Face's layout.
        weights: "average" or "model" of a training checkpoint; None: the average if it has one.
        progress: told how many tensors have been compared, and of how many.

    Raises:
        CheckpointError: a file is missing or damaged, or what was written differs from the source.
        ConfigError: a configuration that makes no sense, or cannot be cut that way.
    """
    given = _open(source, weights)
    if grid is None:
        save_checkpoint(out, given.config, given.tensors, tokenizer_from=given.tokenizer_from)
        written: Mapping[str, Tensor] = read_safetensors(out / "model.safetensors")
    else:
        _write_pieces(out, given, grid)
        written = {name: found.tensor() for name, found in open_pieces(out).items()}
    return _compare(given.tensors, written, out, progress)


def _open(source: str | Path, weights: str | None) -> _Source:
    names = list_folder(Path(source)) if os.path.isdir(source) else []
    if "run.json" in names:
        steps = [name for name in names if name.endswith(".parts")] or ["none yet"]
        raise fault_error(
            "run-folder", source, f"is the folder of a run; name a checkpoint in it: {steps[-1]}"
        )
    folder = resolve(source)
    names = list_folder(folder)
    if "manifest.json" in names and "model" in names:
        return _open_training(folder, weights)
    if weights is not None:
        raise fault_error(
            "weights", folder, f"is no checkpoint of training, so it has no choice of {weights!r}"
        )
    if any(map(is_piece_file, names)):
        config = OPTConfig.from_file(folder / "config.json")
        return _source(folder, config, folder)
    checkpoint = open_checkpoint(folder)
    return _Source(
        config=checkpoint.config, tensors=checkpoint.tensors, tokenizer_from=checkpoint.folder
    )


def _open_training(folder: Path, weights: str | None) -> _Source:
    if weights is not None and weights not in WEIGHTS:
        raise fault_error("weights", weights, f"is not one of {', '.join(WEIGHTS)}")
    chosen = weights or next(name for name in WEIGHTS if os.path.isdir(folder / name))
    if not os.path.isdir(folder / chosen):
        raise fault_error("weights", folder / chosen, "is not there: the run kept no such weights")
    run = folder.absolute().parent
    try:
        config = OPTConfig.from_dict(parse_object((run / "run.json").read_bytes())["model"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{run / 'run.json'} does not say which model this is ({error}); leave the checkpoint "
            "in the folder of its run"
        ) from error
    return _source(folder / chosen, config, run)


def _source(folder: Path, config: OPTConfig, tokenizer_from: Path) -> _Source:
    whole = {name: found.tensor() for name, found in open_pieces(folder).items()}
    tensors, faults = fit(Named(tensors=whole, prefixes=frozenset(), faults=[]), config)
    if faults:
        raise error_of(faults)
    return _Source(config=config, tensors=tensors, tokenizer_from=tokenizer_from)


def _write_pieces(out: Path, given: _Source, grid: Grid) -> None:
    check_tensor_parallel(given.config, grid.tensor)
    with staged_folder(out, replaces=_old_weights(out)) as stage:
        for rank in range(grid.data * grid.tensor):
            with atomic_file(stage / file_name(rank)) as stream:
                _piece_file(given, Grid(data=grid.data, tensor=grid.tensor, rank=rank)).write(
                    stream
                )
        copy_tokenizer(given.tokenizer_from, stage)
        with atomic_file(stage / "config.json") as stream:
            stream.write((json.dumps(given.config.to_dict(), indent=2) + "\n").encode())


def _old_weights(out: Path) -> list[str]:
    """Weights that would contradict the new ones."""
    names = list_folder(out) if os.path.isdir(out) else []
    return [name for name in names if is_piece_file(name) or name == "model.safetensors"]


def _piece_file(given: _Source, grid: Grid) -> PieceFile:
    file = PieceFile()
    for name, tensor in given.tensors.items():
        piece = piece_of(name, tensor.shape, grid)
        if piece.first and not piece.empty:

            def read(tensor: Tensor = tensor, place: Any = piece.slices) -> Array:
                part: Array = tensor.raw()[place]
                return part

            file.add(name, tensor.dtype, piece, read)
    return file


def _compare(
    given: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    out: Path,
    progress: Callable[[int, int], None],
) -> list[Resharded]:
    done, faults = [], []
    for name, tensor in given.items():
        wanted = _sha256(tensor)
        if name not in written or wanted != _sha256(written[name]):
            message = "differs from the source after it was written; is the disk sound?"
            faults.append(Fault(code="hash", where=f"{out}: {name}", message=message))
        done.append(Resharded(name=name, dtype=tensor.dtype, shape=tensor.shape, sha256=wanted))
        progress(len(done), len(given))
    if faults:
        raise error_of(faults)
    return done


def _sha256(tensor: Tensor) -> str:
    digest, flat = hashlib.sha256(), tensor.raw().reshape(-1).view("u1")
    for begin in range(0, len(flat), _HASH_TOGETHER):
        digest.update(flat[begin : begin + _HASH_TOGETHER].data)
    return digest.hexdigest()
