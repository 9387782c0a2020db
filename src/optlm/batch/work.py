"""Rows on their way through one engine, which is kept full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from optlm.batch.inputs import RowFault
from optlm.batch.ledger import Result
from optlm.engine.generation import Generation
from optlm.engine.llm import LLM
from optlm.engine.reading import Reading

__all__ = ["Job", "Row", "Starter", "Work", "complete"]

_ROWS = 512  # in the engine at once: what it runs together (256), and the next in line
_BYTES = 2**26  # of the rows in the engine

Row = tuple[int, bytes | RowFault]  # its number, from 0, and what it holds
Job = Generation | Reading


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A row in the engine: its jobs there, and what makes a line of them when all are finished."""

    jobs: Sequence[Job]
    finish: Callable[[], Result]

    @property
    def finished(self) -> bool:
        return all(job.finished for job in self.jobs)


class Starter(Protocol):
    """Knows a format of rows."""

    def start(self, row: int, content: bytes | RowFault) -> Work | Result:
        """Submit what a row asks for; a row that cannot be served is a result at once."""


def complete(
    llm: LLM,
    starter: Starter,
    rows: Iterable[Row],
    may_start: Callable[[int], bool] = lambda row: True,
) -> Iterator[list[tuple[int, Result]]]:
    """Yield the rows that finished, step after step; all are aborted when the caller stops.

    Args:
        may_start: whether a row may be begun yet; asked again after each step.
    """
    line = _Line(starter, iter(rows), may_start)
    try:
        while True:
            ready = line.fill()
            if ready:
                yield ready
            if not line.active:
                return
            if llm.has_work:
                llm.step()
            if done := line.take_finished():
                yield done
    finally:
        for work in line.active.values():
            for job in work.jobs:
                if not job.finished:
                    llm.abort(job)


class _Line:
    """The rows in the engine, and those about to enter."""

    def __init__(
        self, starter: Starter, rows: Iterator[Row], may_start: Callable[[int], bool]
    ) -> None:
        self.active: dict[int, Work] = {}
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._starter = starter
        self._rows = rows
        self._may_start = may_start
        self._next = next(rows, None)

    def fill(self) -> list[tuple[int, Result]]:
        """Submit rows while there is room; return those that needed no engine."""
        ready: list[tuple[int, Result]] = []
        while self._next is not None and len(ready) < _ROWS and self._has_room(self._next[0]):
            row, content = self._next
            started = self._starter.start(row, content)
            if isinstance(started, Result):
                ready.append((row, started))
            else:
                self.active[row] = started
                self._sizes[row] = len(content) if isinstance(content, bytes) else 0
                self._bytes += self._sizes[row]
            self._next = next(self._rows, None)
        return ready

    def take_finished(self) -> list[tuple[int, Result]]:
        may_be = [  # a cheap look at all, then a close one at few
            row
            for row, work in self.active.items()
            if not (samples := work.jobs[0].samples) or samples[0].finish_reason
        ]
        done = [row for row in may_be if self.active[row].finished]
        for row in done:
            self._bytes -= self._sizes.pop(row)
        return [(row, self.active.pop(row).finish()) for row in done]

    def _has_room(self, row: int) -> bool:
        few = len(self.active) < _ROWS and self._bytes < _BYTES
        return (few or not self.active) and self._may_start(row)
