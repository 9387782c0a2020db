"""`locked`: methods of one object that threads call one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

__all__ = ["Locked", "locked"]

P = ParamSpec("P")
R = TypeVar("R")


class Locked(Protocol):
    lock: Any  # a threading.RLock, whose class has no public name


L = TypeVar("L", bound=Locked)


def locked(method: Callable[Concatenate[L, P], R]) -> Callable[Concatenate[L, P], R]:
    """Run the method while holding the object's lock; the thread that has it passes."""

    @functools.wraps(method)
    def run(self: L, /, *arguments: P.args, **named: P.kwargs) -> R:
        with self.lock:
            return method(self, *arguments, **named)

    return run
