"""p(true): the model is asked whether its own answer is true (Kadavath et al. 2022, arXiv
2207.05221, section 3). No label is read; what it says is the ratio of two likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optlm.errors import RequestError
from optlm.uncertainty.answers import likelihoods

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["p_true"]

_TRUE, _FALSE = " true", " false"


def p_true(
    llm: LLM,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    others: Sequence[Sequence[str]] | None = None,
    adapter: str | None = None,
) -> list[float]:
    """Probability of " true" against " false" after question and proposed answer, for each.

    Args:
        others: further answers to show first, such as samples ("brainstormed", section 3.2).

    Raises:
        RequestError: counts that differ, an empty answer, or a text beyond the context.
    """
    shown = [()] * len(questions) if others is None else others
    if not len(questions) == len(answers) == len(shown):
        raise RequestError(
            f"{len(questions)} questions, {len(answers)} answers and {len(shown)} lists of others; "
            "give as many of each"
        )
    asked = []
    for question, answer, more in zip(questions, answers, shown, strict=True):
        if not answer.strip():
            raise RequestError("the answer is empty; there is nothing to judge")
        prompt = _prompt(question, answer, more)
        asked += [(prompt, word) for word in (_TRUE, _FALSE)]
    scores = likelihoods(llm, asked, adapter=adapter)
    return [_ratio(*pair) for pair in zip(scores[::2], scores[1::2], strict=True)]


def _prompt(question: str, answer: str, others: Sequence[str]) -> str:
    lines = [question.strip()] if question.strip() else []
    if others:
        lines.append("Possible answers:")
        lines += [other.strip() for other in others]
    lines += [f"Proposed answer: {answer.strip()}", "The proposed answer is"]
    return "\n".join(lines)


def _ratio(true: float, false: float) -> float:
    """exp(true) / (exp(true) + exp(false)) without overflow."""
    return 0.5 * (1 + math.tanh((true - false) / 2))
