"""Which uncertainty knows when the model is wrong? Estimators side by side on items whose answers
are known; one that does not beat the plain entropy of the answer's tokens is reported so.

Letters: N items, C choices. Every figure is high where an error is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optlm.errors import RequestError
from optlm.score import Scorer
from optlm.uncertainty.answers import Continuation, continuation, normal
from optlm.uncertainty.asking import BASELINE, ask, doubts_of_truth, token_figures
from optlm.uncertainty.checks import as_figures, both_classes
from optlm.uncertainty.items import Item
from optlm.uncertainty.measures import measure
from optlm.uncertainty.ranking import Ranking, auroc_resampled, rank_errors, resampling
from optlm.uncertainty.reading import Float64, Progress

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = [
    "BASELINE", "Judged", "Row", "Scoring", "choice_probabilities", "judge_answers",
    "judge_choices", "report",
]  # fmt: skip

Scoring = Literal["total", "token", "byte"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """A model's answers to items, what was wrong, and how unsure each estimator was.

    Attributes:
        wrong: (N,).
        figures: by estimator, each (N,).
        asked: tokens of prompt and answer, for further estimators.
        texts: the answers.
        scores: of all choices (C,) for each item; None where the model wrote its answers.
    """

    wrong: NDArray[np.bool_]
    figures: dict[str, Float64]
    asked: list[Continuation]
    texts: list[str]
    scores: list[Float64] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One estimator's line of a report.

    Attributes:
        difference, low, high: AUROC less the baseline's, and the bootstrap interval of that
            difference over items (95 %), resampled in pairs.
        verdict: "beats entropy" if the interval lies above 0, "worse than entropy" if below, else
            "does not beat entropy"; "baseline" for entropy itself.
    """

    estimator: str
    ranking: Ranking
    difference: float
    low: float
    high: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        values = {k: v for k, v in vars(self).items() if k != "ranking"}
        return {**values, **vars(self.ranking)}


def judge_choices(
    llm: LLM,
    items: Sequence[Item],
    *,
    scoring: Scoring = "total",
    temperature: float = 1.0,
    ask_true: bool = False,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> Judged:
    """Let the model choose the likeliest choice of each item.

    Args:
        scoring: log-likelihood of a choice as it is ("total"), a token, or a UTF-8 byte.
        temperature: divides the scores of the choices before they become probabilities.
        ask_true: also ask for p(true); another two short texts an item.
        progress: is told of choices that were read.

    Raises:
        RequestError: items without choices, or a text that cannot be read.
    """
    if not items or not all(item.choices for item in items):
        raise RequestError("items with choices are needed; these have none")
    scores = _choice_scores(llm, items, scoring, adapter, progress)
    best = [int(each.argmax()) for each in scores]
    texts = [item.choices[place] for item, place in zip(items, best, strict=True)]
    prompts = [item.prompt for item in items]
    asked = [continuation(llm, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    chosen = measure(
        llm, [each.ids for each in asked], last=[each.count for each in asked], adapter=adapter
    )
    found = {
        **_columns([token_figures(each) for each in chosen]),
        **_of_choices(scores, temperature),
    }
    if ask_true:
        found["p-true"] = np.array(doubts_of_truth(llm, prompts, texts, adapter=adapter))
    return Judged(
        wrong=np.array([place != item.gold for item, place in zip(items, best, strict=True)]),
        figures=found,
        asked=asked,
        texts=texts,
        scores=scores,
    )


def _choice_scores(
    llm: LLM,
    items: Sequence[Item],
    scoring: Scoring,
    adapter: str | None,
    progress: Progress,
) -> list[Float64]:
    """Scores of the choices (C,) of every item; a prompt is read once for all of its choices."""
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    read = iter(Scorer(llm, adapter=adapter).conditional(pairs, progress=progress))
    scores = []
    for item in items:
        own = [next(read) for _ in item.choices]
        sizes = {
            "total": [1] * len(own),
            "token": [len(each.token_ids) for each in own],
            "byte": [len(choice.encode()) for choice in item.choices],
        }[scoring]
        scores.append(np.array([each.total / n for each, n in zip(own, sizes, strict=True)]))
    return scores


def judge_answers(
    llm: LLM,
    items: Sequence[Item],
    *,
    samples: int = 10,
    max_tokens: int = 32,
    stop: str | Sequence[str] = "\n",
    seed: int = 0,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> Judged:
    """Let the model write an answer to each item, greedily, and samples of others.

    An answer is right if it is one of the item's, but for case, blanks and marks at its ends.

    Raises:
        RequestError: items without answers, fewer than 2 samples, or a text that cannot be read.
    """
    if not items or not all(item.answers for item in items):
        raise RequestError("items with answers are needed; these have none")
    answered = ask(
        llm, [item.prompt for item in items], samples=samples, max_tokens=max_tokens, stop=stop,
        seed=seed, adapter=adapter, progress=progress,
    )  # fmt: skip
    right = [
        normal(each.text) in {normal(answer) for answer in item.answers}
        for each, item in zip(answered, items, strict=True)
    ]
    return Judged(
        wrong=~np.array(right),
        figures=_columns([each.figures for each in answered]),
        asked=[each.asked for each in answered],
        texts=[each.text for each in answered],
    )


def choice_probabilities(scores: ArrayLike, temperature: float = 1.0) -> Float64:
    """softmax(scores / T) of the choices of one item (C,)."""
    scaled = np.asarray(scores, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    result: Float64 = weights / weights.sum()
    return result


def _columns(figures: Sequence[dict[str, float]]) -> dict[str, Float64]:
    return {name: np.array([each[name] for each in figures]) for name in figures[0]}


def _of_choices(scores: Sequence[Float64], temperature: float) -> dict[str, Float64]:
    probs = [np.sort(choice_probabilities(each, temperature))[::-1] for each in scores]
    return {
        "choice-probability": np.array([1 - p[0] for p in probs]),
        "choice-margin": np.array([p[1] - p[0] for p in probs]),
        "choice-entropy": np.array([-(p * np.log(np.maximum(p, 1e-300))).sum() for p in probs]),
    }


def report(judged: Judged, *, resamples: int = 1000, seed: int = 0) -> list[Row]:
    """Rank every estimator, and compare it with the entropy of the answer's tokens.

    Raises:
        RequestError: all answers right, all wrong, or a figure that is not finite.
    """
    both_classes(judged.wrong, "AUROC")
    weights = resampling(len(judged.wrong), resamples, seed)
    base = as_figures(judged.figures[BASELINE], BASELINE)
    baseline = auroc_resampled(base, judged.wrong, weights)
    reference = rank_errors(base, judged.wrong).auroc
    rows = []
    for name, values in judged.figures.items():
        ranking = rank_errors(as_figures(values, name), judged.wrong)
        apart = auroc_resampled(values, judged.wrong, weights) - baseline
        low, high = (float(value) for value in np.quantile(apart, [0.025, 0.975]))
        rows.append(
            Row(
                estimator=name,
                ranking=ranking,
                difference=ranking.auroc - reference,
                low=low,
                high=high,
                verdict=_verdict(name, low, high),
            )
        )
    return rows


def _verdict(name: str, low: float, high: float) -> str:
    if name == BASELINE:
        return "baseline"
    if low > 0:
        return "beats entropy"
    return "worse than entropy" if high < 0 else "does not beat entropy"
