"""Opening files of a checkpoint folder, and finding which of them hold the weights."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path

import numpy as np

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.tensor import Array


def map_file(path: Path) -> Array:
    """The bytes of a regular file as a read-only mapped array.

    Raises:
        CheckpointError: the path is missing, a loop of links, a folder, FIFO, socket or device.
    """
    descriptor = _open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return np.empty(0, np.uint8)
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise fault_error("unreadable", path, f"cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    return np.frombuffer(mapped, np.uint8)


def forget_pages(array: Array) -> None:
    """Let the file under a mapped array leave this process's memory; a later read maps it again.

    Arrays that are not mapped are left alone.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def present(path: Path) -> bool:
    """True if the name is there at all, be it a link that leads nowhere."""
    return os.path.lexists(path)


def list_folder(folder: Path) -> list[str]:
    """Names of a folder's entries, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise fault_error("unreadable", folder, f"cannot be listed: {error}") from error


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    descriptor = _open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        # Not limit + 1 at once: memory is taken for what is asked, and files may grow meanwhile.
        data = file.read(min(limit, os.fstat(descriptor).st_size) + 1)
    if len(data) > limit:
        raise fault_error(
            "file-size", path, f"is larger than {limit} bytes, the limit for its kind"
        )
    return data


def _open_regular(path: Path) -> int:
    # O_NONBLOCK: opening a FIFO that nobody writes to must not wait for ever.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise fault_error(*_open_fault(path, error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise fault_error("not-a-file", path, "is a folder, FIFO or device, not a regular file")
    return descriptor


def _open_fault(path: Path, error: OSError | ValueError) -> tuple[str, Path, str]:
    number = getattr(error, "errno", None)
    if number in (errno.ENOENT, errno.ENOTDIR):
        return ("missing-file", path, "does not exist")
    if number == errno.ELOOP:
        return ("symlink-loop", path, "is a loop of symbolic links")
    return ("unreadable", path, f"cannot be opened: {error}")
