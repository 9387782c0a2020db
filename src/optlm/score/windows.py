"""How each convention cuts a text into windows, and which token is scored in which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from optlm.errors import ContextLengthError
from optlm.score.convention import Convention

__all__ = ["Window", "cut"]


class Window(NamedTuple):
    """Token ids, of which those from place `first` on are scored.

    `at` is the place of the first scored one among the tokens of the text.
    """

    token_ids: list[int]
    first: int
    at: int

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.first


def cut(token_ids: list[int], convention: Convention, *, bos: int, name: str) -> list[Window]:
    """The windows of a text under a resolved convention; those without a scored token are left out.

    Raises:
        ContextLengthError: the text must fit into one window and does not.
    """
    assert convention.window is not None
    size, stride = convention.window, convention.stride or 0
    if convention.plan == "overlap":
        windows = _overlapping(token_ids, size, stride, bos)
    elif convention.plan == "sliding":
        windows = _sliding(token_ids, size, stride)
    elif convention.plan == "rolling":
        windows = _rolling(token_ids, size, bos)
    elif convention.plan == "disjoint":
        windows = _disjoint(token_ids, size)
    else:
        if len(token_ids) > size:
            raise ContextLengthError(
                f"{name} has {len(token_ids)} tokens; convention {convention.name!r} reads texts "
                f"whole and a window holds {size}. Shorten it, or use the convention optlm"
            )
        windows = iter([Window(token_ids, 1, 1)])
    return [window for window in windows if window.num_scored > 0]


def _overlapping(ids: list[int], size: int, stride: int, bos: int) -> Iterator[Window]:
    """Each window after the first scores the next `stride` tokens after as many as fit.

    If the text begins with the start token, so does every window, as the model saw in training.
    """
    start = ids[:1] if ids[:1] == [bos] else []
    yield Window(ids[:size], 1, 1)
    done = size
    while done < len(ids):
        end = min(done + stride, len(ids))
        yield Window(start + ids[end - size + len(start) : end], size - (end - done), done)
        done = end


def _sliding(ids: list[int], size: int, stride: int) -> Iterator[Window]:
    """As the page "Perplexity of fixed-length models" of transformers."""
    done = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        first = max(done - begin, 1)
        yield Window(ids[begin:end], first, begin + first)
        done = end
        if end == len(ids):
            break


def _rolling(ids: list[int], size: int, bos: int) -> Iterator[Window]:
    """As `get_rolling_token_windows` of lm-eval with a context of one token."""
    if not ids:
        return
    yield Window([bos, *ids[:size]], 1, 0)
    done = size
    while done < len(ids):
        end = min(done + size, len(ids))
        yield Window(ids[end - size - 1 : end], size + 1 - (end - done), done)
        done = end


def _disjoint(ids: list[int], size: int) -> Iterator[Window]:
    for begin in range(0, len(ids) - size + 1, size):
        yield Window(ids[begin : begin + size], 1, begin + 1)
