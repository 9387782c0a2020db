"""Texts as the model holds them inside: mean hidden states, and their distance from known texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optlm.uncertainty.answers import Continuation
from optlm.uncertainty.distance import Distance, fit_distance
from optlm.uncertainty.reading import Float64, as_ids

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["by_distance", "hidden_states", "reference_distance"]


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
