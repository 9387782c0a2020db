"""What one distribution says about its own certainty, token by token, and about a whole text.

All figures come from the whole vocabulary, never from the likeliest few.
Letters: N tokens, R rows, V vocabulary. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optlm.engine.prompts import OnePrompt
from optlm.errors import RequestError
from optlm.uncertainty.reading import Float32, Float64, Ints, Progress, as_ids, read_rows

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["TokenMeasures", "check_temperature", "measure", "measure_rows", "tempered"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenMeasures:
    """Figures of the tokens of a text after its first, each an array (N,).

    Attributes:
        token_ids: the tokens.
        logprob: their log-probabilities.
        entropy: of the distribution that each comes from (Shannon), 0 to log V nats.
        margin: probability of the likeliest token less that of the second, 0 to 1.
        self_certainty: KL divergence of the uniform distribution from the model's, nats; high means
            sure (Kang et al. 2025, arXiv 2502.18581).
        rank: 1 where the token was the likeliest.
        top_id, top_prob: the likeliest token and its probability.
    """

    token_ids: Ints
    logprob: Float64
    entropy: Float64
    margin: Float64
    self_certainty: Float64
    rank: Ints
    top_id: Ints
    top_prob: Float64

    def __len__(self) -> int:
        return len(self.token_ids)

    def last(self, count: int) -> TokenMeasures:
        """The last `count` tokens alone: an answer after its prompt.

        Raises:
            RequestError: there are not as many, or `count` is not positive.
        """
        if not 0 < count <= len(self):
            raise RequestError(f"the last {count} of {len(self)} tokens: give 1 to {len(self)}")
        return TokenMeasures(**{name: value[-count:] for name, value in vars(self).items()})

    @property
    def total(self) -> float:
        """Log-likelihood of the text, nats."""
        return math.fsum(self.logprob)

    @property
    def normalised(self) -> float:
        """Log-likelihood a token, nats."""
        return self.total / len(self)

    def summary(self) -> dict[str, float]:
        """Figures of the whole text: its likelihoods, and the means of the others."""
        return {
            "tokens": len(self),
            "log_likelihood": self.total,
            "log_likelihood_per_token": self.normalised,
            "mean_entropy": float(self.entropy.mean()),
            "mean_margin": float(self.margin.mean()),
            "mean_self_certainty": float(self.self_certainty.mean()),
            "top_share": float((self.rank == 1).mean()),
        }


def measure(
    llm: LLM,
    texts: Sequence[OnePrompt],
    *,
    temperature: float = 1.0,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> list[TokenMeasures]:
    """Read texts (or lists of token ids) and measure every token after the first.

    Args:
        temperature: divides the logits first, such as one that `temperature.fit_tokens` found.
        adapter: name of a loaded adapter.

    Raises:
        RequestError: an empty text, one that cannot be read, a temperature out of range.
    """
    check_temperature(temperature)
    sequences = [as_ids(llm, text) for text in texts]
    parts: list[list[TokenMeasures]] = [[] for _ in sequences]
    for rows in read_rows(llm, sequences, adapter=adapter):
        parts[rows.text].append(measure_rows(tempered(rows.logprobs, temperature), rows.targets))
        if rows.position + len(rows.targets) == len(sequences[rows.text]):
            progress(1)
    return [_joined(each) for each in parts]


def check_temperature(temperature: float) -> None:
    """Refuse temperatures that are no positive number.

    Raises:
        RequestError: it is outside 0.01 to 100.
    """
    if not 0.01 <= temperature <= 100:
        raise RequestError(f"temperature is {temperature}; it must lie between 0.01 and 100")


def tempered(logprobs: Float32, temperature: float) -> Float32:
    """Log-probabilities (R, V) of the distributions with their logits divided by `temperature`."""
    if temperature == 1:
        return logprobs
    scaled: Float32 = logprobs / np.float32(temperature)
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    return scaled


def measure_rows(logprobs: Float32, targets: Ints) -> TokenMeasures:
    """Measure `targets` (R,) under their distributions (R, V)."""
    each = np.arange(len(targets))
    probs = np.exp(logprobs)
    chosen = logprobs[each, targets]
    top = logprobs.argmax(axis=1)
    second = np.partition(probs, -2, axis=1)[:, -2]
    return TokenMeasures(
        token_ids=targets,
        logprob=chosen.astype(np.float64),
        entropy=-(probs * logprobs).sum(axis=1, dtype=np.float64),
        margin=(probs[each, top] - second).astype(np.float64),
        self_certainty=-logprobs.mean(axis=1, dtype=np.float64) - math.log(logprobs.shape[1]),
        rank=1 + (logprobs > chosen[:, None]).sum(axis=1),
        top_id=top,
        top_prob=probs[each, top].astype(np.float64),
    )


def _joined(parts: Sequence[TokenMeasures]) -> TokenMeasures:
    return TokenMeasures(
        **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    )
