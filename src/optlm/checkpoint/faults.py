"""Turning lists of faults into the errors that users see."""

from __future__ import annotations

from collections.abc import Sequence

from optlm.errors import CheckpointError, Fault, UnsafeFileError

SHOWN = 10


def error_of(faults: Sequence[Fault]) -> CheckpointError:
    """One error that carries all `faults` and shows the first ten."""
    assert faults
    lines = [str(fault) for fault in faults[:SHOWN]]
    if len(faults) > 1:
        lines = [f"{len(faults)} faults:", *(f"  - {line}" for line in lines)]
    if len(faults) > SHOWN:
        lines.append(f"  ... and {len(faults) - SHOWN} more (`optlm doctor` lists them all)")
    kind = UnsafeFileError if any(f.code == "unsafe-pickle" for f in faults) else CheckpointError
    return kind("\n".join(lines), faults=faults)


def fault_error(code: str, where: object, message: str) -> CheckpointError:
    """An error of a single fault."""
    return error_of([Fault(code=code, where=str(where), message=message)])


def faults_of(error: Exception, where: object) -> list[Fault]:
    """The faults an error carries, or the error itself as a fault of `where`."""
    found = getattr(error, "faults", ())
    return list(found) or [Fault(code="unreadable", where=str(where), message=str(error))]
