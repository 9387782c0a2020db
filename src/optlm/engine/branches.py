"""Sequences that fork, for searches that try several continuations at once.

Branches share the full blocks of what they have in common; the last, partly filled block is copied
on a fork.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from optlm.engine.batch import adapter_ids
from optlm.engine.runner import Runner
from optlm.engine.scheduler import Scheduler

__all__ = ["Branch", "Branches"]

Float32 = NDArray[np.float32]


class Branch:
    """One continuation: its tokens, the blocks of those in the cache, its log-probability."""

    __slots__ = ("blocks", "logprob", "num_computed", "tokens")

    def __init__(self, tokens: list[int], logprob: float = 0.0) -> None:
        self.tokens = tokens
        self.logprob = logprob
        self.blocks: list[int] = []
        self.num_computed = 0


class Branches:
    """The blocks of a search, from the scheduler's pool, which preempts requests to give them."""

    def __init__(
        self, runner: Runner, scheduler: Scheduler, max_blocks: int, adapter_id: int
    ) -> None:
        self.live: list[Branch] = []
        self._adapter_id = adapter_id
        self._runner = runner
        self._scheduler = scheduler
        self._max_blocks = max_blocks

    @property
    def tables(self) -> list[list[int]]:
        return [branch.blocks for branch in self.live]

    def start(self, tokens: list[int]) -> Branch:
        branch = Branch(tokens)
        self.live.append(branch)
        return branch

    def replace(self, children: Sequence[tuple[Branch, int, float]]) -> list[Branch]:
        """Make the live branches those of `children`: (parent, next token, log-probability)."""
        parents, self.live = self.live, []
        source: list[int] = []
        target: list[int] = []
        kept: set[int] = set()  # parents whose partly filled block went to their first child
        size = self._runner.block_size
        for parent, token, logprob in children:
            child = Branch([*parent.tokens, token], logprob)
            child.num_computed = parent.num_computed
            self.live.append(child)
            shared = len(parent.blocks)
            if parent.num_computed % size and id(parent) in kept:
                shared -= 1
            kept.add(id(parent))
            for block in parent.blocks[:shared]:
                self._scheduler.pool.share(block)
                child.blocks.append(block)
            if shared < len(parent.blocks):
                child.blocks.append(self._scheduler.take_block())
                source.append(parent.blocks[shared])
                target.append(child.blocks[shared])
        if source:
            self._runner.copy_blocks(np.array(source, np.int32), np.array(target, np.int32))
        for parent in parents:
            self._scheduler.pool.release(parent.blocks)
        return self.live

    def keep(self, branch: Branch) -> None:
        """Release all live branches but one."""
        for other in self.live:
            if other is not branch:
                self._scheduler.pool.release(other.blocks)
        self.live = [branch]

    def release(self) -> None:
        for branch in self.live:
            self._scheduler.pool.release(branch.blocks)
        self.live = []

    def forward(self, *, hidden: bool = False) -> tuple[Float32, Float32 | None]:
        """Run what is not in the cache yet, of each live branch, as far as one call allows.

        Returns the logits of the branches whose last token was among it (all or none of them), and
        the hidden vectors of all tokens of the call.
        """
        runner = self._runner
        budget = runner.max_batch_tokens // len(self.live)
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        rows: list[int] = []
        tables = np.zeros((len(self.live), self._max_blocks), np.int32)
        for index, branch in enumerate(self.live):
            begin = branch.num_computed
            end = min(len(branch.tokens), begin + budget)
            while len(branch.blocks) * runner.block_size < end:
                branch.blocks.append(self._scheduler.take_block())
            tables[index, : len(branch.blocks)] = branch.blocks
            tokens += branch.tokens[begin:end]
            positions += range(begin, end)
            starts.append(len(tokens))
            if end == len(branch.tokens):
                rows.append(len(tokens) - 1)
            branch.num_computed = end
        arrays = (
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(starts, np.int32),
            tables,
            np.array(rows, np.int32),
            adapter_ids([self._adapter_id] * len(self.live)),
        )
        return runner.forward_hidden(*arrays) if hidden else (runner.forward(*arrays), None)
