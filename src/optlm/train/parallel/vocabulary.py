"""Head and cross-entropy where each process holds some rows of the vocabulary.

As `optlm.train.loop.loss`, chunk by chunk, with three sums over the processes a chunk: of the
highest logit, of the exponentials, and of the target's logit, which only one process has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

__all__ = ["vocabulary_parallel_cross_entropy"]

_CHUNK = 512  # rows of logits at a time, as in optlm.train.loop.loss
_HALF_LIFT = 16.0  # likewise: keeps small probabilities from vanishing in float16


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, begin: int, group: Any
    ) -> Tensor:
        """`weight` holds rows `begin` and on; every process of `group` has the same `hidden`."""
        kind = hidden.device.type
        cast = torch.is_autocast_enabled(kind)
        work = weight.to(torch.get_autocast_dtype(kind)) if cast else weight
        lift = _HALF_LIFT if work.dtype == torch.float16 else 1.0
        states = hidden.to(work.dtype)
        need_grad = ctx.needs_input_grad[0]
        grad_states = torch.empty_like(states, dtype=torch.float32) if need_grad else None
        grad_weight = torch.zeros_like(weight) if need_grad else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(targets), _CHUNK):
            rows = slice(first, first + _CHUNK)
            logits = (states[rows] @ work.T).float()  # (C, V / processes)
            wanted = (targets[rows, None] - begin).clamp(0, len(work) - 1)
            here = (targets[rows, None] >= begin) & (targets[rows, None] < begin + len(work))
            losses[rows], probs = _chunk(logits, wanted, here, group)
            if grad_states is not None and grad_weight is not None:
                probs.scatter_add_(1, wanted, -here.float())
                grad = (probs * lift).to(work.dtype)  # d(sum) / d(logits)
                grad_states[rows] = (grad @ work).float()
                grad_weight += grad.T @ states[rows]
        if grad_states is not None:
            dist.all_reduce(grad_states, group=group)
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.hidden_dtype, ctx.lift = hidden.dtype, lift
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_states, grad_weight = ctx.saved_tensors
        scale = scale / ctx.lift
        return (grad_states * scale).to(ctx.hidden_dtype), grad_weight * scale, None, None, None


def _chunk(logits: Tensor, wanted: Tensor, here: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Losses (C,) and this process's probabilities (C, V / processes); `logits` is used up."""
    highest = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    logits -= highest
    target = logits.gather(1, wanted).where(here, 0.0)
    probs = logits.exp_()
    sums = torch.cat([probs.sum(dim=1, keepdim=True), target], dim=1)  # (C, 2)
    dist.all_reduce(sums, group=group)
    probs /= sums[:, :1]
    return sums[:, 0].log() - sums[:, 1], probs


def vocabulary_parallel_cross_entropy(hidden: Tensor, weight: DTensor, targets: Tensor) -> Tensor:
    """`head_cross_entropy` for a head (V, E) that is cut by rows over the processes of one mesh."""
    mesh, group = weight.device_mesh, weight.device_mesh.get_group()
    rows = -(-weight.shape[0] // mesh.size())  # of every process but the last ones
    begin = min(mesh.get_local_rank() * rows, weight.shape[0])
    local = weight.to_local(grad_placements=[Shard(0)])
    hidden = hidden.to_local() if isinstance(hidden, DTensor) else hidden
    total: Tensor = _VocabularyParallel.apply(hidden, local, targets, begin, group)  # type: ignore[no-untyped-call]
    return total
