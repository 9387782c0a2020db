"""Prompts, the model's answers, and every figure about them that the model alone can give.

All figures are high where an error is to be expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optlm.engine.params import SamplingParams
from optlm.errors import RequestError
from optlm.uncertainty.answers import (
    Continuation,
    Samples,
    continuation,
    disagreement,
    sample,
)
from optlm.uncertainty.judgement import p_true
from optlm.uncertainty.meaning import Meanings, meanings
from optlm.uncertainty.measures import TokenMeasures, measure
from optlm.uncertainty.reading import Progress

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["BASELINE", "Answered", "ask", "doubts_of_truth", "token_figures"]

BASELINE = "entropy"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The greedy answer to one prompt.

    Attributes:
        text: as it follows the prompt.
        asked: tokens of prompt and answer.
        samples, meanings: other answers, and their groups.
        figures: by estimator.
    """

    text: str
    asked: Continuation
    samples: Samples
    meanings: Meanings
    figures: dict[str, float]


def ask(
    llm: LLM,
    prompts: Sequence[str],
    *,
    samples: int = 10,
    max_tokens: int = 32,
    stop: str | Sequence[str] = "\n",
    seed: int = 0,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> list[Answered]:
    """Answer prompts greedily, draw samples, group them by meaning, and measure all of it.

    Raises:
        RequestError: fewer than 2 samples, an empty prompt, or one that leaves no room to ask about
            the answer.
    """
    if not all(prompts):
        raise RequestError("a prompt is empty; there is nothing to answer")
    drawn = sample(
        llm, prompts, count=samples, max_tokens=max_tokens, stop=stop, seed=seed, adapter=adapter
    )
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop, adapter=adapter)
    # An answer that ends at once is the end of a line.
    texts = [output.text.rstrip() or "\n" for output in llm.generate(list(prompts), greedy)]
    asked = [continuation(llm, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    read = measure(
        llm, [each.ids for each in asked], last=[each.count for each in asked], adapter=adapter
    )
    doubts = doubts_of_truth(llm, prompts, texts, adapter=adapter)
    answered = []
    for i, prompt in enumerate(prompts):
        grouped = meanings(llm, prompt, drawn[i], adapter=adapter)
        figures = {
            **token_figures(read[i]),
            "disagreement": disagreement(drawn[i]),
            "semantic-entropy": grouped.entropy,
            "semantic-entropy-discrete": grouped.discrete,
            "p-true": doubts[i],
        }
        answered.append(
            Answered(
                text=texts[i], asked=asked[i], samples=drawn[i], meanings=grouped, figures=figures
            )
        )
        progress(1)
    return answered


def token_figures(answer: TokenMeasures) -> dict[str, float]:
    """Figures of an answer's own tokens."""
    return {
        BASELINE: float(answer.entropy.mean()),
        "likelihood": -answer.total,
        "normalised-likelihood": -answer.normalised,
        "margin": -float(answer.margin.mean()),
        "self-certainty": -float(answer.self_certainty.mean()),
    }


def doubts_of_truth(
    llm: LLM, prompts: Sequence[str], texts: Sequence[str], *, adapter: str | None = None
) -> list[float]:
    """1 - p(true) of each answer."""
    answers = [text.strip() or "nothing" for text in texts]
    return [1 - value for value in p_true(llm, prompts, answers, adapter=adapter)]
