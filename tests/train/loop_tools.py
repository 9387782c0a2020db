"""A trainer of one small matrix, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optlm.train.loop.optim import OptimConfig
from optlm.train.loop.trainer import LoopConfig, Loss, Trainer
from optlm.train.run.folder import RunFolder

Batch = tuple[Tensor, Tensor]
FAST = OptimConfig(learning_rate=0.1)


def data(step: int) -> Batch:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(12, 3, generator=random)
    return x, (x @ torch.tensor([[1.0], [-2.0], [0.5]])) + 0.1


def one_batch(step: int) -> list[Batch]:
    return [data(step)]


def squared_error(model: nn.Module, batch: Batch) -> Loss:
    noisy = nn.functional.dropout(batch[0], 0.1)  # makes the random state matter
    return Loss(((model(noisy) - batch[1]) ** 2).sum(), len(batch[0]))


def plain_error(model: nn.Module, batch: Batch) -> Loss:
    return Loss(((model(batch[0]) - batch[1]) ** 2).sum(), len(batch[0]))


def distance(model: nn.Module) -> dict[str, Any]:
    x, y = data(10_000)
    with torch.no_grad():
        return {"score": float(((model(x) - y) ** 2).mean())}


def trainer(
    folder: Path,
    *,
    batches: Callable[[int], list[Batch]] = one_batch,
    loss: Callable[[nn.Module, Batch], Loss] = squared_error,
    **values: Any,
) -> Trainer[nn.Module, Batch]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "steps": 16,
        "log_every": 5,
        "evaluate_every": 8,
        "checkpoint_every": 4,
        "optim": OptimConfig(learning_rate=0.05, warmup_steps=3),
    }
    folder.mkdir(exist_ok=True)
    return Trainer(
        nn.Linear(3, 1),
        config=LoopConfig(**(settings | values)),
        folder=RunFolder(folder),
        batches=batches,
        loss=loss,
        evaluate=distance,
    )


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


class Killed(Exception):
    """Stands for a power cut: nothing is saved."""


class Adapted(nn.Module):
    """A frozen base with a small trained correction, and a buffer that steps change."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 1).requires_grad_(False)
        self.correction = nn.Linear(3, 1, bias=False)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return self.base(x) + self.correction(x)


def adapter_trainer(folder: Path, **values: Any) -> Trainer[nn.Module, Batch]:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"steps": 9, "evaluate_every": 3, "checkpoint_every": 2} | values
    folder.mkdir(exist_ok=True)
    return Trainer(
        Adapted(),
        config=LoopConfig(**settings),
        folder=RunFolder(folder),
        batches=one_batch,
        loss=squared_error,
        evaluate=distance,
    )
