"""Which documents repeat evaluation files: word 13-grams, as in Brown et al. 2020, appendix C.

All strings of an evaluation record count (question, choices, passage ...). One of 8 to 12 words is
looked for as a whole; shorter ones cannot be told from chance and are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optlm.data.inputs import InputFile
from optlm.data.records import read_rows
from optlm.data.report import CorpusError, ReadReport
from optlm.data.words import Words, ngrams, runs_of_words, words_of

__all__ = ["HeldOut", "HeldOutFile"]

LONGEST, SHORTEST = 13, 8  # words
_BITS = 22  # of the table that spares most words the search


@dataclass
class HeldOutFile:
    """What was found of one evaluation file."""

    path: Path
    first: int  # number of its first record
    records: int = 0
    checked: int = 0  # of them long enough to be looked for
    documents: int = 0  # that share something with it
    examples: list[str] = field(default_factory=list)


class HeldOut:
    """The n-grams of evaluation files; about 20 bytes of memory for each of their words.

    Raises:
        CorpusError: a file is missing, damaged, has a broken line, or holds nothing long enough to
            look for.
    """

    def __init__(self, files: Sequence[InputFile]) -> None:
        self.files: list[HeldOutFile] = []
        found: dict[int, list[tuple[NDArray[np.uint64], NDArray[np.int64]]]] = {}
        records = 0
        for file in files:
            told = HeldOutFile(file.path, records)
            for _, fields in read_rows([file], ReadReport(max_broken=0)):
                told.records += 1
                told.checked += self._take(fields, records, found)
                records += 1
            if not told.checked:
                raise CorpusError(
                    f"{file.path}: none of its {told.records} records has a text of "
                    f"{SHORTEST} words; there is nothing to look for"
                )
            self.files.append(told)
        self._seen = np.zeros(records, bool)
        self._tables = {n: _Table(pieces) for n, pieces in found.items()}

    def _take(self, fields: Any, record: int, found: dict[int, list[Any]]) -> bool:
        taken = False
        for text in _strings(fields):
            hashes = words_of(text).hashes
            length = min(LONGEST, len(hashes))
            if length >= SHORTEST:
                grams = ngrams(hashes, length)
                found.setdefault(length, []).append((grams, np.full(len(grams), record)))
                taken = True
        return taken

    def count(self, words: Words, place: str) -> int:
        """How many n-grams of a document (with repeats) also stand in the files; notes where."""
        hits, records = 0, [np.zeros(0, np.int64)]
        for n, grams in runs_of_words(words.hashes, self._tables):
            found, owners = self._tables[n].find(grams)
            hits += found
            records.append(owners)
        if hits:
            self._note(np.unique(np.concatenate(records)), place)
        return hits

    def _note(self, records: NDArray[np.int64], place: str) -> None:
        self._seen[records] = True
        for file in self.files:
            mine = records[(records >= file.first) & (records < file.first + file.records)]
            if len(mine):
                file.documents += 1
                if len(file.examples) < 3:
                    file.examples.append(f"record {int(mine[0]) - file.first + 1} in {place}")

    def report(self) -> list[dict[str, Any]]:
        """For each file its records, how many of them overlap, and with how many documents."""
        return [
            {
                "file": str(file.path),
                "records": file.records,
                "checked": file.checked,
                "overlapping": int(self._seen[file.first : file.first + file.records].sum()),
                "documents": file.documents,
                "examples": file.examples,
            }
            for file in self.files
        ]


class _Table:
    """Hashes with the record that each is from."""

    def __init__(self, pieces: list[tuple[NDArray[np.uint64], NDArray[np.int64]]]) -> None:
        hashes = np.concatenate([hashes for hashes, _ in pieces])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._records = np.concatenate([records for _, records in pieces])[order]
        self._maybe = np.zeros(2**_BITS, bool)
        self._maybe[hashes >> np.uint64(64 - _BITS)] = True

    def find(self, grams: NDArray[np.uint64]) -> tuple[int, NDArray[np.int64]]:
        """How many of `grams` are here, and the records that have them."""
        grams = grams[self._maybe[grams >> np.uint64(64 - _BITS)]]
        first = np.searchsorted(self._hashes, grams, "left")
        after = np.searchsorted(self._hashes, grams, "right")
        runs = {(int(a), int(b)) for a, b in zip(first, after, strict=True) if b > a}
        owners = [self._records[a:b] for a, b in runs]
        return int((after > first).sum()), np.concatenate([np.zeros(0, np.int64), *owners])


def _strings(value: Any) -> Iterator[str]:
    """Every string in parsed JSON."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
