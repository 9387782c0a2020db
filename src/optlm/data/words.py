"""Words of a text as numbers: what duplicates, repetition and overlap are found by.

A word is a run of letters, digits and marks in lower case; a character of a script written
without blanks (Chinese, Japanese, Thai ...) is a word of its own. Punctuation, blanks and case make
no difference. Everything is computed for whole arrays at once, so that a megabyte of text takes a
few hundredths of a second; `tests/data/test_words.py` holds the plain twin.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "ngrams", "runs_of_words", "words_of"]

Hashes = NDArray[np.uint64]

_SEPARATOR, _LETTER, _ALONE = range(3)
_UNSPACED = (  # first and last code point of scripts without blanks between words
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_PIECE = 2**18  # characters handled at once
_LONGEST = 2**12  # letters of a word after which the powers repeat
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: no power of it vanishes modulo 2^64


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one text in order."""

    hashes: Hashes  # (W,)
    lengths: NDArray[np.int64]  # (W,) characters


def words_of(text: str) -> Words:
    """Return the words of `text`."""
    pieces = [_words_of_piece(piece) for piece in _pieces(text.lower())]
    hashes = np.concatenate([hashes for hashes, _ in pieces])
    return Words(hashes, np.concatenate([lengths for _, lengths in pieces]))


def ngrams(hashes: Hashes, n: int) -> Hashes:
    """One hash for each `n` words that follow each other, (W - n + 1,); empty if W < n."""
    return next((values for _, values in runs_of_words(hashes, (n,))), hashes[:0])


def runs_of_words(hashes: Hashes, wanted: Collection[int]) -> Iterator[tuple[int, Hashes]]:
    """Yield n and `ngrams(hashes, n)` for every `wanted` n, as long as there are any."""
    sums = np.zeros(len(hashes), np.uint64)
    for n in range(1, min(max(wanted), len(hashes)) + 1):
        sums = sums[: len(hashes) - n + 1] * _BASE + hashes[n - 1 :]
        if n in wanted:
            yield n, _mixed(sums)


def _pieces(text: str) -> Iterator[str]:
    """Cut long text after a blank, or anywhere if there is none near."""
    begin = 0
    while len(text) - begin > _PIECE:
        end = text.find(" ", begin + _PIECE, begin + _PIECE + _LONGEST)
        end = begin + _PIECE if end < 0 else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _words_of_piece(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    kinds = _kinds()[points]
    inside = kinds != _SEPARATOR
    begins = inside.copy()
    begins[1:] &= (kinds[:-1] != _LETTER) | (kinds[1:] == _ALONE)
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    points, inside = points[starts[0] :], inside[starts[0] :]
    starts = starts - starts[0]
    spans = np.diff(starts, append=len(points))
    places = np.arange(len(points)) - np.repeat(starts, spans)
    terms = (points + np.uint64(1)) * _powers()[places % _LONGEST]
    terms *= inside  # separators after a word count nothing
    return _mixed(np.add.reduceat(terms, starts)), np.add.reduceat(inside, starts, dtype=np.int64)


def _mixed(values: Hashes) -> Hashes:
    """MurmurHash3's 64-bit finalizer: every bit of the input moves every bit of the output."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """The kind of every code point."""
    kinds = np.zeros(0x110000, np.uint8)
    for point in range(0x33480):  # assigned letters, digits and marks end below
        if unicodedata.category(chr(point))[0] in "LNM":
            kinds[point] = _LETTER
    kinds[0xE0100:0xE01F0] = _LETTER  # variation selectors
    for first, last in _UNSPACED:
        part = kinds[first : last + 1]
        part[part == _LETTER] = _ALONE
    return kinds


@functools.cache
def _powers() -> Hashes:
    powers = np.full(_LONGEST, _BASE, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)
