"""`BlockPool`: which blocks of the KV cache are free, in use, or free but worth finding again.

A block holds the keys and values of `block_size` consecutive tokens of one sequence. A full block
is named by the digest of all tokens up to its end, so sequences that begin alike share blocks.
Released blocks keep
their name until they are handed out again: the least recently released one goes first, blocks
without a name before all others.

Invariant: a block is free (in the queue) exactly when nothing references it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool", "block_digest"]

Digest = bytes


def block_digest(before: Digest, tokens: Sequence[int]) -> Digest:
    """Name of the block that holds `tokens`, given the name of the block before it (b"" for none).

    Cryptographic, so no two prefixes share blocks by accident or on purpose.
    """
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference counts, the queue of free blocks, and the names of full blocks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._digests: list[Digest | None] = [None] * num_blocks
        self._by_digest: dict[Digest, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a free block and forget what it held. The caller has checked `num_free`."""
        block, _ = self._free.popitem(last=False)
        digest = self._digests[block]
        if digest is not None:
            del self._by_digest[digest]
            self._digests[block] = None
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use or was found by `match`."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block of a sequence.

        The last block is freed first: a prefix is only found from its start, so its end is worth
            least.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, digest: Digest) -> None:
        """Let a full block be found; of two with the same content the first keeps the name."""
        if digest not in self._by_digest and self._digests[block] is None:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def match(self, digests: Iterable[Digest]) -> list[int]:
        """Return the blocks of the longest known prefix; the caller must `share` those it keeps."""
        found = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_unreferenced(self, blocks: Iterable[int]) -> int:
        """How many of these blocks sharing would take from the free ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert all invariants, given the block tables of everything that holds blocks."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a sequence holds a block twice: {table}"
            for block in table:
                held[block] += 1
        assert held == self._references, "reference counts do not add up"
        for block, references in enumerate(self._references):
            assert (references == 0) == (block in self._free), (
                f"block {block} is lost or doubly owned"
            )
        named = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert named == self._by_digest, "the map of names differs from the blocks' names"
