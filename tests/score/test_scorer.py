"""Scores of whole texts and continuations: equal to transformers, every token once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from score_bench import Bench

from optlm.errors import ContextLengthError, RequestError
from optlm.score import Scorer, document
from variants import VARIANTS, make_state, write_checkpoint

TEXT = "the cat sat on the mat and then the other cats went to their home in the rain again"
LONG = " ".join([TEXT] * 8)
NATS = 1e-4


def test_every_token_equals_transformers(bench: Bench) -> None:
    scored = Scorer(bench.llm).tokens([TEXT, "A"])
    for text, result in zip([TEXT, "A"], scored, strict=True):
        ids = bench.peer_tokenizer(text)["input_ids"]
        logprobs = bench.logprobs(ids)
        assert result.token_ids == ids
        assert result.logprobs[0] is None
        wanted = [logprobs[i - 1, ids[i]] for i in range(1, len(ids))]
        np.testing.assert_allclose(result.scored, wanted, atol=NATS)
        likeliest = [logprobs[i - 1].argmax() == ids[i] for i in range(1, len(ids))]
        assert result.greedy[1:] == likeliest


def test_long_texts_overlap_and_every_window_begins_with_the_start_token(bench: Bench) -> None:
    result = Scorer(bench.llm, stride=10).tokens(LONG)[0]
    ids = bench.peer_tokenizer(LONG)["input_ids"]
    size = bench.llm.config.max_position_embeddings
    assert len(ids) > 2 * size
    wanted = [bench.logprobs(ids[:size])[i - 1, ids[i]] for i in range(1, size)]
    for begin in range(size, len(ids), 10):
        end = min(begin + 10, len(ids))
        window = [2, *ids[end - size + 1 : end]]
        rows = bench.logprobs(window)
        wanted += [rows[place - 1, window[place]] for place in range(size - (end - begin), size)]
    np.testing.assert_allclose(result.scored, wanted, atol=NATS)
    assert result.logprobs.count(None) == 1


def test_token_ids_and_documents(base: Bench) -> None:
    scorer = Scorer(base.llm)
    ids = base.peer_tokenizer(TEXT)["input_ids"]
    by_ids, by_text = scorer.tokens([ids, TEXT])
    assert by_ids.logprobs == by_text.logprobs
    assert by_ids.num_bytes == by_text.num_bytes == len(TEXT)
    whole = document([by_ids, by_text])
    assert whole.num_tokens == 2 * (len(ids) - 1)
    assert whole.perplexity == pytest.approx(math.exp(-by_text.mean))
    assert whole.bits_per_byte == pytest.approx(-by_text.total / math.log(2) / len(TEXT))


def test_continuations_equal_transformers_and_read_their_context_once(bench: Bench) -> None:
    context = "the cat sat on the mat and then the other"
    endings = [" cats went", " cat sat", " rain", " home in the rain again"]
    scorer = Scorer(bench.llm)
    results = scorer.continuations(context, endings)
    before = len(bench.peer_tokenizer(context)["input_ids"])
    distinct: set[tuple[int, ...]] = set()
    for ending, result in zip(endings, results, strict=True):
        ids = bench.peer_tokenizer(context + ending)["input_ids"]
        logprobs = bench.logprobs(ids)
        wanted = [logprobs[i - 1, ids[i]] for i in range(before, len(ids))]
        np.testing.assert_allclose(result.logprobs, wanted, atol=NATS)
        greedy = all(logprobs[i - 1].argmax() == ids[i] for i in range(before, len(ids)))
        assert result.is_greedy == greedy
        distinct |= {tuple(ids[:n]) for n in range(1, len(ids))}
    assert scorer.num_forward_tokens == len(distinct)  # the least that a trie needs


def test_what_greedy_decoding_says_is_greedy(bench: Bench) -> None:
    from optlm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    context = "the cat sat"
    said = bench.llm.generate(context, params)[0]
    ids = [*said.prompt_token_ids, *said.token_ids]
    scored = Scorer(bench.llm).tokens([ids])[0]
    assert scored.greedy[-4:] == [True] * 4
    other = (ids[-1] + 1) % bench.llm.config.vocab_size
    assert Scorer(bench.llm).tokens([[*ids[:-1], other]])[0].greedy[-1] is False


def test_an_empty_context_is_the_start_token(base: Bench) -> None:
    scorer = Scorer(base.llm)
    alone = scorer.continuations("", ["the cat"])[0]
    assert alone.logprobs == pytest.approx(scorer.tokens("the cat")[0].scored)


def test_a_space_at_the_end_of_the_context_belongs_to_the_next_word(base: Bench) -> None:
    scorer = Scorer(base.llm)
    spaced = scorer.continuations("the cat ", ["sat"])[0]
    plain = scorer.continuations("the cat", [" sat"])[0]
    assert spaced.token_ids == plain.token_ids
    assert spaced.logprobs == plain.logprobs


def test_information_is_what_the_context_adds(base: Bench) -> None:
    scorer = Scorer(base.llm)
    given, plain = (
        scorer.conditional([("the cat", " sat"), ("on the", " mat")], reference="the"),
        scorer.conditional([("the", " sat"), ("the", " mat")]),
    )
    for result, without in zip(given, plain, strict=True):
        assert result.information == pytest.approx(result.total - without.total)


def test_a_written_start_token_is_not_doubled(base: Bench) -> None:
    scorer = Scorer(base.llm)
    assert scorer.tokens("</s>the cat")[0].token_ids == scorer.tokens("the cat")[0].token_ids


def test_pairs(base: Bench) -> None:
    scorer = Scorer(base.llm)
    pair = scorer.pairs([("the cats sat", "the cats cat")])[0]
    assert pair.margin == pytest.approx(pair.good.total - pair.bad.total)
    assert pair.is_right == (pair.margin > 0)
    tie = scorer.pairs([("the cat", "the cat")])[0]
    assert (tie.margin, tie.is_right) == (0, False)


@pytest.mark.parametrize("text", ["", []])
def test_empty_texts(base: Bench, text: object) -> None:
    with pytest.raises(RequestError, match="prompt 1: the text is empty"):
        Scorer(base.llm).tokens(["the", text])


def test_bad_continuations(base: Bench) -> None:
    scorer = Scorer(base.llm)
    with pytest.raises(RequestError, match="prompt 1: the continuation is empty"):
        scorer.continuations("the", [" cat", ""])
    with pytest.raises(ContextLengthError, match="65 tokens, the last of which is not read"):
        scorer.continuations(LONG, [" cat"])
    with pytest.raises(RequestError, match="lone surrogate"):
        scorer.tokens("\ud800")


def test_bad_options(base: Bench) -> None:
    with pytest.raises(RequestError, match="did you mean 'lm-eval'"):
        Scorer(base.llm, convention="lmeval")
    with pytest.raises(RequestError, match="window is 65; the model's context holds 64"):
        Scorer(base.llm, window=65)
    with pytest.raises(RequestError, match="at most 63 leaves no token out"):
        Scorer(base.llm, stride=64)
    with pytest.raises(RequestError, match="has no stride"):
        Scorer(base.llm, convention="gptq", stride=3)
    with pytest.raises(RequestError, match="no adapter 'x' is loaded; there are none"):
        Scorer(base.llm, adapter="x")


def test_ranking(base: Bench) -> None:
    scorer = Scorer(base.llm)
    context, endings = "the cat sat on", [" the mat", " mat", " the other cats went"]
    scored = scorer.continuations(context, endings, reference="the")
    for normalize, scores in {
        "sum": [s.total for s in scored],
        "tokens": [s.total / len(s.token_ids) for s in scored],
        "bytes": [s.total / len(e.strip()) for s, e in zip(scored, endings, strict=True)],
        "information": [s.information for s in scored],
    }.items():
        ranking = scorer.rank(context, endings, normalize=normalize, reference="the")
        assert ranking.scores == pytest.approx(scores)
        assert ranking.best == int(np.argmax(scores))
        assert ranking.margin == pytest.approx(sorted(scores)[-1] - sorted(scores)[-2])


@pytest.mark.parametrize(
    ("endings", "normalize", "message"),
    [
        ([" a"], "sum", "a list of at least two"),
        (" a", "sum", "a list of at least two"),
        ([" a", " a"], "tokens", "endings 0 and 1 are both ' a'"),
        ([" yes", " yes sir"], "sum", "its summed log-probability can never be lower"),
        ([" a", " "], "sum", "ending 1 is ' '; it must be a text"),
        ([" a", 3], "sum", "ending 1 is 3; it must be a text"),
        ([" a", " b"], "mean", "normalize is 'mean'; use one of sum, tokens"),
    ],
)
def test_rankings_that_mean_nothing(
    base: Bench, endings: list[str], normalize: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        Scorer(base.llm).rank("the cat", endings, normalize=normalize)  # type: ignore[arg-type]


def test_endings_that_begin_alike_are_ranked_by_tokens(base: Bench) -> None:
    ranking = Scorer(base.llm).rank("the cat", [" sat", " sat on"], normalize="tokens")
    assert len(ranking.scores) == 2


def test_weights_that_are_not_finite(base: Bench, tmp_path: Path) -> None:
    from optlm import LLM
    from optlm.errors import CheckpointError

    state = make_state(VARIANTS["base"])
    state["model.decoder.layers.0.fc1.weight"][0, 0] = np.nan
    folder = write_checkpoint(tmp_path, VARIANTS["base"], state)
    with pytest.raises(CheckpointError, match=r"fc1\.weight holds NaN or infinity"):
        LLM(folder)


@pytest.mark.parametrize(("dtype", "nats"), [("bf16", 0.1), ("int8", 0.3)])
def test_smaller_formats_stay_close(bench: Bench, dtype: str, nats: float) -> None:
    """A mean over tokens of a tiny random model with large weights; docs/scoring.md has others."""
    from optlm import LLM

    exact = Scorer(bench.llm).tokens(TEXT)[0]
    rounded = Scorer(LLM(bench.folder, dtype=dtype, threads=1)).tokens(TEXT)[0]  # type: ignore[arg-type]
    assert 0 < abs(exact.mean - rounded.mean) < nats
