"""Duplicates: what was planted is found, nothing else is, and memory stays bounded."""

from __future__ import annotations

import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from optlm.data.buckets import SortedOnDisk
from optlm.data.dedup import Duplicate, DuplicateIndex
from optlm.data.words import words_of
from optlm.errors import ConfigError


def find(folder: Path, texts: list[str], threshold: float | None = 0.8) -> list[Duplicate]:
    folder.mkdir()
    with DuplicateIndex(folder, threshold=threshold, memory=2**20) as index:
        for text in texts:
            index.add(text, words_of(text))
        return list(index.find())


def jaccard(a: str, b: str) -> float:
    """The slow twin: all 5-grams of words as sets."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def made_up(chance: random.Random, words: int = 200) -> list[str]:
    return [f"w{chance.randrange(5000)}" for _ in range(words)]


def changed(words: list[str], places: int, chance: random.Random) -> str:
    """`places` words replaced by others."""
    words = list(words)
    for place in chance.sample(range(len(words)), places):
        words[place] = f"new{chance.randrange(5000)}"
    return " ".join(words)


def test_planted_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    chance = random.Random(0)
    originals = [made_up(chance) for _ in range(400)]
    texts = [" ".join(words) for words in originals]
    copies = {}
    for number, words in enumerate(originals[:300]):
        copies[len(texts)] = number
        texts.append(changed(words, number % 15, chance))
    similar = {copy: jaccard(texts[copy], texts[first]) for copy, first in copies.items()}
    found = {duplicate.document: duplicate for duplicate in find(tmp_path / "x", texts)}

    assert all(copies[document] == duplicate.of for document, duplicate in found.items())
    surely = {document for document, value in similar.items() if value >= 0.9}
    never = {document for document, value in similar.items() if value < 0.68}
    assert len(surely) > 50
    assert len(never) > 50
    assert surely <= found.keys()
    assert not never & found.keys()
    for document, duplicate in found.items():
        assert duplicate.similarity == pytest.approx(similar[document], abs=0.16)
        assert duplicate.exact == (similar[document] == 1)
    wanted = {document for document, value in similar.items() if value >= 0.8}
    assert len(wanted & found.keys()) >= 0.85 * len(wanted)
    assert len(wanted & found.keys()) >= 0.85 * len(found)


def test_exact_duplicates_only(tmp_path: Path) -> None:
    texts = ["same", "Same", "same", "", "other", "same", ""]
    found = find(tmp_path / "x", texts, None)
    assert [(d.document, d.of, d.exact) for d in found] == [
        (2, 0, True),
        (5, 0, True),
        (6, 3, True),
    ]
    near = find(tmp_path / "y", ["same", "Same!", "...", "???", "..."])
    assert [(d.document, d.of, d.exact) for d in near] == [(1, 0, False), (4, 2, True)]


def test_what_goes_resembles_something_that_stays(tmp_path: Path) -> None:
    """A chain in which each text resembles the one before: its far end stays."""
    chance = random.Random(1)
    chain = [made_up(chance, 150)]
    for place in range(12):
        chain.append([*chain[-1]])
        chain[-1][place * 12 : place * 12 + 2] = ["new", str(place)]
    texts = [" ".join(words) for words in chain]
    assert all(jaccard(a, b) > 0.85 for a, b in pairwise(texts))
    found = find(tmp_path / "x", texts)
    gone = {duplicate.document for duplicate in found}
    assert 0 < len(gone) < len(texts) - 1
    assert all(duplicate.of not in gone for duplicate in found)
    assert all(duplicate.similarity >= 0.8 for duplicate in found)


def test_thousands_of_equal_texts_are_no_square(tmp_path: Path) -> None:
    found = find(tmp_path / "x", ["one text of several words that is always the same"] * 3000)
    assert [d.document for d in found] == list(range(1, 3000))
    assert {d.of for d in found} == {0}


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    assert find(tmp_path / "x", []) == []


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_bad_thresholds(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ConfigError, match="must lie above 0"):
        DuplicateIndex(tmp_path, threshold=threshold)


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    """Half a megabyte to sort with, several on disk, and the peak between them."""
    texts = [f"a{i % 2900} b c d e f g" for i in range(3200)]
    words_of("warm")
    tracemalloc.start()
    try:
        with DuplicateIndex(tmp_path, threshold=0.8, memory=2**19) as index:
            for text in texts:
                index.add(text, words_of(text))
            on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
            assert sum(1 for _ in index.find()) == 300
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert on_disk > 2_500_000
    assert peak < 1_300_000


@pytest.mark.parametrize("memory", [2**10, 2**30])
def test_rows_come_back_in_order(tmp_path: Path, memory: int) -> None:
    values = np.random.default_rng(0)
    keys = values.integers(0, 2**64, 3000, dtype=np.uint64)
    keys[::3] = keys[0]  # one key that no partition can divide
    keys[1::3] //= np.uint64(2**50)  # and many in a narrow range
    numbers = np.arange(3000, dtype=np.uint64)[::-1]
    rows = SortedOnDisk(tmp_path, "x", memory=memory)
    for begin in range(0, 3000, 700):
        rows.add(keys[begin : begin + 700], numbers[begin : begin + 700])
    blocks = list(rows.blocks())
    together = np.concatenate(blocks)
    order = np.lexsort((numbers, keys))
    assert np.array_equal(together, np.stack([keys, numbers], axis=1)[order])
    assert all(a[-1, 0] != b[0, 0] for a, b in pairwise(blocks))
    assert (len(blocks) > 40) == (memory == 2**10)
    assert list(tmp_path.iterdir()) == []
