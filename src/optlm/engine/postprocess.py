"""What a step's results mean for each of its sequences.

Letters: R rows of results, V vocabulary, T tokens of the step, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from optlm.engine.request import Request

__all__ = ["accept_best", "accept_hidden", "accept_logits"]


def accept_logits(scheduled: Iterable[Request], logits: NDArray[np.float32]) -> None:
    """Give each sequence its logits (R, V): of prompt tokens, and the last to choose a token."""
    row = 0
    for request in scheduled:
        end = request.num_computed + request.num_scheduled
        first = max(request.num_computed, request.next_row)
        if end <= first or request.reads_hidden:
            continue
        sample = request.owner
        chooses = end == len(request.tokens) < request.max_total
        num_prompt_rows = end - first - chooses
        if num_prompt_rows:
            sample.generation.accept_prompt_rows(logits[row : row + num_prompt_rows], first)
            row += num_prompt_rows
        if chooses:
            sample.accept(logits[row])
            row += 1
        elif end == len(request.tokens):
            sample.end("length")


def accept_hidden(scheduled: Iterable[Request], hidden: NDArray[np.float32]) -> None:
    """Give each sequence that wants them the vectors of its tokens, out of those of all (T, E)."""
    start = 0
    for request in scheduled:
        begin, count = request.num_computed, request.num_scheduled
        if request.reads_hidden:
            skipped = max(request.next_row - begin, 0)
            request.owner.accept_hidden(hidden[start + skipped : start + count])
            if begin + count == len(request.tokens):
                request.owner.end("length")
        start += count


def accept_best(scheduled: Iterable[Request], best: NDArray[np.int32]) -> None:
    """Give each sequence its likeliest next token (R,), where none wants more than that."""
    tokens = iter(best.tolist())
    for request in scheduled:
        if request.num_computed + request.num_scheduled == len(request.tokens):
            request.owner.accept_token(next(tokens))
