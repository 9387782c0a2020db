"""Reading trees of tokens: right numbers, every token once, no block lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fakes import FakeRunner, hashed_logits, tiny_config
from optlm import LLM, SamplingParams
from optlm.engine.reading import normalizers
from optlm.engine.tree import TokenTree
from optlm.errors import ContextLengthError, EngineError, RequestError

RULE = hashed_logits(97)


def engine(**options: int) -> LLM:
    prefix_cache = bool(options.pop("prefix_cache", False))
    return LLM.from_runner(FakeRunner(RULE, **options), prefix_cache=prefix_cache)


def tree_of(*sequences: list[int], score_from: int = 0, after_last: bool = False) -> TokenTree:
    tree = TokenTree()
    for token_ids in sequences:
        tree.add(token_ids, min(score_from, len(token_ids) - 1), after_last=after_last)
    return tree


def direct(tokens: list[int], score_from: int = 0) -> tuple[list[float], list[bool]]:
    """The slow twin: the logits of every prefix from the rule."""
    logprobs, greedy = [], []
    for place in range(score_from + 1, len(tokens)):
        row = RULE(tokens[:place]).astype(np.float64)
        logprobs.append(row[tokens[place]] - row.max() - np.log(np.exp(row - row.max()).sum()))
        greedy.append(int(row.argmax()) == tokens[place])
    return logprobs, greedy


def fewest_forward_tokens(sequences: list[list[int]]) -> int:
    """Distinct prefixes that something scored comes after."""
    return len({tuple(s[:n]) for s in sequences for n in range(1, len(s))})


def test_endings_of_one_context() -> None:
    context = list(range(2, 12))
    endings = [[20, 21, 22], [20, 23], [24], [20, 21, 25, 26]]
    sequences = [context + ending for ending in endings]
    reading = engine().read(tree_of(*sequences, score_from=len(context) - 1))
    for index, sequence in enumerate(sequences):
        logprobs, greedy = reading.scores(index)
        wanted = direct(sequence, len(context) - 1)
        np.testing.assert_allclose(logprobs, wanted[0], atol=1e-5)
        assert greedy.tolist() == wanted[1]
    assert reading.num_forward_tokens == fewest_forward_tokens(sequences)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=24)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(tokens, min_size=1, max_size=12),
    st.integers(0, 30),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_any_tree_in_a_small_cache(
    sequences: list[list[int]], spare: int, budget: int, prefix_cache: bool, after_last: bool
) -> None:
    tree = tree_of(*sequences, after_last=after_last)
    llm = engine(num_blocks=32 + spare, max_batch_tokens=budget, prefix_cache=prefix_cache)
    job = llm.submit_reading(tree, normalizers, None)
    other = llm.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=5))
    while llm.has_work:
        llm.step()
        llm.check_integrity()
    job.check()
    assert other.finished
    for index, sequence in enumerate(sequences):
        logprobs, greedy = job.scores(index)
        wanted = direct(sequence)
        np.testing.assert_allclose(logprobs, wanted[0], atol=1e-5)
        assert greedy.tolist() == wanted[1]
        assert len(job.measured(index)) >= len(sequence) - 1 + after_last
    if not prefix_cache and not after_last:
        assert job.num_forward_tokens == fewest_forward_tokens(sequences)


def test_the_beginning_of_an_earlier_reading_is_found() -> None:
    llm = engine(prefix_cache=True)
    context = list(range(2, 22))  # five blocks of four tokens
    first = llm.read(tree_of([*context, 30], score_from=19))
    second = llm.read(tree_of([*context, 31, 32], score_from=19))
    assert first.num_cached_tokens == 0
    assert (second.num_cached_tokens, second.num_forward_tokens) == (16, 5)
    np.testing.assert_allclose(second.scores(0)[0], direct([*context, 31, 32], 19)[0], atol=1e-5)


def test_what_is_not_scored_is_not_read() -> None:
    llm = engine()
    reading = llm.read(tree_of([5], [6]))
    assert reading.num_forward_tokens == 0
    assert len(reading.scores(0)[0]) == 0


def test_a_path_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(RequestError, match="needs 10 KV cache blocks"):
        engine(num_blocks=8).read(tree_of(list(range(40))))


def test_logits_that_are_not_finite_end_it() -> None:
    def broken(prefix: list[int]) -> np.ndarray:
        return np.full(97, np.nan, np.float32)

    llm = LLM.from_runner(FakeRunner(broken, tiny_config()))
    with pytest.raises(EngineError, match="not finite"):
        llm.read(tree_of([2, 3, 4]))
    llm.check_integrity()
    assert not llm.has_work


def test_aborting_frees_the_blocks() -> None:
    llm = engine(max_batch_tokens=4)
    job = llm.submit_reading(tree_of([2, 3, 4, 5, 6, 7, 8, 9]), normalizers, None)
    llm.step()
    llm.abort(job)
    llm.check_integrity()
    assert job.finished
    assert not llm.has_work


def test_the_last_token_needs_no_place_in_the_context() -> None:
    llm = engine()
    assert len(llm.read(tree_of([7] * 65)).scores(0)[0]) == 64
    with pytest.raises(ContextLengthError, match="a sequence has 65 tokens to read"):
        llm.read(tree_of([7] * 65, after_last=True))
