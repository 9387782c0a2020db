"""Pairs of numbers sorted on disk, for more of them than memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["SortedOnDisk"]

Rows = NDArray[np.uint64]  # (N, 2): a key, and what it belongs to

_PARTITIONS = 32
_ROW = 16  # bytes
_WORK = 4  # times its size that sorting a block takes


class SortedOnDisk:
    """Takes rows in any order and gives them back by key, then by their second number.

    Rows are spread over files by the range their key is in. A file is sorted in memory if it fits;
    one that does not is spread again. Only rows that all have the same key are held together
    whatever their number (16 bytes each, and as much again four times while they are sorted).

    Args:
        folder: where the files go; they are removed as they are read.
        name: begins the names of the files; no other object may use it in that folder.
        keys: first key that can come, and the one after the last.
        memory: bytes to use.
    """

    def __init__(
        self, folder: Path, name: str, *, keys: tuple[int, int] = (0, 2**64), memory: int
    ) -> None:
        self._folder, self._name = folder, name
        self._first, self._end = keys
        self._memory = memory
        self._width = -(-(self._end - self._first) // _PARTITIONS)  # of a partition's range
        capacity = max(_PARTITIONS, memory // (_ROW * _WORK))
        self._held: Rows = np.empty((capacity, 2), np.uint64)
        self._held_rows = 0
        self._counts = [0] * _PARTITIONS

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        """Take keys and the number of each, both (N,)."""
        while len(keys):
            free = self._held[self._held_rows :][: len(keys)]
            free[:, 0], free[:, 1] = keys[: len(free)], values[: len(free)]
            keys, values = keys[len(free) :], values[len(free) :]
            self._held_rows += len(free)
            if self._held_rows == len(self._held):
                self._spread()

    def blocks(self) -> Iterator[Rows]:
        """Yield all rows in order; no key is divided between two blocks."""
        self._spread()
        self._held = self._held[:0]  # its memory is now the sorting's
        for number, count in enumerate(self._counts):
            if not count:
                continue
            path = self._path(number)
            first = self._first + number * self._width
            if count * _ROW * _WORK <= self._memory or self._width == 1:
                rows = np.fromfile(path, np.uint64).reshape(-1, 2)
                path.unlink()
                yield rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            else:
                yield from self._again(path, (first, min(first + self._width, self._end)))

    def _again(self, path: Path, keys: tuple[int, int]) -> Iterator[Rows]:
        inner = SortedOnDisk(self._folder, f"{path.name}-", keys=keys, memory=self._memory)
        together = max(1, self._memory // (_ROW * _WORK))
        with path.open("rb") as file:
            while len(rows := np.fromfile(file, np.uint64, 2 * together)):
                inner.add(rows[0::2], rows[1::2])
        path.unlink()
        yield from inner.blocks()

    def _spread(self) -> None:
        rows = self._held[: self._held_rows]
        self._held_rows = 0
        where = (rows[:, 0] - np.uint64(self._first)) // np.uint64(self._width)
        order = np.argsort(where, kind="stable")
        rows, edges = rows[order], np.searchsorted(where[order], np.arange(_PARTITIONS + 1))
        for number in range(_PARTITIONS):
            part = rows[edges[number] : edges[number + 1]]
            if len(part):
                self._counts[number] += len(part)
                with self._path(number).open("ab") as file:
                    file.write(part.tobytes())

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._name}{number:02}"
