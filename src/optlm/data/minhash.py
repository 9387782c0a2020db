"""MinHash signatures (Broder 1997): two texts agree in as many entries as their n-grams overlap.

The scheme is ``affine32`` of the datasketch library, number for number, and a test compares the
two. This one hashes all n-grams of a text at once instead of each with SHA-1;
`benchmarks/dedup.py` measures both.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from optlm.data.words import Words, ngrams

__all__ = ["PERMUTATIONS", "SHINGLE", "bands_for", "minhash", "shingles"]

Signature = NDArray[np.uint32]

PERMUTATIONS = 128
SHINGLE = 5  # words; Lee et al. 2022, "Deduplicating Training Data", section 4.2
_SEED = 1
_RECALL = 0.995  # of pairs at the threshold that share a band
_TOGETHER = 2**10  # shingles; 512 KiB of products stay in the cache


def shingles(words: Words) -> NDArray[np.uint32]:
    """Hashes of all 5-grams of words; of the whole text if it is shorter; none without words."""
    length = min(SHINGLE, len(words.hashes))
    if not length:
        return np.zeros(0, np.uint32)
    high: NDArray[np.uint32] = (ngrams(words.hashes, length) >> np.uint64(32)).astype(np.uint32)
    return high


def minhash(shingles: NDArray[np.uint32]) -> Signature:
    """The least value of each permutation over `shingles`, (128,)."""
    factors, offsets = _permutations()
    mixed = _mixed(shingles)
    least = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
    for begin in range(0, len(mixed), _TOGETHER):
        products = factors[:, None] * mixed[begin : begin + _TOGETHER]
        products += offsets[:, None]
        np.minimum(least, products.min(axis=1), out=least)
    return least


def bands_for(threshold: float) -> tuple[int, int]:
    """Number of bands and entries a band: two texts are compared if they agree in a whole band.

    The longest bands, and so the fewest needless comparisons, with which texts that overlap by
    `threshold` are compared with a probability of 99.5 %: 1 - (1 - threshold^rows)^bands.
    """
    for rows in range(PERMUTATIONS // 4, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return PERMUTATIONS, 1


@functools.cache
def _permutations() -> tuple[Signature, Signature]:
    """Odd factors and offsets of h -> a h + b modulo 2^32."""
    random = np.random.RandomState(_SEED)
    factors = random.randint(0, 2**31, PERMUTATIONS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, random.randint(0, 2**32, PERMUTATIONS, dtype=np.uint32)


def _mixed(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """MurmurHash3's 32-bit finalizer."""
    values = values ^ (values >> np.uint32(16))
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values
