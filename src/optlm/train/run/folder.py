"""The folder of a training run: one trainer at a time, atomic checkpoints, the log.

run.json              the claim: all that decides the bits of the run; another one is refused
inputs.json           hashes of what else the run stands on, such as its packed data
lock                  held by the trainer that is at work
step-00001234.pt      checkpoints: the last ones, the best by validation, and milestones
step-00001234.parts/  the same, written by many processes
log.jsonl             one JSON object an event, in order of steps
logbook.md            what was out of the ordinary, for people
loss.png              the curve
tensorboard/          the same figures for TensorBoard
tokenizer.json        the vocabulary, so that the folder can be exported on its own
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import pickle
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from optlm.checkpoint.save import atomic_file
from optlm.errors import ConfigError, OptlmError
from optlm.train.run.signature import check_signature, sign

__all__ = ["RunFolder", "TrainingError", "claim", "data_of"]

_SMALL_FILES = ("run.json", "inputs.json", "tokenizer.json", "log.jsonl", "logbook.md", "loss.png")
_CLAIMS = ("run.json", "inputs.json")
_BEFORE_TRAINING = {*_CLAIMS, "lock", "tokenizer.json", "data"}  # with more, a run has begun
# All that PyTorch raises for a damaged file.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError)


class TrainingError(OptlmError):
    """Training cannot go on: a loss that is no number, a full disk, a folder in use."""


def claim(technique: str, settings: Any, **others: Any) -> dict[str, Any]:
    """What makes a run the one it is, as JSON values.

    Args:
        technique: the command: "pretrain", "finetune", ...
        settings: a dataclass of everything that was asked for.
        others: what else decides the result, such as a fingerprint of the model that is adapted.
    """
    return {"technique": technique, **dataclasses.asdict(settings), **others}


def data_of(out: Path, given: Path | None) -> tuple[Path, bool]:
    """Folder of the packed tokens of the run in `out`, and whether they may be packed anew.

    They may if they are the run's own and nothing stands on them: it failed before it began.
    """
    own = out / "data"
    folder = own if given is None else given
    return folder, folder == own and _names(out) <= _BEFORE_TRAINING - {"inputs.json"}


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


class RunFolder:
    """Reads and writes one run's files; each is replaced as a whole or not at all."""

    writes = True  # whether this process writes; of many, one does

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changes: dict[
            str, list[Any]
        ] = {}  # name -> values before and now, allowed by the user

    @contextmanager
    def locked(self, config: dict[str, Any], *, may_change: Collection[str] = ()) -> Iterator[None]:
        """Hold the folder for this process and this configuration.

        Args:
            may_change: dotted names of settings that may differ from those the run was begun with;
                they act from here on.

        Raises:
            TrainingError: another trainer holds it, or it cannot be written.
            ConfigError: it belongs to a run with another configuration.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        except OSError as error:
            raise TrainingError(f"cannot write to {self.path}: {error}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"another trainer is at work in {self.path}; wait, or choose another folder"
                ) from None
            self._claim(config, may_change)
            self._sweep()
            try:
                yield
            except BaseException:
                self._release()
                raise

    def _claim(self, config: dict[str, Any], may_change: Collection[str]) -> None:
        file = self.path / "run.json"
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        if not file.exists():
            self.write("run.json", json.dumps(config, indent=1).encode())
            return
        differences = _differences(_read_object(file), config)
        refused = [name for name in differences if name not in may_change]
        if refused:
            raise ConfigError(
                f"{self.path} holds a run with another configuration "
                f"(different: {', '.join(refused)}); "
                "give the same configuration to resume, or another folder"
            )
        if differences:
            self.changes = {name: list(values) for name, values in differences.items()}
            self.write("run.json", json.dumps(config, indent=1).encode())

    def _release(self) -> None:
        """Give up the claim of a run that failed before it began: its settings may be mended."""
        with suppress(OSError):
            if _names(self.path) <= _BEFORE_TRAINING:
                for name in _CLAIMS:
                    (self.path / name).unlink(missing_ok=True)

    def stand_on(self, inputs: dict[str, Any]) -> None:
        """Note hashes of what the run reads besides its settings, or compare them with those noted.

        Raises:
            ConfigError: something is not what it was when the run began.
        """
        file = self.path / "inputs.json"
        inputs = json.loads(json.dumps(inputs))
        if not file.exists():
            self.write("inputs.json", json.dumps(inputs, indent=1).encode())
        elif differences := _differences(_read_object(file), inputs):
            raise ConfigError(
                f"what the run in {self.path} was trained on has changed since "
                f"({', '.join(differences)}); restore it to resume, or begin in another folder"
            )

    def _sweep(self) -> None:
        """Remove what a killed trainer left half-written."""
        for name in ("step-*.pt", *_SMALL_FILES):
            for partial in self.path.glob(f".{name}.*"):
                partial.unlink()
        for partial in self.path.glob(".step-*.parts"):
            shutil.rmtree(partial, ignore_errors=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file.

        Raises:
            TrainingError: the disk is full or the folder cannot be written; the old file stays.
        """
        with self._replacing(name) as file:
            file.write(data)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with atomic_file(self.path / name) as file:
                yield file
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise TrainingError(
                f"cannot write {self.path / name}: {error}; earlier checkpoints are unharmed, "
                "free some space and resume"
            ) from error

    # ---- checkpoints -------------------------------------------------------------------------

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of `step`: a file, or a folder if many processes wrote it."""
        file, parts = self.checkpoint_file(step), self.parts(step)
        return parts if parts.is_dir() and not file.exists() else file

    def checkpoint_file(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.pt"

    def parts(self, step: int) -> Path:
        return self.path / f"step-{step:08d}.parts"

    def save(
        self, step: int, state: dict[str, Any], *, keep: Collection[int] = (), last: int = 2
    ) -> None:
        """Write a checkpoint, then remove those that are neither among the `last` nor in `keep`.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        with self._replacing(self.checkpoint_file(step).name) as file:
            write_signed(file, state)
        shutil.rmtree(self.parts(step), ignore_errors=True)
        self.prune(keep=keep, last=last)

    def prune(self, *, keep: Collection[int] = (), last: int = 2) -> None:
        """Remove the checkpoints that are neither among the `last` nor in `keep`."""
        for old in self.steps()[:-last]:
            if old not in keep:
                self.checkpoint_file(old).unlink(missing_ok=True)
                shutil.rmtree(self.parts(old), ignore_errors=True)

    def load(self, step: int) -> dict[str, Any]:
        """Read one checkpoint after comparing its hash; nothing in it is executed.

        Raises:
            TrainingError: the file is missing or damaged.
        """
        path = self.checkpoint(step)
        if path.is_dir():
            from optlm.train.parallel.parts import read_parts

            return read_parts(path)
        try:
            with path.open("rb") as file:
                return read_signed(file)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingError(f"cannot read {path}: {reason}") from error

    def load_latest(self, *, log: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, None if none was made; damaged ones go to `log`.

        Raises:
            TrainingError: there are checkpoints, and every one is damaged.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except TrainingError as error:
                problems.append(str(error))
                log(str(error))
        if problems:
            raise TrainingError(f"no checkpoint of this run is whole: {'; '.join(problems)}")
        return None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, rising."""
        found = (re.fullmatch(r"step-(\d+)\.(pt|parts)", f.name) for f in self.path.glob("step-*"))
        return sorted({int(match[1]) for match in found if match})

    # ---- log ---------------------------------------------------------------------------------

    def log(self, event: dict[str, Any]) -> None:
        """Append one event.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write the log in {self.path}: {error}") from error

    def events(self) -> list[dict[str, Any]]:
        """Everything logged so far; a last line that a crash cut short is left out."""
        file = self.path / "log.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        return [event for event in map(_parsed, lines) if event is not None]

    def rewind_log(self, step: int) -> None:
        """Drop what was logged after `step` was reached: those steps will run again."""
        kept = [event for event in self.events() if event["step"] <= step]
        text = "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept)
        self.write("log.jsonl", text.encode())


def write_signed(file: IO[bytes], state: dict[str, Any]) -> None:
    """Write tensors and plain values, and their hash, to a file opened to read and write."""
    torch.save(state, file)
    sign(file)


def read_signed(file: IO[bytes]) -> dict[str, Any]:
    """What `write_signed` wrote; nothing in it is executed.

    Raises:
        ValueError, RuntimeError, ...: the file is damaged.
    """
    check_signature(file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return state


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event


def _read_object(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{file} is damaged: {error}; restore it or use another folder"
        ) from error
    if not isinstance(held, dict):
        raise TrainingError(f"{file} is damaged: it holds no JSON object")
    return held


def _differences(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the values that differ, with both values."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return {} if a == b else {prefix.rstrip("."): (a, b)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(a.keys() | b.keys()):
        found |= _differences(a.get(name), b.get(name), f"{prefix}{name}.")
    return found
