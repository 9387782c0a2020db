"""How many documents each rule dropped, with examples for people to judge the rule by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optlm.data.dedup import Duplicate

__all__ = ["Tally"]

_KEPT_EXAMPLES = 5
_SHOWN = 160  # characters of an example


@dataclass
class _Row:
    name: str
    limit: str  # such as "at least 50"
    dropped: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


class Tally:
    """Counts by rule. `limits` gives the rules in order with their limits in words."""

    def __init__(self, limits: dict[str, str]) -> None:
        self._rows = {name: _Row(name, limit) for name, limit in limits.items()}
        self._waiting: dict[int, list[tuple[dict[str, Any], str]]] = {}

    def add(self, name: str, place: str, value: float, text: str) -> None:
        """Count a document dropped by rule `name`, whose measure was `value`."""
        row = self._rows[name]
        row.dropped += 1
        if len(row.examples) < _KEPT_EXAMPLES:
            value = round(value, 4)
            row.examples.append({"place": place, "value": value, "text": text[:_SHOWN]})

    def add_duplicate(self, name: str, found: Duplicate) -> None:
        """Count a duplicate; `show` fills in its place and text when they are known."""
        row = self._rows[name]
        row.dropped += 1
        if len(row.examples) < _KEPT_EXAMPLES:
            example: dict[str, Any] = {"value": round(found.similarity, 4)}
            row.examples.append(example)
            for key, document in (("", found.document), ("of_", found.of)):
                self._waiting.setdefault(document, []).append((example, key))

    def show(self, document: int, place: str, text: str) -> None:
        """Tell the place and text of an indexed document, if an example waits for them."""
        for example, key in self._waiting.pop(document, []):
            example |= {f"{key}place": place, f"{key}text": text[:_SHOWN]}

    def waits_for(self, end: int) -> bool:
        """Whether an example waits for a document before number `end`."""
        return any(document < end for document in self._waiting)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"name": r.name, "limit": r.limit, "dropped": r.dropped, "examples": r.examples}
            for r in self._rows.values()
        ]
