"""What the engine hands back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Completion", "EmbedOutput", "RequestOutput", "ScoreOutput", "StreamOutput", "TokenLogprobs",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLogprobs:
    """Log-probabilities of one position under the model alone, before any sampling option.

    Attributes:
        token_id: the token that stands there.
        logprob: its natural log-probability.
        rank: 1 for the likeliest token.
        top_ids: the likeliest tokens, best first (ties: lowest id); all ids in order when the whole
            vocabulary was asked for.
        top_logprobs: theirs.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float64]

    def top(self) -> dict[int, float]:
        """The same as a mapping from token id."""
        return dict(zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One output of a prompt.

    Attributes:
        finish_reason: "stop" (``</s>``, a stop string or stop id), "length" (`max_tokens` or the
            context is full) or "abort".
        stop_reason: the stop string or stop id, or None.
        logprobs: one entry a token, when asked for.
        cumulative_logprob: sum over the tokens, when `logprobs`, `best_of` or a search made it
            known.
        score: what beam search ranks by.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """The result of one prompt; `text`, `token_ids` and so on are the first output's.

    Attributes:
        prompt: the text as given; None when token ids were given.
        prompt_token_ids: what the model read, after `num_truncated_tokens` were cut off.
        prompt_logprobs: one entry a prompt token, None for the first, when asked for.
        seed: key of the random numbers, given or drawn; None when nothing was random.
        num_cached_tokens: prompt tokens whose keys and values were already in the cache.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    seed: int | None = None
    num_cached_tokens: int = 0
    num_truncated_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason


@dataclass(frozen=True, kw_only=True)
class StreamOutput:
    """An increment of one output; the texts of an output join to its final text.

    Attributes:
        index: which of the `n` outputs.
        token_ids: tokens since the last increment; their text may come later (half characters, stop
            strings).
        finish_reason: set on the last increment of the output, with its `stop_reason`.
        result: everything, on the very last increment of the request.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    result: RequestOutput | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbedOutput:
    """One vector of a text.

    Attributes:
        text: as given; None when token ids were given.
        token_ids: what the model read, a text's start token included.
        vector: (E,), E the width of the token embeddings; not normalised.
    """

    text: str | None
    token_ids: list[int]
    vector: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ScoreOutput:
    """Log-probabilities of the tokens of a text.

    Attributes:
        text: as given; None when token ids were given.
        logprobs: natural logarithms, one a token; None for the first, which nothing precedes.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float | None]

    @property
    def num_scored(self) -> int:
        return sum(value is not None for value in self.logprobs)

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability a scored token; NaN when none is scored."""
        if not self.num_scored:
            return math.nan
        mean = -self.total / self.num_scored
        return math.exp(mean) if mean < 709 else math.inf  # the largest double is exp(709.78)

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8; 0 when only token ids were given."""
        return len(self.text.encode()) if self.text else 0

    @property
    def bits_per_byte(self) -> float:
        """Bits a UTF-8 byte of the text; NaN when the text is unknown or empty."""
        return -self.total / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan
