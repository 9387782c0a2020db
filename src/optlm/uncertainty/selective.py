"""Answer only when the risk is bounded: a threshold on uncertainty that holds with a stated chance.

Learn-then-test (Angelopoulos et al. 2021, arXiv 2110.01052): a first part of the data proposes
thresholds, and the rest tests each hypothesis "the error rate below this threshold exceeds the
risk" with the exact binomial tail (Clopper and Pearson 1934), in a fixed order that keeps the
chance of any false rejection below delta. It holds for items drawn independently from one
distribution, with any model and any uncertainty, in finite samples.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from optlm.errors import RequestError
from optlm.uncertainty.checks import as_figures, as_flags, check_share
from optlm.uncertainty.reading import Float64

__all__ = ["Rule", "binomial_tail", "clopper_pearson_upper", "learn_rule"]

_PROPOSES = 0.2  # of the items
_THRESHOLDS = 20  # proposed, at even steps of coverage
_STARTS = 4  # of the fixed sequence; each may spend delta / _STARTS


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Answer where the uncertainty is at most `threshold`.

    Attributes:
        threshold: None where no threshold passed: then never answer.
        risk, delta: with probability 1 - delta over the data it was learned on, the error rate of
            the answers given is at most `risk`.
        accepted, errors: answers given and wrong among the `tested` items.
        bound: upper Clopper-Pearson bound of the error rate, at the level that was spent on it.
        proposed_on, tested: items that proposed thresholds, and items that tested them.
    """

    threshold: float | None
    risk: float
    delta: float
    accepted: int
    errors: int
    bound: float
    proposed_on: int
    tested: int

    @property
    def coverage(self) -> float:
        """Share of the tested items that are answered."""
        return self.accepted / self.tested

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "coverage": self.coverage}

    def answers(self, uncertainty: float) -> bool:
        """Whether to answer at this uncertainty."""
        return self.threshold is not None and uncertainty <= self.threshold


def learn_rule(
    uncertainty: ArrayLike, wrong: ArrayLike, *, risk: float, delta: float = 0.05, seed: int = 0
) -> Rule:
    """Find the largest coverage whose error rate is at most `risk`, with probability 1 - `delta`.

    Args:
        uncertainty, wrong: of items whose answers are known to be right or wrong (N,).
        seed: which items propose.

    Raises:
        RequestError: other counts, figures that are not finite, shares outside 0 to 1, or fewer
            items than could ever bound this risk.
    """
    figures = as_figures(uncertainty, "uncertainty")
    flags = as_flags(wrong, "wrong", len(figures))
    check_share(risk, "risk")
    level = check_share(delta, "delta") / _STARTS
    fewest = math.ceil(math.log(level) / math.log1p(-risk))  # all right, and just enough
    needed = math.ceil(fewest / (1 - _PROPOSES)) + 1
    if len(figures) < needed:
        raise RequestError(
            f"{len(figures)} items cannot bound a risk of {risk} with delta {delta}: even if all "
            f"were right, {needed} are needed. Label more, or allow a higher risk or delta"
        )
    order = np.random.default_rng(seed).permutation(len(figures))
    first, rest = np.split(order, [math.ceil(_PROPOSES * len(figures))])
    # Lower coverages could not pass; which ones is decided without a look at the rest's labels.
    least = min(fewest / len(rest), 1)
    thresholds = np.quantile(
        figures[first], np.linspace(least, 1, _THRESHOLDS), method="inverted_cdf"
    )
    accepts = figures[rest][None] <= thresholds[:, None]  # (thresholds, tested)
    accepted = accepts.sum(axis=1)
    errors = (accepts & flags[rest][None]).sum(axis=1)
    passed = _fixed_sequence(accepted.tolist(), errors.tolist(), risk, level)
    if passed is None:
        return Rule(
            threshold=None, risk=risk, delta=delta, accepted=0, errors=0, bound=1.0,
            proposed_on=len(first), tested=len(rest),
        )  # fmt: skip
    k, n = int(errors[passed]), int(accepted[passed])
    return Rule(
        threshold=float(thresholds[passed]),
        risk=risk,
        delta=delta,
        accepted=n,
        errors=k,
        bound=clopper_pearson_upper(k, n, level),
        proposed_on=len(first),
        tested=len(rest),
    )


def _fixed_sequence(
    accepted: list[int], errors: list[int], risk: float, level: float
) -> int | None:
    """The last threshold that passes: from each start on, until one does not (algorithm 1)."""
    best = None
    for start in range(0, len(accepted), len(accepted) // _STARTS):
        for place in range(start, len(accepted)):
            if binomial_tail(errors[place], accepted[place], risk) > level:
                break
            best = place if best is None else max(best, place)
    return best


def binomial_tail(k: int, n: int, p: float) -> float:
    """Probability of at most `k` errors among `n` when each has probability `p`."""
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    i = np.arange(k + 1)
    logs = _log_factorials(n)
    terms = logs[n] - logs[i] - logs[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    highest = float(terms.max())
    return min(1.0, math.exp(highest) * float(np.exp(terms - highest).sum()))


def clopper_pearson_upper(errors: int, n: int, delta: float) -> float:
    """The highest error rate at which `errors` or fewer of `n` have probability `delta`.

    Raises:
        RequestError: `errors` is not within 0 to n, or `delta` no share.
    """
    check_share(delta, "delta")
    if not 0 <= errors <= n:
        raise RequestError(f"{errors} errors among {n}: give 0 to {n}")
    if errors == n:
        return 1.0
    low, high = errors / n, 1.0
    for _ in range(60):  # halvings: beyond the precision of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(errors, n, middle) > delta else (low, middle)
    return high


_FACTORIALS: list[Float64] = [np.zeros(1)]


def _log_factorials(n: int) -> Float64:
    """Logarithms of 0!, 1! ... n! and on; kept, and made anew when `n` outgrows them."""
    if len(_FACTORIALS[0]) <= n:
        size = max(2 * len(_FACTORIALS[0]), n + 1)
        _FACTORIALS[0] = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size)))])
    return _FACTORIALS[0]
