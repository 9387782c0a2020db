"""`Ledger`: which rows are done, and the output that grows from them in the order of the input.

Rows finish in any order. Each goes into the journal as it finishes; a row whose predecessors are
all written goes on into the output. So three things are on disk:

    OUT.part      the output as far as it is complete, in order; renamed to OUT at the end
    OUT.journal   H: what the job is; M: rows, bytes and checksum of the output up to here, which
                  the disk holds for certain; R: one finished row each; E: the end

After a crash the output is cut back to the mark and grows again from the rows of the journal.
Nothing of it is guessed from the output itself. When the journal has grown, it is replaced by a
short one with a new mark.

What survives: the end of the process costs nothing that was committed (the system has it). The loss
of power costs at most what finished within `sync_seconds`, and a row is then done again.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optlm.batch.journal import Journal, write_all
from optlm.batch.settings import differences
from optlm.checkpoint.staging import sync_folder
from optlm.errors import OptlmError, RequestError

__all__ = ["Ledger", "LedgerError", "Result", "Tally"]

_COMPACT_BYTES = 2**24  # of the journal, before it is replaced by a short one
_BLOCK = 2**20


class LedgerError(OptlmError):
    """The files of a job contradict each other, so that it cannot go on."""


@dataclass(frozen=True, slots=True)
class Result:
    """A finished row: its line of output, without the line break, and what it counts for."""

    line: bytes
    failed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Tally:
    """Sums over rows."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, result: Result) -> None:
        self.rows += 1
        self.errors += result.failed
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens


class Ledger:
    """Made by `open` (a file) or `for_stream` (standard output, which no crash survives).

    Attributes:
        next_row: the first row that is not in the output.
        tally: of the rows in the output.
        kept: rows that are done, in the output or waiting for those before them.
        finished: the job ended earlier; OUT is there.
    """

    def __init__(
        self, journal: Journal, write: Callable[[bytes], object], sync_seconds: float
    ) -> None:
        self.next_row = 0
        self.tally = Tally()
        self.kept = 0
        self.finished = False
        self._journal = journal
        self._write = write
        self._header = b""
        self._bytes = 0  # of the output
        self._crc = 0  # of the output
        self._waiting: dict[int, tuple[int, int]] = {}  # row -> place and size in the journal
        self._sync_seconds = sync_seconds
        self._synced = time.monotonic()
        self._compact_at = _COMPACT_BYTES
        self._part: int | None = None
        self._out: Path | None = None
        self._torn = False  # a write failed: what the files hold is known to the next start only

    @classmethod
    def for_stream(cls, write: Callable[[bytes], object]) -> Ledger:
        """Order rows for a stream; those that wait are in a temporary file."""
        return cls(Journal.temporary(), write, float("inf"))

    @classmethod
    def open(
        cls,
        out: Path,
        header: Mapping[str, Any],
        *,
        sync_seconds: float = 1.0,
        overwrite: bool = False,
    ) -> Ledger:
        """Begin a job, or go on with the one whose files are there.

        Args:
            header: what decides the output; a job goes on only with the same.
            overwrite: forget what is there, whatever it is.

        Raises:
            RequestError: another process works on it; the files are those of another job, all
                differences named; OUT is there and no journal tells where it comes from.
            LedgerError: the output is shorter than promised, or was changed.
        """
        journal = Journal.open(_journal_path(out))
        try:
            ledger = cls(journal, lambda data: None, sync_seconds)
            ledger._start(out, header, overwrite)
        except BaseException:
            journal.close()
            raise
        return ledger

    def is_done(self, row: int) -> bool:
        return row < self.next_row or row in self._waiting

    def record(self, row: int, result: Result) -> None:
        """Note a finished row, in memory until `commit`. A row that is done stays as it was."""
        if self.is_done(row):
            return
        counts = b"%d %d %d %d " % (
            row, result.failed, result.prompt_tokens, result.completion_tokens,
        )  # fmt: skip
        place = self._journal.append(b"R", counts + result.line)
        self._waiting[row] = (place, len(counts) + len(result.line))

    def commit(self) -> None:
        """Write what was recorded; from here on it survives the end of this process.

        Raises:
            OSError: it cannot be written. What was committed before stays.
        """
        try:
            self._journal.flush()
            self.kept = self.next_row + len(self._waiting)
            self._drain()
            if time.monotonic() - self._synced >= self._sync_seconds:
                self._journal.sync()
                self._synced = time.monotonic()
            if self._journal.size >= self._compact_at:
                self._compact()
        except BaseException:
            self._torn = True
            raise

    def finish(self) -> None:
        """Give the output its name; all rows must be recorded."""
        assert not self._waiting, "rows are missing before those that wait"
        if self._part is None or self._out is None:
            return
        self.commit()
        os.fsync(self._part)
        self._journal.append(b"E", self._state())
        self._journal.sync()
        self._deliver()

    def close(self) -> None:
        """Commit, unless a write failed before; release the lock."""
        try:
            if not (self._torn or self.finished):
                self.commit()
        finally:
            self._journal.close()
            if self._part is not None:
                os.close(self._part)
                self._part = None

    # ---- beginning -----------------------------------------------------------------------------

    def _start(self, out: Path, header: Mapping[str, Any], overwrite: bool) -> None:
        self._out = out
        text = json.dumps(header, sort_keys=True)
        lines = self._journal.lines()
        first = next(lines, None)
        if overwrite or first is None or first[1] != b"H":
            if not overwrite and (os.path.lexists(out) or self._size_of_part()):
                self._forget_empty_journal()
                raise RequestError(
                    f"{out if os.path.lexists(out) else _part_path(out)} is there, and no journal "
                    "says that this job made it; choose another output, or give --overwrite"
                )
            self._header = text.encode()
            self._journal.rewrite([(b"H", self._header), (b"M", self._state())])
            self._open_part(fresh=True)
            return
        self._header = first[2]
        self._check_header(json.loads(first[2]), json.loads(text))
        ended = self._replay(lines)
        if ended and not _part_path(out).exists():
            self._check_delivered(out)
            self.finished = True
            return
        self._open_part(fresh=False)
        self._drain()

    def _check_header(self, was: dict[str, Any], now: dict[str, Any]) -> None:
        found = differences(was, now)
        if found:
            raise RequestError(
                f"{self._journal.path} belongs to another job: {'; '.join(found)}. Give what was "
                "given then, choose another output, or begin anew with --overwrite"
            )

    def _replay(self, lines: Iterator[tuple[int, bytes, bytes]]) -> bool:
        """Take over what the journal says; return whether the job had ended."""
        for place, letter, payload in lines:
            if letter == b"R":
                row = int(payload.split(b" ", 1)[0])
                self._waiting[row] = (place, len(payload))
            else:
                self._take_state(json.loads(payload))
                if letter == b"E":
                    self._waiting.clear()
                    return True
        self.kept = self.next_row + len(self._waiting)
        return False

    def _take_state(self, state: dict[str, Any]) -> None:
        self._bytes, self._crc = state["bytes"], state["crc32"]
        self.tally = Tally(**state["tally"])
        self.next_row = self.kept = self.tally.rows

    def _state(self) -> bytes:
        state = {"bytes": self._bytes, "crc32": self._crc, "tally": asdict(self.tally)}
        return json.dumps(state).encode()

    def _open_part(self, *, fresh: bool) -> None:
        assert self._out is not None
        path = _part_path(self._out)
        self._part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not fresh:
            self._check_part(self._part, path)
        os.ftruncate(self._part, self._bytes)
        os.lseek(self._part, 0, os.SEEK_END)
        descriptor = self._part
        self._write = lambda data: write_all(descriptor, data)
        sync_folder(path.absolute().parent)

    def _check_part(self, descriptor: int, path: Path) -> None:
        crc = place = 0
        while place < self._bytes:
            block = os.pread(descriptor, min(_BLOCK, self._bytes - place), place)
            if not block:
                raise LedgerError(
                    f"{path} has {place:,} bytes; {self._bytes:,} were written. Bring it back, or "
                    "begin anew with --overwrite"
                )
            crc = zlib.crc32(block, crc)
            place += len(block)
        if crc != self._crc:
            raise LedgerError(
                f"{path} was changed: its checksum is {crc:08x}, that of what was written "
                f"{self._crc:08x}. Bring it back, or begin anew with --overwrite"
            )

    def _check_delivered(self, out: Path) -> None:
        if not os.path.lexists(out):
            raise LedgerError(f"{out} was finished and is gone; to make it again give --overwrite")

    def _size_of_part(self) -> int:
        assert self._out is not None
        path = _part_path(self._out)
        return path.stat().st_size if path.exists() else 0

    def _forget_empty_journal(self) -> None:
        if not self._journal.size and self._journal.path is not None:
            self._journal.path.unlink(missing_ok=True)

    # ---- going on ------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Move the rows whose turn it is from the journal to the output."""
        lines = []
        while (found := self._waiting.get(self.next_row)) is not None:
            row = self._journal.read(*found)
            _, failed, prompt, completion, line = row.split(b" ", 4)
            del self._waiting[self.next_row]
            self.next_row += 1
            self.tally.add(Result(line, failed == b"1", int(prompt), int(completion)))
            lines.append(line + b"\n")
            self._bytes += len(line) + 1
            if len(lines) == 256:
                self._put(lines)
        self._put(lines)

    def _put(self, lines: list[bytes]) -> None:
        if lines:
            data = b"".join(lines)
            self._crc = zlib.crc32(data, self._crc)
            self._write(data)
            lines.clear()

    def _compact(self) -> None:
        """Promise the output as it is, and keep of the journal only the rows that wait."""
        if self._part is not None:
            os.fsync(self._part)
        rows = sorted(self._waiting)
        sizes = [self._waiting[row][1] for row in rows]
        places = self._journal.rewrite(self._short(rows))[2:]  # after header and mark
        self._waiting = dict(zip(rows, zip(places, sizes, strict=True), strict=True))
        self._compact_at = max(_COMPACT_BYTES, 2 * self._journal.size)

    def _short(self, rows: list[int]) -> Iterator[tuple[bytes, bytes]]:
        yield b"H", self._header
        yield b"M", self._state()
        for row in rows:
            yield b"R", self._journal.read(*self._waiting[row])

    # ---- the end -------------------------------------------------------------------------------

    def _deliver(self) -> None:
        assert self._out is not None
        os.replace(_part_path(self._out), self._out)
        sync_folder(self._out.absolute().parent)
        self._journal.rewrite([(b"H", self._header), (b"E", self._state())])
        self.finished = True


def _part_path(out: Path) -> Path:
    return out.with_name(out.name + ".part")


def _journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")
