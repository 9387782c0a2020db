"""Estimators that need more than the model itself: others beside it, dropout, or texts it knows.

Each gives one figure for an answer: the mean over its tokens, or a distance of the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optlm.uncertainty.answers import Continuation
from optlm.uncertainty.distance import Distance, fit_distance
from optlm.uncertainty.ensemble import Disagreement, Member, disagree
from optlm.uncertainty.reading import Float64, as_ids

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["by_distance", "by_dropout", "by_ensemble", "hidden_states", "reference_distance"]


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


def reference_distance(llm: LLM, texts: Sequence[str], *, adapter: str | None = None) -> Distance:
    """Where the mean hidden states of known texts lie."""
    return fit_distance(hidden_states(llm, [as_ids(llm, text) for text in texts], adapter=adapter))


def hidden_states(
    llm: LLM, sequences: Sequence[list[int]], *, adapter: str | None = None
) -> Float64:
    """Mean over the tokens of what the head reads of each text (texts, E).

    Raises:
        RequestError: a text beyond the context.
    """
    found = llm.embed(list(sequences), pooling="mean", adapter=adapter)
    return np.array([each.vector for each in found], np.float64)


def by_distance(
    llm: LLM, distance: Distance, asked: Sequence[Continuation], *, adapter: str | None = None
) -> Float64:
    """Squared distance of prompt and answer together from known texts."""
    return distance.of(hidden_states(llm, [each.ids for each in asked], adapter=adapter))
