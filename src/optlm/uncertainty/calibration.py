"""Does a confidence of 0.8 mean right in 8 of 10 cases? Bins, their error, and its interval.

Letters: N items, G groups, B bins, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optlm.errors import RequestError
from optlm.uncertainty.checks import as_figures, as_flags, check_share
from optlm.uncertainty.ranking import resampling
from optlm.uncertainty.reading import Float64

__all__ = ["Reliability", "reliability"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reliability:
    """What a reliability diagram shows, and its one number.

    Attributes:
        edges: of the bins (B + 1,).
        counts, confidence, accuracy: of each bin (B,): items, their mean confidence, the share of
            right ones; 0 where a bin is empty.
        ece: expected calibration error: the mean over items of |accuracy - confidence| of their bin
            (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599).
        low, high: its bootstrap interval. ECE is biased upwards where bins are small, and so is the
            interval; compare ECEs of the same items and bins only.
        level: probability of the interval.
        items, groups: N and G.
    """

    edges: Float64
    counts: NDArray[np.intp]
    confidence: Float64
    accuracy: Float64
    ece: float
    low: float
    high: float
    level: float
    items: int
    groups: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }


def reliability(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    bins: int = 15,
    binning: Literal["width", "mass"] = "width",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Reliability:
    """Compare confidences (N,) in 0 to 1 with which items were right (N,).

    Args:
        groups: number of each item's group (N,), such as its document: items of a group depend on
            each other, so the bootstrap draws whole groups.
        binning: bins of equal "width" on 0 to 1, or of equal "mass" (counts).

    Raises:
        RequestError: no items, confidences outside 0 to 1, other counts, or fewer than 1 bin.
    """
    figures = as_figures(confidence, "confidence")
    if figures.min() < 0 or figures.max() > 1:
        raise RequestError("confidence: every number must lie between 0 and 1")
    flags = as_flags(correct, "correct", len(figures))
    if bins < 1 or resamples < 1:
        raise RequestError(f"bins is {bins} and resamples {resamples}; both must be at least 1")
    check_share(level, "level")
    edges = np.linspace(0, 1, bins + 1)
    if binning == "mass":
        edges = np.unique(np.quantile(figures, edges))
        edges = edges if len(edges) > 1 else np.array([0.0, 1.0])
    place = np.clip(np.searchsorted(edges, figures, side="left") - 1, 0, len(edges) - 2)
    names = np.arange(len(figures)) if groups is None else _numbered(groups, len(figures))
    sums = _sums(names, place, len(edges) - 1, figures, flags)
    whole = sums.sum(axis=0)
    drawn = np.einsum("rg,gbk->rbk", resampling(len(sums), resamples, seed), sums)
    tail = (1 - level) / 2
    low, high = np.quantile(_ece(drawn), [tail, 1 - tail])
    counts = np.maximum(whole[:, 0], 1)
    return Reliability(
        edges=edges,
        counts=whole[:, 0].astype(np.intp),
        confidence=whole[:, 1] / counts,
        accuracy=whole[:, 2] / counts,
        ece=float(_ece(whole[None])[0]),
        low=float(low),
        high=float(high),
        level=level,
        items=len(figures),
        groups=len(sums),
    )


def _numbered(groups: ArrayLike, count: int) -> NDArray[np.intp]:
    names = np.asarray(groups)
    if names.shape != (count,):
        raise RequestError(f"groups: {count} are needed, one for each item, not {names.shape}")
    return np.unique(names, return_inverse=True)[1]


def _sums(
    groups: NDArray[np.intp],
    place: NDArray[np.intp],
    bins: int,
    confidence: Float64,
    correct: NDArray[np.bool_],
) -> Float64:
    """Items, confidence and right ones, summed by group and bin (G, B, 3)."""
    count = int(groups.max()) + 1
    cell = groups * bins + place
    columns = (np.ones(len(cell)), confidence, correct.astype(np.float64))
    sums = [np.bincount(cell, weights=column, minlength=count * bins) for column in columns]
    table: Float64 = np.stack(sums, axis=-1).astype(np.float64)
    return table.reshape(count, bins, 3)


def _ece(sums: Float64) -> Float64:
    """ECE (R,) from sums (R, B, 3)."""
    gaps = np.abs(sums[..., 1] - sums[..., 2]).sum(axis=-1)
    result: Float64 = gaps / np.maximum(sums[..., 0].sum(axis=-1), 1)
    return result
