"""Examples side by side in rows, without any seeing another; and the order in which they come.

Positions restart with every example and the attention is block-diagonal, so a packed batch has the
loss and the gradient of the same examples one by one (a test compares them).

Letters: B rows, S tokens of a row, n virtual tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optlm.model import IGNORE
from optlm.train.finetune.examples import Example, ExamplesError

__all__ = ["PackedBatches", "Rows", "make_rows"]

_OPEN_ROWS = 32  # looked through for one with room


@dataclass(frozen=True)
class Rows:
    """A micro-batch, all (B, S): inputs, the index of each in its example, which example of the row
    it belongs to (-1: padding), and the token to predict, or `IGNORE`."""

    tokens: Tensor
    positions: Tensor
    segments: Tensor
    targets: Tensor

    def mask(self, before: int) -> Tensor | None:
        """(B, 1, S, n + S), True where a token may look; None where that is plain causal attention.

        Args:
            before: number of virtual tokens n, which all may see.
        """
        batch, length = self.tokens.shape
        if before == 0 and bool((self.segments <= 0).all()):
            return None  # one example a row: padding is on the right, where nobody looks
        causal = torch.ones(length, length, dtype=torch.bool, device=self.tokens.device).tril()
        same = self.segments[:, :, None] == self.segments[:, None, :]
        virtual = causal.new_ones(batch, length, before)
        return torch.cat([virtual, same & causal], dim=2)[:, None]


def make_rows(rows: Sequence[Sequence[Example]], pad: int) -> Rows:
    """Lay out the examples of each row one after the other, padded to the longest row."""
    length = max(sum(example.length for example in row) for row in rows)
    tokens = np.full((len(rows), length), pad, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    segments = np.full((len(rows), length), -1, dtype=np.int64)
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    for row, examples in enumerate(rows):
        begin = 0
        for segment, example in enumerate(examples):
            end = begin + example.length
            tokens[row, begin:end] = example.tokens[:-1]
            positions[row, begin:end] = np.arange(example.length)
            segments[row, begin:end] = segment
            targets[row, begin + example.first - 1 : end] = example.tokens[example.first :]
            begin = end
    return Rows(*(torch.from_numpy(array) for array in (tokens, positions, segments, targets)))


class PackedBatches:
    """Batches of packed rows: epoch after epoch, each in an order of its own.

    A batch is a function of the examples, the seed and the step.

    Args:
        row_tokens: inputs a row holds; no example may be longer.
        batch_rows: rows a step; the last step of an epoch may have fewer.
        micro_rows: of them at once in memory.

    Raises:
        ExamplesError: there are no examples, or not one of them has a token to predict.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        row_tokens: int,
        batch_rows: int,
        micro_rows: int,
        pad: int,
        seed: int,
    ) -> None:
        if not examples:
            raise ExamplesError("the data set is empty; nothing can be learned from it")
        self._examples = [example for example in examples if example.first < len(example.tokens)]
        if not self._examples:
            raise ExamplesError(
                f"the labels of all {len(examples)} examples are masked; no response has a token"
            )
        assert max(example.length for example in self._examples) <= row_tokens
        self._row_tokens = row_tokens
        self._batch_rows = batch_rows
        self._micro_rows = micro_rows
        self._pad = pad
        self._seed = seed
        self._first_steps = [0]  # of every epoch seen so far, and of the next
        self._rows: tuple[int, list[list[int]]] = (-1, [])  # the epoch at hand

    def batch(self, step: int) -> list[Rows]:
        """The micro-batches of a 0-based step."""
        while step >= self._first_steps[-1]:
            rows = len(self._pack(len(self._first_steps) - 1))
            self._first_steps.append(self._first_steps[-1] + -(-rows // self._batch_rows))
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        begin = (step - self._first_steps[epoch]) * self._batch_rows
        rows_now = self._pack(epoch)[begin : begin + self._batch_rows]
        return [
            make_rows(
                [[self._examples[i] for i in row] for row in rows_now[at : at + self._micro_rows]],
                self._pad,
            )
            for at in range(0, len(rows_now), self._micro_rows)
        ]

    def _pack(self, epoch: int) -> list[list[int]]:
        """Indices of the examples in every row of an epoch: each goes where it first fits."""
        if self._rows[0] == epoch:
            return self._rows[1]
        key = np.array([self._seed, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self._examples))
        rows: list[list[int]] = []
        room: list[int] = []
        for index in order.tolist():
            length = self._examples[index].length
            first = max(0, len(rows) - _OPEN_ROWS)
            fits = next((r for r in range(first, len(rows)) if room[r] >= length), None)
            if fits is None:
                rows.append([])
                room.append(self._row_tokens)
                fits = len(rows) - 1
            rows[fits].append(index)
            room[fits] -= length
        self._rows = (epoch, rows)
        return rows
