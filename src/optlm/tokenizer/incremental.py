"""Text of a growing list of token ids, as early as it is certain."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

__all__ = ["ByteDecoder", "IncrementalDecoder", "WindowDecoder"]


class IncrementalDecoder(Protocol):
    """Text of a growing list of ids; the pieces join to `Tokenizer.decode` of all ids."""

    def push(self, token_id: int) -> str:
        """Take one more id; return the characters that are now certain, perhaps none."""

    def finish(self) -> str:
        """Return what was held back; bytes of an unfinished character become U+FFFD."""


class ByteDecoder:
    """For byte-level vocabularies: exact, in constant time a token."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class WindowDecoder:
    """For other vocabularies: the library decodes a short window twice, the difference is new.

    Byte-fallback decoders judge a run of bytes as a whole, so a broken run may show fewer U+FFFD
    here than in the decoding of all ids. Valid text is the same.
    """

    LONGEST = 16  # ids that may wait for the rest of a character

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # ids of the window whose text was returned

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        whole = self._decode(self._window)
        waiting = len(self._window) - self._given
        if whole.endswith("\ufffd") and waiting < self.LONGEST:
            return ""
        return self._advance(whole)

    def finish(self) -> str:
        rest = self._advance(self._decode(self._window))
        self._window, self._given = [], 0
        return rest

    def _advance(self, whole: str) -> str:
        known = self._decode(self._window[: self._given])
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return whole[len(known) :]
