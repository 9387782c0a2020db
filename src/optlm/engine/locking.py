"""Methods of one object that threads call one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import RLock
from typing import Any, TypeVar

__all__ = ["new_lock", "one_at_a_time"]

C = TypeVar("C", bound=type)


def new_lock() -> Any:
    """Return a lock that the thread which has it may take again; its class has no public name."""
    return RLock()


def one_at_a_time(*names: str) -> Callable[[C], C]:
    """Make the methods `names` of a class hold the object's `lock` while they run."""

    def decorate(owner: C) -> C:
        for name in names:
            setattr(owner, name, _locked(getattr(owner, name)))
        return owner

    return decorate


def _locked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, /, *arguments: Any, **named: Any) -> Any:
        with self.lock:
            return method(self, *arguments, **named)

    return run
