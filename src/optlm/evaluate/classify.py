"""`classify`: choose among labels by their likelihood after a prompt with shots.

The methods:

* "plain": the log-probability of the whole label.
* "mean": the same a token, for labels of different lengths.
* "calibrated": contextual calibration. Probabilities over the labels are divided by those after
  inputs without content and normalized again (Zhao et al. 2021, arXiv 2102.09690, section 5).
* "pmi": the log-probability less that of the label after the template without a text, which takes
  off how common a label is by itself (Holtzman et al. 2021, arXiv 2104.08315, section 3).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from optlm.engine.llm import LLM
from optlm.errors import ContextLengthError, RequestError
from optlm.evaluate.labels import Example, Template, verbalized
from optlm.score import Scorer

__all__ = ["Classification", "Classifier", "LabelModel", "Method", "classify"]

Method = Literal["plain", "mean", "calibrated", "pmi"]

CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al., section 5


class LabelModel(Protocol):
    """What classification asks of a model."""

    @property
    def context(self) -> int:
        """Most tokens of a prompt with its label."""

    def count(self, text: str) -> int:
        """Tokens of a text, the start token among them."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Log-probability (nats) and tokens of each label after its prompt."""


class EngineLabels:
    """A `LabelModel` over an `LLM`; what prompts begin with is computed once."""

    def __init__(self, llm: LLM) -> None:
        self.scorer = Scorer(llm)
        self.context = llm.config.max_position_embeddings

    def count(self, text: str) -> int:
        return len(self.scorer.tokenizer.encode(text, add_bos=True))

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        scored = self.scorer.conditional(pairs)
        return [(each.total, len(each.token_ids)) for each in scored]


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One text's label.

    Attributes:
        probabilities: by label, over all members of the ensemble; they sum to 1.
        members: the same of each member: a template with an order of the shots.
        num_shots: the fewest shots that fitted beside the text.
    """

    text: str
    label: str
    probabilities: dict[str, float]
    members: tuple[dict[str, float], ...]
    num_shots: int

    @property
    def agreement(self) -> float:
        """Share of the members that choose this label."""
        return sum(_best(member) == self.label for member in self.members) / len(self.members)


class _Member(NamedTuple):
    template: Template
    shots: tuple[Example, ...]


class Classifier:
    """A choice among labels with one prompt, or an ensemble of them.

    Args:
        model: an engine, or anything that scores labels.
        labels: names, or names with the text that stands for each.
        templates: one or several; their probabilities are averaged.
        shots: labelled examples. Those that do not fit beside a text are left out, whole and the
            first ones first; the text itself is never cut.
        method: see the module.
        orders: orders of the shots whose probabilities are averaged: as given, then shuffled.
        seed: of the shuffles.
        terminator: put after each label.
        domain: of "pmi": the context of a label by itself; default what the template has after the
            text.
        content_free: of "calibrated": the inputs without content.

    Raises:
        RequestError: labels, templates, shots or numbers that make no sense.
    """

    def __init__(
        self,
        model: LLM | LabelModel,
        labels: Sequence[str] | Mapping[str, str],
        *,
        templates: Template | Sequence[Template] = Template(),  # noqa: B008
        shots: Sequence[Example] = (),
        method: Method = "plain",
        orders: int = 1,
        seed: int = 0,
        terminator: str = "",
        domain: str | None = None,
        content_free: Sequence[str] = CONTENT_FREE,
    ) -> None:
        self.model: LabelModel = EngineLabels(model) if isinstance(model, LLM) else model
        self.labels = verbalized(labels, terminator)
        self.method = method
        self._domain = domain
        self._content_free = tuple(content_free)
        self._baselines: dict[tuple[Template, tuple[Example, ...]], list[float]] = {}
        if method not in get_args(Method):
            raise RequestError(f"method is {method!r}; use one of {', '.join(get_args(Method))}")
        if isinstance(orders, bool) or not isinstance(orders, int) or orders < 1:
            raise RequestError(f"orders is {orders!r}; it must be a whole number from 1")
        if method == "calibrated" and not self._content_free:
            raise RequestError("content_free is empty; calibration needs an input without content")
        given = [templates] if isinstance(templates, Template) else list(templates)
        if not given:
            raise RequestError("templates is empty; give at least one")
        for shot in shots:
            if shot.label not in self.labels:
                raise RequestError(
                    f"a shot has the label {shot.label!r}; labels: {', '.join(self.labels)}"
                )
        draw = random.Random(seed)
        ordered = [tuple(shots)]
        ordered += [tuple(draw.sample(shots, len(shots))) for _ in range(orders - 1)]
        self._members = [_Member(t, o) for t in given for o in dict.fromkeys(ordered)]

    def __call__(self, texts: Sequence[str]) -> list[Classification]:
        """Label each text.

        Raises:
            RequestError: a text is empty.
            ContextLengthError: a text does not fit into the context by itself.
        """
        for number, text in enumerate(texts):
            if not text.strip():
                raise RequestError(f"text {number} is empty; there is nothing to classify")
        packed = [[self._pack(member, text) for member in self._members] for text in texts]
        prompts = [
            self.prompt(member, text)
            for text, members in zip(texts, packed, strict=True)
            for member in members
        ]
        scored = iter(self._totals(prompts))
        found = []
        for text, members in zip(texts, packed, strict=True):
            probabilities = [self._probabilities(member, next(scored)) for member in members]
            mean = {
                name: math.fsum(each[name] for each in probabilities) / len(probabilities)
                for name in self.labels
            }
            found.append(
                Classification(
                    text=text,
                    label=_best(mean),
                    probabilities=mean,
                    members=tuple(probabilities),
                    num_shots=min(len(member.shots) for member in members),
                )
            )
        return found

    def prompt(self, member: _Member, text: str) -> str:
        """What the labels are scored after."""
        template = member.template
        shown = [template.query(shot.text) + self.labels[shot.label] for shot in member.shots]
        head = [template.instruction] if template.instruction else []
        return template.between.join([*head, *shown, template.query(text)])

    def bias(self) -> dict[str, float]:
        """Probabilities of the labels after inputs without content, all shots before them."""
        member = self._members[0]
        found = self._baseline("calibrated", self._pack(member, max(self._content_free, key=len)))
        return dict(zip(self.labels, found, strict=True))

    # ---- inside --------------------------------------------------------------------------------

    def _pack(self, member: _Member, text: str) -> _Member:
        """The member with its last shots, as many as fit beside the text."""
        longest = max(self.labels.values(), key=self.model.count)
        for dropped in range(len(member.shots) + 1):
            fitting = _Member(member.template, member.shots[dropped:])
            needed = self.model.count(self.prompt(fitting, text) + longest)
            if needed <= self.model.context:
                return fitting
        raise ContextLengthError(
            f"the text {text!r:.60} takes {needed} tokens in its template, without shots; the "
            f"model's context holds {self.model.context}. Shorten it: a query is never cut"
        )

    def _totals(self, prompts: Sequence[str]) -> list[list[tuple[float, int]]]:
        """Of each prompt, the score of every label."""
        pairs = [(prompt, label) for prompt in prompts for label in self.labels.values()]
        flat = self.model.score(pairs)
        width = len(self.labels)
        return [flat[begin : begin + width] for begin in range(0, len(flat), width)]

    def _probabilities(self, member: _Member, scored: list[tuple[float, int]]) -> dict[str, float]:
        totals = [total for total, _ in scored]
        if self.method == "mean":
            totals = [total / count for total, count in scored]
        elif self.method == "pmi":
            alone = self._baseline("pmi", member)
            totals = [a - b for a, b in zip(totals, alone, strict=True)]
        elif self.method == "calibrated":
            free = self._baseline("calibrated", member)
            totals = [a - math.log(b) for a, b in zip(totals, free, strict=True)]
        return dict(zip(self.labels, _softmax(totals), strict=True))

    def _baseline(self, kind: str, member: _Member) -> list[float]:
        """Of each label: nats after the domain ("pmi"); probability after no content."""
        key = (member.template, member.shots if kind == "calibrated" else ())
        if key not in self._baselines:
            if kind == "pmi":
                domain = member.template.domain if self._domain is None else self._domain
                (scored,) = self._totals([domain])
                self._baselines[key] = [total for total, _ in scored]
            else:
                prompts = [self.prompt(member, text) for text in self._content_free]
                rows = [_softmax([t for t, _ in row]) for row in self._totals(prompts)]
                self._baselines[key] = [
                    max(math.fsum(column) / len(rows), 1e-12) for column in zip(*rows, strict=True)
                ]
        return self._baselines[key]


def classify(
    texts: str | Sequence[str],
    labels: Sequence[str] | Mapping[str, str],
    *,
    llm: LLM | None = None,
    templates: Template | Sequence[Template] = Template(),  # noqa: B008
    shots: Sequence[Example] = (),
    method: Method = "plain",
    orders: int = 1,
    seed: int = 0,
    terminator: str = "",
) -> list[Classification]:
    """Choose a label for each text by its likelihood after a prompt; `Classifier` tells more.

    Args:
        llm: an engine; the bundled model when None.

    Raises:
        RequestError: labels, templates, shots or numbers that make no sense, or an empty text.
        ContextLengthError: a text does not fit into the context by itself.
    """
    classifier = Classifier(
        LLM() if llm is None else llm,
        labels,
        templates=templates,
        shots=shots,
        method=method,
        orders=orders,
        seed=seed,
        terminator=terminator,
    )
    return classifier([texts] if isinstance(texts, str) else texts)


def _best(probabilities: Mapping[str, float]) -> str:
    return max(probabilities, key=lambda name: probabilities[name])


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    raised = [math.exp(value - top) for value in values]
    return [value / math.fsum(raised) for value in raised]
