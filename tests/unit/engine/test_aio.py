"""One engine, many asyncio callers: results, cancellation, refusals, death."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from engine_fakes import FakeRunner, hashed_logits, text_llm, tiny_config
from optlm.engine.aio import AsyncLLM
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import EngineError, RequestError

V = 97
PROMPTS = [[2, 3 + i, 5, 6, 7, 8] for i in range(40)]
GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def make(**options: int) -> LLM:
    return LLM.from_runner(FakeRunner(hashed_logits(V), tiny_config(V), **options))


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def test_many_callers_get_what_they_get_alone() -> None:
    llm = make(num_blocks=40)
    wanted = [o.token_ids for o in make().generate(PROMPTS, GREEDY)]

    async def streamed(engine: AsyncLLM, prompt: list[int]) -> list[int]:
        return [t async for piece in engine.stream(prompt, GREEDY) for t in piece.token_ids]

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            whole = await asyncio.gather(*(engine.generate(p, GREEDY) for p in PROMPTS))
            assert [o.token_ids for o in whole] == wanted
            assert await asyncio.gather(*(streamed(engine, p) for p in PROMPTS)) == wanted
            scores = await asyncio.gather(*(engine.score(p) for p in PROMPTS))
            assert scores == make().score(PROMPTS)
            read = SamplingParams(max_tokens=0)
            assert (await engine.generate([2], read)).finish_reason == "length"
            assert not engine._tickets

    run(main())
    assert not llm.has_work
    llm.check_integrity()


def test_text_streams_in_pieces() -> None:
    async def main() -> None:
        async with AsyncLLM(text_llm("Hellö world")) as engine:
            params = SamplingParams(temperature=0, stop="wor")
            pieces = [piece async for piece in engine.stream("", params)]
            assert "".join(piece.text for piece in pieces) == "Hellö "
            assert pieces[-1].result is not None

    run(main())


def test_callers_that_leave_free_their_blocks() -> None:
    llm = make()
    endless = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            tasks = [asyncio.create_task(engine.generate(p, endless)) for p in PROMPTS[:8]]
            stream = engine.stream([2, 9], endless)
            assert (await anext(stream)).token_ids
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await stream.aclose()
            assert len((await engine.generate([2, 5], GREEDY)).token_ids) == 9

    run(main())
    assert llm._scheduler.pool.num_free == 64


def test_bad_requests_harm_nobody_else() -> None:
    async def main() -> None:
        async with AsyncLLM(make()) as engine:
            good = asyncio.create_task(engine.generate([2, 5], GREEDY))
            for bad in ([], [V], "no tokenizer", None, [2] * 100):
                with pytest.raises(RequestError):
                    await engine.generate(bad, GREEDY)  # type: ignore[arg-type]
                with pytest.raises(RequestError):
                    await anext(engine.stream(bad, GREEDY))  # type: ignore[arg-type]
            with pytest.raises(RequestError):
                await engine.score([2] * 65)
            with pytest.raises(RequestError):
                await anext(engine.stream([2], SamplingParams(best_of=2)))
            assert len((await good).token_ids) == 9
            assert engine.error is None

    run(main())


def test_a_row_that_is_not_finite_fails_one_caller() -> None:
    rule = hashed_logits(V)
    llm = LLM.from_runner(
        FakeRunner(lambda p: rule(p) * np.float32("nan" if p[:2] == [9, 9] else 1), tiny_config(V))
    )

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            good = asyncio.create_task(engine.generate([2, 5], GREEDY))
            with pytest.raises(EngineError, match="not finite"):
                await engine.generate([9, 9], GREEDY)
            assert len((await good).token_ids) == 9

    run(main())


def test_when_the_engine_dies_everyone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    forward = llm._runner.forward
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError("no room")
        return forward(*args)

    monkeypatch.setattr(llm._runner, "forward", failing)

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            results = await asyncio.gather(
                *(engine.generate(p, GREEDY) for p in PROMPTS), return_exceptions=True
            )
            assert all(isinstance(result, EngineError) for result in results)
            assert engine.error is not None
            assert "no room" in engine.error
            with pytest.raises(EngineError, match="no room"):
                await engine.generate([2], GREEDY)

    run(main())


def test_closing_tells_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    forward = llm._runner.forward

    def slow(*args: Any) -> Any:
        time.sleep(0.05)  # 60 tokens take longer than closing
        return forward(*args)

    monkeypatch.setattr(llm._runner, "forward", slow)

    async def main() -> None:
        engine = AsyncLLM(llm)
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        stream = engine.stream([2, 5], params)
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="closed"):
            await engine.generate([2], GREEDY)

    run(main())
    assert not llm.has_work
    llm.check_integrity()


def test_a_slow_reader_gets_all_in_few_pieces() -> None:
    llm = make()
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    wanted = make().generate([2, 5], params)[0].token_ids

    async def main() -> None:
        async with AsyncLLM(llm) as engine:
            stream = engine.stream([2, 5], params)
            pieces = [await anext(stream)]
            assert len((await engine.generate([2, 9], params)).token_ids) == 50  # meanwhile
            (ticket,) = engine._tickets
            assert ticket._inbox.qsize() <= 2
            pieces += [piece async for piece in stream]
            assert len(pieces) <= 4
            assert [i for piece in pieces for i in piece.token_ids] == wanted
            assert pieces[-1].result is not None

    run(main())


def test_a_caller_that_leaves_is_gone_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    forward, running = llm._runner.forward_best, []

    def slow(*args: Any) -> Any:
        time.sleep(0.01)
        running.append((engine_has_left, len(args[2]) - 1))
        return forward(*args)

    monkeypatch.setattr(llm._runner, "forward_best", slow)
    endless = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine_has_left = False

    async def main() -> None:
        nonlocal engine_has_left
        async with AsyncLLM(llm) as engine:
            stays = asyncio.create_task(engine.generate([2, 9], endless))
            leaves = engine.stream([2, 5], endless)
            await anext(leaves)
            await leaves.aclose()
            engine_has_left = True
            await stays
            assert engine.stats().blocks_used == 0

    run(main())
    after = [count for left, count in running if left]
    assert after[:1] in ([1], [2])  # one step may have been under way
    assert set(after[1:]) == {1}


def test_stats_add_up() -> None:
    async def main() -> None:
        async with AsyncLLM(make(num_blocks=20)) as engine:
            assert engine.stats().blocks_total == 20
            await asyncio.gather(*(engine.generate(p, GREEDY) for p in PROMPTS))
            await engine.generate(
                [2, 5], SamplingParams(temperature=0, beam_width=2, max_tokens=3, ignore_eos=True)
            )
            await engine.generate(PROMPTS[0], GREEDY)
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
            assert stats.prompt_tokens == 41 * 6 + 2
            assert stats.generated_tokens == 41 * 9 + 3
            assert stats.prefix_queries == 41 * 6
            assert stats.preemptions > 0
            await engine.generate(PROMPTS[0], GREEDY)
            assert engine.stats().prefix_hits == stats.prefix_hits + 4  # a block of it

    run(main())


def test_the_urgent_overtakes() -> None:
    llm = make(max_batch_tokens=2)
    done: list[str] = []

    async def main() -> None:
        async with AsyncLLM(llm) as engine:

            async def ask(name: str, priority: int) -> None:
                await engine.generate([2, 5], GREEDY, priority=priority)
                done.append(name)

            await asyncio.gather(*(ask(f"late{i}", 5) for i in range(8)), ask("urgent", -1))
            for bad in (1.5, "high", 2**40, True):
                with pytest.raises(RequestError, match="priority"):
                    await engine.generate([2], GREEDY, priority=bad)  # type: ignore[arg-type]

    run(main())
    assert "urgent" in done[:3]
