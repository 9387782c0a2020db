"""Checkpoints of many processes: a folder to which each adds its pieces, whole or not there at all.

    step-00000012.parts/
      model/shard-00001-model-00001-of-00001.safetensors ...   weights, one file for each process
      average/  exp_avg/  exp_avg_sq/                          the same names and pieces
      rest.pt                                                  step, random state, all that is small
      manifest.json                                            sha256 of every file

It is written under another name and renamed when every process has its file on disk. Each set of
files is a folder of `optlm.checkpoint.pieces`, which PyTorch's distributed checkpoint reads too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optlm.checkpoint.layout import Grid, Piece
from optlm.checkpoint.pieces import PieceFile, Pieces, file_name, open_pieces
from optlm.checkpoint.staging import sync_folder
from optlm.errors import CheckpointError
from optlm.train.run.folder import RunFolder, TrainingError, read_signed, write_signed

__all__ = ["load_latest", "read_parts", "save_parts"]

_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for every weight
_ADAMW = "AdamW"


# ---- writing -----------------------------------------------------------------------------------


def save_parts(
    folder: RunFolder,
    step: int,
    state: dict[str, Any],
    *,
    grid: Grid,
    pieces: Mapping[str, Piece],
    names: list[str],
) -> None:
    """Write the checkpoint of `step`, together with all other processes.

    Args:
        state: as `Trainer.save` makes it; tensors of weights are this process's pieces.
        names: of the weights, in the optimizer's order.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; earlier ones are unharmed.
    """
    stage, target = folder.path / f".step-{step:08d}.parts", folder.parts(step)
    sets, rest = _take_apart(state, names)
    with _as_training_error(target):
        if grid.rank == 0:
            shutil.rmtree(stage, ignore_errors=True)
            for name in sets:
                (stage / name).mkdir(parents=True)
        dist.barrier()
        mine = {}
        for name, tensors in sets.items():
            if digest := _write(stage / name / file_name(grid.rank), tensors, pieces):
                mine[f"{name}/{file_name(grid.rank)}"] = digest
        files = _gathered(mine)
        if grid.rank == 0:
            _finish(stage, target, rest, {k: v for part in files for k, v in part.items()}, grid)
            folder.checkpoint_file(step).unlink(missing_ok=True)
        dist.barrier()


def _take_apart(
    state: dict[str, Any], names: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Sets of tensors that are cut like the weights, and everything else."""
    sets = {"model": state["model"]}
    if state["average"] is not None:
        sets["average"] = state["average"]
    adamw = state["optimizer"][_ADAMW]
    moments = adamw["state"]
    for moment in _MOMENTS:
        sets[moment] = {names[i]: moments[i][moment] for i in moments}
    small = {i: {k: v for k, v in kept.items() if k not in _MOMENTS} for i, kept in moments.items()}
    rest = {k: v for k, v in state.items() if k not in ("model", "average", "optimizer")}
    return sets, rest | {"adamw": adamw | {"state": small}, "names": names}


def _write(path: Path, tensors: dict[str, Tensor], pieces: Mapping[str, Piece]) -> str | None:
    """Write this process's file of a set; its sha256, None if it holds nothing of the set."""
    file, empty = PieceFile(), True
    for name, tensor in tensors.items():
        piece = pieces[name]
        if piece.first and not piece.empty:
            file.add(name, "F32", piece, lambda t=tensor: t.cpu().numpy())  # type: ignore[misc]
            empty = False
    if empty:
        return None
    with path.open("wb") as stream:
        digest = file.write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(path.parent)
    return digest


def _finish(
    stage: Path, target: Path, rest: dict[str, Any], files: dict[str, str], grid: Grid
) -> None:
    with (stage / "rest.pt").open("w+b") as stream:
        write_signed(stream, rest)
        stream.flush()
        os.fsync(stream.fileno())
    manifest = {"format": 1, "data": grid.data, "tensor": grid.tensor, "files": files}
    with (stage / "manifest.json").open("w", encoding="utf-8") as text:
        json.dump(manifest, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    sync_folder(stage)
    shutil.rmtree(target, ignore_errors=True)  # a damaged one, or these steps would not run again
    os.rename(stage, target)
    sync_folder(target.parent)


@contextmanager
def _as_training_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {target}: {error}; earlier checkpoints are unharmed, free some space "
            "and resume"
        ) from error


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# ---- reading -----------------------------------------------------------------------------------


def load_latest(
    folder: RunFolder,
    *,
    pieces: Mapping[str, Piece],
    names: list[str],
    log: Callable[[str], None],
) -> dict[str, Any] | None:
    """The newest checkpoint that every process can read, of one process or many, cut for this one.

    Raises:
        TrainingError: there are checkpoints, and every one is damaged.
    """
    told = []
    for step in reversed(_gathered(folder.steps())[0]):
        state, problem = None, None
        try:
            state = _load(folder, step, pieces, names)
        except (TrainingError, CheckpointError) as error:
            problem = str(error)
        found = [text for text in _gathered(problem) if text]
        if not found:
            return state
        told.append(found[0])
        log(found[0])
    if told:
        raise TrainingError(f"no checkpoint of this run is whole: {'; '.join(told)}")
    return None


def _load(
    folder: RunFolder, step: int, pieces: Mapping[str, Piece], names: list[str]
) -> dict[str, Any]:
    path = folder.checkpoint(step)
    if path.is_dir():
        share = (dist.get_rank(), dist.get_world_size())
        return read_parts(path, pieces=pieces, names=names, share=share)
    state = folder.load(step)  # of one process: all of it is read, and a part is kept
    for kind in ("model", "average"):
        if state[kind] is not None:
            state[kind] = {name: _cut(whole, pieces[name]) for name, whole in state[kind].items()}
    for index, kept in state["optimizer"][_ADAMW]["state"].items():
        for moment in _MOMENTS:
            kept[moment] = _cut(kept[moment], pieces[names[index]])
    return state


def _cut(whole: Tensor, piece: Piece) -> Tensor:
    return whole[piece.slices].clone()


def read_parts(
    path: Path,
    *,
    pieces: Mapping[str, Piece] | None = None,
    names: list[str] | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """The state that was saved: whole, or this process's `pieces` of it.

    Args:
        share: (rank, world); each process compares the hashes of its share of the files.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = sorted(manifest["files"].items())[share[0] :: share[1]]
        for name, digest in files:
            _compare(path / name, digest)
        with (path / "rest.pt").open("rb") as file:
            rest = read_signed(file)
        sets = {
            kind: {name: _read(found, pieces) for name, found in open_pieces(path / kind).items()}
            for kind in ("model", "average", *_MOMENTS)
            if (path / kind).is_dir()
        }
        return _put_together(rest, sets, names)
    except (OSError, ValueError, LookupError, TypeError, CheckpointError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error


def _compare(path: Path, digest: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.sha256()
        while block := file.read(1 << 20):
            actual.update(block)
    if actual.hexdigest() != digest:
        raise ValueError(f"the SHA-256 of {path.name} is not the one it was written with")


def _read(found: Pieces, pieces: Mapping[str, Piece] | None) -> Tensor:
    if pieces is None:
        return torch.from_numpy(found.read((0,) * len(found.shape), found.shape))
    piece = pieces[found.name]
    if piece.shape != found.shape:
        raise ValueError(f"{found.name} has shape {found.shape}; the model's is {piece.shape}")
    return torch.from_numpy(found.read(piece.offsets, piece.sizes))


def _put_together(
    rest: dict[str, Any], sets: dict[str, dict[str, Tensor]], names: list[str] | None
) -> dict[str, Any]:
    adamw, saved = rest.pop("adamw"), rest.pop("names")
    if names is not None and names != saved:
        raise ValueError("its weights are not those of the model that is being trained")
    for index, kept in adamw["state"].items():
        kept |= {moment: sets[moment][saved[index]] for moment in _MOMENTS}
    state = {"model": sets["model"], "average": sets.get("average"), "optimizer": {_ADAMW: adamw}}
    return rest | state
