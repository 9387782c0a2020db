"""MC dropout: the reference model reads a text several times with dropout on, and the passes are
compared as the members of an ensemble (Gal and Ghahramani 2016, arXiv 1506.02142).

It says something of a model that was trained with dropout. Needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from optlm.errors import ContextLengthError, RequestError
from optlm.model import OPT
from optlm.uncertainty.ensemble import Disagreement, combine, joined

__all__ = ["disagree_by_dropout"]

_ROWS = 64  # distributions of each pass in memory at a time


@torch.no_grad()
def disagree_by_dropout(
    model: OPT,
    sequences: Sequence[Sequence[int]],
    *,
    passes: int = 10,
    rate: float | None = None,
    seed: int = 0,
) -> list[Disagreement]:
    """Compare `passes` readings of each sequence of token ids, each with its own dropout.

    Args:
        rate: of the residual dropout; None takes the configuration's. Attention and layers are
            dropped in no pass.
        seed: the same seed gives the same figures, whatever else drew random numbers.

    Raises:
        RequestError: fewer than 2 passes, a rate of 0 or outside 0 to 1, or a text without tokens.
        ContextLengthError: a sequence beyond the context.
    """
    if passes < 2:
        raise RequestError(f"{passes} passes cannot disagree; take at least 2 (10 is usual)")
    rate = model.config.dropout if rate is None else rate
    if not 0 < rate < 1:
        raise RequestError(
            f"the dropout rate is {rate}, so all passes would be alike; give one between 0 and 1"
        )
    context = model.config.max_position_embeddings
    for ids in sequences:
        if len(ids) < 2:
            raise RequestError("a text has one token and nothing before it, so no distribution")
        if len(ids) > context:
            raise ContextLengthError(f"a text has {len(ids)} tokens; the context is {context}")
    with torch.random.fork_rng(devices=[]), _dropping(model, rate):
        torch.manual_seed(seed)
        return [_disagree(model, list(ids), passes) for ids in sequences]


@contextmanager
def _dropping(model: OPT, rate: float) -> Iterator[None]:
    """Turn the residual dropout on, and everything back at the end."""
    layers: list[Any] = list(model.decoder.layers)
    before = [(layer.training, layer.dropout) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.dropout = True, rate  # of the layer, not of its attention
        yield
    finally:
        for layer, (training, dropout) in zip(layers, before, strict=True):
            layer.training, layer.dropout = training, dropout


def _disagree(model: OPT, ids: list[int], passes: int) -> Disagreement:
    tokens = torch.tensor([ids[:-1]] * passes, device=model.head_weight.device)
    states = model.hidden(tokens)  # (passes, T, E); every row drops its own
    targets = np.array(ids[1:])
    parts = []
    for at in range(0, len(targets), _ROWS):
        rows = [
            torch.log_softmax((state[at : at + _ROWS] @ model.head_weight.T).float(), -1)
            .cpu()
            .numpy()
            for state in states
        ]
        parts.append(combine(rows, targets[at : at + _ROWS]))
    return joined(parts)
