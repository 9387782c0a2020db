"""Lines of plain, gzip and zstd files, in bounded memory whatever the file holds."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from optlm.data.report import CorpusError

__all__ = ["LINE_LIMIT", "Progress", "open_blocks", "read_lines"]

LINE_LIMIT = 2**26  # bytes; a longer line is not held in memory
Progress = Callable[[int], None]  # told how many bytes of the file (as stored) were read

_BLOCK = 2**20  # bytes of text handled at once
# A zstd block of 128 KiB may be stored in 4 bytes, so this many bytes hold at most 16 MiB.
_ZSTD_PIECE = 2**9
_ZSTD_WINDOW = 2**31  # files may be written with long-distance matching


def read_lines(
    path: Path, compression: str, *, limit: int = LINE_LIMIT, progress: Progress | None = None
) -> Iterator[bytes | int]:
    """Yield the lines of a file without their ``\\n``; of one longer than `limit` only its length.

    Args:
        compression: "" (plain), "gz" or "zst".

    Raises:
        CorpusError: the file is missing, or its compressed data are damaged or cut off.
    """
    parts: list[bytes] = []  # the line begun in earlier blocks
    size = 0
    for block in open_blocks(path, compression, progress=progress):
        *lines, rest = block.split(b"\n")
        for line in lines:
            size += len(line)
            yield size if size > limit else b"".join([*parts, line]) if parts else line
            parts, size = [], 0
        size += len(rest)
        if size > limit:
            parts = []
        elif rest:
            parts.append(rest)
    if size:
        yield size if size > limit else b"".join(parts)


def open_blocks(
    path: Path, compression: str, *, progress: Progress | None = None
) -> Iterator[bytes]:
    """Yield the decompressed content in blocks of at most 1 MiB. Raises as `read_lines`."""
    decompressed = {"": _plain, "gz": _gzip, "zst": _zstd}[compression]
    try:
        with path.open("rb") as file:
            seen = 0
            for block in decompressed(file):
                if progress and file.tell() != seen:
                    progress(file.tell() - seen)
                    seen = file.tell()
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read {path}: {error}") from error


def _plain(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _gzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file) as text:
        while block := text.read(_BLOCK):
            yield block


def _zstd(file: IO[bytes]) -> Iterator[bytes]:
    """One or more frames; a file that ends inside a frame is an error."""
    import zstandard

    library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, begun = library.decompressobj(), False
    try:
        while data := file.read(_ZSTD_PIECE):
            while data:
                begun = True
                text = frame.decompress(data)
                for start in range(0, len(text), _BLOCK):
                    yield text[start : start + _BLOCK]
                data = frame.unused_data
                if frame.eof:
                    frame, begun = library.decompressobj(), False
    except zstandard.ZstdError as error:
        raise OSError(f"damaged zstd data: {error}") from error
    if begun:
        raise EOFError("it ends in the middle of its compressed data")
