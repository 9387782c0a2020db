"""Tokens in their text, and the words and sentences that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from optlm.tokenizer import Tokenizer

__all__ = ["Span", "Token", "place_tokens", "sentences", "words"]

# A sentence ends after its full stop (and quotes) where white space follows, and at an empty line.
_SENTENCE_END = re.compile(rb"""[.!?]+["')\]]*(?=\s)|\n\s*\n""")


class Token(NamedTuple):
    """A token and the bytes [start, end) of the text that it stands for."""

    id: int
    bytes: bytes
    start: int
    end: int

    @property
    def text(self) -> str:
        r"""For display; bytes that are no UTF-8 alone appear as ``\xe2``."""
        return self.bytes.decode("utf-8", "backslashreplace")


class Span(NamedTuple):
    """Tokens [first, last) of a text, which stand for its bytes [start, end)."""

    first: int
    last: int
    start: int
    end: int


def place_tokens(token_ids: Iterable[int], tokenizer: Tokenizer | None) -> list[Token]:
    """The tokens with their places; a leading start token stands for no bytes."""
    placed: list[Token] = []
    at = 0
    for token in token_ids:
        content = b"" if tokenizer is None else tokenizer.token_bytes(token)
        if tokenizer is not None and not placed and token == tokenizer.bos_id:
            content = b""
        placed.append(Token(token, content, at, at + len(content)))
        at += len(content)
    return placed


def words(tokens: list[Token]) -> list[Span]:
    """The words: tokens from one white space to the next, which belongs to the word after it.

    White space at the end of the text belongs to the last word.
    """
    spans: list[Span] = []
    first: int | None = None
    solid = False  # the word under way has more than white space
    for place, token in enumerate(tokens):
        if not token.bytes:
            continue
        before = tokens[place - 1].bytes if place else b""
        parted = token.bytes[:1].isspace() or before[-1:].isspace()
        if first is not None and solid and parted and _rest_has_words(tokens, place):
            spans.append(_span(tokens, first, place))
            first, solid = None, False
        first = place if first is None else first
        solid = solid or not token.bytes.isspace()
    if first is not None:
        spans.append(_span(tokens, first, len(tokens)))
    return spans


def sentences(tokens: list[Token]) -> list[Span]:
    """The sentences, cut after ``.``, ``!`` or ``?`` before white space, and at empty lines.

    A token belongs to the sentence in which its last byte stands.
    """
    whole = b"".join(token.bytes for token in tokens)
    ends = [match.end() for match in _SENTENCE_END.finditer(whole)]
    spans: list[Span] = []
    first = next((place for place, token in enumerate(tokens) if token.bytes), len(tokens))
    for end in [*ends, len(whole)]:
        last = first
        while last < len(tokens) and tokens[last].end <= end:
            last += 1
        if last > first and not whole[tokens[first].start : tokens[last - 1].end].isspace():
            spans.append(_span(tokens, first, last))
            first = last
    if first < len(tokens) and spans:  # white space at the end
        spans[-1] = _span(tokens, spans[-1].first, len(tokens))
    elif first < len(tokens):
        spans.append(_span(tokens, first, len(tokens)))
    return spans


def _rest_has_words(tokens: list[Token], place: int) -> bool:
    return any(token.bytes and not token.bytes.isspace() for token in tokens[place:])


def _span(tokens: list[Token], first: int, last: int) -> Span:
    return Span(first, last, tokens[first].start, tokens[last - 1].end)
