"""`LLM` over a scripted runner: prompts, samples, log-probabilities, failures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slow_sampling as slow
from naive import GREEDY, PROMPTS, RULE, V, hashed, naive

import optlm.engine.engine
from engine_fakes import FakeRunner, text_llm, tiny_config
from optlm.engine.llm import LLM
from optlm.engine.outputs import RequestOutput
from optlm.engine.params import SamplingParams
from optlm.errors import BackendError, CheckpointError, EngineError, RequestError

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"temperature": 0, "logit_bias": {7: 4.0, 8: 4.0}},
    {"temperature": 0, "stop_token_ids": list(range(40, 60)), "min_tokens": 3},
    {"seed": 1},
    {"seed": 2, "temperature": 0.3, "top_k": 5},
    {"seed": 3, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_equals_the_naive_loop(options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=12, **options)
    outputs = hashed(max_batch_tokens=8).generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.token_ids == naive(prompt, params)


# ---- forms of prompts ----------------------------------------------------------------------------


def test_prompts_come_in_every_form() -> None:
    llm = text_llm("ok")
    params = SamplingParams(temperature=0)
    assert [o.prompt for o in llm.generate("ab", params)] == ["ab"]
    assert llm.generate([2, 5], params)[0].prompt is None
    assert llm.generate(np.array([2, 5]), params)[0].prompt_token_ids == [2, 5]
    assert llm.generate([], params) == []
    mixed = llm.generate(["a", [2, 100], "", np.array([2])], params)
    assert [o.prompt_token_ids for o in mixed] == [[2, 100], [2, 100], [2], [2]]
    several = llm.generate(["", ""], [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2)])
    assert [o.text for o in several] == ["o", "ok"]


@pytest.mark.parametrize(
    "prompts",
    [
        [[]],
        [[2], []],
        [[-1]],
        [[97]],
        [[2**64]],
        [[True]],
        [[1.0]],
        [["a"]],
        [None],
        5,
        None,
        b"ab",
        {"a": 1},
        [2, "a"],
        "text without tokenizer",
        [[2, 3], "text"],
    ],
    ids=str,
)
def test_bad_prompts_are_refused_and_nothing_runs(prompts: Any) -> None:
    llm = hashed()
    with pytest.raises(RequestError):
        llm.generate(prompts, GREEDY)
    assert not llm.has_work
    llm.check_integrity()


def test_refusals_name_the_prompt_and_bad_params_are_refused() -> None:
    llm = hashed()
    with pytest.raises(RequestError, match=r"prompt 1: token 0 of the prompt is 97"):
        llm.generate([[2], [97]], GREEDY)
    with pytest.raises(RequestError, match="2 prompts and 1 params"):
        llm.generate([[2], [3]], [GREEDY])
    for bad in (5, {"n": 1}, [{"n": 1}], "greedy"):
        with pytest.raises(RequestError):
            llm.generate([[2]], bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="need a tokenizer"):
        llm.generate([2], SamplingParams(stop="x"))
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([2], SamplingParams(logit_bias={97: 1.0}))


# ---- samples -------------------------------------------------------------------------------------


def test_samples_differ_by_index_and_share_the_prompt() -> None:
    llm = hashed(max_batch_tokens=8)
    prompt = list(range(3, 35))
    params = SamplingParams(seed=4, n=3, max_tokens=8)
    output = llm.generate(prompt, params)[0]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert [o.token_ids for o in output.outputs] == [naive(prompt, params, i) for i in range(3)]
    assert output.text == output.outputs[0].text
    runner = llm._runner
    assert isinstance(runner, FakeRunner)
    # 32 tokens once, then the last block of 4 again for the two others.
    assert sum(tokens for tokens, _ in runner.batches) <= 32 + 2 * 4 + 3 * 8


def test_best_of_returns_the_likeliest_by_mean_logprob() -> None:
    params = SamplingParams(seed=4, n=2, best_of=5, max_tokens=8)
    output = hashed().generate([2, 5], params)[0]
    means = {}
    for sample in range(5):
        ids = naive([2, 5], params, sample)
        tokens, total = [2, 5], 0.0
        for token in ids:
            total += slow.log_softmax([float(x) for x in RULE(tokens)])[token]
            tokens.append(token)
        means[tuple(ids)] = total / len(ids)
    best = sorted(means, key=lambda ids: -means[ids])[:2]
    assert [tuple(o.token_ids) for o in output.outputs] == best
    assert output.outputs[0].cumulative_logprob == pytest.approx(means[best[0]] * len(best[0]))


def test_a_drawn_seed_is_recorded_and_reproduces() -> None:
    llm = hashed()
    first = llm.generate([2, 5], SamplingParams(max_tokens=10))[0]
    again = llm.generate([2, 5], SamplingParams(max_tokens=10, seed=first.seed))[0]
    assert first.token_ids == again.token_ids
    assert llm.generate([2, 5], SamplingParams(max_tokens=1))[0].seed != first.seed
    assert llm.generate([2], GREEDY)[0].seed is None


def test_same_text_under_any_load() -> None:
    params = SamplingParams(seed=9, max_tokens=10, top_p=0.9)
    wanted = hashed().generate([2, 7, 7], params)[0].token_ids
    llm = hashed(num_blocks=12, max_batch_tokens=5)
    outputs = llm.generate([[2, 7, 7], *PROMPTS, [2, 7, 7]], params)
    assert outputs[0].token_ids == outputs[-1].token_ids == wanted
    assert llm._scheduler.num_preemptions > 0


# ---- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(
        seed=1, temperature=0.5, top_k=3, repetition_penalty=1.4, logprobs=4, prompt_logprobs=2,
        max_tokens=5,
    )  # fmt: skip
    prompt = list(range(3, 24))
    output = hashed(max_batch_tokens=4).generate(prompt, params)[0]
    tokens = prompt + output.token_ids
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    assert output.prompt_logprobs[0] is None
    reports = [*output.prompt_logprobs[1:], *output.logprobs]
    for position, report in enumerate(reports):
        wanted = slow.log_softmax([float(x) for x in RULE(tokens[: position + 1])])
        order = sorted(range(V), key=lambda i: (-wanted[i], i))
        assert report is not None
        assert report.token_id == tokens[position + 1]
        assert report.logprob == pytest.approx(wanted[report.token_id], abs=1e-5)
        assert report.rank == order.index(report.token_id) + 1
        count = 2 if position + 1 < len(prompt) else 4
        assert report.top_ids.tolist() == order[:count]
    total = sum(report.logprob for report in output.logprobs)
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_are_made_once_for_all_samples() -> None:
    prompt = list(range(3, 24))
    params = SamplingParams(seed=1, n=3, prompt_logprobs=1, max_tokens=4)
    llm = hashed(max_batch_tokens=8)
    output = llm.generate(prompt, params)[0]
    assert output.prompt_logprobs is not None
    assert [report and report.token_id for report in output.prompt_logprobs] == [None, *prompt[1:]]
    assert [o.token_ids for o in output.outputs] == [naive(prompt, params, i) for i in range(3)]


def test_logprobs_of_the_whole_vocabulary_and_of_none() -> None:
    whole = hashed().generate([2, 5], SamplingParams(logprobs="all", max_tokens=2))[0]
    assert whole.logprobs is not None
    assert len(whole.logprobs[0].top()) == V
    assert math.fsum(map(math.exp, whole.logprobs[1].top().values())) == pytest.approx(1, abs=1e-5)
    only = hashed().generate([2, 5], SamplingParams(logprobs=0, max_tokens=2))[0]
    assert only.logprobs is not None
    assert only.logprobs[0].top() == {}
    assert hashed().generate([2, 5], GREEDY)[0].logprobs is None


def test_max_tokens_0_only_reads() -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    llm = hashed(max_batch_tokens=4)
    outputs = llm.generate([[2, 5, 6, 7, 8, 9], [3]], params)
    assert [len(o.prompt_logprobs or ()) for o in outputs] == [6, 1]
    assert outputs[0].token_ids == []
    assert outputs[0].finish_reason == "length"
    assert not llm.has_work
    plain = llm.generate([2, 5], SamplingParams(max_tokens=0))[0]
    assert (plain.token_ids, plain.finish_reason) == ([], "length")


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
@pytest.mark.parametrize("count", [{"n": 3}, {"best_of": 3}], ids=str)
def test_samples_of_a_prompt_only_read_are_all_empty(
    prompt_logprobs: int | None, count: dict[str, int]
) -> None:
    """The prompt less its last token fills whole blocks: a second sample finds all of it cached."""
    llm = hashed()
    params = SamplingParams(max_tokens=0, prompt_logprobs=prompt_logprobs, **count)
    for prompt in ([9] * 33, [9, 9, 4]):
        output = llm.generate(prompt, params)[0]
        assert [o.token_ids for o in output.outputs] == [[]] * params.n
        assert {o.finish_reason for o in output.outputs} == {"length"}
        llm.check_integrity()


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("where", ["forward", "schedule", "complete", "accept"])
def test_an_interruption_leaves_the_engine_usable(
    error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = hashed(max_batch_tokens=8)
    owner, name = {
        "forward": (llm._runner, "forward_best"),
        "schedule": (llm._scheduler, "_grow"),
        "complete": (llm._scheduler, "_name"),
        "accept": (optlm.engine.engine, "accept_best"),
    }[where]
    original = getattr(owner, name)
    calls = 0

    def strike(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args)
        if calls == 3:
            raise error
        return result

    monkeypatch.setattr(owner, name, strike)
    with pytest.raises(error):
        llm.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    assert not llm.has_work
    llm.check_integrity()
    assert llm._scheduler.pool.num_free == 64
    assert [o.token_ids for o in llm.generate(PROMPTS, GREEDY)] == [
        naive(p, GREEDY) for p in PROMPTS
    ]


def test_torn_bookkeeping_is_thrown_away() -> None:
    llm = hashed()
    stream = llm.stream([2, 5], GREEDY)
    next(stream)
    llm._scheduler.pool._references[3] += 1  # as if struck in the middle of an allocation
    stream.close()
    llm.check_integrity()
    assert llm.generate([2], GREEDY)[0].token_ids == naive([2], GREEDY)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_the_request_alone(value: float) -> None:
    def rule(prefix: list[int]) -> np.ndarray:
        row = RULE(prefix)
        if prefix[:2] == [9, 9]:
            row[5] = value
        return row

    llm = LLM.from_runner(FakeRunner(rule, tiny_config(V)))
    healthy = llm.stream([2, 5], GREEDY)
    next(healthy)
    for options in (
        {},
        {"n": 3},
        {"temperature": 0},
        {"temperature": 0, "logprobs": 1},
        {"temperature": 0, "presence_penalty": 1.0},
        {"temperature": 0, "beam_width": 2},
        {"temperature": 0, "penalty_alpha": 0.5, "top_k": 3},
    ):
        with pytest.raises(EngineError, match="not finite"):
            llm.generate([9, 9], SamplingParams(**options))
    for only_read in (
        lambda: llm.score([9, 9, 4]),
        lambda: llm.generate([9, 9, 4], SamplingParams(max_tokens=0, prompt_logprobs=1)),
    ):
        with np.errstate(invalid="ignore"), pytest.raises(EngineError, match="not finite"):
            only_read()
    assert sum(len(piece.token_ids) for piece in healthy) == 5  # and the one before
    assert not llm.has_work
    llm.check_integrity()


def test_a_failed_prompt_starts_no_further_samples() -> None:
    nan = np.full(V, np.nan, np.float32)
    llm = LLM.from_runner(FakeRunner(lambda prefix: nan, tiny_config(V)))
    job = llm.submit([2], SamplingParams(n=3))
    llm.step()
    assert job.finished
    assert not llm.has_work


def test_an_aborted_best_of_returns_a_finished_sample() -> None:
    llm = hashed()
    job = llm.submit([60], SamplingParams(seed=1, n=1, best_of=12, max_tokens=60))
    while all(sample.finish_reason is None for sample in job.samples):
        llm.step()
    llm.abort(job)
    assert {sample.finish_reason for sample in job.samples} == {"stop", "abort"}
    # All have as many tokens; the finished one is not the likeliest.
    likeliest = max(job.samples, key=lambda sample: sample.cumulative_logprob)
    assert likeliest.finish_reason == "abort"
    assert job.output().finish_reason == "stop"


def test_abort_keeps_what_there_is() -> None:
    llm = hashed()
    job = llm.submit([2, 5], SamplingParams(temperature=0, max_tokens=20, n=2, ignore_eos=True))
    for _ in range(5):
        llm.step()
    llm.abort(job)
    output = job.output()
    assert output.finish_reason == "abort"
    wanted = naive([2, 5], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert output.token_ids == wanted
    assert not llm.has_work
    llm.check_integrity()


# ---- the rest ------------------------------------------------------------------------------------


def test_a_hundred_thousand_prompts_would_not_choke_on_bookkeeping() -> None:
    llm = hashed(num_blocks=600, max_batch_tokens=256)
    outputs = llm.generate([[2, 3 + i % 90] for i in range(2000)], SamplingParams(max_tokens=1))
    assert len(outputs) == 2000


def test_outputs_are_plain_values() -> None:
    output = hashed().generate([2, 5], GREEDY)[0]
    assert isinstance(output, RequestOutput)
    assert all(type(token) is int for token in output.token_ids)


def test_backends_and_options_are_checked() -> None:
    with pytest.raises(RequestError, match="backend is 'cuda'"):
        LLM("nowhere", backend="cuda")  # type: ignore[arg-type]
    for bad in ({"dtype": "f64"}, {"threads": 0}, {"num_blocks": 0}, {"max_batch_tokens": 1.5},
                {"num_blocks": 4, "kv_cache_bytes": 10**6}, {"kv_cache_bytes": True}):  # fmt: skip
        with pytest.raises(RequestError):
            LLM("nowhere", **bad)


def test_an_absent_bundled_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("optlm.engine.load.bundled_model", lambda: tmp_path / "mini")
    with pytest.raises(CheckpointError, match="bundled model is not there"):
        LLM()


def test_no_backend_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from optlm.engine import runner

    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    for wanted in ("auto", "native", "torch"):
        with pytest.raises(BackendError, match=r"install") as caught:
            runner._choose_backend(wanted)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
