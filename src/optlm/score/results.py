"""What the `Scorer` hands back. Log-probabilities are natural, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from optlm.score.convention import Convention
from optlm.score.spans import Token

__all__ = [
    "ContinuationScore",
    "DocumentScore",
    "PairScore",
    "ScoredText",
    "SpanScore",
    "WindowScore",
    "document",
    "exp_or_inf",
    "mean_perplexity",
    "window_weights",
]


class WindowScore(NamedTuple):
    """One window of a text: its scored tokens, their sum, and how much "sliding" counts it."""

    num_scored: int
    total: float
    weight: int


class SpanScore(NamedTuple):
    """A word, sentence or byte: bytes [start, end) of the text, and its log-probability.

    `logprob` is None where one of its tokens is not scored.
    """

    text: str
    start: int
    end: int
    logprob: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredText:
    """A text with the log-probability of each token given those before it.

    Attributes:
        text: as given; None when token ids were given.
        tokens: what the model read, with the bytes each stands for; the start token has none.
        logprobs: one a token; None for what the convention does not score.
        greedy: whether each token is the likeliest in its place (of equals, the lowest id).
        word_starts: log-probability that a word begins (or the text ends) before each token, and
            after the last; None unless asked for, or where nothing precedes.
        byte_logprobs: of each byte of each token; None unless asked for. They sum to the token's.
        windows: in order.
        convention: resolved for the model.
    """

    text: str | None
    tokens: list[Token]
    logprobs: list[float | None]
    greedy: list[bool | None]
    windows: list[WindowScore]
    convention: Convention
    word_starts: list[float | None] | None = None
    byte_logprobs: list[list[float] | None] | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def scored(self) -> list[float]:
        """The log-probabilities that there are."""
        return [value for value in self.logprobs if value is not None]

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(self.scored)

    @property
    def num_scored(self) -> int:
        return len(self.scored)

    @property
    def mean(self) -> float:
        """Log-probability a scored token; NaN when there is none."""
        return self.total / self.num_scored if self.num_scored else math.nan

    @property
    def is_greedy(self) -> bool:
        """Whether every scored token is the likeliest in its place."""
        return all(value for value in self.greedy if value is not None)

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8; of token ids, the bytes they stand for."""
        return self.tokens[-1].end if self.text is None else len(self.text.encode())

    @property
    def num_words(self) -> int:
        """Runs of characters between white space."""
        text = self.text
        if text is None:
            text = b"".join(token.bytes for token in self.tokens).decode("utf-8", "replace")
        return len(text.split())

    @property
    def perplexity(self) -> float:
        """By the convention's average; NaN when nothing is scored."""
        return mean_perplexity(self.windows, self.convention)


@dataclass(frozen=True, kw_only=True, eq=False)
class ContinuationScore:
    """A continuation given a context.

    Attributes:
        token_ids: its tokens.
        logprobs: one a token.
        greedy: whether each is the likeliest in its place.
        unconditional: the log-probability of the continuation after the reference context, when
            one was given.
    """

    context: str | None
    continuation: str | None
    token_ids: list[int]
    logprobs: list[float]
    greedy: list[bool]
    unconditional: float | None = None

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        return self.total / len(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding of the context would give this continuation."""
        return all(self.greedy)

    @property
    def num_bytes(self) -> int:
        return len((self.continuation or "").encode())

    @property
    def information(self) -> float:
        """Log-probability given the context less that without it (pointwise mutual information)."""
        return math.nan if self.unconditional is None else self.total - self.unconditional


@dataclass(frozen=True, kw_only=True, eq=False)
class PairScore:
    """A minimal pair: right when the good sentence is likelier as a whole."""

    good: ScoredText
    bad: ScoredText

    @property
    def margin(self) -> float:
        """Log-probability of the good sentence less that of the bad one."""
        return self.good.total - self.bad.total

    @property
    def is_right(self) -> bool:
        return self.margin > 0


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """Sums over texts, and the figures that are made of them; NaN where they are undefined."""

    num_texts: int
    num_tokens: int
    num_words: int
    num_bytes: int
    total: float
    perplexity: float

    @property
    def bits_per_byte(self) -> float:
        return -self.total / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan

    @property
    def word_perplexity(self) -> float:
        return exp_or_inf(-self.total / self.num_words) if self.num_words else math.nan

    @property
    def byte_perplexity(self) -> float:
        return exp_or_inf(-self.total / self.num_bytes) if self.num_bytes else math.nan

    def told(self) -> dict[str, Any]:
        """JSON form; undefined figures are null."""
        figures = {
            "nll": -self.total,
            "tokens": self.num_tokens,
            "words": self.num_words,
            "bytes": self.num_bytes,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": self.byte_perplexity,
        }
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def document(texts: Sequence[ScoredText]) -> DocumentScore:
    """The texts as one; they share a convention."""
    windows = [window for text in texts for window in text.windows]
    return DocumentScore(
        num_texts=len(texts),
        num_tokens=sum(text.num_scored for text in texts),
        num_words=sum(text.num_words for text in texts),
        num_bytes=sum(text.num_bytes for text in texts),
        total=math.fsum(text.total for text in texts),
        perplexity=mean_perplexity(windows, texts[0].convention) if texts else math.nan,
    )


def window_weights(windows: Sequence[WindowScore], convention: Convention) -> list[float]:
    """How much each window's mean counts in the convention's average."""
    if convention.average == "tokens":
        return [float(window.num_scored) for window in windows]
    if convention.average == "windows":
        return [1.0 for _ in windows]
    return [float(window.weight) for window in windows]


def mean_perplexity(windows: Sequence[WindowScore], convention: Convention) -> float:
    """Perplexity as the convention averages it; NaN when nothing is scored."""
    weights = window_weights(windows, convention)
    whole = sum(weights)
    if not whole:
        return math.nan
    means = [window.total / window.num_scored for window in windows]
    return exp_or_inf(-math.fsum(m * w for m, w in zip(means, weights, strict=True)) / whole)


def exp_or_inf(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf  # the largest double is exp(709.78)
