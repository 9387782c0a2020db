"""`Journal`: a JSON Lines file of results that a later run goes on with.

Its first line tells all that the results depend on. A run with other settings is refused, and a
last line that was cut off when a run ended is written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from optlm.errors import RequestError

__all__ = ["Journal"]


class Journal:
    """Use as ``with Journal(path, header) as journal``.

    Attributes:
        num_done: records that an earlier run wrote.

    Raises:
        RequestError: the file is something else, or of a run with other settings.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.num_done = 0
        self._header = json.dumps(header, ensure_ascii=False)
        end = self._check(header)
        self._file: IO[bytes] = path.open("r+b" if end else "wb")
        if end:
            self._file.truncate(end)
            self._file.seek(end)
        else:
            self._write(self._header)
            self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def records(self) -> Iterator[dict[str, Any]]:
        """Those that an earlier run wrote."""
        with self.path.open("rb") as file:
            next(file)
            for _ in range(self.num_done):
                yield json.loads(next(file))

    def add(self, records: list[dict[str, Any]]) -> None:
        """Append records, and see that they reach the disk."""
        for record in records:
            self._write(json.dumps(record, ensure_ascii=False))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")

    def _check(self, header: dict[str, Any]) -> int:
        """Count the records that are there; return where the last whole line ends."""
        if not self.path.exists() or not self.path.stat().st_size:
            return 0
        end = 0
        with self.path.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n") and self._header.encode().startswith(first):
                return 0  # a run ended within its first line
            self._compare(first, header)
            end = len(first)
            for line in file:
                if not _is_whole(line):
                    break
                self.num_done += 1
                end += len(line)
        return end

    def _compare(self, first: bytes, header: dict[str, Any]) -> None:
        advice = "name another file, or remove this one"
        try:
            found = json.loads(first)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "optlm_score" not in found:
            raise RequestError(f"{self.path} is no result of optlm score; {advice}")
        for name in {**found, **header}:
            if found.get(name) != header.get(name):
                raise RequestError(
                    f"{self.path} holds results of another run: {name} was "
                    f"{_short(found.get(name))} and is {_short(header.get(name))}; {advice}"
                )


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
