"""Joining the processes that torchrun started, and leaving them together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from optlm.errors import ConfigError, OptlmError
from optlm.train.loop.device import training_device
from optlm.train.parallel.alone import Alone
from optlm.train.parallel.watch import Watch
from optlm.train.run.folder import TrainingError

__all__ = ["GroupConfig", "join"]

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """How the processes work together.

    Raises:
        ConfigError: a value out of range.
    """

    device: str = "auto"  # of every process: auto, cpu or cuda
    tensor: int = 1  # processes that share the matrices of one copy of the model
    patience: float = 60.0  # seconds without a sign of life before a process is given up
    timeout: float = 1800.0  # seconds to wait for a process that lives but does not come

    def __post_init__(self) -> None:
        if self.tensor < 1:
            raise ConfigError(f"tensor parallelism is {self.tensor}; it must be at least 1")
        for name in ("patience", "timeout"):
            if not 1.0 <= getattr(self, name) <= 86_400:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must lie between 1 and 86400 seconds"
                )


@contextmanager
def join(config: GroupConfig | None = None) -> Iterator[Alone]:
    """Yield `Alone`, or under torchrun (``RANK``, ``WORLD_SIZE``, ...) what joins its processes.

    An error inside the block on any process ends the block on all of them, with that error. When
    all leave it well, they leave together.

    Raises:
        ConfigError: the number of processes is no multiple of the tensor parallelism, or they
            cannot have the device.
        TrainingError: another process failed, was killed, or did not come; the message names it.
    """
    config = config or GroupConfig()
    world = _number("WORLD_SIZE", 1)
    if world % config.tensor:
        raise ConfigError(
            f"{world} processes cannot be divided into groups of {config.tensor} for tensor "
            f"parallelism; start a multiple of {config.tensor} with torchrun --nproc-per-node"
        )
    device = training_device(config.device, local_rank=_number("LOCAL_RANK", 0))
    if world == 1:
        yield Alone(device)
        return
    rank = _number("RANK", None)
    _stay_on_loopback(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _store(rank, world, timedelta(seconds=config.timeout))
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    watch = Watch(
        PrefixStore("optlm/watch", store),
        rank,
        world,
        keeper="torchrun" if agent else "rank 0, which keeps it,",
        patience=config.patience,
    )
    try:
        with _shared_errors(watch):
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("optlm/group", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=config.timeout),
            )
            from optlm.train.parallel.sharded import Sharded

            yield Sharded(config.tensor, device, watch)
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # those who wait for this process are told by that
        watch.leave(keeper=rank == 0 and not agent)
        watch.close()


@contextmanager
def _shared_errors(watch: Watch) -> Iterator[None]:
    """Tell the others what ends this process, or find out what ended them."""
    try:
        yield
    except BaseException as error:
        if _is_lost_connection(error):
            cause = watch.diagnose()
            raise TrainingError(
                f"{cause}; start again to resume from the last checkpoint"
            ) from error
        known = isinstance(error, OptlmError)
        watch.publish(str(error) if known else f"{type(error).__name__}: {error}")
        raise


def _is_lost_connection(error: BaseException) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    if isinstance(error, kinds):
        return True
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, not a number; start with torchrun"
        ) from None


def _stay_on_loopback(world: int) -> None:
    """When all processes are on this machine, their connections need not leave it."""
    if _number("LOCAL_WORLD_SIZE", 0) == world:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def _store(rank: int, world: int, timeout: timedelta) -> Store:
    """The key-value store the processes meet at; torchrun's own, or one that rank 0 keeps."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or rank != 0:
        meeting: Store = next(iter(rendezvous("env://", timeout=timeout)))[0]
        return meeting
    address, port = os.environ.get("MASTER_ADDR", _LOOPBACK), _number("MASTER_PORT", None)
    listener = socket.create_server((address, port))  # on that address, where TCPStore takes all
    options: dict[str, Any] = {"master_listen_fd": listener.detach(), "multi_tenant": True}
    return TCPStore(
        address, port, world, is_master=True, timeout=timeout, use_libuv=True, **options
    )
