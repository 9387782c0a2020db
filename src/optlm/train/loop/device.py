"""Where training computes, how values get there, and in which numbers.

Only this file chooses a device or a precision. A technique names neither: `Alone` (or `Sharded`)
holds the device, places the model on it, brings every batch there, and evaluates there.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from optlm.errors import ConfigError, did_you_mean

__all__ = ["DEVICES", "PRECISIONS", "autocast", "to_device", "training_device"]

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS: dict[str, torch.dtype | None] = {
    "f32": None,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


def training_device(name: str = "auto", *, local_rank: int = 0) -> torch.device:
    """The device that one of `DEVICES` stands for; "auto" is a GPU where PyTorch has one.

    Args:
        local_rank: which of this machine's processes asks; each has the GPU of its own number.

    Raises:
        ConfigError: an unknown name, "cuda" where PyTorch has no GPU, or fewer GPUs than processes.
    """
    if name not in DEVICES:
        raise ConfigError(
            f"device is {name!r}; it must be one of {', '.join(DEVICES)}"
            f"{did_you_mean(str(name), DEVICES)}"
        )
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError(
            f"device is 'cuda', but PyTorch {torch.__version__} finds no GPU here; take 'cpu' or "
            "'auto', or install a PyTorch made for this machine's CUDA"
        )
    if name == "cpu" or not there:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: PyTorch finds {count}; start at "
            f"most {count} processes on it, or take device 'cpu'"
        )
    return torch.device("cuda", local_rank)


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple or dataclass with some in it, on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        placed = [to_device(each, device) for each in value]
        return type(value)(*placed) if hasattr(value, "_fields") else tuple(placed)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        placed_fields = {name: to_device(getattr(value, name), device) for name in names}
        return dataclasses.replace(value, **placed_fields)
    return value


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products on `device` in `precision`; everything else stays float32.

    Raises:
        ConfigError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
