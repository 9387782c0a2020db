"""The folder of a training run: one trainer at a time, atomic checkpoints, the log.

run.json              the claim: all that decides the bits of the run; another one is refused
lock                  held by the trainer that is at work
step-00001234.pt      checkpoints: the last two, and the best by validation
log.jsonl             one JSON object an event, in order of steps
loss.png              the curve
tokenizer.json        the vocabulary, so that the folder can be exported on its own
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from optlm.checkpoint.save import atomic_file
from optlm.errors import ConfigError, OptlmError

__all__ = ["RunFolder", "TrainingError", "claim"]

_KEEP = 2
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


class RunFolder:
    """Reads and writes one run's files; each is replaced as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self, config: dict[str, Any]) -> Iterator[None]:
        """Hold the folder for this process and this configuration.

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
            self._claim(config)
            self._sweep()
            yield

    def _claim(self, config: dict[str, Any]) -> None:
        file = self.path / "run.json"
        config = json.loads(json.dumps(config))  # tuples become lists, as in the file
        if not file.exists():
            self.write("run.json", json.dumps(config, indent=1).encode())
            return
        held = json.loads(file.read_text(encoding="utf-8"))
        if held != config:
            raise ConfigError(
                f"{self.path} holds a run with another configuration "
                f"(different: {', '.join(_differences(held, config))}); "
                "give the same configuration to resume, or another folder"
            )

    def _sweep(self) -> None:
        """Remove what a killed trainer left half-written."""
        for partial in self.path.glob(".step-*.pt.*"):
            partial.unlink()

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
        return self.path / f"step-{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any], *, best: int) -> None:
        """Write a checkpoint, then remove those that are neither among the last two nor the best.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        with self._replacing(self.checkpoint(step).name) as file:
            torch.save(state, file)
        for old in self._steps()[:-_KEEP]:
            if old != best:
                self.checkpoint(old).unlink()

    def load(self, step: int) -> dict[str, Any]:
        """Read one checkpoint; nothing in it is executed.

        Raises:
            TrainingError: the file is missing or damaged.
        """
        path = self.checkpoint(step)
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainingError(f"cannot read {path}: {reason}") from error
        return state

    def load_latest(self, *, log: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, None if none was made; damaged ones go to `log`.

        Raises:
            TrainingError: there are checkpoints, and every one is damaged.
        """
        problems = []
        for step in reversed(self._steps()):
            try:
                return self.load(step)
            except TrainingError as error:
                problems.append(str(error))
                log(str(error))
        if problems:
            raise TrainingError(f"no checkpoint of this run is whole: {'; '.join(problems)}")
        return None

    def _steps(self) -> list[int]:
        return sorted(int(file.stem.removeprefix("step-")) for file in self.path.glob("step-*.pt"))

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


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix.rstrip(".")]
    names = sorted(a.keys() | b.keys())
    return [d for name in names for d in _differences(a.get(name), b.get(name), f"{prefix}{name}.")]
