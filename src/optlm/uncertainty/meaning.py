"""Semantic entropy: uncertainty over meanings, not over wordings.

Kuhn et al. 2023 (arXiv 2302.09664) and Farquhar et al. 2024 (Nature 630) draw answers, group those
that entail each other, and take the entropy over groups. They ask a second model about entailment.
Here the model itself is asked: an answer that means the same makes the other one likelier when both
stand under the same question.

    gain(i -> j) = log p(answer j | question, answer i, question) - log p(answer j | question)

A gain is measured against that of answer j's own repetition; answers are of one meaning when both
shares reach `_SHARE`, and groups are what such pairs connect.

Letters: N different answers, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optlm.uncertainty.answers import Samples, likelihoods, normal
from optlm.uncertainty.reading import Float64

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["Meanings", "group", "meanings", "mutual_shares"]

_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Meanings:
    """Samples in groups of one meaning.

    Attributes:
        groups: each sample's group, numbered by first appearance.
        entropy: over the groups, each as probable as its different answers together (of those
            drawn), nats.
        discrete: over the groups by their counts alone, nats.
    """

    groups: list[int]
    entropy: float
    discrete: float

    @property
    def count(self) -> int:
        return max(self.groups) + 1


def meanings(
    llm: LLM, prompt: str, samples: Samples, *, share: float = _SHARE, adapter: str | None = None
) -> Meanings:
    """Group samples of the answer to `prompt` by meaning; N x N texts are scored.

    Raises:
        RequestError: a prompt that, twice over, leaves no room for answers.
    """
    names = [normal(text) for text in samples.texts]
    first = {name: place for place, name in reversed(list(enumerate(names)))}
    different = sorted(first.values())
    texts = [samples.texts[place] for place in different]
    shares = mutual_shares(llm, prompt, texts, adapter=adapter)
    found = dict(zip((names[p] for p in different), group(shares, share), strict=True))
    groups = [found[name] for name in names]
    weights = np.zeros(max(groups) + 1)
    highest = max(samples.logprobs[place] for place in different)
    for place in different:
        weights[groups[place]] += math.exp(samples.logprobs[place] - highest)
    return Meanings(
        groups=groups, entropy=_entropy(weights), discrete=_entropy(np.bincount(groups))
    )


def mutual_shares(
    llm: LLM, prompt: str, texts: Sequence[str], *, adapter: str | None = None
) -> Float64:
    """How much of its own repetition's gain each answer's likelihood has from each other (N, N).

    Entry (i, j) is gain(i -> j) / gain(j -> j), and 0 where the model gains nothing even from a
    repetition, or where a text is empty.
    """
    full = [place for place, text in enumerate(texts) if text]
    answers = [_spaced(prompt, texts[place]) for place in full]
    asked = [(prompt, answer) for answer in answers]
    asked += [(f"{prompt}{before}\n{prompt}", answer) for before in answers for answer in answers]
    scores = np.array(likelihoods(llm, asked, adapter=adapter))
    alone, after = scores[: len(full)], scores[len(full) :].reshape(len(full), len(full))
    gains = after - alone
    own = np.diag(gains)
    table = np.zeros((len(texts), len(texts)))
    with np.errstate(divide="ignore", invalid="ignore"):
        table[np.ix_(full, full)] = np.where(own > 0, gains / own, 0.0)
    np.fill_diagonal(table, 1.0)
    return table


def _spaced(prompt: str, text: str) -> str:
    return text if not prompt or prompt[-1].isspace() else f" {text}"


def group(shares: Float64, threshold: float) -> list[int]:
    """Numbers of the groups that pairs with both shares at the threshold connect.

    The order of the answers changes nothing but the numbers.
    """
    linked = np.minimum(shares, shares.T) >= threshold
    groups = [-1] * len(shares)
    count = 0
    for start in range(len(shares)):
        if groups[start] >= 0:
            continue
        waiting = [start]
        while waiting:
            place = waiting.pop()
            if groups[place] < 0:
                groups[place] = count
                waiting += np.flatnonzero(linked[place]).tolist()
        count += 1
    return groups


def _entropy(weights: np.ndarray) -> float:
    """Shannon entropy of weights that need not sum to 1, nats."""
    probs = weights[weights > 0] / weights.sum()
    return max(0.0, -float((probs * np.log(probs)).sum()))
