"""What a step's results mean for each of its sequences.

Letters: R rows of results, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from optlm.engine.request import Request

__all__ = ["accept_best", "accept_logits"]


def accept_logits(scheduled: Iterable[Request], logits: NDArray[np.float32]) -> None:
    """Give each sequence its logits (R, V): of prompt tokens, and the last to choose a token."""
    row = 0
    for request in scheduled:
        end = request.num_computed + request.num_scheduled
        first = max(request.num_computed, request.next_row)
        if end <= first:
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


def accept_best(scheduled: Iterable[Request], best: NDArray[np.int32]) -> None:
    """Give each sequence its likeliest next token (R,), where none wants more than that."""
    tokens = iter(best.tolist())
    for request in scheduled:
        if request.num_computed + request.num_scheduled == len(request.tokens):
            request.owner.accept_token(next(tokens))
