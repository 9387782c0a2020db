"""Weights by name, read from a checkpoint when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optlm.checkpoint import Checkpoint

__all__ = ["Weights", "weights_of"]

Weights = Callable[[str], Tensor]  # Hugging Face's name -> float32


def weights_of(checkpoint: Checkpoint) -> Weights:
    """One tensor in memory at a time; CheckpointError if it holds NaN or infinity."""
    return lambda name: torch.from_numpy(checkpoint.tensors[name].numpy())
