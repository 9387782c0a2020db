"""A device that computes nothing, to find what is forgotten on another one.

PyTorch's fake tensors know on which device every value lies and refuse to mix two. The device is
``meta``, because a build without CUDA has no other; what must be known to go on (a number read
back, how many entries a mask picks) is made up: every number is 1, every mask picks everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

ELSEWHERE = torch.device("meta")


class _Fake(FakeTensorMode):
    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 1
        if func is aten.nonzero.default:
            found = args[0]
            return found.new_empty((found.numel(), found.ndim), dtype=torch.int64)
        return super().dispatch(func, types, args, kwargs)


@contextmanager
def elsewhere(patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The block makes fake tensors; `ELSEWHERE` is a device on which nothing is done by default."""
    patch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)  # meta has none
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    make = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None) -> torch.Tensor:
        place = device or torch.empty(()).device  # the default one
        return make(data, dtype=dtype, device="cpu").to(place)  # made there, meta ones are not fake

    patch.setattr(torch, "tensor", tensor)
    with _Fake():
        yield ELSEWHERE


def moved(model: Any) -> Any:
    """`model` with its parameters elsewhere; `Module.to` cannot move fake ones."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            placed = nn.Parameter(p.detach().to(ELSEWHERE), requires_grad=p.requires_grad)
            setattr(module, name, placed)
    return model
