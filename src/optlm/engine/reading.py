"""`Reading`: a tree of token sequences on its way through the model, and what was measured.

Letters: N nodes of the tree, R rows of logits, V vocabulary, C columns of a measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from optlm.engine.adapters import LoadedAdapter
from optlm.engine.generation import Sample
from optlm.engine.sampling import log_normalizer_of
from optlm.engine.stats import Counters
from optlm.engine.tree import TokenTree
from optlm.errors import EngineError

__all__ = ["ARGMAX", "LOG_TOTAL", "Measure", "Reading", "normalizers"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

# From logits (R, V), which it may overwrite, and the nodes that they follow, to numbers (R, C). The
# first two columns are:
LOG_TOTAL = 0  # the logarithm of the sum of exp(logits)
ARGMAX = 1  # the id of the largest, the lowest of equals
Measure = Callable[[Float32, list[int]], Float64]


def normalizers(logits: Float32, nodes: list[int]) -> Float64:
    """The least a `Measure` does: its two first columns. Row by row to stay in cache."""
    measured = np.empty((len(logits), 2))
    for row, values in zip(logits, measured, strict=True):
        best = row.argmax()
        values[:] = log_normalizer_of(row), best
    return measured


class Reading:
    """One tree on its way. `finished` when all of it is read, or it was aborted or failed.

    Attributes:
        num_forward_tokens: tokens that went through the model.
        num_cached_tokens: tokens whose keys and values were in the prefix cache.
    """

    samples: Sequence[Sample] = ()

    def __init__(
        self,
        arrival: int,
        tree: TokenTree,
        measure: Measure,
        adapter: LoadedAdapter,
        *,
        priority: int = 0,
    ) -> None:
        self.priority = priority
        self.arrival = arrival
        self.tree = tree
        self.adapter = adapter
        self.error: str | None = None
        self.finished = not any(tree.wanted)
        self.num_forward_tokens = 0
        self.num_cached_tokens = 0
        self._measure = measure
        self._logits = np.full(len(tree.tokens), np.nan)  # (N,) each token's, among its rivals
        self._places = np.cumsum(tree.wanted) - 1  # (N,) node -> row of `_measured`
        self._measured = np.empty((0, 2))

    def accept(self, nodes: list[int], logits: Float32, children: list[list[int]]) -> None:
        """Take the logits (R, V) after each of `nodes`."""
        rows = [row for row, node in enumerate(nodes) for _ in children[node]]
        following = [child for node in nodes for child in children[node]]
        if following:
            self._logits[following] = logits[rows, [self.tree.tokens[node] for node in following]]
        measured = self._measure(logits, nodes)
        if not np.isfinite(measured[:, LOG_TOTAL]).all():
            self.error = "the model's logits are not finite; the checkpoint is damaged"
            self.end("abort")
            return
        if not len(self._measured):
            self._measured = np.empty((sum(self.tree.wanted), measured.shape[1]))
        self._measured[self._places[nodes]] = measured

    def end(self, reason: str) -> None:
        self.finished = True

    def count(self, counters: Counters) -> None:
        """Add what was read to an engine's totals."""
        tokens = self.num_forward_tokens + self.num_cached_tokens
        counters.prompt_tokens += tokens
        counters.prefix_queries += tokens
        counters.prefix_hits += self.num_cached_tokens

    def check(self) -> None:
        """Raise the error that ended the reading, if one did."""
        if self.error is not None:
            raise EngineError(self.error)

    def measured(self, sequence: int) -> Float64:
        """What was measured of the wanted logits of a sequence, in order (rows, C)."""
        path = np.array(self.tree.paths[sequence], np.intp)[self.tree.scored_from[sequence] :]
        wanted = np.array([self.tree.wanted[node] for node in path], bool)
        measured: Float64 = self._measured[self._places[path[wanted]]]
        return measured

    def scores(self, sequence: int) -> tuple[Float64, NDArray[np.bool_]]:
        """Of each scored token of a sequence: its log-probability, and whether it is the likeliest.

        Nats; one less than there are tokens from the place it is scored from.
        """
        path = np.array(self.tree.paths[sequence], np.intp)[self.tree.scored_from[sequence] :]
        before, scored = path[:-1], path[1:]
        measured = self._measured[self._places[before]]
        tokens = np.array([self.tree.tokens[node] for node in scored], np.float64)
        logprobs: Float64 = self._logits[scored] - measured[:, LOG_TOTAL]
        return logprobs, measured[:, ARGMAX] == tokens
