"""Folders that change as a whole: their files are written beside them and moved when complete."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from optlm.checkpoint.faults import fault_error

_MARK = ".part-"  # in the names of folders that are being written


def check_target(folder: Path) -> None:
    """Refuse a target that cannot become a folder of files, before any work is done.

    Raises:
        CheckpointError: the path is a file, a link that leads nowhere, or lies in a folder that
            cannot be written.
    """
    if os.path.isdir(folder):
        writable, place = os.access(folder, os.W_OK | os.X_OK), folder
    elif os.path.lexists(folder):
        raise fault_error("not-a-folder", folder, "is there already and is not a folder")
    else:
        place = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
        if not place.is_dir():
            raise fault_error("not-a-folder", place, f"is not a folder, so {folder} cannot be made")
        writable = os.access(place, os.W_OK | os.X_OK)
    if not writable:
        raise fault_error("read-only", place, "cannot be written; choose another place")


@contextlib.contextmanager
def staged_folder(folder: Path, *, replaces: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder whose files are moved to `folder` when the block ends well.

    A new `folder` appears whole, by one rename. Into a folder that is there the files are moved one
    by one; its ``config.json`` is removed before and comes last, so what a crash between two moves
    leaves does not load, and is never taken for a mixture of old and new. Of the names in
    `replaces`, those that are not written are removed; other files stay. A stage that a killed
    process left behind is removed by the next one for the same folder.
    """
    check_target(folder)
    folder = folder.absolute()
    exists = folder.is_dir()
    parent = folder if exists else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name[:100]}{_MARK}"
    _remove_leftovers(parent, prefix)
    stage = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    lock = os.open(stage, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield stage
        os.fsync(lock)
        if exists:
            _move_files(stage, folder, replaces)
        else:
            os.chmod(stage, 0o777 & ~current_umask())
            os.rename(stage, folder)
        sync_folder(parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write that failed: disk full
            raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
        raise
    finally:
        os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def _move_files(stage: Path, folder: Path, replaces: Collection[str]) -> None:
    last = "config.json"
    new = sorted(os.listdir(stage), key=lambda name: name == last)
    gone = [last, *(name for name in replaces if name not in new)]
    with _signals_wait():
        # Second names keep the old files' blocks: freeing them between two moves would take long.
        for name in {*new, *gone}:
            with contextlib.suppress(OSError):
                os.link(folder / name, stage / f"old {name}", follow_symlinks=False)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        for name in new:
            os.replace(stage / name, folder / name)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C and a polite request to end come before or after the block, never inside."""
    kinds = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove stages that no living process holds."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
