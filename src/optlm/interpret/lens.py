"""The logit lens: what the model would say if each layer were its last.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020). The state between two layers goes
through what stands after the last one: the final norm where the model has one, `project_out` where
it has projections, and the head. In the 350M each layer ends with its own norm and no final norm
follows, so its states are read as they are. The last row therefore equals the model's own logits on
every variant, and the first row is the embedding, which no layer has touched.

Letters: L layers, T tokens, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from optlm.errors import RequestError
from optlm.interpret.cache import array
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = ["LogitLens", "TokenProbabilities", "logit_lens", "token_probabilities"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
    """Distributions after the embedding (row 0) and after each layer (rows 1 to L).

    Position t predicts token t + 1; the target of the last position is its likeliest token.
    Logarithms are natural.
    """

    tokens: tuple[int, ...]
    targets: NDArray[np.int64]  # (T,)
    top_ids: NDArray[np.int64]  # (L + 1, T, k), likeliest first
    top_logprobs: NDArray[np.float32]  # (L + 1, T, k)
    target_logprobs: NDArray[np.float32]  # (L + 1, T)
    target_ranks: NDArray[np.int64]  # (L + 1, T), 0 is the likeliest
    entropy: NDArray[np.float32]  # (L + 1, T), nats
    kl_to_final: NDArray[np.float32]  # (L + 1, T), KL(model's own || lens), nats


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenProbabilities:
    """What the model thought of each token of a text after the first, in nats.

    Entry i is about `tokens[i + 1]`, predicted from the tokens before it.
    """

    tokens: tuple[int, ...]
    logprobs: NDArray[np.float32]  # (T - 1,)
    ranks: NDArray[np.int64]  # (T - 1,), 0 is the likeliest
    entropy: NDArray[np.float32]  # (T - 1,)
    top_ids: NDArray[np.int64]  # (T - 1, k), likeliest first
    top_logprobs: NDArray[np.float32]  # (T - 1, k)


@torch.no_grad()
def logit_lens(model: OPT, tokens: Sequence[int], *, top: int = 5) -> LogitLens:
    """Read every layer's state through the head.

    One layer's logits are in memory beside the model's own.

    Raises:
        RequestError: `top` is not in 1..V; no tokens, or too many.
        CheckpointError: weights hold NaN.
    """
    _check_top(top, model)
    ids = token_rows(model, tokens)
    states = residual_states(model, ids)
    final = _logprobs(model, states[-1])
    targets = torch.cat([ids[0, 1:], final[-1:].argmax(dim=-1)])
    rows = []
    for state in states:
        logprobs = _logprobs(model, state)
        divergence = (final.exp() * (final - logprobs)).sum(dim=-1)
        rows.append((_read(logprobs, targets, top), array(divergence)))
    return LogitLens(
        tokens=tuple(tokens),
        targets=targets.cpu().numpy(),
        top_ids=np.stack([row.top_ids for row, _ in rows]),
        top_logprobs=np.stack([row.top_logprobs for row, _ in rows]),
        target_logprobs=np.stack([row.logprobs for row, _ in rows]),
        target_ranks=np.stack([row.ranks for row, _ in rows]),
        entropy=np.stack([row.entropy for row, _ in rows]),
        kl_to_final=np.stack([divergence for _, divergence in rows]),
    )


@torch.no_grad()
def token_probabilities(model: OPT, tokens: Sequence[int], *, top: int = 10) -> TokenProbabilities:
    """How likely the model found each token after the first, and what it expected.

    Raises:
        RequestError: fewer than two tokens, too many, or `top` is not in 1..V.
        CheckpointError: weights hold NaN.
    """
    _check_top(top, model)
    if len(tokens) < 2:
        raise RequestError(f"{len(tokens)} tokens predict nothing; give at least two")
    ids = token_rows(model, tokens)
    logprobs = _logprobs(model, residual_states(model, ids)[-1][:-1])
    row = _read(logprobs, ids[0, 1:], top)
    return TokenProbabilities(tokens=tuple(tokens), **vars(row))


def residual_states(model: OPT, ids: Tensor) -> list[Tensor]:
    """L + 1 states (T, D) of the one row `ids` (1, T): the embedding, then what leaves a layer."""
    states: list[Tensor] = []
    last = model.config.num_hidden_layers - 1

    def keep(value: Tensor) -> None:
        states.append(value[0])

    points = [f"layers.{i}.hook_resid_pre" for i in range(last + 1)]
    with hooked(model, dict.fromkeys([*points, f"layers.{last}.hook_resid_post"], keep)):
        model.hidden(ids)
    return states


@dataclass(frozen=True, kw_only=True)
class _Row:
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int64]
    entropy: NDArray[np.float32]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


def _read(logprobs: Tensor, targets: Tensor, top: int) -> _Row:
    """What distributions (T, V) say about `targets` (T,)."""
    chosen = logprobs.gather(1, targets[:, None])
    best, ids = logprobs.topk(top, dim=-1)
    return _Row(
        logprobs=array(chosen[:, 0]),
        ranks=(logprobs > chosen).sum(dim=-1).cpu().numpy(),
        entropy=array(-(logprobs.exp() * logprobs).sum(dim=-1)),
        top_ids=ids.cpu().numpy(),
        top_logprobs=array(best),
    )


def _logprobs(model: OPT, state: Tensor) -> Tensor:
    """Log-probabilities (T, V) that the head gives states (T, D) of the residual stream."""
    logits = F.linear(model.decoder.finish(state), model.head_weight)
    check_finite(logits)
    return logits.float().log_softmax(dim=-1)


def _check_top(top: int, model: OPT) -> None:
    if not 1 <= top <= model.config.vocab_size:
        raise RequestError(f"top is {top}; it must be from 1 to {model.config.vocab_size}")
