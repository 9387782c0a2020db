"""What is measured of rows of logits beyond their normaliser: where words begin, single bytes.

Letters: R rows, V vocabulary, C columns.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from optlm.engine.sampling import exponentiate
from optlm.engine.tree import TokenTree
from optlm.score.convention import Convention
from optlm.tokenizer import Tokenizer

__all__ = ["WORD_START", "ByteMeasure", "TextMeasure", "word_start_ids"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

WORD_START = 2  # column of the log-probability that a word begins, or the text ends


def word_start_ids(
    tokenizer: Tokenizer, vocab_size: int, convention: Convention
) -> NDArray[np.intp]:
    """Ids of the tokens that begin a word, and of the end token if it ends one."""

    def begins(token: int) -> bool:
        if tokenizer.is_special(token):
            return convention.end_ends_words and token == tokenizer.eos_id
        first = tokenizer.token_bytes(token)[:1]
        return first.isspace() if convention.word_marks == "whitespace" else first == b" "

    return np.array([token for token in range(vocab_size) if begins(token)], np.intp)


class TextMeasure:
    """A `Measure` with the column WORD_START, and the bytes of the tokens that follow.

    Args:
        starts: ids of the tokens that begin a word; None measures none.
        by_byte: None measures no bytes.
    """

    def __init__(self, starts: NDArray[np.intp] | None, by_byte: ByteMeasure | None) -> None:
        self._starts = starts
        self._by_byte = by_byte

    def __call__(self, logits: Float32, nodes: list[int]) -> Float64:
        """Row by row to stay in cache; the logits (R, V) are overwritten."""
        measured = np.empty((len(logits), 2 if self._starts is None else 3))
        for row, node, values in zip(logits, nodes, measured, strict=True):
            if self._by_byte is not None:
                self._by_byte.take(row, node)
            best = row.argmax()
            shift = exponentiate(row)
            total = float(row.sum())
            values[:2] = shift + np.log(total), best
            if self._starts is not None:
                begin = float(row[self._starts].sum())
                values[WORD_START] = np.log(begin / total) if begin > 0 else -np.inf
        return measured


class ByteMeasure:
    """The log-probability of each byte of the tokens of a tree.

    Byte k of a token has the probability that a token continues with it, among tokens that begin
    with the k bytes before it; the last byte also carries the probability that the token ends
    there. So the bytes of a token sum to the token. Special tokens and rows without a token begin
    with no byte; they belong to the whole of which the first byte is a part. Of a special token in
    the text the first byte carries all.

    Attributes:
        logprobs: node of the tree -> one number a byte of its token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.logprobs: dict[int, list[float]] = {}
        content = {
            token: tokenizer.token_bytes(token)
            for token in range(vocab_size)
            if not tokenizer.is_special(token) and tokenizer.token_bytes(token)
        }
        ordered = sorted(content, key=lambda token: (content[token], token))
        self._tokenizer = tokenizer
        self._ids = np.array(ordered, np.intp)
        self._sorted = [content[token] for token in ordered]
        self._content = content
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._tokens: list[int] = []
        self._children: list[list[int]] = []

    def begin(self, tree: TokenTree) -> None:
        """Turn to a new tree."""
        self.logprobs = {}
        self._tokens = tree.tokens
        self._children = tree.children()

    def take(self, logits: Float32, node: int) -> None:
        """Measure the bytes of the tokens after `node` from logits (V,)."""
        children = self._children[node]
        if not children:
            return
        # In double precision: single would lose the unlikely ones.
        weights = np.exp(logits.astype(np.float64) - logits.max())
        sums = np.concatenate([[0.0], np.cumsum(weights[self._ids])])
        for child in children:
            token = self._tokens[child]
            chain = [float(weights.sum())]
            chain += [float(sums[end] - sums[begin]) for begin, end in self._spans(token)]
            chain[-1] = float(weights[token])
            logs = np.log(np.maximum(chain, chain[-1]))  # a difference of sums may round to less
            parts = (logs[1:] - logs[:-1]).tolist()
            self.logprobs[child] = parts + [0.0] * (self._size(token) - len(parts))

    def _size(self, token: int) -> int:
        return len(self._tokenizer.token_bytes(token))

    def _spans(self, token: int) -> list[tuple[int, int]]:
        """For each beginning of the token, the range of tokens that begin alike, in `_ids`."""
        known = self._ranges.get(token)
        if known is None:
            content = self._content.get(token)
            if content is None:  # a special token is one piece
                known = [(0, 0)]
            else:
                known = [self._beginning_with(content[: n + 1]) for n in range(len(content))]
            self._ranges[token] = known
        return known

    def _beginning_with(self, prefix: bytes) -> tuple[int, int]:
        begin = bisect_left(self._sorted, prefix)
        bumped = prefix.rstrip(b"\xff")  # the least bytes after all that begin with the prefix
        if not bumped:
            return begin, len(self._sorted)
        return begin, bisect_left(self._sorted, bumped[:-1] + bytes([bumped[-1] + 1]), lo=begin)
