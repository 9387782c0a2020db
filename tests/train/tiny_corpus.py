"""Made-up documents, and corpus files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zstandard

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "big", "house", "rain"]


def story(number: int) -> str:
    order = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(30)]
    return f"Story {number}. " + " ".join(order) + "."


def write_corpus(path: Path, documents: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(document) + "\n" for document in documents).encode()
    path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return path
