"""What one distribution says about its own certainty, token by token, and about a whole text.

All figures come from the whole vocabulary, never from the likeliest few.
Letters: N tokens, R rows, V vocabulary. Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from optlm.engine.prompts import OnePrompt
from optlm.engine.reading import normalizers
from optlm.engine.tree import TokenTree
from optlm.engine.windows import plan_windows
from optlm.errors import RequestError
from optlm.uncertainty.reading import Float32, Float64, Ints, Progress, as_ids

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["TokenMeasures", "check_temperature", "measure", "measure_rows", "tempered"]

_TREE_TOKENS = 1 << 14  # of the texts that are read together, more or less


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
    last: Sequence[int] | None = None,
    temperature: float = 1.0,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> list[TokenMeasures]:
    """Read texts (or lists of token ids) and measure every token after the first.

    What texts begin with alike is read once, and one longer than the context in overlapping
    windows, as `LLM.score` does.

    Args:
        last: measure only so many tokens at the end of each text: an answer after its prompt.
        temperature: divides the logits first, such as one that `temperature.fit_tokens` found.
        adapter: name of a loaded adapter.

    Raises:
        RequestError: an empty text, one that cannot be read, a temperature or `last` out of range.
    """
    check_temperature(temperature)
    sequences = [as_ids(llm, text) for text in texts]
    counts = [len(ids) - 1 for ids in sequences] if last is None else last
    for ids, count in zip(sequences, counts, strict=True):
        if not 0 < count < len(ids):
            raise RequestError(f"the last {count} of {len(ids) - 1} tokens: give 1 or more of them")
    found: list[TokenMeasures] = []
    for chunk in _chunks(list(zip(sequences, counts, strict=True))):
        tree = TokenTree()
        parts = [_add(llm, tree, ids, count) for ids, count in chunk]
        figures = _Figures(tree, temperature)
        llm.read(tree, figures, adapter=adapter)
        found += [figures.of(part) for part in parts]
        progress(len(chunk))
    return found


def _chunks(asked: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    begin = size = 0
    for end, (ids, _) in enumerate(asked, start=1):
        size += len(ids)
        if size >= _TREE_TOKENS or end == len(asked):
            yield asked[begin:end]
            begin, size = end, 0


def _add(llm: LLM, tree: TokenTree, ids: list[int], count: int) -> list[int]:
    """Add a text to the tree; the nodes of its last `count` tokens."""
    windows = plan_windows(
        ids,
        context=llm.config.max_position_embeddings,
        bos=llm.config.bos_token_id,
        on_overflow="windows",
        stride=None,
    )
    before = len(ids) - 1 - count  # tokens still to come that nobody asks for
    nodes: list[int] = []
    for token_ids, score_from in windows:
        skipped = min(before, len(token_ids) - 1 - score_from)
        before -= skipped
        number = tree.add(token_ids, score_from + skipped)
        nodes += tree.paths[number][score_from + skipped + 1 :]
    return nodes


class _Figures:
    """A `Measure` that keeps the figures of the token at every node."""

    def __init__(self, tree: TokenTree, temperature: float) -> None:
        self._tokens = np.array(tree.tokens, np.intp)
        self._children = tree.children()
        self._temperature = temperature
        whole = ("token_ids", "rank", "top_id")
        self._values: dict[str, Any] = {
            field.name: np.empty(len(self._tokens), np.intp if field.name in whole else np.float64)
            for field in fields(TokenMeasures)
        }

    def __call__(self, logits: Float32, nodes: list[int]) -> Float64:
        rows = [row for row, node in enumerate(nodes) for _ in self._children[node]]
        following = [child for node in nodes for child in self._children[node]]
        logprobs = logits[rows]
        measured = normalizers(logits, nodes)  # overwrites the logits
        logprobs -= measured[rows, :1].astype(np.float32)
        found = measure_rows(tempered(logprobs, self._temperature), self._tokens[following])
        for name, values in self._values.items():
            values[following] = getattr(found, name)
        return measured

    def of(self, nodes: list[int]) -> TokenMeasures:
        return TokenMeasures(**{name: values[nodes] for name, values in self._values.items()})


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
