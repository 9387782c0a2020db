"""Signs of life: why a group of processes stands still, and the end of waiting for the dead.

Every process counts up a number of its own in the store they share, once a second, from a thread.
A process whose number stands still was killed or stopped. One whose number moves but who is steps
behind the others is at work on something else, or caught in it: its last word says on what.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store

__all__ = ["Watch"]

_BEAT = 1.0  # seconds


class Watch:
    """This process's signs of life, and its view of the others'.

    Args:
        keeper: who keeps the store, for messages.
        patience: seconds without a sign of life after which a process is given up and this ends.
        end: what is then done with the message; by default it is printed, with the stack, and the
            process exits with code 1. The main thread may wait in a collective for ever.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        *,
        keeper: str,
        patience: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        # A connection of its own: the main thread may wait on the other.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=5))
        self._rank, self._world, self._patience = rank, world, patience
        self._keeper = keeper
        self._end = end or _exit
        self._doing = "starting"
        self._silent: list[int] = []  # found dead when the connection was lost
        self._ending = False  # this process ends already, and gives up nobody
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._beats = 0
        self._beat()
        self._thread.start()

    def doing(self, what: str) -> None:
        """What the others are told if this process does not arrive."""
        self._doing = what

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    # ---- errors ------------------------------------------------------------------------------

    def publish(self, error: str) -> None:
        """Leave the error that ends this process for the others to find."""
        with self._lock, contextlib.suppress(RuntimeError):
            self._store.set(f"error/{self._rank}", error)

    def diagnose(self) -> str:
        """Why a collective failed: another's error, who is dead, or who is behind; takes 3 s."""
        self._ending = True
        deadline = time.monotonic() + 3 * _BEAT
        try:
            before = self._others()
            while time.monotonic() < deadline:
                for rank in before:
                    if error := self._get(f"error/{rank}"):
                        return f"rank {rank} failed: {error}"
                time.sleep(0.1)
            after = self._others()
        except RuntimeError:
            return f"the store of the processes cannot be reached: {self._keeper} is gone"
        self._silent = [rank for rank in after if after[rank][0] == before[rank][0]]
        if self._silent:
            return "; ".join(f"{_dead(rank)} (last: {after[rank][1]})" for rank in self._silent)
        told = "; ".join(f"rank {rank}: {doing}" for rank, (_, doing) in after.items())
        return f"all processes are alive, but did not come together ({told})"

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        # Silence is counted in looks, not read off a clock: a machine that slept accuses nobody.
        seen = {rank: (0, 0) for rank in range(self._world) if rank != self._rank}
        while not self._stop.wait(_BEAT):
            try:
                self._beat()
                others = self._others()
                for rank, (beats, doing) in others.items():
                    missed = seen[rank][1] + 1 if beats == seen[rank][0] else 0
                    seen[rank] = (beats, missed)
                    silent = missed * _BEAT > self._patience and not self._get(f"left/{rank}")
                    if silent and not self._ending:
                        self._end(
                            f"{_dead(rank)} (silent for {missed * _BEAT:.0f} s; last: {doing})"
                        )
                        return
            except RuntimeError:
                continue  # the store is gone; the collectives fail too, and say so

    def _beat(self) -> None:
        self._beats += 1
        with self._lock:
            self._store.set(f"beat/{self._rank}", f"{self._beats} {self._doing}")

    def _others(self) -> dict[int, tuple[int, str]]:
        found = {}
        for rank in range(self._world):
            if rank != self._rank:
                beats, _, doing = (self._get(f"beat/{rank}") or "0 starting").partition(" ")
                found[rank] = (int(beats), doing)
        return found

    def _get(self, key: str) -> str | None:
        with self._lock:
            return self._store.get(key).decode() if self._store.check([key]) else None

    def leave(self, *, keeper: bool) -> None:
        """Tell the others that this process ends; the keeper of the store waits for theirs, 5 s."""
        self._ending = True
        deadline = time.monotonic() + 5
        try:
            with self._lock:
                self._store.set(f"left/{self._rank}", "1")
            while keeper and time.monotonic() < deadline:
                awaited = set(range(self._world)) - set(self._silent)
                if all(self._get(f"left/{rank}") for rank in awaited):
                    return
                time.sleep(0.05)
        except RuntimeError:
            return  # the keeper is gone already


def _dead(rank: int) -> str:
    return f"rank {rank} was killed or is stopped"


def _exit(message: str) -> None:
    print(f"optlm: error: {message}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
