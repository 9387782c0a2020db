"""`Journal`: lines with checksums, appended to one file that one process at a time may hold.

A line is a CRC-32 in hexadecimal, a letter that says what it is, and its payload, with spaces
between. A process killed while it writes leaves at most one torn line at the end; a machine that
loses power may leave more. The first line that is not whole ends the journal: what comes after it
was not promised to anyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from optlm.checkpoint.staging import sync_folder
from optlm.errors import RequestError

__all__ = ["Journal", "write_all"]

_BLOCK = 2**20
_PREFIX = len(b"01234567 R ")


class Journal:
    """Use `open` for a file that stays, `temporary` for one that vanishes with the process.

    Attributes:
        size: bytes in the file, those of lines that were not flushed included.
    """

    def __init__(self, descriptor: int, path: Path | None) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._file = descriptor
        self._unwritten: list[bytes] = []

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create the file and lock it.

        Raises:
            RequestError: another process holds it.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                        return cls(descriptor, path)
            except BlockingIOError:
                os.close(descriptor)
                raise RequestError(
                    f"another process is writing this output (it holds {path}); let it finish, or "
                    "choose another output"
                ) from None
            os.close(descriptor)  # `rewrite` replaced the file in between

    @classmethod
    def temporary(cls) -> Journal:
        return cls(_nameless(), None)

    def lines(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield place of the payload, letter and payload of each line; cut off what is torn."""
        place, rest = 0, b""
        while block := os.pread(self._file, _BLOCK, place + len(rest)):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                body = line[9:]
                if line[:9] != _checksum(body):
                    return self._cut(place)
                yield place + _PREFIX, line[9:10], line[_PREFIX:]
                place += len(line) + 1
        return self._cut(place)

    def append(self, letter: bytes, payload: bytes) -> int:
        """Add a line, in memory until `flush`; return the place of its payload in the file."""
        body = letter + b" " + payload
        line = _checksum(body) + body + b"\n"
        place = self.size + _PREFIX
        self._unwritten.append(line)
        self.size += len(line)
        return place

    def flush(self) -> None:
        """Hand the lines to the system: from here on they survive the end of this process."""
        if self._unwritten:
            lines, self._unwritten = b"".join(self._unwritten), []
            os.lseek(self._file, 0, os.SEEK_END)
            write_all(self._file, lines)

    def sync(self) -> None:
        """Hand the lines to the disk: from here on they survive the loss of power."""
        self.flush()
        if self.path is not None:
            os.fdatasync(self._file)

    def read(self, place: int, size: int) -> bytes:
        """Read part of a line that was flushed."""
        return os.pread(self._file, size, place)

    def rewrite(self, lines: Iterable[tuple[bytes, bytes]]) -> list[int]:
        """Replace the content at once: old or new after a crash. Return the payloads' places."""
        self.flush()
        fresh = _nameless() if self.path is None else _beside(self.path)
        new = Journal(fresh, self.path)
        try:
            places = [new.append(letter, payload) for letter, payload in _flushing(new, lines)]
            new.sync()
            if self.path is not None:
                os.replace(_temporary_name(self.path), self.path)
                sync_folder(self.path.parent)
        except BaseException:
            os.close(fresh)
            if self.path is not None:
                _temporary_name(self.path).unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file, self.size = fresh, new.size
        return places

    def close(self) -> None:
        """Release the lock; lines that were not flushed are dropped."""
        os.close(self._file)

    def _cut(self, size: int) -> None:
        if size < self.size:
            os.ftruncate(self._file, size)
            self.size = size


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _checksum(body: bytes) -> bytes:
    return b"%08x " % zlib.crc32(body)


def _flushing(
    journal: Journal, lines: Iterable[tuple[bytes, bytes]]
) -> Iterator[tuple[bytes, bytes]]:
    """Keep no more in memory than about a block while `lines` are appended."""
    held = 0
    for letter, payload in lines:
        yield letter, payload
        held += len(payload)
        if held > _BLOCK:
            journal.flush()
            held = 0


def _temporary_name(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _beside(path: Path) -> int:
    """An empty file that will take the place of `path`, already locked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(_temporary_name(path), flags, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _nameless() -> int:
    with tempfile.TemporaryFile(buffering=0) as file:
        return os.dup(file.fileno())
