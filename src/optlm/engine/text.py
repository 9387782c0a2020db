"""`TextStream`: text that grows token by token and is cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TextStream"]


class TextStream:
    """Collects decoded pieces and tells how much of the text is certain.

    A piece of text is certain once no stop string can begin in it any more. Invariant: what `take`
    has given away is a prefix of the final text.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self.text = ""
        self.stopped_by: str | None = None
        self._stops = stops
        self._include_stop = include_stop
        self._taken = 0

    def push(self, piece: str, *, may_stop: bool = True) -> bool:
        """Append a piece; True if a stop string is now complete, and the text ends there.

        Stop strings that end in a piece pushed with `may_stop` false do not count.
        """
        before = len(self.text)
        self.text += piece
        if not (self._stops and piece and may_stop):
            return False
        found = []
        for stop in self._stops:
            start = self.text.find(stop, max(before - len(stop) + 1, 0))
            if start >= 0:
                found.append((start, len(stop), stop))
        if not found:
            return False
        start, length, self.stopped_by = min(found)
        self.text = self.text[: start + length if self._include_stop else start]
        return True

    def take(self, *, last: bool = False) -> str:
        """Return the certain text not given away before; `last` gives all of it."""
        end = len(self.text) if last else len(self.text) - self._held_back()
        piece = self.text[self._taken : end]
        self._taken = end
        return piece

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self.text) - self._taken), 0, -1):
            end = self.text[len(self.text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
