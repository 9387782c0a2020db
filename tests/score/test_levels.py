"""Words, sentences and bytes, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_bench import Bench

from optlm.errors import RequestError
from optlm.score import Scorer, byte_scores, sentence_scores, word_scores
from optlm.score.spans import Token, sentences, words

TEXT = "the cat sat on the mat"


def mass(bench: Bench, logprobs: np.ndarray, *, end: bool = True) -> float:
    """Log-probability that a token with white space before it, or the end token, comes next."""
    tokenizer = bench.llm.tokenizer
    total = 0.0
    for token in range(len(logprobs)):
        starts = not tokenizer.is_special(token) and tokenizer.token_bytes(token)[:1].isspace()
        if starts or (end and token == tokenizer.eos_id):
            total += math.exp(logprobs[token])
    return math.log(total)


def test_words_are_conditioned_on_the_end_of_the_word_before(bench: Bench) -> None:
    result = Scorer(bench.llm).tokens(TEXT, words=True)[0]
    ids = result.token_ids
    rows = bench.logprobs(ids)
    for number, word in enumerate(word_scores(result)):
        places = [i for i, t in enumerate(result.tokens) if word.start <= t.start < word.end and i]
        wanted = sum(rows[i - 1, ids[i]] for i in places) + mass(bench, rows[places[-1]])
        if number:
            wanted -= mass(bench, rows[places[0] - 1])
        assert word.logprob == pytest.approx(wanted, abs=1e-4 * (len(places) + 2))


def test_words_without_correction_are_sums(base: Bench) -> None:
    scorer = Scorer(base.llm, corrects_words=False)
    result = scorer.tokens(TEXT)[0]
    spans = word_scores(result)
    assert [word.text for word in spans] == ["the", " cat", " sat", " on", " the", " mat"]
    assert math.fsum(word.logprob or 0 for word in spans) == pytest.approx(result.total)


def test_words_sum_to_the_text_and_how_it_may_end(base: Bench) -> None:
    """The correction telescopes: of the terms between words nothing is left."""
    result = Scorer(base.llm).tokens(TEXT, words=True)[0]
    assert result.word_starts is not None
    total = math.fsum(word.logprob or 0 for word in word_scores(result))
    assert total == pytest.approx(result.total + (result.word_starts[-1] or 0))


def test_bytes_sum_to_their_tokens_and_equal_the_definition(bench: Bench) -> None:
    text = "the café </s> sat"
    result = Scorer(bench.llm).tokens(text, by_byte=True)[0]
    tokenizer, ids = bench.llm.tokenizer, result.token_ids
    rows = bench.logprobs(ids)
    spans = byte_scores(result)
    assert len(spans) == len(text.encode())
    texts = {
        i: tokenizer.token_bytes(i) for i in range(rows.shape[1]) if not tokenizer.is_special(i)
    }
    at = 0
    for place, token in enumerate(result.tokens):
        parts = [span.logprob for span in spans[at : at + len(token.bytes)]]
        at += len(token.bytes)
        if not place or tokenizer.is_special(token.id):
            continue
        assert math.fsum(parts) == pytest.approx(result.logprobs[place], abs=1e-5)
        p = np.exp(rows[place - 1])
        before = 1.0
        for length in range(1, len(token.bytes)):
            alike = [i for i, b in texts.items() if b.startswith(token.bytes[:length])]
            now = p[alike].sum()
            assert parts[length - 1] == pytest.approx(math.log(now / before), abs=1e-4)
            before = now


def test_sentences(base: Bench) -> None:
    text = 'the cat sat. "The rain!" then a b.c went?\n\nhome again'
    result = Scorer(base.llm).tokens(text)[0]
    spans = sentence_scores(result)
    assert [s.text.strip() for s in spans] == [
        "the cat sat.", '"The rain!"', "then a b.c went?", "home again"
    ]  # fmt: skip
    assert math.fsum(s.logprob or 0 for s in spans) == pytest.approx(result.total)


def test_what_was_not_measured(base: Bench) -> None:
    result = Scorer(base.llm).tokens(TEXT)[0]
    with pytest.raises(RequestError, match="score with words=True"):
        word_scores(result)
    with pytest.raises(RequestError, match="score with by_byte=True"):
        byte_scores(result)


def test_words_of_windows(base: Bench) -> None:
    """Every word of a long text is scored, whatever windows it lies in."""
    text = " ".join([TEXT] * 20)
    result = Scorer(base.llm, stride=7).tokens(text, words=True)[0]
    spans = word_scores(result)
    assert [word.text.strip() for word in spans] == text.split()
    assert all(word.logprob is not None for word in spans)


PIECES = st.lists(st.sampled_from(["a", "bc", " ", " d", "\n", "e ", ". ", ".", "", "\n\n"]))


@settings(max_examples=200, deadline=None)
@given(PIECES)
def test_spans_hold_every_token_once(pieces: list[str]) -> None:
    tokens, at = [], 0
    for number, piece in enumerate(pieces):
        tokens.append(Token(number, piece.encode(), at, at + len(piece)))
        at += len(piece)
    for spans in (words(tokens), sentences(tokens)):
        held = [i for span in spans for i in range(span.first, span.last) if tokens[i].bytes]
        assert held == [i for i, token in enumerate(tokens) if token.bytes]
    if not any(piece.endswith(" ") and piece != " " for piece in pieces):
        found = ["".join(pieces[s.first : s.last]) for s in words(tokens)]
        assert [word for text in found for word in text.split()] == "".join(pieces).split()
