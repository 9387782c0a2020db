"""Named cases of block pool and scheduler; the random ones are in tests/property."""

from __future__ import annotations

import itertools

import pytest

from optlm.engine.blocks import BlockPool, block_digest
from optlm.engine.request import Request
from optlm.engine.scheduler import Scheduler
from optlm.errors import RequestError

SIZE = 4
arrivals = itertools.count()


def make(
    num_blocks: int = 16,
    *,
    tokens: int = 64,
    sequences: int = 8,
    rows: int = 64,
    prefix_cache: bool = True,
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, SIZE),
        max_batch_tokens=tokens,
        max_sequences=sequences,
        max_logit_rows=rows,
        prefix_cache=prefix_cache,
    )


def request(
    tokens: list[int], output: int = 4, next_row: int | None = None, priority: int = 0
) -> Request:
    return Request(
        (priority, next(arrivals), 0),
        list(tokens),
        max_total=len(tokens) + output,
        max_blocks=32,
        next_row=len(tokens) - 1 if next_row is None else next_row,
    )


def step(scheduler: Scheduler) -> dict[tuple[int, ...], int]:
    """One engine step with a model that always says 1; tokens scheduled by key."""
    scheduled = scheduler.schedule()
    scheduler.check_integrity()
    counts = {r.key: r.num_scheduled for r in scheduled}
    for r in scheduled:
        if r.num_computed + r.num_scheduled == len(r.tokens):
            r.tokens.append(1)
    scheduler.complete(scheduled)
    for r in scheduled:
        if len(r.tokens) >= r.max_total:
            scheduler.remove(r)
    scheduler.check_integrity()
    return counts


def run(scheduler: Scheduler, limit: int = 500) -> int:
    for count in range(limit):
        if not step(scheduler):
            assert not scheduler.running
            assert not scheduler.waiting
            return count
    raise AssertionError("the scheduler does not come to an end")


def test_whole_prompt_cached_still_computes_its_last_block() -> None:
    scheduler = make()
    prompt = list(range(10, 10 + 2 * SIZE))  # an exact multiple of the block size
    for expected in (0, SIZE):
        one = request(prompt)
        scheduler.add(one)
        counts = step(scheduler)
        assert one.num_cached == expected
        assert counts[one.key] == len(prompt) - expected
        run(scheduler)


def test_exact_multiple_plus_one_reuses_all_full_blocks() -> None:
    scheduler = make()
    first = request(list(range(10, 19)))
    scheduler.add(first)
    run(scheduler)
    second = request(list(range(10, 19)))
    scheduler.add(second)
    assert step(scheduler)[second.key] == 1
    assert second.num_cached == 2 * SIZE


def test_generated_tokens_are_found_too() -> None:
    scheduler = make()
    first = request([10, 11, 12], output=8)
    scheduler.add(first)
    run(scheduler)
    second = request([*first.tokens, 50])
    scheduler.add(second)
    step(scheduler)
    assert second.num_cached == 2 * SIZE  # 10 of its 12 tokens were computed


def test_prompt_rows_keep_the_prefix_cache_out() -> None:
    scheduler = make()
    prompt = list(range(10, 30))
    scheduler.add(request(prompt))
    run(scheduler)
    scored = request(prompt, next_row=0)
    scheduler.add(scored)
    step(scheduler)
    assert scored.num_cached == 0
    later = request(prompt, next_row=9)  # blocks 0 and 1 may be reused
    scheduler.add(later)
    step(scheduler)
    assert later.num_cached == 2 * SIZE


def test_no_reuse_without_prefix_cache() -> None:
    scheduler = make(prefix_cache=False)
    for _ in range(2):
        one = request(list(range(10, 30)))
        scheduler.add(one)
        run(scheduler)
        assert one.num_cached == 0


def test_prompts_that_differ_in_the_first_token_share_nothing() -> None:
    scheduler = make()
    scheduler.add(request([1, *range(10, 30)]))
    run(scheduler)
    other = request([2, *range(10, 30)])
    scheduler.add(other)
    step(scheduler)
    assert other.num_cached == 0
    assert block_digest(b"", [1, 2]) != block_digest(b"", [1, 2, 0])
    assert block_digest(b"a" * 16, [1]) != block_digest(b"b" * 16, [1])


def test_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=6, sequences=4)
    old = request(list(range(10, 18)), output=12)
    new = request(list(range(30, 38)), output=12)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert old in scheduler.running
    assert new in scheduler.waiting
    assert new.num_computed == 0
    kept = list(new.tokens)
    while new in scheduler.waiting:
        step(scheduler)
    assert new.tokens[: len(kept)] == kept
    run(scheduler)
    assert len(old.tokens) == len(new.tokens) == 20


def test_the_oldest_is_never_preempted_for_a_newer_one() -> None:
    scheduler = make(num_blocks=8, sequences=8)
    requests = [request([i] * 5, output=16) for i in range(20, 26)]
    for one in requests:
        scheduler.add(one)
    finished: list[tuple[int, ...]] = []
    while scheduler.running or scheduler.waiting:
        step(scheduler)
        for one in requests:
            if len(one.tokens) == one.max_total and one.key not in finished:
                finished.append(one.key)
    assert scheduler.num_preemptions > 0
    assert finished[0] == requests[0].key


def test_admission_leaves_a_block_for_each_running_request() -> None:
    scheduler = make(num_blocks=4)
    old = request([9] * SIZE, output=5)  # its next token opens a second block
    new = request([8] * 3 * SIZE, output=2)
    scheduler.add(old)
    scheduler.add(new)
    while len(old.tokens) < old.max_total:
        assert new.key not in step(scheduler)
    assert new.key in step(scheduler)
    run(scheduler)
    assert scheduler.num_preemptions == 0


def test_long_prompt_is_read_in_chunks_beside_decoding() -> None:
    scheduler = make(num_blocks=32, tokens=8)
    short = request([9, 9], output=20)
    scheduler.add(short)
    step(scheduler)
    long = request(list(range(100, 130)), output=1)
    scheduler.add(long)
    seen = []
    while len(long.tokens) == 30:
        counts = step(scheduler)
        assert counts[short.key] == 1  # a prompt never holds up a decoding request
        seen.append(counts[long.key])
    assert seen == [7, 7, 7, 7, 2]


def test_rows_limit_the_chunk_of_a_scored_prompt() -> None:
    scheduler = make(rows=8, tokens=64)
    scored = request(list(range(100, 130)), output=1, next_row=10)
    scheduler.add(scored)
    seen = []
    while scored in scheduler.running or scored in scheduler.waiting:
        seen.append(step(scheduler)[scored.key])
    assert seen == [18, 8, 4]  # 10 tokens without rows and 8 with


def test_rows_of_decoding_requests_come_first() -> None:
    scheduler = make(num_blocks=64, rows=8, tokens=64)
    decoding = [request([9, i], output=9) for i in range(5)]
    for one in decoding:
        scheduler.add(one)
    step(scheduler)
    scored = request(list(range(100, 130)), output=1, next_row=0)
    scheduler.add(scored)
    seen = []
    for _ in range(4):
        counts = step(scheduler)
        assert all(counts[one.key] == 1 for one in decoding)
        seen.append(counts[scored.key])
    assert seen == [3, 3, 3, 3]
    older = request(list(range(200, 230)), output=1, next_row=0)
    older.key = (0, -1, 0)  # comes before the decoding ones in the queue
    scheduler.remove(scored)
    scheduler.add(older)
    for _ in range(3):
        counts = step(scheduler)
        assert all(counts[one.key] == 1 for one in decoding)
        assert counts[older.key] == 3


def test_requests_that_never_fit_are_refused_with_the_numbers() -> None:
    scheduler = make(num_blocks=3)
    scheduler.add(request([1] * 9, output=4))  # 12 tokens in the cache; the 13th is never fed back
    with pytest.raises(RequestError, match=r"needs 4 KV cache blocks .*has 3"):
        scheduler.add(request([1] * 9, output=5))
    run(scheduler)


def test_abort_while_prefilling_waiting_and_decoding() -> None:
    scheduler = make(num_blocks=16, tokens=8)
    decoding, reading, waiting = (
        request([5], 9), request([6] * 20, 9), request([7] * 30, 9)
    )  # fmt: skip
    scheduler.add(decoding)
    step(scheduler)
    scheduler.add(reading)
    step(scheduler)
    scheduler.add(waiting)
    assert 0 < reading.num_computed < 20
    for one in (reading, waiting, decoding):
        scheduler.remove(one)
        scheduler.remove(one)  # twice is harmless
        scheduler.check_integrity()
    assert scheduler.pool.num_free == 16


def test_shared_prefix_in_a_tiny_pool() -> None:
    scheduler = make(num_blocks=7, tokens=16)
    prefix = list(range(40, 48))
    first = request([*prefix, 1], output=3)
    scheduler.add(first)
    step(scheduler)
    others = [request([*prefix, 2 + i], output=6) for i in range(4)]
    for one in others:
        scheduler.add(one)
    run(scheduler)
    assert all(one.num_cached >= 2 * SIZE for one in others)
    assert scheduler.pool.num_free == 7


def test_least_recently_released_blocks_go_first() -> None:
    pool = BlockPool(4, SIZE)
    blocks = [pool.allocate() for _ in range(4)]
    for index, block in enumerate(blocks[:3]):
        pool.name(block, bytes([index]))
    pool.release([blocks[0], blocks[1]])  # the end of the prefix is freed first
    pool.release([blocks[3]])  # nameless: before all others
    pool.release([blocks[2]])
    assert [pool.allocate() for _ in range(4)] == [blocks[3], blocks[1], blocks[0], blocks[2]]
    assert pool.match([bytes([0])]) == []


def test_of_two_equal_blocks_the_first_keeps_the_name() -> None:
    pool = BlockPool(2, SIZE)
    one, two = pool.allocate(), pool.allocate()
    pool.name(one, b"x")
    pool.name(two, b"x")
    assert pool.match([b"x"]) == [one]
    pool.release([one])
    pool.share(one)
    pool.check_integrity([[one], [two]])


@pytest.mark.parametrize("fault", ["leak", "double", "lost name"])
def test_check_integrity_sees_faults(fault: str) -> None:
    pool = BlockPool(3, SIZE)
    block = pool.allocate()
    pool.name(block, b"x")
    pool.check_integrity([[block]])
    tables = {"leak": [], "double": [[block], [block]], "lost name": [[block]]}[fault]
    if fault == "lost name":
        pool._by_digest.clear()
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


# ---- fair shares and priorities ------------------------------------------------------------------


def test_short_prompts_behind_long_ones_are_read_at_once() -> None:
    scheduler = make(num_blocks=64, tokens=8)
    longs = [request(list(range(100 * i, 100 * i + 40)), output=1) for i in (1, 2)]
    for one in longs:
        scheduler.add(one)
    assert step(scheduler) == {longs[0].key: 8}  # alone, the first takes all
    shorts = [request([9, i, i], output=1) for i in range(4)]
    for one in shorts:
        scheduler.add(one)
    assert step(scheduler) == {longs[0].key: 4, shorts[0].key: 3, shorts[1].key: 1}
    counts = step(scheduler)
    assert counts[longs[0].key] == 4
    assert len(shorts[1].tokens) == 4
    run(scheduler)


def test_a_stream_of_short_prompts_at_most_halves_a_long_one() -> None:
    scheduler = make(num_blocks=64, tokens=8)
    long = request(list(range(100, 140)), output=1)
    scheduler.add(long)
    steps = 0
    while len(long.tokens) == 40:
        for i in range(4):
            scheduler.add(request([9, steps, i], output=1))
        assert step(scheduler)[long.key] >= min(4, 40 - long.num_computed)
        steps += 1
    assert steps <= 2 * 40 // 8


def test_what_was_kept_for_prompts_without_room_is_not_lost() -> None:
    for num_blocks, wanted in ((12, [22, 18]), (11, [30])):  # 6 blocks, 5, and 1 for the first
        scheduler = make(num_blocks=num_blocks, tokens=40)
        scheduler.add(request(list(range(100, 130)), output=1))
        scheduler.add(request(list(range(200, 218)), output=1))
        assert list(step(scheduler).values()) == wanted
        run(scheduler)


def test_rows_are_shared_too() -> None:
    scheduler = make(num_blocks=64, tokens=64, rows=8)
    scored = request(list(range(100, 160)), output=1, next_row=0)
    scheduler.add(scored)
    short = request([9, 9, 9], output=1)
    scheduler.add(short)
    assert step(scheduler) == {scored.key: 7, short.key: 3}


def test_the_urgent_goes_first_and_takes_the_place_of_others() -> None:
    scheduler = make(num_blocks=12, sequences=2)
    slow = [request([20 + i] * 9, output=20) for i in range(3)]
    for one in slow:
        scheduler.add(one)
    step(scheduler)
    urgent = request([5] * 9, output=2, priority=-1)
    lazy = request([6] * 3, output=2, priority=1)
    for one in (lazy, urgent):
        scheduler.add(one)
    counts = step(scheduler)
    assert list(counts) == [slow[0].key, urgent.key]
    assert slow[1] in scheduler.waiting
    order = []
    while scheduler.running or scheduler.waiting:
        step(scheduler)
        done = [r.key for r in (*slow, urgent, lazy) if len(r.tokens) == r.max_total]
        order += [key for key in done if key not in order]
    assert order[:3] == [urgent.key, slow[0].key, slow[1].key]
    assert set(order) == {urgent.key, lazy.key, *(one.key for one in slow)}


def test_equals_are_not_preempted_for_each_other() -> None:
    scheduler = make(num_blocks=12, sequences=2)
    for i in range(4):
        scheduler.add(request([20 + i] * 9, output=6, priority=3))
    run(scheduler)
    assert scheduler.num_preemptions == 0
