"""TensorBoard's event file, written line by line beside the log.

TensorBoard's own classes make the bytes; its writer with a thread of its own is not used, so that
nothing is pending when a process is killed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from optlm.train.run.folder import TrainingError

__all__ = ["Board"]


class Board:
    """Appends scalars to one new file in `folder`.

    Args:
        step: what an earlier file of the same folder says about later steps is void.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        self._path = folder / f"events.out.tfevents.{time.time_ns() // 10**6}.optlm"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot write to {folder}: {error}") from error
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write([
            event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"),
            event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=started),
        ])  # fmt: skip

    def add(self, event: dict[str, Any]) -> None:
        """Write the numbers of one event of the log, names with dots into groups.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        kind, step = event["kind"], event["step"]
        figures = {name: value for name, value in event.items() if name not in ("kind", "step")}
        values = [
            summary_pb2.Summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in _numbers(figures)
        ]
        summary = summary_pb2.Summary(value=values)
        self._write([event_pb2.Event(wall_time=time.time(), step=step, summary=summary)])

    def _write(self, events: list[Any]) -> None:
        try:
            with self._path.open("ab") as file:
                writer = RecordWriter(file)
                for event in events:
                    writer.write(event.SerializeToString())
        except OSError as error:
            raise TrainingError(f"cannot write {self._path}: {error}") from error


def _numbers(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + name, float(value)))
    return found
