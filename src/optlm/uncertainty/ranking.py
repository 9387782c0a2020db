"""How well an uncertainty tells wrong answers from right ones.

Letters: N items, B resamples. Uncertainty is high where an error is expected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optlm.uncertainty.checks import as_figures, as_flags, both_classes
from optlm.uncertainty.reading import Float64

__all__ = ["Ranking", "auroc", "auroc_resampled", "rank_errors", "resampling", "risk_coverage"]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Figures of one estimator on one task.

    Attributes:
        auroc: probability that a wrong answer has the higher uncertainty of a wrong and a right one
            (ties count half); 0.5 is chance.
        aurc: area under the risk-coverage curve, the mean error rate over all coverages (Geifman
            and El-Yaniv 2017); lower is better.
        prr: prediction rejection ratio: 1 where no order of rejection is better, 0 for a random one
            (Malinin et al. 2017).
    """

    auroc: float
    aurc: float
    prr: float


def rank_errors(uncertainty: ArrayLike, wrong: ArrayLike) -> Ranking:
    """Compare uncertainties (N,) with which answers were wrong (N,).

    Raises:
        RequestError: no items, other counts, figures that are not finite, or one class only.
    """
    figures = as_figures(uncertainty, "uncertainty")
    flags = as_flags(wrong, "wrong", len(figures))
    both_classes(flags, "AUROC")
    aurc = float(risk_coverage(figures, flags).mean())
    best = float(risk_coverage(flags, flags).mean())
    chance = float(flags.mean())
    return Ranking(
        auroc=auroc(figures, flags), aurc=aurc, prr=(chance - aurc) / max(chance - best, 1e-12)
    )


def auroc(uncertainty: ArrayLike, wrong: ArrayLike) -> float:
    """See `Ranking`.

    Raises:
        RequestError: as `rank_errors`.
    """
    figures = as_figures(uncertainty, "uncertainty")
    flags = as_flags(wrong, "wrong", len(figures))
    both_classes(flags, "AUROC")
    return float(auroc_resampled(figures, flags, np.ones((1, len(figures))))[0])


def auroc_resampled(uncertainty: ArrayLike, wrong: ArrayLike, weights: Float64) -> Float64:
    """AUROC (B,) with item n counted weights[b, n] times; 0.5 where one class has no weight."""
    figures = np.asarray(uncertainty, np.float64)
    order = np.argsort(figures, kind="stable")
    starts = np.flatnonzero(np.diff(figures[order], prepend=-np.inf))  # of groups of equals
    flags = np.asarray(wrong, np.bool_)[order]
    ordered = weights[:, order]
    bad = np.add.reduceat(ordered * flags, starts, axis=1)
    good = np.add.reduceat(ordered * ~flags, starts, axis=1)
    below = np.cumsum(good, axis=1) - good / 2
    pairs = bad.sum(axis=1) * good.sum(axis=1)
    wins = (bad * below).sum(axis=1)
    result: Float64 = np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)
    return result


def resampling(count: int, resamples: int, seed: int) -> Float64:
    """How often each of `count` items is drawn in each bootstrap resample (B, N)."""
    random = np.random.default_rng(seed)
    return random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def risk_coverage(uncertainty: ArrayLike, wrong: ArrayLike) -> Float64:
    """Error rate (N,) among the 1, 2 ... N least uncertain items, the mean over orders of equals.

    Item k of the result belongs to the coverage (k + 1) / N.
    """
    figures = np.asarray(uncertainty, np.float64)
    _, group = np.unique(figures, return_inverse=True)  # numbered by uncertainty
    errors = np.bincount(group, weights=np.asarray(wrong, np.float64))
    sizes = np.bincount(group)
    expected = np.repeat(errors / sizes, sizes)
    curve: Float64 = np.cumsum(expected) / np.arange(1, len(figures) + 1)
    return curve
