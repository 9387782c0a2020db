"""Which language a piece of text is in, by py3langid (its model is in the package, 4.6 MB)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier

__all__ = ["Identifier", "pieces_of"]

_SPACED = ".!?\u0589\u0964\u061f"  # ends of sentences before a space (Armenian, Hindi, Arabic)
_CLOSE = "\u3002\uff01\uff1f"  # Chinese and Japanese ones, which no space follows
_END = re.compile(rf"(?<=[{_SPACED}])\s+|(?<=[{_CLOSE}])|\n+")
_SHORTEST = 24  # bytes; of less nobody can tell the language
_SAME = {"nb": "no", "nn": "no"}  # written forms of one language


def pieces_of(text: str) -> list[str]:
    """Sentences and lines, those too short to identify left out."""
    pieces = (piece.strip() for piece in _END.split(text) if piece)
    return [piece for piece in pieces if len(piece.encode()) >= _SHORTEST]


class Identifier:
    """Tells apart the 130 or so languages that the package knows."""

    def __init__(self) -> None:
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
        self._known = set(self._identifier.labels)

    def knows(self, language: str) -> bool:
        return _base(language) in self._known

    def language(self, text: str) -> str:
        """The code of the language a text is most likely in."""
        return _base(str(self._identifier.classify(text)[0]))

    def share_of_others(self, language: str, pieces: Sequence[str]) -> float | None:
        """Share of the characters in pieces of other languages; None without a piece."""
        total = sum(map(len, pieces))
        if not total:
            return None
        other = [piece for piece in pieces if self.language(piece) != _base(language)]
        return sum(map(len, other)) / total


def _base(language: str) -> str:
    """``pt-BR`` -> ``pt``."""
    base = language.split("-")[0].split("_")[0].lower()
    return _SAME.get(base, base)
