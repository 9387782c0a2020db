"""Words, n-grams, repetition and signatures: the array versions against plain ones."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from optlm.data.minhash import bands_for, minhash, shingles
from optlm.data.repetition import duplicate_ngrams, duplicates, top_ngram
from optlm.data.words import ngrams, words_of

TEXT = st.lists(
    st.sampled_from(["the", "cat", "Sat.", "on-a", "mat!", "\n", "猫", "é", "..", "x1"])
)


def plain_words(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", text.lower())


@settings(max_examples=100, deadline=None)
@given(TEXT.map(" ".join))
def test_words_are_the_plain_ones(text: str) -> None:
    words, wanted = words_of(text), plain_words(text)
    assert words.lengths.tolist() == [len(word) for word in wanted]
    codes = {word: int(words_of(word).hashes[0]) for word in wanted}
    assert words.hashes.tolist() == [codes[word] for word in wanted]
    assert len(set(codes.values())) == len(codes)


@pytest.mark.parametrize("text", ["", " \n", "...", "\0"])
def test_texts_without_words(text: str) -> None:
    assert len(words_of(text).hashes) == 0
    assert len(shingles(words_of(text))) == 0


def test_letters_of_many_scripts() -> None:
    assert words_of("नमस्ते दुनिया").lengths.tolist() == [6, 6]  # marks belong to their words
    assert words_of("日本語 한국어").lengths.tolist() == [1, 1, 1, 3]
    assert words_of("don't stop").lengths.tolist() == [3, 1, 4]


def test_long_texts_are_cut_between_words() -> None:
    text = "a word and another " * 40_000  # 760,000 characters
    assert np.array_equal(words_of(text).hashes, np.tile(words_of(text[:19]).hashes, 40_000))
    assert len(words_of("x" * 600_000).hashes) == 3


@settings(max_examples=100, deadline=None)
@given(TEXT.map(" ".join), st.integers(1, 4))
def test_ngrams_and_repetition_are_the_plain_ones(text: str, n: int) -> None:
    wanted = plain_words(text)
    grams = [tuple(wanted[i : i + n]) for i in range(len(wanted) - n + 1)]
    words = words_of(text)
    hashes = ngrams(words.hashes, n).tolist()
    assert [hashes.index(h) for h in hashes] == [grams.index(gram) for gram in grams]

    letters = max(1, sum(map(len, wanted)))
    counts = Counter(grams)
    most = max(counts.values(), default=0)
    best = max((len("".join(g)) * c for g, c in counts.items() if c == most), default=0)
    assert top_ngram(words, n) == pytest.approx(best / letters if most > 1 else 0)

    covered: set[int] = set()
    for i, gram in enumerate(grams):
        if gram in grams[:i]:
            covered |= set(range(i, i + n))
    assert duplicate_ngrams(words, n) == pytest.approx(
        sum(len(wanted[i]) for i in covered) / letters
    )


def test_duplicate_lines() -> None:
    assert duplicates(["ab", "c", "ab", "ab"]) == (0.5, 4 / 7)
    assert duplicates([]) == (0, 0)


@pytest.mark.parametrize("count", [1, 5, 6, 1500])
def test_signatures_are_those_of_datasketch(count: int) -> None:
    hashes = shingles(words_of(" ".join(f"word{i}" for i in range(count))))
    twin = MinHash(num_perm=128, hashfunc=int)
    twin.update_batch(hashes.tolist())
    assert np.array_equal(minhash(hashes), twin.hashvalues)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.995
    assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.995 or rows == 32
