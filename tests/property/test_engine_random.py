"""Random load on the engine: arrivals, lengths, aborts, shared prefixes, tiny pools.

After every step the bookkeeping adds up; in the end every request has the tokens it gets alone.
"""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fakes import FakeRunner, hashed_logits, tiny_config
from optlm.engine.generation import Generation
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams

V = 23  # small, so that </s> and shared prefixes happen
CONFIG = tiny_config(V, 40)
RULE = hashed_logits(V, eos_bias=1.0)


def engine(num_blocks: int, max_batch_tokens: int, block_size: int, prefix_cache: bool) -> LLM:
    runner = FakeRunner(
        RULE,
        CONFIG,
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
    )
    return LLM.from_runner(runner, prefix_cache=prefix_cache)


@functools.cache
def alone(prompt: tuple[int, ...], params: str) -> list[list[int]]:
    llm = engine(64, 64, 4, False)
    output = llm.generate([list(prompt)], SAMPLING[params])[0]
    return [completion.token_ids for completion in output.outputs]


SAMPLING: dict[str, SamplingParams] = {
    name: SamplingParams(**values)
    for name, values in {
        "greedy": {"temperature": 0, "max_tokens": 9},
        "one": {"temperature": 0, "max_tokens": 1},
        "read": {"temperature": 0, "max_tokens": 0, "prompt_logprobs": 1},
        "sampled": {"seed": 5, "max_tokens": 12, "top_p": 0.9, "ignore_eos": True},
        "scored": {"seed": 6, "max_tokens": 5, "prompt_logprobs": 0, "logprobs": 1},
        "three": {"seed": 7, "max_tokens": 6, "n": 3},
        "best": {"seed": 8, "max_tokens": 4, "n": 1, "best_of": 3},
        "beam": {"temperature": 0, "max_tokens": 4, "beam_width": 2, "n": 2},
        "contrast": {"temperature": 0, "max_tokens": 4, "penalty_alpha": 0.5, "top_k": 3},
    }.items()
}

prompts = st.builds(
    lambda prefix, rest: [2] + [5, 6, 7, 8] * prefix + rest,
    st.integers(0, 4),
    st.lists(st.integers(3, 6), max_size=6),
)
# Steps until the next arrival, prompt, parameters, steps until it is aborted (or never).
arrivals = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 3]),
        prompts,
        st.sampled_from(sorted(SAMPLING)),
        st.one_of(st.none(), st.none(), st.integers(0, 9)),
    ),
    min_size=4,
    max_size=16,
)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals,
    # The largest request, a beam of 2 over 27 tokens, needs 14 blocks of 3.
    num_blocks=st.integers(14, 20),
    max_batch_tokens=st.integers(3, 20),
    block_size=st.integers(3, 5),
    prefix_cache=st.booleans(),
)
def test_every_request_gets_what_it_gets_alone(
    arrivals: list[tuple[int, list[int], str, int | None]],
    num_blocks: int,
    max_batch_tokens: int,
    block_size: int,
    prefix_cache: bool,
) -> None:
    llm = engine(num_blocks, max_batch_tokens, block_size, prefix_cache)
    jobs: list[tuple[Generation, list[int], str]] = []
    aborted: set[int] = set()
    deadlines: dict[int, int] = {}
    now = 0

    def step() -> None:
        nonlocal now
        for index in [i for i, deadline in deadlines.items() if deadline <= now]:
            del deadlines[index]
            if not jobs[index][0].finished:
                llm.abort(jobs[index][0])
                aborted.add(index)
                llm.check_integrity()
        llm.step()
        llm.check_integrity()
        now += 1

    for gap, prompt, name, patience in arrivals:
        for _ in range(gap):
            step()
        if patience is not None:
            deadlines[len(jobs)] = now + patience
        jobs.append((llm.submit(prompt, SAMPLING[name]), prompt, name))
    steps = 0
    while llm.has_work:
        step()
        steps += 1
        assert steps < 3000, "the engine does not come to an end"
    assert llm._scheduler.pool.num_free == num_blocks
    for index, (job, prompt, name) in enumerate(jobs):
        assert job.finished
        output = job.output()
        if index in aborted:
            # Of several samples the best finished one may stand.
            assert name == "best" or any(o.finish_reason == "abort" for o in output.outputs)
            continue
        assert [o.token_ids for o in output.outputs] == alone(tuple(prompt), name)
        if output.prompt_logprobs is not None:
            assert len(output.prompt_logprobs) == len(prompt)
