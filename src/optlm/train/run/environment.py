"""The fingerprint of the world of a run: what could change its bits besides its settings."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

import optlm

__all__ = ["changed", "environment"]

_LIBRARIES = ("torch", "numpy", "tokenizers")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, processor and threads, and the GPU if `device` is one, as text by name."""
    found = {
        "optlm": optlm.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "byte order": sys.byteorder,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, each as "name: before -> now"."""
    names = sorted(before.keys() | now.keys())
    return [
        f"{name}: {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
