"""`Scheduler`: which requests run in the next step, and how many tokens of each.

Continuous batching: every step carries one token of every decoding request and, within the token
budget, chunks of prompts (`optlm.engine.budget`). Requests are served by priority, then in order of
arrival; when blocks run out, the last of them gives its blocks back and is computed again later
(its finished blocks may still be found by name then). It sees integers only.

Why it cannot hang: a request is only added if it fits an empty pool, the first running one is never
preempted but for a waiting one of higher priority, and the first waiting one is admitted whenever
nothing runs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence

from optlm.engine.blocks import BlockPool
from optlm.engine.budget import Budget, tokens_left
from optlm.engine.request import Request
from optlm.engine.stats import Counters
from optlm.errors import RequestError

__all__ = ["Scheduler"]


class Scheduler:
    """Queues of requests over one `BlockPool`.

    Args:
        max_batch_tokens: most tokens a step.
        max_sequences: most requests that run at the same time, at most `max_batch_tokens`.
        max_logit_rows: most logit rows a step, at least `max_sequences`.
        prefix_cache: whether computed blocks are reused by requests that begin alike.
        counters: counted on; new ones when None.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_logit_rows: int,
        prefix_cache: bool = True,
        counters: Counters | None = None,
    ) -> None:
        assert 1 <= max_sequences <= min(max_batch_tokens, max_logit_rows)
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_logit_rows = max_logit_rows
        self.prefix_cache = prefix_cache
        self.counters = counters or Counters()
        self.running: list[Request] = []  # by key
        self.waiting: list[Request] = []  # by key

    @property
    def num_preemptions(self) -> int:
        return self.counters.preemptions

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
        self._yield_to_urgent()
        scheduled: list[Request] = []
        decoding = sum(tokens_left(request) == 1 for request in self.running)
        budget = Budget(
            self.max_batch_tokens - decoding, self.max_logit_rows - decoding, self._prompts()
        )
        index = 0
        while index < len(self.running):
            request = self.running[index]
            count = 1 if tokens_left(request) == 1 else budget.take(request)
            if not self._grow(request, request.num_computed + count):
                break
            index += 1
            request.num_scheduled = count
            if count:
                scheduled.append(request)
        if self.waiting:
            self._admit(scheduled, budget)
        if not budget.is_spent:
            self._top_up(scheduled, budget)
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

    def _prompts(self) -> Iterator[Request]:
        """What may be read in the next step, in order."""
        for request in self.running:
            if tokens_left(request) > 1:
                yield request
        yield from self.waiting[: self.max_sequences - len(self.running)]

    def _yield_to_urgent(self) -> None:
        """Preempt for a waiting request what runs with a higher number of priority."""
        while self.waiting and self.running:
            urgent, victim = self.waiting[0], self.running[-1]
            has_room = len(self.running) < self.max_sequences and self._find(urgent) is not None
            if urgent.priority >= victim.priority or has_room:
                return
            self._preempt(victim)

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

    def _admit(self, scheduled: list[Request], budget: Budget) -> None:
        """Let waiting requests run; a long prompt lets short ones pass while another is read."""
        index = 0
        while index < len(self.waiting) and not budget.is_spent:
            request = self.waiting[index]
            if len(self.running) >= self.max_sequences:
                return
            if not budget.allows(request):
                index += 1
                continue
            if not self._reserve(request):
                return
            del self.waiting[index]
            insort(self.running, request, key=_key)
            count = budget.take(request)
            self._grow(request, request.num_computed + count)
            request.num_scheduled = count
            scheduled.append(request)

    def _top_up(self, scheduled: list[Request], budget: Budget) -> None:
        """Give to prompts what was kept for others that did not come, within the free blocks."""
        size = self.pool.block_size
        for request in scheduled:
            end = request.num_computed + request.num_scheduled
            if end == len(request.tokens):
                continue
            room = (len(request.blocks) + self.pool.num_free) * size - end
            count = budget.take_more(request, room)
            self._grow(request, end + count)
            request.num_scheduled += count

    def _reserve(self, request: Request) -> bool:
        """Share the cached prefix if the rest of the request's tokens has room too."""
        found = self._find(request)
        if found is None:
            return False
        for block in found:
            self.pool.share(block)
            self._append(request, block)
        request.num_named = len(found)
        request.num_computed = len(found) * self.pool.block_size
        if request.num_cached < 0:
            request.num_cached = request.num_computed
            self._count(request)
        return True

    def _find(self, request: Request) -> list[int] | None:
        """The blocks of its cached prefix; None if the rest of its tokens has no room."""
        pool = self.pool
        found: list[int] = []
        if self.prefix_cache:
            # The token at next_row must be computed: its logits are not in the cache.
            limit = request.next_row // pool.block_size
            found = pool.match(request.name_blocks(pool.block_size)[:limit])
        needed = -(-len(request.tokens) // pool.block_size) - len(found)
        # One block more for each running request, which may cross into its next block any moment.
        free = pool.num_free - pool.num_unreferenced(found) - len(self.running)
        return found if needed <= free else None

    def _count(self, request: Request) -> None:
        self.counters.prompt_tokens += request.num_prompt
        if self.prefix_cache:
            self.counters.prefix_queries += request.num_prompt
            self.counters.prefix_hits += request.num_cached

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
        self.counters.preemptions += 1
        self.running.remove(request)
        self._release(request)
        insort(self.waiting, request, key=_key)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks.clear()
        request.num_computed = 0


def _key(request: Request) -> tuple[int, ...]:
    return request.key
