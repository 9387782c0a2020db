"""A SHA-256 inside the file it speaks of.

PyTorch writes zip archives, and a zip archive may end in a comment. The hash of everything before
it goes there: file and hash are written, renamed and lost together, and PyTorch reads the file as
ever.
"""

from __future__ import annotations

import hashlib
import os
from typing import IO

__all__ = ["check_signature", "sign"]

_PREFIX = b"sha256:"
_COMMENT = len(_PREFIX) + 64  # bytes
_BLOCK = 1 << 20


def sign(file: IO[bytes]) -> None:
    """Append the hash to a finished archive without a comment; its descriptor must be readable."""
    file.seek(-2, os.SEEK_END)  # the length of the comment is the last field of an archive
    file.write(_COMMENT.to_bytes(2, "little"))
    file.flush()
    digest = _digest(file.fileno(), file.tell())
    file.write(_PREFIX + digest.encode())


def check_signature(file: IO[bytes]) -> None:
    """Compare; a file without a hash, from before there were any, passes.

    Raises:
        ValueError: the contents are not those that were signed.
    """
    size = file.seek(0, os.SEEK_END) - _COMMENT
    if size < 0:
        return
    comment = os.pread(file.fileno(), _COMMENT, size)
    if comment.startswith(_PREFIX) and comment != _PREFIX + _digest(file.fileno(), size).encode():
        raise ValueError("its SHA-256 is not the one it was written with: the file is damaged")


def _digest(descriptor: int, size: int) -> str:
    """Of the first `size` bytes."""
    digest, position = hashlib.sha256(), 0
    while position < size:
        block = os.pread(descriptor, min(_BLOCK, size - position), position)
        if not block:
            raise ValueError("it ends early")
        digest.update(block)
        position += len(block)
    return digest.hexdigest()
