"""Which of several endings goes best with a context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from optlm.errors import RequestError
from optlm.score.results import ContinuationScore

__all__ = ["Normalize", "Ranking", "check_endings", "make_ranking"]

Normalize = Literal["sum", "tokens", "bytes", "information"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """Endings of one context by score.

    Attributes:
        endings: in the order given.
        scores: theirs: the log-probability ("sum"), that divided by the number of "tokens", or of
            "bytes" (white space around it not counted), or less the log-probability after the
            reference context ("information").
        best: place of the highest score; of equals the first.
    """

    endings: list[ContinuationScore]
    scores: list[float]
    normalize: Normalize

    @property
    def best(self) -> int:
        return max(range(len(self.scores)), key=lambda place: self.scores[place])

    @property
    def margin(self) -> float:
        """Score of the best less that of the next."""
        first, second = sorted(self.scores, reverse=True)[:2]
        return first - second


def check_endings(endings: Sequence[str], normalize: str) -> None:
    """Refuse endings whose ranking would mean nothing.

    Raises:
        RequestError: fewer than two, two alike, white space alone, an ending that another begins
            with under "sum" (it can never score lower), or an unknown `normalize`.
    """
    if normalize not in get_args(Normalize):
        raise RequestError(
            f"normalize is {normalize!r}; use one of {', '.join(get_args(Normalize))}"
        )
    if isinstance(endings, str) or len(endings) < 2:
        raise RequestError(f"endings are {endings!r:.80}; a ranking needs a list of at least two")
    for place, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise RequestError(f"ending {place} is {ending!r:.80}; it must be a text")
        for other, longer in enumerate(endings):
            if other == place or not isinstance(longer, str):
                continue
            if longer == ending:
                raise RequestError(f"endings {place} and {other} are both {ending!r:.80}")
            if normalize == "sum" and longer.startswith(ending):
                raise RequestError(
                    f"ending {place}, {ending!r:.80}, is the beginning of ending {other}, "
                    f"{longer!r:.80}: its summed log-probability can never be lower. Normalise by "
                    "tokens, bytes or information, or end both with a mark such as a full stop"
                )


def make_ranking(endings: list[ContinuationScore], normalize: Normalize) -> Ranking:
    scores = [_score(ending, normalize) for ending in endings]
    return Ranking(endings=endings, scores=scores, normalize=normalize)


def _score(ending: ContinuationScore, normalize: Normalize) -> float:
    if normalize == "tokens":
        return ending.mean
    if normalize == "bytes":
        return ending.total / len((ending.continuation or "").strip().encode())
    return ending.information if normalize == "information" else ending.total
