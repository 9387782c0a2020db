"""What the training loop asks of the processes it runs in, answered for a single one.

`Alone` is the interface; `optlm.train.parallel.sharded.Sharded` answers the same for many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from optlm.train.loop.device import to_device
from optlm.train.loop.optim import Optimizer, clip
from optlm.train.run.folder import RunFolder

__all__ = ["Alone"]

B = TypeVar("B")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

_MIX = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: neighbouring numbers become far seeds


class Alone:
    """One process that does everything itself, on one device."""

    rank = 0  # of this process
    world = 1  # processes in all
    groups = 1  # of processes that read different rows

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    # ---- the run folder -----------------------------------------------------------------------

    def holding(
        self, folder: RunFolder, claim: dict[str, Any], **options: Any
    ) -> AbstractContextManager[RunFolder]:
        """Lock the folder as `RunFolder.locked` does; give the one this process writes to."""

        @contextmanager
        def held() -> Iterator[RunFolder]:
            with folder.locked(claim, **options):
                yield folder

        return held()

    def first(self, work: Callable[[], T]) -> T:
        """Let one process do `work` before the others do the same and find it done."""
        return work()

    def save(
        self,
        folder: RunFolder,
        step: int,
        state: dict[str, Any],
        optimizer: Optimizer,
        **policy: Any,
    ) -> None:
        """Write a checkpoint of `state`, whose tensors are this process's own.

        `policy` is what `RunFolder.save` takes besides.
        """
        folder.save(step, state, **policy)

    def load_latest(
        self, folder: RunFolder, optimizer: Optimizer, *, log: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """What `save` was given, cut for this process, from the newest checkpoint that is whole."""
        return folder.load_latest(log=log)

    # ---- the model ----------------------------------------------------------------------------

    def place(self, model: M, average: M, method: str) -> tuple[nn.Module, nn.Module]:
        """Spread a model and its average (the same object without averaging) over the devices.

        Args:
            method: the optimizer's, which must be able to work on what a process owns.

        Returns:
            Modules whose parameters, under the names of the model's, are what this process owns.
        """
        return model.to(self.device), average.to(self.device)

    def call(self, function: Callable[..., T], model: M, *arguments: Any) -> T:
        """``function(model, *arguments)`` with all weights and arguments where it computes."""
        return function(model, *to_device(arguments, self.device))

    def judge(self, evaluate: Callable[[M], dict[str, Any]], model: M) -> dict[str, Any]:
        """Figures of an evaluation, the same on every process."""
        with self.device:  # where tensors are made that name no device
            return evaluate(model)

    # ---- a step -------------------------------------------------------------------------------

    def share(self, batches: list[B]) -> Iterator[B]:
        """This process's part of a step's micro-batches.

        Each is given with a random state of its own, a function of the state before the step and of
        the micro-batch's number, so that dropout is the same wherever the micro-batch is run. After
        the last one, the state is one draw further than before, on every process.
        """
        yield from seeded(enumerate(batches))

    def sum(self, values: list[float]) -> list[float]:
        """Element by element, over all processes that read different rows."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is set anywhere."""
        return flag

    def clip(
        self, own: nn.Module, highest: float, *, divide_by: float
    ) -> tuple[float, dict[str, float]]:
        """`optlm.train.loop.optim.clip` for the gradients of the whole model."""
        return clip(own, highest, divide_by=divide_by)


def seeded(numbered: Any) -> Iterator[Any]:
    """Yield the second of each (number, value), with the random state set by the number.

    A GPU's generator is set as well, so that no state of it needs to be kept: what it draws follows
    from the state of the CPU's before the step.
    """
    base = int(torch.randint(2**63 - 1, ()))
    after = torch.get_rng_state()
    try:
        for number, value in numbered:
            torch.manual_seed((base + (number + 1) * _MIX) % 2**64)
            yield value
    finally:
        torch.set_rng_state(after)
