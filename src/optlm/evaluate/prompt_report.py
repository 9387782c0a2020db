"""How far a prompt's accuracy hangs on choices that should not matter.

Orders, draws and templates of few-shot prompts move accuracy by tens of points, and models lean to
frequent and to late labels (Zhao et al. 2021, arXiv 2102.09690, section 4; Lu et al. 2022, arXiv
2104.08786). The report measures each of it for one task and model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optlm.engine.llm import LLM
from optlm.errors import RequestError
from optlm.evaluate.classify import Classification, Classifier, EngineLabels, LabelModel, Method
from optlm.evaluate.labels import Example, Template

__all__ = ["PromptReport", "Spread", "prompt_report"]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Accuracies of prompts that differ in one thing."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.accuracies) / len(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation of the sample; 0 for a single prompt."""
        if len(self.accuracies) < 2:
            return 0.0
        squares = math.fsum((value - self.mean) ** 2 for value in self.accuracies)
        return math.sqrt(squares / (len(self.accuracies) - 1))

    def __str__(self) -> str:
        low, high = min(self.accuracies), max(self.accuracies)
        return f"{self.mean:.3f} +- {self.deviation:.3f} (from {low:.3f} to {high:.3f})"


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """What prompts that should do equally well do.

    Attributes:
        orders, seeds, templates: spreads over orders of one draw of shots, over draws, and over
            templates.
        influence: of each shot of the first draw: the mean log-probability (nats) of the right
            labels with all shots, less that without it. Below 0 the shot does harm.
        label_bias: probability of each label after inputs without content.
        predicted, gold: share of each label among the answers, over all orders, and in truth.
        recency: how much likelier the label of the last shot is said than in other orders, as a
            share of the answers; 0 is none. NaN when all orders end in one label.
        num_texts, num_shots: what it rests on.
    """

    orders: Spread
    seeds: Spread
    templates: Spread
    influence: tuple[tuple[Example, float], ...]
    label_bias: dict[str, float]
    predicted: dict[str, float]
    gold: dict[str, float]
    recency: float
    num_texts: int
    num_shots: int

    def told(self) -> dict[str, Any]:
        """JSON form; what is undefined is null."""
        told = asdict(self)
        told["recency"] = None if math.isnan(self.recency) else self.recency
        return told

    def __str__(self) -> str:
        lines = [
            f"accuracy over orders     {self.orders}",
            f"accuracy over draws      {self.seeds}",
            f"accuracy over templates  {self.templates}",
            f"recency bias             {self.recency:+.3f}",
            "label  without content  predicted  in truth",
        ]
        lines += [
            f"{name!r}  {self.label_bias[name]:.3f}  {self.predicted[name]:.3f}  "
            f"{self.gold[name]:.3f}"
            for name in self.label_bias
        ]
        if self.influence:
            lines.append("influence of each shot (nats of the right label)")
        lines += [
            f"{value:+.4f}  {shot.label!r}  {shot.text[:60]!r}" for shot, value in self.influence
        ]
        return "\n".join(lines)


def prompt_report(
    model: LLM | LabelModel,
    labels: Sequence[str] | Mapping[str, str],
    items: Sequence[Example],
    *,
    pool: Sequence[Example],
    num_shots: int = 4,
    templates: Template | Sequence[Template] = Template(),  # noqa: B008
    orders: int = 6,
    seeds: int = 4,
    method: Method = "plain",
    seed: int = 0,
    terminator: str = "",
) -> PromptReport:
    """Measure how much orders, draws, templates and single shots change the answers.

    Args:
        items: texts whose labels are known.
        pool: what shots are drawn from; none of the items.
        orders, seeds: how many orders of the first draw, and how many draws.

    Raises:
        RequestError: nothing to measure, too small a pool, an item that is a shot, or a label that
            is none.
    """
    if not items:
        raise RequestError("there are no items; the report needs texts whose labels are known")
    if not 1 <= num_shots <= len(pool):
        raise RequestError(f"num_shots is {num_shots}; the pool has {len(pool)} examples")
    shared = {item.text for item in items} & {shot.text for shot in pool}
    if shared:
        raise RequestError(f"the text {min(shared)!r:.60} is among the items and in the pool")
    if orders < 1 or seeds < 1:
        raise RequestError(f"orders is {orders} and seeds is {seeds}; both must be at least 1")
    given = [templates] if isinstance(templates, Template) else list(templates)
    scorer = EngineLabels(model) if isinstance(model, LLM) else model

    def classifier(shots: Sequence[Example], template: Template | None = None) -> Classifier:
        return Classifier(
            scorer,
            labels,
            templates=template or given[0],
            shots=shots,
            method=method,
            terminator=terminator,
        )

    names = list(classifier(()).labels)
    unknown = [item.label for item in items if item.label not in names]
    if unknown:
        raise RequestError(f"an item has the label {unknown[0]!r}; labels: {', '.join(names)}")
    draw = random.Random(seed)
    draws = [tuple(draw.sample(pool, num_shots)) for _ in range(seeds)]
    ordered = _orders(draws[0], orders, draw)
    texts = [item.text for item in items]
    answers = [classifier(shots)(texts) for shots in ordered]
    first = answers[0]
    influence = []
    for place, shot in enumerate(draws[0]):
        rest = draws[0][:place] + draws[0][place + 1 :]
        without = classifier(rest)(texts)
        influence.append((shot, _support(first, items) - _support(without, items)))
    drawn = [first, *(classifier(shots)(texts) for shots in draws[1:])]
    templated = [first, *(classifier(draws[0], template)(texts) for template in given[1:])]
    return PromptReport(
        orders=Spread(accuracies=tuple(_accuracy(each, items) for each in answers)),
        seeds=Spread(accuracies=tuple(_accuracy(each, items) for each in drawn)),
        templates=Spread(accuracies=tuple(_accuracy(each, items) for each in templated)),
        influence=tuple(influence),
        label_bias=classifier(draws[0]).bias(),
        predicted=_shares([one.label for each in answers for one in each], names),
        gold=_shares([item.label for item in items], names),
        recency=_recency(ordered, answers),
        num_texts=len(items),
        num_shots=num_shots,
    )


def _orders(
    shots: tuple[Example, ...], count: int, draw: random.Random
) -> list[tuple[Example, ...]]:
    """The shots as drawn, then shuffled so that every label comes last in turn."""
    ordered = [shots]
    labels = list(dict.fromkeys(shot.label for shot in reversed(shots)))
    for number in range(1, count):
        wanted = labels[number % len(labels)]
        last = draw.choice([place for place, shot in enumerate(shots) if shot.label == wanted])
        others = [shot for place, shot in enumerate(shots) if place != last]
        ordered.append((*draw.sample(others, len(others)), shots[last]))
    return ordered


def _accuracy(answers: Sequence[Classification], items: Sequence[Example]) -> float:
    return sum(a.label == i.label for a, i in zip(answers, items, strict=True)) / len(items)


def _support(answers: Sequence[Classification], items: Sequence[Example]) -> float:
    """Mean log-probability of the right labels."""
    logs = [
        math.log(max(answer.probabilities[item.label], 1e-300))
        for answer, item in zip(answers, items, strict=True)
    ]
    return math.fsum(logs) / len(logs)


def _shares(said: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    return {name: said.count(name) / len(said) for name in names}


def _recency(
    ordered: Sequence[tuple[Example, ...]], answers: Sequence[Sequence[Classification]]
) -> float:
    """Mean over labels: share of a label where it comes last, less its share where it does not."""
    last = [shots[-1].label for shots in ordered]
    shares = [[one.label for one in each] for each in answers]
    gains = []
    for label in dict.fromkeys(last):
        ends = [
            s.count(label) / len(s) for s, end in zip(shares, last, strict=True) if end == label
        ]
        other = [
            s.count(label) / len(s) for s, end in zip(shares, last, strict=True) if end != label
        ]
        if other:
            gains.append(sum(ends) / len(ends) - sum(other) / len(other))
    return math.fsum(gains) / len(gains) if gains else math.nan
