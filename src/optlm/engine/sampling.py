"""From a row of logits to the next token, and to log-probabilities.

The order of the steps is that of `SamplingParams`; `tests/unit/engine/slow_sampling.py` writes each
from its definition. Nothing here sorts the whole vocabulary unless a nearly flat distribution
forces it to.

Letters: V vocabulary, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optlm.engine.outputs import TokenLogprobs
from optlm.engine.params import ALL_LOGPROBS, SamplingParams
from optlm.engine.utf8 import Utf8State

__all__ = [
    "Chooser", "chosen_logprobs", "draw", "exponentiate", "keep_min_p", "keep_top_k", "keep_top_p",
    "log_normalizer", "log_normalizer_of", "log_softmax", "token_logprobs", "uniform",
]  # fmt: skip

Float32 = NDArray[np.float32]
Ids = NDArray[np.intp]

_NUCLEUS = 2048  # the likeliest tokens, tried first before top-p sorts the whole vocabulary
_SAFE = 50  # exp of a number this small, and the sum over a vocabulary, are normal floats
_BLOCK = 256  # weights summed at a time when a token is drawn


def log_softmax(row: Float32) -> Float32:
    """Natural log-probabilities of one row (V,)."""
    shifted = row - row.max()
    shifted -= np.float32(math.log(_total(np.exp(shifted))))
    result: Float32 = shifted
    return result


def log_normalizer(row: Float32) -> float:
    """The logarithm of the sum of exp over a row (V,), summed pairwise.

    A reported log-probability is the logit minus this, wherever it is reported, so that the same
    token has the same number whoever asks.
    """
    return log_normalizer_of(row.copy())


def log_normalizer_of(row: Float32) -> float:
    """The same; `row` is overwritten."""
    shift = exponentiate(row)
    return shift + float(np.log(float(row.sum())))


def exponentiate(row: Float32) -> float:
    """Turn logits (V,) into exp(logits - shift), in place; return the shift."""
    top = float(row.max())
    shift = 0.0 if abs(top) < _SAFE else top  # without one it is one pass less
    if shift:
        np.subtract(row, shift, out=row)
    np.exp(row, out=row)
    return shift


def chosen_logprobs(rows: Float32, targets: Sequence[int]) -> list[float]:
    """Log-probability of ``targets[r]`` under ``rows[r]`` (R, V), row by row to stay in cache."""
    return [
        float(row[target]) - log_normalizer(row) for row, target in zip(rows, targets, strict=True)
    ]


def token_logprobs(row: Float32, normalizer: float, token: int, count: int) -> TokenLogprobs:
    """Report `token` and the `count` likeliest of a row (V,) of logits."""
    if count == ALL_LOGPROBS:
        ids = np.arange(len(row))
    else:
        kept = keep_top_k(row, count) if count else np.zeros(0, np.intp)
        ids = np.arange(len(row)) if kept is None else kept
        ids = ids[np.argsort(-row[ids], kind="stable")]
    value = row[token]
    return TokenLogprobs(
        token_id=token,
        logprob=float(value) - normalizer,
        rank=1 + int(np.count_nonzero(row > value)),
        top_ids=ids.astype(np.int32),
        top_logprobs=row[ids].astype(np.float64) - normalizer,
    )


class Chooser:
    """Chooses the tokens of one sequence; counts for the penalties, keys the random numbers."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        stop_ids: Sequence[int],
        seed: int,
        sample: int,
        utf8: Utf8State | None = None,
    ) -> None:
        self._params = params
        self._prompt_length = len(prompt)
        self._utf8 = utf8
        self._random = None if params.is_greedy else _RandomNumbers(seed, sample)
        self._bias = _arrays(params.logit_bias) if params.logit_bias else None
        self._stop_ids = np.array(stop_ids, np.intp) if params.min_tokens else None
        penalised = params.repetition_penalty != 1
        self._seen = _Counts() if penalised else None
        self._output = _Counts() if params.presence_penalty or params.frequency_penalty else None
        if self._seen is not None:
            for token in set(prompt):
                self._seen.add(token)
        self.is_plain_greedy = params.is_greedy and not params.changes_logits

    def choose(self, row: Float32, position: int) -> int:
        """Return the token at `position` of the sequence; `row` (V,), finite, is overwritten."""
        if self.is_plain_greedy:
            return int(row.argmax())
        params = self._params
        if params.changes_logits:
            self._process(row, position - self._prompt_length)
        if self._utf8 is not None:
            self._utf8.apply(row, position)
        if self._random is None:
            token = int(row.argmax())
        else:
            token = draw(row, float(row.max()), params, self._random.at(position))
        if self._utf8 is not None:
            self._utf8.take(token)
        for counts in (self._seen, self._output):
            if counts is not None:
                counts.add(token)
        return token

    def _process(self, row: Float32, num_output: int) -> None:
        """Steps 1 to 4, in place."""
        params = self._params
        if self._bias is not None:
            ids, values = self._bias
            row[ids] += values
        if self._stop_ids is not None and num_output < params.min_tokens:
            row[self._stop_ids] = -np.inf
        if self._seen is not None:
            ids = self._seen.ids
            logits = row[ids]
            penalty = np.float32(params.repetition_penalty)
            row[ids] = np.where(logits > 0, logits / penalty, logits * penalty)
        if self._output is not None:
            ids, counts = self._output.ids, self._output.counts
            row[ids] -= counts * np.float32(params.frequency_penalty) + np.float32(
                params.presence_penalty
            )


def draw(row: Float32, highest: float, params: SamplingParams, uniform_number: float) -> int:
    """Steps 5 to 9: where the cumulative probability of those kept passes `uniform_number`.

    Tokens are cumulated in order of id, in double precision.
    """
    scaled = (row - np.float32(highest)) / np.float32(params.temperature)
    ids: Ids | None = None
    if params.min_p > 0:
        ids = keep_min_p(scaled, params.min_p)
    if params.top_k:
        ids = keep_top_k(scaled, params.top_k, ids)
    if params.top_p < 1:
        ids = keep_top_p(scaled, params.top_p, ids)
    weights = np.exp(scaled if ids is None else scaled[ids])
    place = _invert(weights, uniform_number)
    return place if ids is None else int(ids[place])


def keep_min_p(scaled: Float32, min_p: float) -> Ids:
    """Ids at least `min_p` times as likely as the likeliest; `scaled` has its maximum at 0."""
    return np.flatnonzero(scaled >= np.float32(math.log(min_p)))


def keep_top_k(scaled: Float32, k: int, ids: Ids | None = None) -> Ids | None:
    """The `k` ids (of `ids`, or of all) with the largest values, ascending.

    Among equal values the lowest ids are kept. None stands for all ids.
    """
    values = scaled if ids is None else scaled[ids]
    if k >= len(values):
        return ids
    bound = np.partition(values, len(values) - k)[len(values) - k]
    places = _largest(values, k, bound)
    return places if ids is None else ids[places]


def keep_top_p(scaled: Float32, top_p: float, ids: Ids | None = None) -> Ids:
    """The fewest likeliest ids (of `ids`, or of all) that hold `top_p` of the probability.

    Ascending. `scaled` has its maximum at 0. Among equal values the lowest ids are kept.
    """
    values = scaled if ids is None else scaled[ids]
    wanted = top_p * _total(np.exp(values))
    likeliest = values
    if len(values) > _NUCLEUS:
        likeliest = np.partition(values, len(values) - _NUCLEUS)[-_NUCLEUS:]
        if _total(np.exp(likeliest)) < wanted:
            likeliest = values
    ranked = np.sort(likeliest)[::-1]
    mass = np.cumsum(np.exp(ranked), dtype=np.float64)
    count = min(int(np.searchsorted(mass, wanted, side="left")) + 1, len(ranked))
    places = _largest(values, count, ranked[count - 1])
    return places if ids is None else ids[places]


def _largest(values: Float32, count: int, bound: np.float32) -> Ids:
    """Places of the `count` largest values, of which `bound` is least; the first among equals."""
    places = np.flatnonzero(values >= bound)
    surplus = len(places) - count
    if surplus:
        ties = np.flatnonzero(values[places] == bound)
        places = np.delete(places, ties[len(ties) - surplus :])
    return places


def _invert(weights: Float32, uniform_number: float) -> int:
    """First place at which the running sum exceeds `uniform_number` of the whole.

    Summed in blocks first, so only one block needs a running sum.
    """
    blocks = np.cumsum(_block_sums(weights), dtype=np.float64)
    wanted = uniform_number * blocks[-1]
    last = np.searchsorted(blocks, blocks[-1], side="left")  # the blocks after it are all zero
    block = int(min(np.searchsorted(blocks, wanted, side="right"), last))
    before = blocks[block - 1] if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    place = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), wanted - before, side="right"))
    # The two ways of summing round differently; never step beyond the last token that can be drawn.
    return block * _BLOCK + min(place, int(np.flatnonzero(inside)[-1]))


def _block_sums(weights: Float32) -> Float32:
    return np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))


def _total(weights: Float32) -> float:
    """Sum of a row: blocks in single, their sums in double precision."""
    return float(_block_sums(weights).sum(dtype=np.float64))


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) by Philox4x64 (Salmon et al. 2011) with key (seed, sample)."""
    return _RandomNumbers(seed, sample).at(position)


class _RandomNumbers:
    """Counter-based, so a number depends on seed, sample and position and on no earlier draw."""

    def __init__(self, seed: int, sample: int) -> None:
        from numpy.random import Philox  # 20 ms that greedy requests need not spend

        self._philox: Any = Philox(key=np.array([seed, sample], np.uint64))
        self._state = self._philox.state  # with an empty buffer, as after every change of counter

    def at(self, position: int) -> float:
        self._state["state"]["counter"][0] = position
        self._philox.state = self._state
        return int(self._philox.random_raw() >> 11) * 2.0**-53


class _Counts:
    """How often each token occurred, as arrays that grow by doubling."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.zeros(64, np.intp)
        self._counts = np.zeros(64, np.float32)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Float32:
        return self._counts[: len(self._places)]


def _arrays(bias: Any) -> tuple[Ids, Float32]:
    return np.array(list(bias), np.intp), np.array(list(bias.values()), np.float32)
