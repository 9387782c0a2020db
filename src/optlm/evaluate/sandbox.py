"""Runs programs that a model wrote: in a process of their own, bounded, without a network.

The process has a time, memory, file and process limit, an empty folder and environment, and a
network namespace of its own in which nothing is reachable. Where the system gives no such namespace
nothing is run. It is no jail: files that the user may read, the program may read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile

from optlm.errors import BackendError

__all__ = ["first_block", "passes"]

_SECONDS = 5.0
_MEMORY = 1 << 30  # bytes of address space
_FILE = 1 << 20  # bytes of a file written
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # flags of unshare(2)
_PASSED = 77  # the exit code of a program that came to its end; one may call exit(0) before


def first_block(completion: str) -> str:
    """A completion of a function up to the first line that is not indented."""
    kept: list[str] = []
    lines = completion.split("\n")
    for number, line in enumerate(lines):
        if number and line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return "\n".join(kept)


def passes(program: str, test: str, entry_point: str, *, seconds: float = _SECONDS) -> bool:
    """Whether a program passes its test, which defines `check(candidate)`.

    Raises:
        BackendError: the system gives no namespace without a network, so nothing was run.
    """
    ending = f"import os\nos._exit({_PASSED})"
    source = f"{program}\n\n{test}\n\ncheck({entry_point})\n{ending}\n"
    with tempfile.TemporaryDirectory() as folder:
        process = _start(source, folder)
        try:
            return process.wait(timeout=seconds) == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(source: str, folder: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", source],
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_confine,
        )
    except subprocess.SubprocessError:
        raise BackendError(
            "this system lets no process give up its network, so generated programs are not run; "
            "run this where namespaces are allowed (Linux, not confined further)"
        ) from None


def _confine() -> None:
    """In the child, before the program: give up the network and take limits."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_NET) and libc.unshare(_NEW_NET):
        raise OSError(ctypes.get_errno(), "unshare")
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    if os.getuid():
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
