"""One number that divides the logits, so that confidences mean what they say (Guo et al. 2017,
arXiv 1706.04599, section 4.2). The order of tokens or choices does not change.

The mean negative log-likelihood is convex in the inverse temperature, so the best one is found by
Newton steps inside a bracket.

Letters: N items, C choices, R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from optlm.errors import RequestError
from optlm.uncertainty.reading import Float32, Float64, Ints, Progress, read_rows

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["Derivatives", "best_temperature", "choice_derivatives", "fit_choices", "fit_tokens"]

LOWEST, HIGHEST = 0.05, 20.0
_TOLERANCE = 1e-4  # relative, of the temperature
_PASSES = 30


class Derivatives(NamedTuple):
    """Mean negative log-likelihood at an inverse temperature, its slope and its curvature."""

    nll: float
    slope: float
    curvature: float


def best_temperature(at: Callable[[float], Derivatives]) -> float:
    """The temperature whose negative log-likelihood is least.

    Raises:
        RequestError: it lies at a limit: the labels are all right (or no better than chance), and
            more of the same would not bound it.
    """
    low, high = 1 / HIGHEST, 1 / LOWEST  # of the inverse
    inverse = 1.0
    for _ in range(_PASSES):
        _, slope, curvature = at(inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = slope / curvature if curvature > 0 else math.inf
        following = inverse - step
        if not low < following < high:
            following = math.sqrt(low * high)
        if abs(following - inverse) <= _TOLERANCE * inverse:
            break
        inverse = following
    if inverse > 0.99 / LOWEST or inverse < 1.01 / HIGHEST:
        limit = LOWEST if inverse > 1 else HIGHEST
        reason = "all right" if inverse > 1 else "no better than chance"
        raise RequestError(
            f"the best temperature lies beyond {limit}: the model's answers are {reason} on these "
            "data, so they cannot calibrate it. Give harder (or more) labelled data"
        )
    return 1 / inverse


def fit_tokens(
    llm: LLM,
    sequences: Sequence[list[int]],
    *,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> float:
    """The temperature under which the tokens of `sequences` are likeliest; reads them every step.

    Exact, over the whole vocabulary, and in the memory of one step's rows.

    Args:
        progress: is told of a pass over all texts, not of a text.

    Raises:
        RequestError: no sequences, or the best temperature lies beyond the limits.
    """
    if not sequences:
        raise RequestError("no texts to calibrate on; give at least one")

    def at(inverse: float) -> Derivatives:
        sums = np.zeros(3)
        count = 0
        for rows in read_rows(llm, sequences, adapter=adapter):
            sums += _row_sums(rows.logprobs, rows.targets, inverse)
            count += len(rows.targets)
        progress(1)
        return Derivatives(*(sums / count).tolist())

    return best_temperature(at)


def _row_sums(logprobs: Float32, targets: Ints, inverse: float) -> Float64:
    """Sums over rows (R, V) of the loss and its derivatives by the inverse temperature."""
    scaled = logprobs * np.float32(inverse)
    highest = scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled - highest)
    totals = weights.sum(axis=1, dtype=np.float64)
    mean = (weights * logprobs).sum(axis=1, dtype=np.float64) / totals
    square = (weights * logprobs * logprobs).sum(axis=1, dtype=np.float64) / totals
    chosen = logprobs[np.arange(len(targets)), targets].astype(np.float64)
    nll = np.log(totals) + highest[:, 0] - inverse * chosen
    return np.array([nll.sum(), (mean - chosen).sum(), (square - mean**2).sum()])


def fit_choices(scores: Sequence[ArrayLike], gold: Sequence[int]) -> float:
    """The temperature of softmax(scores / T) under which the right choices are likeliest.

    Args:
        scores: log-likelihoods of the choices of each item; items may differ in their number.
        gold: index of each item's right choice.

    Raises:
        RequestError: no items or labels, a label that is no choice, scores that are not finite, or
            the best temperature lies beyond the limits.
    """
    return best_temperature(choice_derivatives(scores, gold))


def choice_derivatives(
    scores: Sequence[ArrayLike], gold: Sequence[int]
) -> Callable[[float], Derivatives]:
    """The loss of `fit_choices` as a function of the inverse temperature."""
    if not scores or len(gold) != len(scores):
        raise RequestError(
            f"{len(scores)} items and {len(gold)} labels; give one label for each of at least one"
        )
    widest = max(len(np.atleast_1d(np.asarray(each))) for each in scores)
    table = np.full((len(scores), widest), -np.inf)  # (N, C)
    for row, (each, right) in enumerate(zip(scores, gold, strict=True)):
        values = np.asarray(each, np.float64)
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
            raise RequestError(f"item {row}: give finite scores of at least 2 choices")
        if not 0 <= right < len(values):
            raise RequestError(f"item {row}: label {right} is none of its {len(values)} choices")
        table[row, : len(values)] = values - values.max()
    present = np.where(np.isfinite(table), table, 0.0)
    chosen = table[np.arange(len(table)), list(gold)]

    def at(inverse: float) -> Derivatives:
        weights = np.exp(table * inverse)
        totals = weights.sum(axis=1)
        mean = (weights * present).sum(axis=1) / totals
        square = (weights * present**2).sum(axis=1) / totals
        nll = np.log(totals) - inverse * chosen
        return Derivatives(
            float(nll.mean()), float((mean - chosen).mean()), float((square - mean**2).mean())
        )

    return at
