"""Beam and contrastive search against their slow twins, and beside other requests."""

from __future__ import annotations

import itertools

import pytest
import slow_search

from engine_fakes import FakeRunner, hashed_logits, hidden_vector, text_llm, tiny_config
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import RequestError

V = 31
RULE = hashed_logits(V, eos_bias=2.0)
PROMPTS = [[2], [2, 5, 6, 7], list(range(3, 20)), [9] * 16]


def logits(prefix: list[int]) -> list[float]:
    return [float(x) for x in RULE(prefix)]


def hidden(prefix: list[int]) -> list[float]:
    return [float(x) for x in hidden_vector(prefix)]


def engine(**options: int) -> LLM:
    return LLM.from_runner(FakeRunner(RULE, tiny_config(V), **options))


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_beam_search_equals_the_definition(
    width: int, length_penalty: float, ignore_eos: bool
) -> None:
    params = SamplingParams(
        temperature=0,
        beam_width=width,
        n=width,
        length_penalty=length_penalty,
        max_tokens=9,
        ignore_eos=ignore_eos,
        stop_token_ids=[4],
    )
    llm = engine(max_batch_tokens=5)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        stops = {4} if ignore_eos else {2, 4}
        wanted = slow_search.beam(
            logits,
            prompt,
            width=width,
            length_penalty=length_penalty,
            max_tokens=9,
            stops=stops,
        )
        assert [o.token_ids for o in output.outputs] == [tokens for _, _, tokens in wanted]
        for got, (score, total, tokens) in zip(output.outputs, wanted, strict=True):
            assert got.score == pytest.approx(score, abs=1e-4)
            assert got.cumulative_logprob == pytest.approx(total, abs=1e-4)
            assert got.finish_reason == ("stop" if tokens[-1] in stops else "length")
            assert got.stop_reason == (4 if tokens[-1] == 4 else None)
    llm.check_integrity()


def test_beam_of_one_without_stops_is_greedy() -> None:
    common = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    llm = engine()
    greedy = llm.generate(PROMPTS, SamplingParams(**common))
    beam = llm.generate(PROMPTS, SamplingParams(beam_width=1, **common))
    assert [o.token_ids for o in beam] == [o.token_ids for o in greedy]


def test_a_wide_beam_finds_the_likeliest_continuation() -> None:
    params = SamplingParams(temperature=0, beam_width=V - 1, max_tokens=2, stop_token_ids=[])
    output = engine(max_batch_tokens=64, num_blocks=200).generate([2, 5], params)[0]
    best = max(
        itertools.product(range(V), repeat=2),
        key=lambda pair: (
            (
                slow_search.log_softmax(logits([2, 5]))[pair[0]]
                + slow_search.log_softmax(logits([2, 5, pair[0]]))[pair[1]]
            )
            / 2
            if pair[0] != 2
            else -99.0
        ),
    )
    if len(output.token_ids) == 2:
        assert tuple(output.token_ids) == best


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("k", [2, 4, 5])
def test_contrastive_search_equals_the_definition(alpha: float, k: int) -> None:
    params = SamplingParams(temperature=0, penalty_alpha=alpha, top_k=k, max_tokens=14)
    llm = engine(max_batch_tokens=5)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert output.token_ids == slow_search.contrastive(
            logits, hidden, prompt, alpha=alpha, k=k, max_tokens=14, stops={2}
        )
    llm.check_integrity()


def test_contrastive_search_without_penalty_is_greedy() -> None:
    llm = engine()
    greedy = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=10))
    search = SamplingParams(temperature=0, max_tokens=10, penalty_alpha=0.0, top_k=3)
    assert [o.token_ids for o in llm.generate(PROMPTS, search)] == [o.token_ids for o in greedy]


def test_searches_use_the_whole_context_and_end_with_length() -> None:
    for options in ({"beam_width": 3, "length_penalty": 0.5}, {"penalty_alpha": 0.4, "top_k": 3}):
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, **options)
        output = engine(max_batch_tokens=7).generate([5] * 59, params)[0]
        assert (len(output.token_ids), output.finish_reason) == (5, "length")


def test_searches_stream_and_stop() -> None:
    llm = text_llm("One, two. Three", num_blocks=80)
    contrast = SamplingParams(temperature=0, penalty_alpha=0.2, top_k=3, stop=". T")
    pieces = list(llm.stream("", contrast))
    assert "".join(piece.text for piece in pieces) == "One, two"
    assert len(pieces) > 5
    assert pieces[-1].result is not None
    assert pieces[-1].result.finish_reason == "stop"
    beam = SamplingParams(temperature=0, beam_width=2, n=2)
    outputs = list(llm.stream("", beam))
    assert [o.index for o in outputs] == [0, 1]
    assert outputs[0].text == "One, two. Three"
    assert [o.result is None for o in outputs] == [True, False]


def test_searches_take_blocks_from_requests_and_give_them_back() -> None:
    llm = engine(num_blocks=20, max_batch_tokens=8)
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    wanted = [engine().generate(p, greedy)[0].token_ids for p in PROMPTS]
    beam = SamplingParams(temperature=0, beam_width=4, max_tokens=9, length_penalty=0.0)
    alone = engine().generate([2, 5, 6, 7], beam)[0].token_ids
    jobs = [llm.submit(p, greedy) for p in PROMPTS]
    for _ in range(8):
        llm.step()
    search = llm.submit([2, 5, 6, 7], beam)
    while llm.has_work:
        llm.step()
        llm.check_integrity()
    assert llm._scheduler.num_preemptions > 0
    assert [job.output().token_ids for job in jobs] == wanted
    assert search.output().token_ids == alone
    assert llm._scheduler.pool.num_free == 20


def test_an_aborted_search_frees_its_blocks() -> None:
    llm = engine()
    for options in ({"beam_width": 3}, {"penalty_alpha": 0.4, "top_k": 3}):
        job = llm.submit([2, 5, 6], SamplingParams(temperature=0, max_tokens=30, **options))
        for _ in range(3):
            llm.step()
            llm.check_integrity()
        llm.abort(job)
        llm.check_integrity()
        assert job.output().finish_reason == "abort"
        assert not llm.has_work
    assert llm._scheduler.pool.num_free == 64


def test_searches_that_cannot_fit_are_refused() -> None:
    wide = SamplingParams(temperature=0, beam_width=8, max_tokens=30)
    with pytest.raises(RequestError, match="max_batch_tokens"):
        engine(max_batch_tokens=4).generate([2], wide)
    with pytest.raises(RequestError, match="KV cache blocks"):
        engine(num_blocks=20).generate([2], wide)
    with pytest.raises(RequestError, match="vocabulary has 30 tokens"):
        engine(max_batch_tokens=64).generate([2], SamplingParams(temperature=0, beam_width=31))
