"""The forward pass of training, with the switches that change speed and memory and nothing else.

`model.OPT.hidden` says what is computed. Here the layers run one by one, so that each can be
compiled once for all, or recomputed on the way back instead of remembered, and so that the size of
what flows between them can be watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optlm.model import OPT

__all__ = ["Forward"]


def _run_layer(layer: nn.Module, x: Tensor) -> Tensor:
    output: tuple[Tensor, ...] = layer(x, None, None, False)
    return output[0]


@dataclass(frozen=True)
class Forward:
    """Unpadded tokens (B, T) to what the head reads (B, T, E), as `OPT.hidden`.

    Args:
        recompute: keep only what enters each layer and run the layer again in the backward pass: a
            third more arithmetic, activations of one layer instead of all.
        compiled: let torch.compile fuse the operators of a layer; costs a minute at the start.
    """

    recompute: bool = False
    compiled: bool = False

    def __call__(self, model: OPT, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return also the root mean square of what enters each layer and leaves the last."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = model.decoder.embed(tokens, positions)
        sizes = [_rms(x)]
        for layer in model.decoder.layers:
            if not model._drop_layer():
                x = self._layer(layer, x)
            sizes.append(_rms(x))
        return model.decoder.finish(x), sizes

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        run = _compiled() if self.compiled else _run_layer
        if self.recompute and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(run, layer, x, use_reentrant=False)
            return recomputed
        return run(layer, x)


@torch.no_grad()
def _rms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float32)
    return norm / math.sqrt(x.numel())


_compiled_layer: list[Callable[[nn.Module, Tensor], Tensor]] = []


def _compiled() -> Callable[[nn.Module, Tensor], Tensor]:
    """`_run_layer` compiled once a process: its graphs serve all layers of all models."""
    if not _compiled_layer:
        _compiled_layer.append(torch.compile(_run_layer))
    return _compiled_layer[0]
