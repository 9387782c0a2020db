"""The answers of `Alone` for many processes: FSDP2 over the rows, tensor parallelism by DTensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from optlm.checkpoint.layout import Grid, Piece, check_tensor_parallel, piece_of
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.loop.device import to_device
from optlm.train.loop.optim import Optimizer, layer_of
from optlm.train.parallel.alone import Alone, seeded
from optlm.train.parallel.parts import load_latest, save_parts
from optlm.train.parallel.sharding import Own, Root, cut_by_tensor
from optlm.train.parallel.watch import Watch
from optlm.train.run.folder import RunFolder

__all__ = ["Sharded"]

B = TypeVar("B")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


class Sharded(Alone):
    """Processes of one group, each with its pieces of every weight and its rows of every batch.

    Made by `optlm.train.parallel.join`.
    """

    def __init__(self, tensor: int, device: torch.device, watch: Watch) -> None:
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.grid = Grid(data=self.world // tensor, tensor=tensor, rank=self.rank)
        self.groups = self.grid.data
        self._watch = watch
        shape = (self.grid.data, tensor)
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        self._roots: dict[int, Root] = {}
        self._pieces: dict[str, Piece] = {}
        self._steps = 0

    # ---- the run folder -----------------------------------------------------------------------

    def holding(
        self, folder: RunFolder, claim: dict[str, Any], **options: Any
    ) -> AbstractContextManager[RunFolder]:
        """Rank 0 locks the folder and writes to it; the others read."""

        @contextmanager
        def held() -> Iterator[RunFolder]:
            if self.rank == 0:
                with folder.locked(claim, **options):
                    dist.barrier()
                    yield folder
            else:
                dist.barrier()
                yield _Reader(folder.path)

        return held()

    def first(self, work: Callable[[], T]) -> T:
        """Rank 0 works while the others wait, then they do."""
        self._watch.doing("preparing")
        if self.rank == 0:
            done = work()
            dist.barrier()
            return done
        dist.barrier()
        return work()

    def save(
        self,
        folder: RunFolder,
        step: int,
        state: dict[str, Any],
        optimizer: Optimizer,
        **policy: Any,
    ) -> None:
        self._watch.doing(f"saving step {step}")
        names = self._names(optimizer)
        save_parts(folder, step, state, grid=self.grid, pieces=self._pieces, names=names)
        if self.rank == 0:
            folder.prune(**policy)

    def load_latest(
        self, folder: RunFolder, optimizer: Optimizer, *, log: Callable[[str], None]
    ) -> dict[str, Any] | None:
        self._watch.doing("loading")
        return load_latest(folder, pieces=self._pieces, names=self._names(optimizer), log=log)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of the weights in the optimizer's order."""
        known = {id(own): name for name, own in self._own.named_parameters()}
        return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]

    # ---- the model ----------------------------------------------------------------------------

    def place(self, model: M, average: M, method: str) -> tuple[nn.Module, nn.Module]:
        """Cut both in place.

        Raises:
            ConfigError: a model or optimizer that does not work in pieces, with the reason.
        """
        if method != "adamw":
            raise ConfigError(
                f"the optimizer {method!r} needs whole matrices, and every process holds pieces; "
                "use 'adamw', or train on one process"
            )
        self._check(model)
        self._own = self._place(model)
        return self._own, self._own if average is model else self._place(average)

    def _check(self, model: nn.Module) -> None:
        if not isinstance(model, OPT):
            raise ConfigError(
                f"a {type(model).__name__} cannot be spread over processes; only OPT can"
            )
        check_tensor_parallel(model.config, self.grid.tensor)
        if model.config.layerdrop:
            raise ConfigError(
                f"layerdrop is {model.config.layerdrop}; processes that share weights must run the "
                "same layers. Set it to 0, or train on one process"
            )
        if frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
            raise ConfigError(f"{frozen[0]} is frozen; many processes train whole models only")

    def _place(self, model: nn.Module) -> Own:
        assert isinstance(model, OPT)
        model.to(self.device)
        for name, p in model.named_parameters():
            self._pieces[name] = piece_of(name, tuple(p.shape), self.grid)
        if self.grid.tensor > 1:
            cut_by_tensor(model, self._mesh["tensor"])
        mesh = self._mesh["data"] if self.grid.data > 1 else None
        self._roots[id(model)] = Root(model, mesh)
        own = Own(model)
        for name, p in own.named_parameters():
            assert tuple(p.shape) == self._pieces[name].sizes, (name, p.shape, self._pieces[name])
        return own

    def call(self, function: Callable[..., T], model: M, *arguments: Any) -> T:
        placed = to_device(arguments, self.device)
        result: T = self._roots[id(model)].run(function, *placed)
        return result

    def judge(self, evaluate: Callable[[M], dict[str, Any]], model: M) -> dict[str, Any]:
        """Every process evaluates, since each holds a part; rank 0's figures count."""
        self._watch.doing(f"evaluating after step {self._steps}")
        root = self._roots[id(model)]
        with self.device:  # where tensors are made that name no device
            figures = [root.run(evaluate)]
        root.let_go()
        dist.broadcast_object_list(figures, src=0)
        return dict(figures[0])

    # ---- a step -------------------------------------------------------------------------------

    def share(self, batches: list[B]) -> Iterator[B]:
        """Every D-th micro-batch for each of the D groups that read different rows.

        Raises:
            ConfigError: their number is no multiple of D, so that some group would have less to do.
        """
        if len(batches) % self.groups:
            raise ConfigError(
                f"{len(batches)} micro-batches cannot be shared out over {self.groups} "
                "data-parallel groups; choose sizes so that their number is a multiple"
            )
        mine = self.grid.data_rank
        yield from seeded((i, b) for i, b in enumerate(batches) if i % self.groups == mine)

    def sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.grid.data > 1:
            dist.all_reduce(total, group=self._mesh["data"].get_group())
        return list(total.tolist())

    def any(self, flag: bool) -> bool:
        self._steps += 1
        self._watch.doing(f"step {self._steps + 1} since the start")
        told = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told)

    @torch.no_grad()
    def clip(
        self, own: nn.Module, highest: float, *, divide_by: float
    ) -> tuple[float, dict[str, float]]:
        assert isinstance(own, Own)
        own.take_gradients()
        named = [(name, p.grad) for name, p in own.named_parameters() if p.grad is not None]
        squares = torch.stack(
            [
                (grad.double() / divide_by).square().sum() / self._pieces[name].copies
                for name, grad in named
            ]
        )
        dist.all_reduce(squares)
        by_layer: dict[str, float] = {}
        for (name, _), square in zip(named, squares.tolist(), strict=True):
            layer = layer_of(name)
            by_layer[layer] = by_layer.get(layer, 0.0) + square
        total = math.sqrt(sum(by_layer.values()))
        if math.isfinite(total):
            scale = min(1.0, highest / (total + 1e-6)) / divide_by
            torch._foreach_mul_([grad for _, grad in named], scale)
        return total, {layer: math.sqrt(square) for layer, square in by_layer.items()}


class _Reader(RunFolder):
    """The run folder as seen by all but rank 0."""

    writes = False

    def write(self, name: str, data: bytes) -> None:
        """Rank 0 does it."""

    def log(self, event: dict[str, Any]) -> None:
        """Rank 0 does it."""

    def rewind_log(self, step: int) -> None:
        """Rank 0 does it."""
