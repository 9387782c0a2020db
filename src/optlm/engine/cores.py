"""How many threads are worth starting here."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["available_threads"]

_CGROUPS = Path("/sys/fs/cgroup")


def available_threads(cgroups: Path = _CGROUPS) -> int:
    """Cores this process may use: its affinity, within the CPU time its container may take.

    More threads than that wait for each other at every barrier. A container's limit is a quota of
    time (``cpu.max``; ``cpu.cfs_quota_us`` in the older form) and shows in nothing else.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, math.ceil(_quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """CPU time a second of wall time; infinite without a limit."""
    try:
        if (cgroups / "cpu.max").exists():
            quota, period = (cgroups / "cpu.max").read_text().split()
        else:
            old = cgroups / "cpu"
            quota = (old / "cpu.cfs_quota_us").read_text()
            period = (old / "cpu.cfs_period_us").read_text()
        share = float(quota) / float(period)  # "max" is no number, -1 no limit
    except (OSError, ValueError, ZeroDivisionError):
        return 1e9
    return share if 0 < share < 1e9 else 1e9
