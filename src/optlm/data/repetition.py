"""How much of a text repeats: Rae et al. 2021 (Gopher), table A1.

A line, paragraph or n-gram counts as a duplicate from its second occurrence on, as in datatrove.
Shares of characters of n-grams are of the letters of all words; overlapping n-grams are counted
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optlm.data.words import Words, ngrams

__all__ = ["duplicate_ngrams", "duplicates", "top_ngram"]


def duplicates(pieces: Sequence[str]) -> tuple[float, float]:
    """Share of pieces that stood before, and share of their characters."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count / max(1, len(pieces)), characters / max(1, sum(map(len, pieces)))


def top_ngram(words: Words, n: int) -> float:
    """Share of the letters that the most frequent `n`-gram takes, if it occurs twice or more."""
    hashes = ngrams(words.hashes, n)
    if not len(hashes):
        return 0.0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    letters = np.convolve(words.lengths, np.ones(n, np.int64), "valid")[first]
    often = counts == counts.max()
    if counts.max() < 2:
        return 0.0
    return float((counts * letters)[often].max() / words.lengths.sum())


def duplicate_ngrams(words: Words, n: int) -> float:
    """Share of the letters in `n`-grams that stood before."""
    hashes = ngrams(words.hashes, n)
    if not len(hashes):
        return 0.0
    again = np.ones(len(hashes), np.int64)
    again[np.unique(hashes, return_index=True)[1]] = 0
    inside = np.convolve(again, np.ones(n, np.int64)) > 0  # words that such an n-gram covers
    return float(words.lengths[inside].sum() / words.lengths.sum())
