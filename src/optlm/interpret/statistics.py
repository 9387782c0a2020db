"""What each attention head does, as a few numbers, without ever holding a T x T matrix.

Queries and keys of a layer are met in blocks of rows while the forward pass runs, so memory grows
with the length of the text and not with its square. `dense_statistics` in the tests is the slow
twin.

Letters: L layers, H heads, T tokens, K head width, N rows of a block.

Sources: previous-token, duplicate-token and induction heads are those of "A Mathematical Framework
for Transformer Circuits" (Elhage and others, 2021) and "In-context Learning and Induction Heads"
(Olsson and others, 2022); the sink on the first token is that of arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.config import OPTConfig
from optlm.errors import RequestError
from optlm.interpret.attention import probabilities, watching_heads
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT

__all__ = ["SCORES", "HeadStatistics", "head_statistics", "repeated_tokens"]

SCORES = {
    "entropy": "of a token's attention, nats",
    "distance": "tokens back to what it looks at, mean",
    "spread": "entropy as a share of the largest possible, ln(t + 1)",
    "reach": "distance as a share of the largest possible, t",
    "previous": "attention to the token before",
    "start": "attention to the first token",
    "itself": "attention to the token itself",
    "duplicate": "attention to earlier copies of the token, where there are any",
    "induction": "attention to what followed earlier copies of the token, where there are any",
}
_BLOCK = 64  # rows of attention in memory at a time
_WORDS = 50265  # ids of the published vocabulary from here on are padding rows


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadStatistics:
    """Scores of every head, means over the tokens of some texts but the first of each.

    `scores[name]` is (L, H); `SCORES` tells what each name means. `repeats` is the number of tokens
    behind "duplicate", `followed` the one behind "induction"; where it is 0 the score is NaN.
    """

    tokens: int
    repeats: int
    followed: int
    scores: dict[str, NDArray[np.float64]]


def head_statistics(model: OPT, texts: Sequence[Sequence[int]]) -> HeadStatistics:
    """Score every head on `texts`, in one pass over each.

    Raises:
        RequestError: no text, or one of fewer than two tokens, or one that is too long.
        CheckpointError: weights hold NaN.
    """
    if not texts or min(map(len, texts)) < 2:
        raise RequestError("give at least one text, each of at least two tokens")
    shape = (len(SCORES), model.config.num_hidden_layers, model.config.num_attention_heads)
    sums = torch.zeros(shape, dtype=torch.float64)
    counts = torch.zeros(len(SCORES), dtype=torch.float64)
    for text in texts:
        ids = token_rows(model, text)
        repeats = _repeats(ids[0])

        def read(layer: int, q: Tensor, k: Tensor, repeats: _Repeats = repeats) -> None:
            sums[:, layer] += _score(q, k, repeats)

        with torch.no_grad(), watching_heads(model, read):
            check_finite(model.hidden(ids))
        counts += repeats.counts
    means = (sums / counts[:, None, None]).numpy()
    return HeadStatistics(
        tokens=int(counts[0]),
        repeats=int(counts[-2]),
        followed=int(counts[-1]),
        scores=dict(zip(SCORES, means, strict=True)),
    )


def repeated_tokens(config: OPTConfig, *, seed: int = 0, block: int = 256) -> list[int]:
    """The start token and a block of random tokens, no two alike, twice: what induction lives on.

    The block is shorter where context or vocabulary are small. Nothing but copying predicts the
    second half, so a head that looks where copying would need it shows itself.
    """
    last = min(config.vocab_size, _WORDS)
    block = min(block, (config.max_position_embeddings - 1) // 2, last - 4)
    if block < 2:
        raise RequestError(
            f"a vocabulary of {config.vocab_size} and a context of "
            f"{config.max_position_embeddings} leave no room to repeat tokens"
        )
    random = np.random.default_rng(seed)
    ids = random.choice(np.arange(4, last), block, replace=False).tolist()
    return [config.bos_token_id, *ids, *ids]


@dataclass(frozen=True, kw_only=True)
class _Repeats:
    """Where the tokens of a text occurred before."""

    ids: Tensor  # (T,)
    counts: Tensor  # (scores,) rows that each score is a mean over

    def of_rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """(N, last) twice: earlier copies of each row's token, and what followed them."""
        rows = torch.arange(first, last, device=self.ids.device)[:, None]
        columns = torch.arange(last, device=self.ids.device)
        same = (self.ids[first:last, None] == self.ids[:last]) & (columns < rows)
        followed = same.roll(1, dims=1) & (columns > 0) & (columns < rows)
        return same, followed


def _repeats(ids: Tensor) -> _Repeats:
    found = _Repeats(ids=ids, counts=torch.empty(0))
    repeats = followed = 0
    for first in range(1, len(ids), _BLOCK):
        same, after = found.of_rows(first, min(first + _BLOCK, len(ids)))
        repeats += int(same.any(dim=1).sum())
        followed += int(after.any(dim=1).sum())
    rows = len(ids) - 1
    counts = [rows] * (len(SCORES) - 2) + [repeats, followed]
    return _Repeats(ids=ids, counts=torch.tensor(counts, dtype=torch.float64))


def _score(q: Tensor, k: Tensor, repeats: _Repeats) -> Tensor:
    """Sums over the rows of one layer: (scores, H). Queries and keys are (H, T, K)."""
    total = torch.zeros(len(SCORES), q.shape[0], dtype=torch.float64)
    for first in range(1, q.shape[1], _BLOCK):
        last = min(first + _BLOCK, q.shape[1])
        probs = probabilities(q[:, first:last], k[:, :last], first)  # (H, N, last)
        same, followed = repeats.of_rows(first, last)
        rows = torch.arange(first, last, device=q.device)
        places = torch.arange(last, device=q.device, dtype=probs.dtype)
        entropy = torch.special.entr(probs).sum(dim=-1)
        distance = rows - probs @ places
        columns = [
            entropy,
            distance,
            entropy / (rows + 1.0).log(),
            distance / rows,
            _at(probs, rows - 1),
            probs[:, :, 0],
            _at(probs, rows),
            torch.einsum("hns,ns->hn", probs, same.to(probs.dtype)),
            torch.einsum("hns,ns->hn", probs, followed.to(probs.dtype)),
        ]
        total += torch.stack([column.double().sum(dim=-1).cpu() for column in columns])
    return total


def _at(probs: Tensor, columns: Tensor) -> Tensor:
    """(H, N): the entry of each row (H, N, S) at its own column (N,)."""
    return probs.gather(2, columns.expand(probs.shape[0], -1)[..., None])[..., 0]
