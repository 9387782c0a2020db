"""`LLM` over a scripted runner: the limit of the context, and scoring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import slow_sampling as slow
from naive import GREEDY, PROMPTS, RULE, V, hashed, naive

from engine_fakes import ByteTokenizer, FakeRunner, hashed_logits, tiny_config
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import ContextLengthError, RequestError

# ---- the context ---------------------------------------------------------------------------------


def test_generation_ends_when_the_context_is_full() -> None:
    llm = hashed()
    output = llm.generate([5] * 60, SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))[
        0
    ]
    assert (len(output.token_ids), output.finish_reason) == (4, "length")
    assert output.token_ids == naive([5] * 60, SamplingParams(temperature=0, max_tokens=4))


def test_long_prompts_are_refused_with_the_numbers() -> None:
    llm = hashed()
    for length in (64, 65, 1000):
        with pytest.raises(ContextLengthError, match=rf"{length} tokens.*64.*truncate_left"):
            llm.generate([5] * length, GREEDY)
    assert llm.generate([5] * 63, GREEDY)[0].finish_reason == "length"
    read = SamplingParams(max_tokens=0, prompt_logprobs=0)
    assert len(llm.generate([5] * 64, read)[0].prompt_logprobs or ()) == 64
    with pytest.raises(ContextLengthError):
        llm.generate([5] * 65, read)


def test_texts_far_beyond_the_context_are_refused_without_encoding_them() -> None:
    class Bounded(ByteTokenizer):
        def fewest_tokens(self, text: str) -> int:
            return len(text) // 4

        def encode(self, text: str) -> list[int]:
            assert len(text) < 1000, "encoded"
            return super().encode(text)

    llm = LLM.from_runner(FakeRunner(RULE, tiny_config(V)), Bounded())
    for call in (llm.generate, llm.score):
        with pytest.raises(ContextLengthError, match="250 tokens or more"):
            call("\x05" * 1000)
        with pytest.raises(ContextLengthError, match="has 101 tokens"):
            call("\x05" * 100)
    assert llm.generate("\x05" * 20, GREEDY)[0].token_ids


@pytest.mark.parametrize(
    ("length", "max_tokens", "kept"),
    [(40, 10, 40), (60, 10, 54), (1000, 10, 54), (1000, 60, 32), (1000, 10**6, 32), (64, 0, 64)],
)
def test_truncate_left_keeps_the_start_token_and_the_end(
    length: int, max_tokens: int, kept: int
) -> None:
    llm = hashed()
    prompt = [2, *(3 + i % 90 for i in range(length - 1))]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, on_overflow="truncate_left")
    output = llm.generate(prompt, params)[0]
    assert output.num_truncated_tokens == length - kept
    assert output.prompt_token_ids == (prompt[:1] + prompt[length - kept + 1 :])
    bare = llm.generate(prompt[1:], params)[0].prompt_token_ids
    assert bare == prompt[1:][-kept:]


def test_requests_that_cannot_fit_the_cache_are_refused() -> None:
    llm = hashed(num_blocks=4)
    with pytest.raises(RequestError, match=r"needs 5 KV cache blocks .* has 4"):
        llm.generate([5] * 10, SamplingParams(max_tokens=8))
    assert llm.generate([5] * 10, SamplingParams(max_tokens=7))


# ---- score ---------------------------------------------------------------------------------------


def slow_score(tokens: list[int]) -> list[float]:
    return [
        slow.log_softmax([float(x) for x in RULE(tokens[:i])])[tokens[i]]
        for i in range(1, len(tokens))
    ]


def test_score_equals_the_definition() -> None:
    llm = hashed(max_batch_tokens=8)
    for tokens, output in zip(PROMPTS, llm.score(PROMPTS), strict=True):
        assert output.token_ids == tokens
        assert output.logprobs[0] is None
        assert output.logprobs[1:] == pytest.approx(slow_score(tokens), abs=1e-5)
        assert output.num_scored == len(tokens) - 1
    one = llm.score([2, 5, 6])[0]
    assert one.total == pytest.approx(sum(slow_score([2, 5, 6])), abs=1e-5)
    assert one.perplexity == pytest.approx(math.exp(-one.total / 2))
    assert math.isnan(one.bits_per_byte)
    assert math.isnan(llm.score([2])[0].perplexity)


def test_score_of_text_counts_bytes() -> None:
    llm = LLM.from_runner(FakeRunner(hashed_logits(300), tiny_config(300)), ByteTokenizer())
    output = llm.score("né")[0]
    assert output.num_bytes == 3
    assert output.bits_per_byte == pytest.approx(-output.total / math.log(2) / 3)


@pytest.mark.parametrize("stride", [None, 1, 20, 62, 63])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [64, 65, 100, 200])
def test_long_texts_are_scored_in_windows(stride: int | None, bos: bool, length: int) -> None:
    llm = hashed(max_batch_tokens=16)
    tokens = [2 if bos else 3, *(3 + i * i % 90 for i in range(length - 1))]
    output = llm.score(tokens, on_overflow="windows", stride=stride)[0]
    assert output.token_ids == tokens
    assert len(output.logprobs) == length
    wanted = slow_score(tokens[:64])
    step = stride or 32
    done = 64
    while done < length:
        end = min(done + step, length)
        start = [2] if bos else []
        window = start + tokens[end - 64 + len(start) : end]
        assert len(window) == 64
        wanted += slow_score(window)[-(end - done) :]
        done = end
    assert output.logprobs[1:] == pytest.approx(wanted, abs=1e-5)


def test_score_refuses_what_it_cannot_do() -> None:
    llm = hashed()
    with pytest.raises(ContextLengthError, match=r"65 tokens.*64.*windows"):
        llm.score([[2] * 65])
    for stride in (0, -1, 64, 1.5, True):
        with pytest.raises(RequestError, match="stride"):
            llm.score([2, 3], stride=stride)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="on_overflow"):
        llm.score([2, 3], on_overflow="cut")  # type: ignore[arg-type]
    assert not llm.has_work


def test_score_never_holds_many_logit_rows() -> None:
    config = tiny_config(V, 2048)
    runner = FakeRunner(
        lambda prefix: np.zeros(V, np.float32), config, num_blocks=1200, max_batch_tokens=1024
    )
    LLM.from_runner(runner).score([[5] * 600, [6] * 700])
    assert max(rows for _, rows in runner.batches) == 256


def test_score_beside_generate_does_not_disturb_it() -> None:
    llm = hashed(max_batch_tokens=8)
    stream = llm.stream([2, 5, 6], GREEDY)
    first = next(stream)
    llm.score(PROMPTS)
    rest = [t for p in stream for t in p.token_ids]
    assert first.token_ids + rest == naive([2, 5, 6], GREEDY)
