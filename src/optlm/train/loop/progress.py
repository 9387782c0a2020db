"""What a run shows on a terminal, and how it is asked to stop."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from optlm.train.loop.device import PRECISIONS

__all__ = ["measured_peak", "progress", "stop_signal"]


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(
    steps: int,
    done: int,
    *,
    flops_per_token: float | None,
    peak_flops: float | None,
    shown: bool = True,
) -> Iterator[Callable[[int, float, float], None]]:
    """Yield a function (step, loss, tokens a second) that moves a bar on a terminal's stderr.

    MFU, the share of the machine's `peak_flops` that the model's arithmetic uses, is shown when
    both figures are given.
    """
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (shown and sys.stderr.isatty())) as bar:
        task = bar.add_task("training", total=steps, completed=done, loss=math.nan, speed="")

        def report(step: int, loss: float, speed: float) -> None:
            text = f"{speed:,.0f} tokens/s"
            if flops_per_token and peak_flops:
                text += f"  MFU {speed * flops_per_token / peak_flops:.1%}"
            bar.update(task, completed=step, loss=loss, speed=text)

        yield report


def measured_peak(precision: str, device: torch.device, *, seconds: float = 0.3) -> float:
    """Floating-point operations a second of large matrix products on `device`."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, dtype=PRECISIONS[precision] or torch.float32, device=device)
    best, deadline = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < deadline:
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
