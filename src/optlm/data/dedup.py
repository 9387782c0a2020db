"""Exact and near duplicates among any number of documents, in bounded memory.

Near duplicates are found as in Broder 1997 and Lee et al. 2022: MinHash signatures of word 5-grams,
cut into bands; documents that agree in a whole band are compared. Unlike most tools this one
then compares the signatures (so texts that only share a band by chance are kept), and drops
a document only if it resembles one that stays. Of such texts the first stays, so what shall be
kept is listed first.

On disk a document takes about 900 bytes (signature 512, digest 16, bands 16 each); in memory 4,
beside the fixed amount that sorting uses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from optlm.data.buckets import SortedOnDisk
from optlm.data.minhash import PERMUTATIONS, bands_for, minhash, shingles
from optlm.data.words import Words, ngrams
from optlm.errors import ConfigError

__all__ = ["Duplicate", "DuplicateIndex"]

_DIGEST = 16  # bytes
_NEIGHBOURS = (1, 2, 3)  # steps back in a bucket, beside its first document
_TOGETHER = 2**12  # pairs compared at once


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A document that can go."""

    document: int
    of: int  # the document that stays
    similarity: float  # estimated Jaccard similarity of their word 5-grams; 1 if they are equal
    exact: bool  # equal in every byte


class DuplicateIndex:
    """Takes documents one by one, then tells which can go.

    Args:
        folder: an empty folder for its files, on a disk with room for them.
        threshold: least similarity of near duplicates; None: only equal texts are found.
        memory: bytes to use for sorting.

    Raises:
        ConfigError: `threshold` is no number above 0 and up to 1.
    """

    def __init__(self, folder: Path, *, threshold: float | None, memory: int = 2**28) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ConfigError(
                f"the similarity of near duplicates is {threshold}; it must lie above 0 and up to 1"
            )
        self.documents = 0
        self._folder, self._memory = folder, memory
        self._threshold = 1.0 if threshold is None else threshold
        self._bands, self._rows = bands_for(threshold) if threshold else (0, 0)
        self._equal = SortedOnDisk(folder, "equal-", memory=memory // 4)
        self._alike = SortedOnDisk(folder, "alike-", memory=memory // 4)
        self._digests: IO[bytes] = (folder / "digests").open("wb")
        self._signatures: IO[bytes] = (folder / "signatures").open("wb")

    def __enter__(self) -> DuplicateIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self._digests.close()
        self._signatures.close()

    def add(self, text: str, words: Words) -> None:
        """Take the next document; `words` are those of `text`."""
        number = np.array([self.documents], np.uint64)
        self.documents += 1
        digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()
        self._digests.write(digest)
        self._equal.add(np.frombuffer(digest, "<u8")[:1], number)
        if not self._bands:
            return
        hashes = shingles(words)
        signature = minhash(hashes)
        self._signatures.write(signature.tobytes())
        if len(hashes):  # a text without words resembles nothing
            keys = self._band_keys(signature)
            self._alike.add(keys, np.repeat(number, len(keys)))

    def _band_keys(self, signature: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """One number for the entries of each band and its place, (bands,)."""
        used = signature[: self._bands * self._rows].astype(np.uint64).reshape(self._bands, -1)
        places = np.arange(1, self._bands + 1, dtype=np.uint64)[:, None]
        table = np.concatenate([places, used], axis=1)  # (bands, 1 + rows)
        return ngrams(table.reshape(-1), 1 + self._rows)[:: 1 + self._rows]

    def find(self) -> Iterator[Duplicate]:
        """Yield what can go, by its number; call it once, after the last `add`."""
        self._digests.close()
        self._signatures.close()
        if not self.documents:
            return
        keys = (0, self.documents)
        pairs = SortedOnDisk(self._folder, "pairs-", keys=keys, memory=self._memory // 4)
        for buckets in (self._equal, self._alike):
            for block in buckets.blocks():
                for later, earlier in _pairs(block):
                    pairs.add(later, earlier)
        compare = _Comparison(self._folder, self.documents, signatures=bool(self._bands))
        stays = np.arange(self.documents, dtype=np.uint32)  # itself, or the one kept instead
        for block in pairs.blocks():
            yield from self._decide(block, compare, stays)

    def _decide(
        self, pairs: NDArray[np.uint64], compare: _Comparison, stays: NDArray[np.uint32]
    ) -> Iterator[Duplicate]:
        """`pairs` (N, 2): a document and an earlier one, ascending."""
        pairs = np.unique(pairs, axis=0).astype(np.int64)
        for begin in range(0, len(pairs), _TOGETHER):
            later, earlier = pairs[begin : begin + _TOGETHER].T
            values = compare(later, earlier)
            alike = values >= self._threshold
            near = zip(later[alike].tolist(), earlier[alike].tolist(), values[alike], strict=True)
            for document, other, similarity in near:
                if stays[document] != document:
                    continue
                kept = int(stays[other])
                if kept != other:
                    similarity = compare(np.array([document]), np.array([kept]))[0]
                if similarity >= self._threshold:
                    stays[document] = kept
                    exact = compare.exactly(document, kept)
                    yield Duplicate(document, kept, float(similarity), exact)


def _pairs(block: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Whom to compare: in each bucket every document with the first, and with the few before it.

    `block` (N, 2) holds keys and documents, both ascending. All pairs of a bucket would be as many
    as its square.
    """
    keys, documents = block[:, 0], block[:, 1]
    opens = np.concatenate([[True], keys[1:] != keys[:-1]])
    sizes = np.diff(np.flatnonzero(opens), append=len(keys))
    firsts = np.repeat(documents[opens], sizes)
    yield documents[~opens], firsts[~opens]
    for step in _NEIGHBOURS:
        same = keys[step:] == keys[:-step]
        yield documents[step:][same], documents[:-step][same]


class _Comparison:
    """Similarity of documents by their digests and signatures, read from disk as needed."""

    def __init__(self, folder: Path, documents: int, *, signatures: bool) -> None:
        self._digests = np.memmap(folder / "digests", "<u8", "r").reshape(documents, -1)
        self._signatures = None
        if signatures:
            mapped = np.memmap(folder / "signatures", np.uint32, "r")
            self._signatures = mapped.reshape(documents, PERMUTATIONS)

    def __call__(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        equal = (self._digests[a] == self._digests[b]).all(axis=1)
        if self._signatures is None:
            return np.asarray(equal, np.float64)
        alike = (self._signatures[a] == self._signatures[b]).mean(axis=1)
        similarity: NDArray[np.float64] = np.where(equal, 1.0, alike)
        return similarity

    def exactly(self, a: int, b: int) -> bool:
        return bool((self._digests[a] == self._digests[b]).all())
