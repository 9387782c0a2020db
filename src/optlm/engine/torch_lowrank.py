"""Low-rank adapters beside the weights of a PyTorch model, one of them in force at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

__all__ = ["LowRankLayers"]

Changes = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


class LowRankLayers:
    """Adds B (A x) to what the model's matrices make of x while an adapter is in force.

    Args:
        model: its modules have the names that adapters use.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapters: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        self._active: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooked: set[str] = set()

    def add(self, changes: Changes) -> int:
        """Take in A (r, inputs) and B (outputs, r) of each module; return the lowest free id."""
        adapter_id = next(i for i in range(len(self._adapters) + 1) if i not in self._adapters)
        tensors = {}
        for name, (a, b) in changes.items():
            module = self._model.get_submodule(name)
            weight = module.weight
            assert isinstance(weight, Tensor)
            tensors[name] = (
                from_numpy(a).to(weight.device, weight.dtype),
                from_numpy(b).to(weight.device, weight.dtype),
            )
            if name not in self._hooked:
                module.register_forward_hook(partial(self._hook, name))
                self._hooked.add(name)
        self._adapters[adapter_id] = tensors
        return adapter_id

    def remove(self, adapter_id: int) -> None:
        del self._adapters[adapter_id]

    @contextmanager
    def using(self, adapter_id: int) -> Iterator[None]:
        """Put an adapter in force; -1 for none."""
        self._active = self._adapters[adapter_id] if adapter_id >= 0 else {}
        try:
            yield
        finally:
            self._active = {}

    def _hook(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Any:
        change = self._active.get(name)
        if change is None:
            return None
        a, b = change
        return out + (inputs[0] @ a.T) @ b.T
