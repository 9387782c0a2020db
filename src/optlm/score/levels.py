"""From the tokens of a text to its words, sentences and bytes."""

from __future__ import annotations

import math

from optlm.errors import RequestError
from optlm.score.results import ScoredText, SpanScore
from optlm.score.spans import Span, sentences, words

__all__ = ["byte_scores", "sentence_scores", "word_scores"]


def word_scores(scored: ScoredText) -> list[SpanScore]:
    """The words of a text, each with the white space before it.

    A tokenizer that marks where words begin tells only with the next token that a word has ended.
    So if the convention corrects words, log P(word) is the sum over its tokens, plus the
    log-probability that a word ends after them, less that a word ended before them (Pimentel &
    Meister 2024, theorem 2). Nothing precedes the first word of a text, so it has no such term.

    Raises:
        RequestError: the text was scored without `words=True`.
    """
    spans = words(scored.tokens)
    if not scored.convention.corrects_words:
        return [_of_tokens(scored, span) for span in spans]
    starts = scored.word_starts
    if starts is None:
        raise RequestError("where words begin was not measured; score with words=True")
    result = []
    for place, span in enumerate(spans):
        score = _of_tokens(scored, span)
        before = starts[span.first] if place else 0.0
        after = starts[span.last]
        if score.logprob is None or before is None or after is None:
            result.append(score._replace(logprob=None))
        else:
            result.append(score._replace(logprob=score.logprob + after - before))
    return result


def sentence_scores(scored: ScoredText) -> list[SpanScore]:
    """The sentences of a text: sums over their tokens."""
    return [_of_tokens(scored, span) for span in sentences(scored.tokens)]


def byte_scores(scored: ScoredText) -> list[SpanScore]:
    """The bytes of a text; those of a token sum to the token.

    Raises:
        RequestError: the text was scored without `by_byte=True`.
    """
    if scored.byte_logprobs is None:
        raise RequestError("bytes were not measured; score with by_byte=True")
    result = []
    for token, logprobs in zip(scored.tokens, scored.byte_logprobs, strict=True):
        values = [None] * len(token.bytes) if logprobs is None else logprobs
        for place, value in enumerate(values):
            start = token.start + place
            shown = token.bytes[place : place + 1].decode("utf-8", "backslashreplace")
            result.append(SpanScore(shown, start, start + 1, value))
    return result


def _of_tokens(scored: ScoredText, span: Span) -> SpanScore:
    tokens = scored.tokens[span.first : span.last]
    text = b"".join(token.bytes for token in tokens).decode("utf-8", "backslashreplace")
    values = scored.logprobs[span.first : span.last]
    known = [value for value in values if value is not None]
    whole = math.fsum(known) if len(known) == len(values) else None
    return SpanScore(text, span.start, span.end, whole)
