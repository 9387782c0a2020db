"""Arrays of figures and of right and wrong answers, checked once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optlm.errors import RequestError

__all__ = ["as_figures", "as_flags", "both_classes", "check_share"]


def as_figures(values: ArrayLike, what: str) -> NDArray[np.float64]:
    """A finite array (N,), N at least 1.

    Raises:
        RequestError: none, not one-dimensional, or not all of them finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise RequestError(f"{what}: give a list of at least one number, not {array.shape}")
    if not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise RequestError(f"{what}: number {place} is {array[place]}; it must be finite")
    return array


def as_flags(values: ArrayLike, what: str, count: int) -> NDArray[np.bool_]:
    """An array (count,) of true and false.

    Raises:
        RequestError: no labels, another count, or something else than true, false, 1 and 0.
    """
    array: NDArray[Any] = np.asarray(values)
    if array.shape != (count,):
        raise RequestError(f"{what}: {count} labels are needed, one for each, not {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise RequestError(f"{what}: labels are true or false (1 or 0)")
    flags: NDArray[np.bool_] = array.astype(np.bool_)
    return flags


def both_classes(wrong: NDArray[np.bool_], what: str) -> None:
    """Refuse labels of one class only.

    Raises:
        RequestError: all answers are right, or all are wrong.
    """
    if wrong.all() or not wrong.any():
        which = "wrong" if wrong.all() else "right"
        raise RequestError(
            f"{what} is undefined: all {len(wrong)} answers are {which}; it compares right answers "
            "with wrong ones. Give items of both kinds"
        )


def check_share(value: float, what: str) -> float:
    """A number between 0 and 1, neither of them.

    Raises:
        RequestError: it is not.
    """
    if not 0 < value < 1:
        raise RequestError(f"{what} is {value}; it must lie between 0 and 1")
    return float(value)
