"""What a request begins with, who read that last, and who is to read it now.

The prefix cache of an engine holds blocks of 16 tokens. Here a beginning is known by its pieces of
64 bytes, which is about as much text and exactly as many token ids: the name of a piece is a hash
of all up to its end, so that the longest name two requests share tells how far they are alike.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

__all__ = ["Chooser", "Readers", "beginnings"]

_PIECE = 64  # bytes
_PIECES = 128  # of a request that are looked at: 8 KiB of text, 2,048 token ids
_KNOWN = 2**16  # pieces that are remembered
_SLACK = 8  # requests that a reader may have more than the least busy one, for what it has read


def beginnings(body: bytes) -> list[bytes]:
    """The names of what a request's first prompt begins with, the shortest first.

    A body that is no request has none; the replica says what is wrong with it.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    read = _first_text(fields)[: _PIECE * _PIECES]
    digest, names = hashlib.blake2b(str(fields.get("model")).encode(), digest_size=8), []
    for place in range(0, len(read) - _PIECE + 1, _PIECE):
        digest.update(read[place : place + _PIECE])
        names.append(digest.digest())
    return names


def _first_text(fields: dict[str, Any]) -> bytes:
    """What the model reads first, as bytes: a text, token ids or the turns of a chat."""
    given = next((fields[n] for n in ("prompt", "messages", "context", "input") if n in fields), "")
    if isinstance(given, list) and given and isinstance(given[0], (str, list)):
        given = given[0]
    if isinstance(given, str):
        return given.encode("utf-8", "surrogatepass")
    if not isinstance(given, list):
        return b""
    if all(type(token) is int and 0 <= token < 2**31 for token in given):
        return array("i", given).tobytes()
    return json.dumps(given, ensure_ascii=False).encode("utf-8", "surrogatepass")


class Readers:
    """Who read which beginnings last, of the latest that were read."""

    def __init__(self, known: int = _KNOWN) -> None:
        self._known = known
        self._readers: OrderedDict[bytes, str] = OrderedDict()

    def find(self, names: Sequence[bytes], there: Collection[str]) -> str | None:
        """Who read the longest of the beginnings, among those that are there."""
        for name in reversed(names):
            reader = self._readers.get(name)
            if reader is not None and reader in there:
                return reader
        return None

    def note(self, names: Sequence[bytes], reader: str) -> None:
        """Remember who reads them."""
        for name in names:
            self._readers[name] = reader
            self._readers.move_to_end(name)
        while len(self._readers) > self._known:
            self._readers.popitem(last=False)


class Chooser:
    """Sends a request to who read the longest part of its beginning last.

    Unless that one has many more requests under way than another: waiting would cost more than
    reading again. What nobody has read goes to the least busy, of equals to who waited longest.
    """

    def __init__(self) -> None:
        self._readers = Readers()
        self._turn = 0
        self._turns: dict[str, int] = {}  # when each was last chosen

    def order(self, names: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """Who is to read a request, the best first; that one is taken to do so.

        Args:
            loads: requests under way, of each that is there; at least one.
        """
        order = sorted(loads, key=lambda name: (loads[name], self._turns.get(name, 0)))
        reader = self._readers.find(names, loads)
        if reader is not None and loads[reader] <= loads[order[0]] + _SLACK:
            order.remove(reader)
            order.insert(0, reader)
        self._readers.note(names, order[0])
        self._turn += 1
        self._turns = {name: self._turns.get(name, 0) for name in loads} | {order[0]: self._turn}
        return order
