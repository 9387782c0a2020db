"""Counting the words a model has read, from tokens alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from optlm.tokenizer.files import byte_of_character
from optlm.train.tokens.corpus import END

__all__ = ["WordCounter"]

_BLANK = frozenset(b" \t\n\r\v\f")


class WordCounter:
    """Counts words as ``text.split()`` does on ASCII blanks: maximal runs of other bytes.

    A word belongs to the token it begins in; every document begins a new one. So the words of rows
    that follow each other in a document add up to those of the document, and at most one word of a
    row that begins inside a word is counted twice.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.get_vocab_size()
        self._inner = np.zeros(size, dtype=np.int64)  # words that begin after the first byte
        self._begins = np.zeros(size, dtype=bool)  # the first byte is of a word
        self._ends_blank = np.zeros(size, dtype=bool)
        bytes_of = byte_of_character()
        special = set(tokenizer.get_added_tokens_decoder())
        for token, index in tokenizer.get_vocab().items():
            if index in special:
                self._ends_blank[index] = index == END
                continue
            blank = [bytes_of[letter] in _BLANK for letter in token]
            self._inner[index] = sum(a and not b for a, b in pairwise(blank))
            self._begins[index] = not blank[0]
            self._ends_blank[index] = blank[-1]

    def count(self, rows: NDArray[np.int64]) -> int:
        """Words that begin in rows (B, S) of token ids."""
        after_blank = np.ones(rows.shape, dtype=bool)
        after_blank[:, 1:] = self._ends_blank[rows[:, :-1]]
        return int(self._inner[rows].sum() + (self._begins[rows] & after_blank).sum())
