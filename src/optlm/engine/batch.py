"""The flat arrays of one step. Allocated once and filled again every step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optlm.engine.request import Request

__all__ = ["BatchArrays", "Int32", "adapter_ids"]

Int32 = NDArray[np.int32]


class BatchArrays:
    """Buffers for `max_tokens` tokens of `max_sequences` sequences of `max_blocks` blocks."""

    def __init__(self, max_tokens: int, max_sequences: int, max_blocks: int) -> None:
        self._tokens = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._starts = np.zeros(max_sequences + 1, np.int32)
        self._tables = np.zeros((max_sequences, max_blocks), np.int32)
        self._rows = np.zeros(max_tokens, np.int32)

    def fill(
        self, scheduled: Sequence[Request]
    ) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32 | None]:
        """Lay out a step as `Runner.forward` wants it; the views are valid until the next call."""
        tokens: list[int] = []
        positions: list[int] = []
        starts: list[int] = [0]
        rows: list[int] = []
        for index, request in enumerate(scheduled):
            begin, count = request.num_computed, request.num_scheduled
            end = begin + count
            if count == 1:
                tokens.append(request.tokens[begin])
                positions.append(begin)
            else:
                tokens += request.tokens[begin:end]
                positions += range(begin, end)
            total = len(tokens)
            starts.append(total)
            if not request.reads_hidden:
                rows += range(total - (end - max(begin, request.next_row)), total)
            self._tables[index] = request.block_table
        self._tokens[:total] = tokens
        self._positions[:total] = positions
        self._starts[: len(starts)] = starts
        self._rows[: len(rows)] = rows
        return (
            self._tokens[:total],
            self._positions[:total],
            self._starts[: len(starts)],
            self._tables[: len(scheduled)],
            self._rows[: len(rows)],
            adapter_ids([request.adapter.id for request in scheduled]),
        )


def adapter_ids(ids: list[int]) -> Int32 | None:
    """Each sequence's adapter (B,); None when none has one."""
    return np.array(ids, np.int32) if any(i >= 0 for i in ids) else None
