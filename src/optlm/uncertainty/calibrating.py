"""Find a temperature on one half of the data and tell on the other half what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optlm.errors import RequestError
from optlm.uncertainty.calibration import Reliability, reliability
from optlm.uncertainty.evaluation import Scoring, choice_probabilities, judge_choices
from optlm.uncertainty.items import Item
from optlm.uncertainty.measures import measure
from optlm.uncertainty.reading import Float64, Progress, as_ids
from optlm.uncertainty.temperature import choice_derivatives, fit_choices, fit_tokens

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["Calibrated", "calibrate_choices", "calibrate_tokens"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibrated:
    """A temperature, and the figures of data it was not found on, before and after.

    Attributes:
        nll_before, nll_after: mean negative log-likelihood, nats.
        fitted_on, held_out: texts or items of each half.
    """

    temperature: float
    nll_before: float
    nll_after: float
    before: Reliability
    after: Reliability
    fitted_on: int
    held_out: int

    def figures(self) -> tuple[dict[str, float], dict[str, float]]:
        """What is worth keeping of both sides: nll, ece, and its interval."""
        pairs = ((self.nll_before, self.before), (self.nll_after, self.after))
        before, after = (
            {"nll": nll, "ece": each.ece, "ece_low": each.low, "ece_high": each.high}
            for nll, each in pairs
        )
        return before, after


def calibrate_tokens(
    llm: LLM,
    texts: Sequence[str],
    *,
    bins: int = 15,
    seed: int = 0,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> Calibrated:
    """Calibrate the probability of the likeliest next token, over all tokens of the texts.

    Intervals resample whole texts, since the tokens of one depend on each other.

    Raises:
        RequestError: fewer than 4 texts, an empty one, or data that bound no temperature.
    """
    first, rest = _halves(len(texts), seed, "texts")
    sequences = [as_ids(llm, text) for text in texts]
    fitting = [sequences[i] for i in first]
    temperature = fit_tokens(llm, fitting, adapter=adapter, progress=progress)
    groups = np.concatenate([np.full(len(sequences[i]) - 1, i) for i in rest])
    sides: list[tuple[float, Reliability]] = []
    for each in (1.0, temperature):
        held = measure(llm, [sequences[i] for i in rest], temperature=each, adapter=adapter)
        progress(1)
        confidence = np.concatenate([m.top_prob for m in held])
        correct = np.concatenate([m.top_id == m.token_ids for m in held])
        nll = -float(np.concatenate([m.logprob for m in held]).mean())
        found = reliability(
            np.minimum(confidence, 1.0), correct, groups=groups, bins=bins, seed=seed
        )
        sides.append((nll, found))
    return _calibrated(temperature, sides, first, rest)


def calibrate_choices(
    llm: LLM,
    items: Sequence[Item],
    *,
    scoring: Scoring = "total",
    bins: int = 15,
    seed: int = 0,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> Calibrated:
    """Calibrate the probability of the chosen choice among those of its item.

    Raises:
        RequestError: fewer than 4 items, items without choices, or data that bound no temperature.
    """
    first, rest = _halves(len(items), seed, "items")
    judged = judge_choices(llm, items, scoring=scoring, adapter=adapter, progress=progress)
    assert judged.scores is not None
    scores: list[Float64] = judged.scores
    gold = [item.gold for item in items]
    temperature = fit_choices([scores[i] for i in first], [gold[i] for i in first])
    loss = choice_derivatives([scores[i] for i in rest], [gold[i] for i in rest])
    sides = []
    for each in (1.0, temperature):
        confidence = [choice_probabilities(scores[i], each).max() for i in rest]
        found = reliability(np.minimum(confidence, 1.0), ~judged.wrong[rest], bins=bins, seed=seed)
        sides.append((loss(1 / each).nll, found))
    return _calibrated(temperature, sides, first, rest)


def _halves(count: int, seed: int, what: str) -> tuple[list[int], list[int]]:
    if count < 4:
        raise RequestError(
            f"{count} {what} are too few: one half finds the temperature, the other tells what it "
            "is worth; give at least 4, best hundreds"
        )
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def _calibrated(
    temperature: float,
    sides: Sequence[tuple[float, Reliability]],
    first: Sequence[int],
    rest: Sequence[int],
) -> Calibrated:
    (nll_before, before), (nll_after, after) = sides
    return Calibrated(
        temperature=temperature,
        nll_before=nll_before,
        nll_after=nll_after,
        before=before,
        after=after,
        fitted_on=len(first),
        held_out=len(rest),
    )
