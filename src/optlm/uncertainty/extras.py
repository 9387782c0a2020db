"""Estimators that need more than the model itself: others beside it, or dropout.

Each gives one figure for an answer, the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from optlm.uncertainty.answers import Continuation
from optlm.uncertainty.ensemble import Disagreement, Member, disagree
from optlm.uncertainty.reading import Float64

__all__ = ["by_dropout", "by_ensemble"]


def by_ensemble(members: Sequence[Member], asked: Sequence[Continuation]) -> Float64:
    """Mean mutual information of the answers' tokens among the members."""
    return _means(disagree(members, [each.ids for each in asked]), asked)


def by_dropout(
    model: str | Path | None,
    asked: Sequence[Continuation],
    *,
    rate: float,
    passes: int = 10,
    seed: int = 0,
) -> Float64:
    """Mean mutual information of the answers' tokens among passes with dropout; needs PyTorch."""
    from optlm.assets import bundled_model
    from optlm.model import OPT
    from optlm.uncertainty.dropout import disagree_by_dropout

    reference = OPT.from_checkpoint(bundled_model() if model is None else model)
    sequences = [each.ids for each in asked]
    found = disagree_by_dropout(reference, sequences, passes=passes, rate=rate, seed=seed)
    return _means(found, asked)


def _means(found: Sequence[Disagreement], asked: Sequence[Continuation]) -> Float64:
    return np.array(
        [
            each.last(answer.count).mutual_information.mean()
            for each, answer in zip(found, asked, strict=True)
        ]
    )
