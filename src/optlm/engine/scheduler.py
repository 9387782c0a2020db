"""`Scheduler`: which requests run in the next step, and how many tokens of each.

Continuous batching: every step carries one token of every decoding request and, within the token
budget, chunks of prompts. Requests are served in order of arrival; when blocks run out, the latest
arrival gives its blocks back and is computed again later (its finished blocks may still be found by
name then). It sees integers only.

Why it cannot hang: a request is only added if it fits an empty pool, the oldest running one is
never preempted for another, and the oldest waiting one is admitted whenever nothing runs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence

from optlm.engine.blocks import BlockPool
from optlm.engine.request import Request
from optlm.errors import RequestError

__all__ = ["Scheduler"]


class Scheduler:
    """Queues of requests over one `BlockPool`.

    Args:
        max_batch_tokens: most tokens a step.
        max_sequences: most requests that run at the same time, at most `max_batch_tokens`.
        max_logit_rows: most logit rows a step, at least `max_sequences`.
        prefix_cache: whether computed blocks are reused by requests that begin alike.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_logit_rows: int,
        prefix_cache: bool = True,
    ) -> None:
        assert 1 <= max_sequences <= min(max_batch_tokens, max_logit_rows)
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_logit_rows = max_logit_rows
        self.prefix_cache = prefix_cache
        self.running: list[Request] = []  # by key
        self.waiting: list[Request] = []  # by key
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could not finish even if it had all blocks to itself.
        """
        # The last token of a sequence is never fed back, so it needs no place in the cache.
        wanted = max(request.max_total - 1, len(request.tokens))
        self.check_fits(-(-wanted // self.pool.block_size), f"up to {wanted} tokens")
        insort(self.waiting, request, key=_key)

    def check_fits(self, num_blocks: int, what: str) -> None:
        """Refuse what needs more blocks than there are."""
        pool = self.pool
        if num_blocks > pool.num_blocks:
            raise RequestError(
                f"the request needs {num_blocks} KV cache blocks "
                f"({what}, {pool.block_size} a block); the cache has {pool.num_blocks}. "
                "Lower max_tokens, or give the engine more (num_blocks or kv_cache_bytes)"
            )

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not, and free its blocks."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> list[Request]:
        """Choose the requests of the next step, set their `num_scheduled`, give them blocks."""
        scheduled: list[Request] = []
        tokens_left, rows_left = self.max_batch_tokens, self.max_logit_rows
        prefilling = False
        index = 0
        while index < len(self.running):
            request = self.running[index]
            count = len(request.tokens) - request.num_computed
            decoding = count == 1
            if not decoding:
                if not prefilling:  # from here on, keep room for every decoding request
                    prefilling = True
                    later = sum(_is_decoding(other) for other in self.running[index:])
                    tokens_left -= later
                    rows_left -= later
                count = self._chunk(request, count, tokens_left, rows_left)
            if not self._grow(request, request.num_computed + count):
                break
            index += 1
            if count == 0:
                continue
            request.num_scheduled = count
            scheduled.append(request)
            if not (decoding and prefilling):
                tokens_left -= count
                rows_left -= _rows(request, count)
        if self.waiting:
            self._admit(scheduled, tokens_left, rows_left)
        return scheduled

    def complete(self, scheduled: Iterable[Request]) -> None:
        """Record that the step's tokens are in the cache; full blocks become findable."""
        block_size = self.pool.block_size
        for request in scheduled:
            request.num_computed += request.num_scheduled
            if request.num_computed > request.next_row:
                request.next_row = request.num_computed
            if self.prefix_cache and request.num_computed >= (request.num_named + 1) * block_size:
                self._name(request)

    def take_block(self) -> int:
        """Take a block for use outside the queues, preempting requests when none is free."""
        while not self.pool.num_free:
            self._preempt(self.running[-1])
        return self.pool.allocate()

    def check_integrity(self, other_tables: Sequence[Sequence[int]] = ()) -> None:
        """Assert all invariants; `other_tables` are blocks held outside the queues."""
        size = self.pool.block_size
        for queue in (self.running, self.waiting):
            assert sorted(queue, key=_key) == queue, "a queue is out of order"
        assert not set(self.running) & set(self.waiting), "a request runs and waits"
        assert len(self.running) <= self.max_sequences
        for request in self.running:
            assert request.num_computed <= len(request.tokens)
            assert request.num_computed <= len(request.blocks) * size, "tokens without blocks"
            assert request.block_table[: len(request.blocks)].tolist() == request.blocks
            assert request.num_named * size <= request.num_computed, "a block was named too early"
        for request in self.waiting:
            assert not request.blocks, "a waiting request holds blocks"
            assert request.num_computed == 0
        self.pool.check_integrity([*(request.blocks for request in self.running), *other_tables])

    # ---- inside --------------------------------------------------------------------------------

    def _chunk(self, request: Request, count: int, tokens_left: int, rows_left: int) -> int:
        """Return how many of `count` prompt tokens the budgets allow."""
        count = max(min(count, tokens_left), 0)
        if request.reads_hidden:
            return count
        without_rows = max(request.next_row - request.num_computed, 0)
        return max(min(count, without_rows + rows_left), 0)

    def _grow(self, request: Request, end: int) -> bool:
        """Give the request blocks for tokens[:end]; False if it was preempted itself."""
        blocks = request.blocks
        while end > len(blocks) * self.pool.block_size:
            if not self.pool.num_free:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    return False
                continue
            self._append(request, self.pool.allocate())
        return True

    def _admit(self, scheduled: list[Request], tokens_left: int, rows_left: int) -> None:
        while self.waiting and tokens_left > 0 and rows_left > 0:
            request = self.waiting[0]
            if len(self.running) >= self.max_sequences or not self._reserve(request):
                return
            del self.waiting[0]
            insort(self.running, request, key=_key)
            left = len(request.tokens) - request.num_computed
            count = self._chunk(request, left, tokens_left, rows_left)
            self._grow(request, request.num_computed + count)
            request.num_scheduled = count
            scheduled.append(request)
            tokens_left -= count
            rows_left -= _rows(request, count)

    def _reserve(self, request: Request) -> bool:
        """Share the cached prefix if the rest of the request's tokens has room too."""
        pool = self.pool
        found: list[int] = []
        if self.prefix_cache:
            # The token at next_row must be computed: its logits are not in the cache.
            limit = request.next_row // pool.block_size
            found = pool.match(request.name_blocks(pool.block_size)[:limit])
        needed = -(-len(request.tokens) // pool.block_size) - len(found)
        # One block more for each running request, which may cross into its next block any moment.
        free = pool.num_free - pool.num_unreferenced(found) - len(self.running)
        if needed > free:
            return False
        for block in found:
            pool.share(block)
            self._append(request, block)
        request.num_named = len(found)
        request.num_computed = len(found) * pool.block_size
        if request.num_cached < 0:
            request.num_cached = request.num_computed
        return True

    def _append(self, request: Request, block: int) -> None:
        request.block_table[len(request.blocks)] = block
        request.blocks.append(block)

    def _name(self, request: Request) -> None:
        size = self.pool.block_size
        digests = request.name_blocks(size)
        for index in range(request.num_named, request.num_computed // size):
            self.pool.name(request.blocks[index], digests[index])
        request.num_named = request.num_computed // size

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self.running.remove(request)
        self._release(request)
        insort(self.waiting, request, key=_key)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks.clear()
        request.num_computed = 0


def _key(request: Request) -> tuple[int, ...]:
    return request.key


def _is_decoding(request: Request) -> bool:
    return len(request.tokens) - request.num_computed == 1


def _rows(request: Request, count: int) -> int:
    """Logit rows of the next `count` tokens of a request."""
    if request.reads_hidden:
        return 0
    return max(request.num_computed + count - max(request.num_computed, request.next_row), 0)
