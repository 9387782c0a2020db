"""`TreeReader`: reads a tree of tokens, depth first, every token once.

What sequences share is computed once, to the token: where they part, full blocks of keys and values
are shared and the partly filled one is copied. It has forward passes of its own, one a step of the
engine, beside the ordinary requests, whose blocks it may take for a while.

Why it cannot run out of blocks: the deepest path with a copied block at each parting fits an empty
pool (checked on arrival), and a second branch begins only when as much is left free.
"""

from __future__ import annotations

import numpy as np

from optlm.engine.batch import Int32, adapter_ids
from optlm.engine.blocks import block_digest
from optlm.engine.reading import Reading
from optlm.engine.runner import Runner
from optlm.engine.scheduler import Scheduler

__all__ = ["TreeReader"]

_LOGIT_ROWS = 128  # a step, at most: the native runner keeps memory for so many


class _Stem:
    """Tokens in the cache from the first on: their number, blocks, and the names of full blocks."""

    __slots__ = ("blocks", "digests", "length", "unnamed", "waiting")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.length = 0
        self.digests: list[bytes] = []
        self.unnamed: list[int] = []  # tokens after the last full block
        self.waiting = 0  # runs that go on from here and have not begun


class _Run:
    """Nodes one after another up to a parting or an end."""

    __slots__ = ("begun", "nodes", "num_done", "stem")

    def __init__(self, nodes: list[int], stem: _Stem) -> None:
        self.nodes = nodes
        self.stem = stem  # before it began, the one it shares with the others
        self.begun = False
        self.num_done = 0


class _Held:
    """The blocks of all stems; what `LLM` needs to check and to release."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.stems: dict[int, _Stem] = {}
        self._pool = scheduler.pool

    @property
    def tables(self) -> list[list[int]]:
        return [stem.blocks for stem in self.stems.values()]

    def add(self, stem: _Stem) -> _Stem:
        self.stems[id(stem)] = stem
        return stem

    def drop(self, stem: _Stem) -> None:
        del self.stems[id(stem)]
        self._pool.release(stem.blocks)

    def release(self) -> None:
        for stem in list(self.stems.values()):
            self.drop(stem)


class TreeReader:
    """A `Search` whose result is its `Reading`.

    Args:
        max_blocks: blocks of a full context.

    Raises:
        RequestError: the deepest path does not fit the cache.
    """

    def __init__(
        self,
        reading: Reading,
        runner: Runner,
        scheduler: Scheduler,
        max_blocks: int,
    ) -> None:
        self.generation = reading
        self.branches = _Held(scheduler)
        self._runner = runner
        self._scheduler = scheduler
        self._max_blocks = max_blocks
        tree = reading.tree
        self._children = tree.children()
        read = tree.to_read(self._children)
        self._next = [[n for n in following if read[n]] for following in self._children]
        self._reserve = self._blocks_of_deepest(read)
        scheduler.check_fits(self._reserve, "its longest text and where texts part")
        firsts = [n for n, parent in enumerate(tree.parents) if parent < 0 and read[n]]
        self._stack = [self._run(node, self.branches.add(_Stem())) for node in reversed(firsts)]

    def step(self) -> None:
        """Run one forward pass; at the end the reading is finished."""
        reading = self.generation
        batch = self._choose()
        nodes = [node for run, count in batch for node in _part(run, count)]
        rows = [row for row, node in enumerate(nodes) if reading.tree.wanted[node]]
        logits = self._runner.forward(*self._arrays(batch, nodes, rows))
        reading.num_forward_tokens += len(nodes)
        if rows:
            reading.accept([nodes[row] for row in rows], logits, self._children)
        for run, count in reversed(batch):
            self._advance(run, count)
        if not self._stack:
            reading.end("stop")

    # ---- inside --------------------------------------------------------------------------------

    def _blocks_of_deepest(self, read: list[bool]) -> int:
        """Most blocks that one path needs: its own, and a copy at each parting."""
        size, most = self._runner.block_size, 0
        depth, partings = [0] * len(read), [0] * len(read)
        for node, parent in enumerate(self.generation.tree.parents):
            depth[node] = 1 + (depth[parent] if parent >= 0 else 0)
            if parent >= 0:
                partings[node] = partings[parent] + (len(self._next[parent]) > 1)
            if read[node]:
                most = max(most, -(-depth[node] // size) + partings[node])
        return most

    def _run(self, node: int, stem: _Stem) -> _Run:
        nodes = [node]
        while len(following := self._next[nodes[-1]]) == 1:
            nodes.append(following[0])
        stem.waiting += 1
        return _Run(nodes, stem)

    def _choose(self) -> list[tuple[_Run, int]]:
        """Take runs from the stack, and how many tokens of each, as far as one call allows."""
        batch: list[tuple[_Run, int]] = []
        tokens_left, rows_left = self._runner.max_batch_tokens, _LOGIT_ROWS
        while self._stack and tokens_left and rows_left:
            run = self._stack[-1]
            if batch and not self._has_room(run):
                break
            if not run.begun:
                self._begin(run)
            count, rows = self._count(run, tokens_left, rows_left)
            self._grow(run.stem, run.stem.length + count)
            batch.append((run, count))
            tokens_left -= count
            rows_left -= rows
            if run.num_done + count < len(run.nodes):
                break
            self._stack.pop()
        return batch

    def _has_room(self, run: _Run) -> bool:
        total = run.stem.length + len(run.nodes)
        needed = -(-total // self._runner.block_size) - len(run.stem.blocks) + 1
        return self._scheduler.pool.num_free - needed >= self._reserve

    def _count(self, run: _Run, tokens_left: int, rows_left: int) -> tuple[int, int]:
        """Tokens of the run that the budgets allow, at least one, and their rows of logits."""
        wanted, rows, count = self.generation.tree.wanted, 0, 0
        for node in run.nodes[run.num_done : run.num_done + tokens_left]:
            if wanted[node]:
                if rows == rows_left:
                    break
                rows += 1
            count += 1
        return count, rows

    def _begin(self, run: _Run) -> None:
        """Give the run a stem of its own."""
        shared = run.stem
        run.begun = True
        shared.waiting -= 1
        if not shared.blocks and not shared.length:
            self._find_cached(run)
        if not shared.waiting:
            return  # the last one goes on in the blocks themselves
        own = _Stem()
        own.length, own.digests = shared.length, list(shared.digests)
        own.unnamed = list(shared.unnamed)
        full, partly = divmod(shared.length, self._runner.block_size)
        for block in shared.blocks[:full]:
            self._scheduler.pool.share(block)
            own.blocks.append(block)
        run.stem = self.branches.add(own)
        if partly:
            own.blocks.append(self._scheduler.take_block())
            self._runner.copy_blocks(
                np.array(shared.blocks[full:], np.int32), np.array(own.blocks[full:], np.int32)
            )

    def _find_cached(self, run: _Run) -> None:
        """Begin with the blocks that the prefix cache holds of a run's first tokens."""
        if not self._scheduler.prefix_cache:
            return
        tree, stem, pool = self.generation.tree, run.stem, self._scheduler.pool
        size = self._runner.block_size
        first = next((i for i, n in enumerate(run.nodes) if tree.wanted[n]), len(run.nodes) - 1)
        for end in range(size, first + 1, size):
            tokens = [tree.tokens[node] for node in run.nodes[end - size : end]]
            digest = self._digest(stem, tokens)
            found = pool.match([digest])
            if not found:
                break
            pool.share(found[0])
            stem.blocks += found
            stem.digests.append(digest)
        stem.length = run.num_done = len(stem.blocks) * size
        self.generation.num_cached_tokens += stem.length

    def _digest(self, stem: _Stem, tokens: list[int]) -> bytes:
        before = stem.digests[-1] if stem.digests else self.generation.adapter.salt
        return block_digest(before, tokens)

    def _grow(self, stem: _Stem, end: int) -> None:
        while len(stem.blocks) * self._runner.block_size < end:
            stem.blocks.append(self._scheduler.take_block())

    def _arrays(
        self, batch: list[tuple[_Run, int]], nodes: list[int], rows: list[int]
    ) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32 | None]:
        positions: list[int] = []
        starts = [0]
        tables = np.zeros((len(batch), self._max_blocks), np.int32)
        for table, (run, count) in zip(tables, batch, strict=True):
            positions += range(run.stem.length, run.stem.length + count)
            starts.append(len(positions))
            table[: len(run.stem.blocks)] = run.stem.blocks
        return (
            np.array([self.generation.tree.tokens[node] for node in nodes], np.int32),
            np.array(positions, np.int32),
            np.array(starts, np.int32),
            tables,
            np.array(rows, np.int32),
            adapter_ids([self.generation.adapter.id] * len(batch)),
        )

    def _advance(self, run: _Run, count: int) -> None:
        """Record that `count` tokens are in the cache; where texts part, queue the branches."""
        stem = run.stem
        self._name(stem, _part(run, count))
        stem.length += count
        run.num_done += count
        if run.num_done < len(run.nodes):
            return
        following = self._next[run.nodes[-1]]
        if not following:
            self.branches.drop(stem)
        self._stack += [self._run(node, stem) for node in reversed(following)]

    def _name(self, stem: _Stem, nodes: list[int]) -> None:
        """Let the blocks that became full be found by their tokens."""
        if not self._scheduler.prefix_cache:
            return
        size = self._runner.block_size
        stem.unnamed += [self.generation.tree.tokens[node] for node in nodes]
        while len(stem.unnamed) >= size:
            stem.digests.append(self._digest(stem, stem.unnamed[:size]))
            self._scheduler.pool.name(stem.blocks[len(stem.digests) - 1], stem.digests[-1])
            del stem.unnamed[:size]


def _part(run: _Run, count: int) -> list[int]:
    return run.nodes[run.num_done : run.num_done + count]
