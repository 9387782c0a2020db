"""Measures of answers, and how sure they are."""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["binary_f1", "bootstrap", "exact_match", "macro_f1", "wilson"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_Z = 1.959964  # 95 % of a normal distribution lie within
_RESAMPLES = 1000


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): honest for small counts and shares near 0 and 1."""
    if not count:
        return 0.0, 1.0
    share, z2 = successes / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(
    values: Sequence[Any], statistic: Callable[[Sequence[Any]], float], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic by resampling items (percentiles of 1000 draws)."""
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES) - 1]


def binary_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of class 1 over pairs (gold, predicted); 0 where nothing of the class is found."""
    return _f1(pairs, 1)


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean F1 of the classes that occur."""
    classes = {value for pair in pairs for value in pair}
    return math.fsum(_f1(pairs, value) for value in classes) / len(classes)


def _f1(pairs: Sequence[tuple[int, int]], value: int) -> float:
    hits = sum(gold == value == said for gold, said in pairs)
    wanted = sum(gold == value for gold, _ in pairs)
    given = sum(said == value for _, said in pairs)
    return 2 * hits / (wanted + given) if hits else 0.0


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 if the answer is one of the accepted, but for case, articles, punctuation and space."""
    return float(_plain(answer) in {_plain(text) for text in accepted})


def _plain(text: str) -> str:
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())
