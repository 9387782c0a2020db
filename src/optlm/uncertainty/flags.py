"""Warnings about an answer, each with what it rests on: which statistic, which threshold, and how
that threshold was found. None of them knows what is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optlm.errors import RequestError, did_you_mean
from optlm.uncertainty.stored import StoredRule

__all__ = ["Flag", "flags"]


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One statistic against one threshold.

    Attributes:
        raised: the statistic is above it: the answer may be made up.
        basis: what the threshold rests on.
    """

    estimator: str
    value: float
    threshold: float | None
    raised: bool
    basis: str


def flags(
    figures: Mapping[str, float],
    *,
    rules: Sequence[StoredRule] = (),
    thresholds: Mapping[str, float] | None = None,
) -> list[Flag]:
    """Compare an answer's figures with rules that were learned, and with thresholds of the user's.

    Raises:
        RequestError: a rule or threshold of a statistic that was not computed.
    """
    found = []
    for rule in rules:
        value = _value(figures, rule.estimator)
        found.append(
            Flag(
                estimator=rule.estimator,
                value=value,
                threshold=rule.rule.threshold,
                raised=not rule.rule.answers(value),
                basis=rule.basis,
            )
        )
    for name, threshold in (thresholds or {}).items():
        value = _value(figures, name)
        found.append(
            Flag(
                estimator=name,
                value=value,
                threshold=threshold,
                raised=value > threshold,
                basis=f"{name} against a threshold of {threshold:.4g} that you gave; it was not "
                "calibrated, so it says nothing of how often such answers are wrong",
            )
        )
    return found


def _value(figures: Mapping[str, float], name: str) -> float:
    if name not in figures:
        raise RequestError(
            f"there is no statistic {name!r} of this answer{did_you_mean(name, figures)}; "
            f"there are {', '.join(figures)}"
        )
    return figures[name]
