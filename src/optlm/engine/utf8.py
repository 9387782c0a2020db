"""UTF-8-legal decoding: which tokens may follow so that the text is whole characters.

A token of a byte-level vocabulary may end inside a character. What stands open is one of eight
states (Unicode 15, table 3-7): between characters, or in one of seven places inside, which tell
the bytes that may come. A token is allowed if its bytes are, and if the character it leaves open
can still be closed by the tokens that are left.

Letters: V vocabulary, S = 8 states.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from optlm.errors import RequestError

__all__ = ["KnowsBytes", "Utf8Masks", "Utf8State", "Utf8Table"]

Ids = NDArray[np.intp]

BETWEEN = 0  # the state outside characters
BROKEN = -1
_NEVER = 127  # tokens that close a state which none can close
# Inside a character: the lowest and the highest byte that may come, and the state after it.
_INSIDE = {
    1: (0x80, 0xBF, BETWEEN),  # one byte is missing
    2: (0x80, 0xBF, 1),
    3: (0x80, 0xBF, 2),
    4: (0xA0, 0xBF, 1),  # after E0: nothing that two bytes could say
    5: (0x80, 0x9F, 1),  # after ED: no surrogates
    6: (0x90, 0xBF, 2),  # after F0: nothing that three bytes could say
    7: (0x80, 0x8F, 2),  # after F4: nothing beyond U+10FFFF
}
_AFTER_LEAD = {0xE0: 4, 0xED: 5, 0xF0: 6, 0xF4: 7}
_KEPT = 16  # sets of stop tokens whose masks are kept


@runtime_checkable
class KnowsBytes(Protocol):
    """A tokenizer that tells what its tokens stand for."""

    def token_bytes(self, token_id: int, /) -> bytes: ...
    def is_special(self, token_id: int, /) -> bool: ...


def advance(state: int, data: bytes) -> int:
    """The state after some bytes, or `BROKEN`."""
    for byte in data:
        if state == BETWEEN:
            state = _after_first(byte)
        else:
            low, high, following = _INSIDE[state]
            state = following if low <= byte <= high else BROKEN
        if state == BROKEN:
            return BROKEN
    return state


def _after_first(byte: int) -> int:
    if byte < 0x80:
        return BETWEEN
    if byte in _AFTER_LEAD:
        return _AFTER_LEAD[byte]
    for low, high, missing in ((0xC2, 0xDF, 1), (0xE1, 0xEF, 2), (0xF1, 0xF3, 3)):
        if low <= byte <= high:
            return missing
    return BROKEN


class Utf8Table:
    """The state after each token from each state (S, V); made once for a tokenizer.

    Special tokens and ids without a token show no text; they stand between characters only.
    """

    def __init__(self, tokenizer: KnowsBytes, vocab_size: int) -> None:
        self.after = np.full((1 + len(_INSIDE), vocab_size), BROKEN, np.int8)
        for token in range(vocab_size):
            data = b"" if tokenizer.is_special(token) else tokenizer.token_bytes(token)
            self.after[BETWEEN, token] = BETWEEN if data.isascii() else advance(BETWEEN, data)
            if data and 0x80 <= data[0] <= 0xBF:  # nothing else may come inside a character
                self.after[1:, token] = [advance(state, data) for state in _INSIDE]
        self._masks: dict[frozenset[int], Utf8Masks] = {}

    def masks(self, stop_ids: frozenset[int]) -> Utf8Masks:
        """Masks for requests that end with any of `stop_ids`."""
        if stop_ids not in self._masks:
            if len(self._masks) >= _KEPT:
                del self._masks[next(iter(self._masks))]
            self._masks[stop_ids] = Utf8Masks(self.after, stop_ids)
        return self._masks[stop_ids]


class Utf8Masks:
    """Which tokens are allowed in each state, with so many tokens left.

    A stop token ends the text and may show in it or not, so it stands between characters only.
    """

    def __init__(self, after: NDArray[np.int8], stop_ids: Iterable[int]) -> None:
        self.after = after.copy()
        ends = np.array(sorted(stop_ids), np.intp)
        whole = self.after[BETWEEN, ends] == BETWEEN
        self.after[:, ends] = BROKEN
        self.after[BETWEEN, ends[whole]] = BETWEEN
        self._closing = self._count_closing()
        if not np.delete(self._allowed(BETWEEN, 0), ends).any():
            raise RequestError(
                "utf8 leaves no token: the vocabulary has none that is whole characters"
            )
        self._made: dict[tuple[int, int], tuple[Ids, bool]] = {}

    def _count_closing(self) -> NDArray[np.int64]:
        """Fewest tokens that lead from each state to the end of its character (S,)."""
        closing = np.full(len(self.after) + 1, _NEVER)  # the last for BROKEN, which is -1
        closing[BETWEEN] = 0
        for _ in _INSIDE:  # no way through the states is longer
            closing[1:-1] = np.minimum(closing[1:-1], 1 + closing[self.after[1:]].min(axis=1))
        return closing

    def _allowed(self, state: int, left: int) -> NDArray[np.bool_]:
        """(V,) whether a token may come when `left` more may follow it."""
        after = self.after[state]
        allowed: NDArray[np.bool_] = self._closing[after] <= min(left, _NEVER - 1)
        return allowed

    def apply(self, row: NDArray[np.float32], state: int, left: int) -> None:
        """Remove from logits (V,) what is not allowed."""
        key = state, min(left, len(_INSIDE))
        if key not in self._made:
            allowed = self._allowed(*key)
            few = bool(allowed.sum() * 2 < len(allowed))
            self._made[key] = np.flatnonzero(allowed if few else ~allowed), few
        ids, are_allowed = self._made[key]
        if are_allowed:
            kept = row[ids]
            row.fill(-np.inf)
            row[ids] = kept
        else:
            row[ids] = -np.inf


class Utf8State:
    """One sequence's place between or inside characters.

    Args:
        max_total: the sequence ends at this many tokens.
    """

    def __init__(self, masks: Utf8Masks, max_total: int) -> None:
        self._masks = masks
        self._max_total = max_total
        self._state = BETWEEN

    def apply(self, row: NDArray[np.float32], position: int) -> None:
        """Remove from logits (V,) the tokens that may not stand at `position`."""
        self._masks.apply(row, self._state, self._max_total - position - 1)

    def take(self, token: int) -> None:
        self._state = int(self._masks.after[self._state, token])
