"""`Pool`: one vector of a text from the vectors of its tokens.

Letters: N tokens at a time, E embedding width.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from optlm.errors import RequestError

__all__ = ["Pool", "Pooling"]

Pooling = Literal["mean", "last"]


class Pool:
    """Takes vectors in order of position, however they are cut into pieces.

    The mean is summed in double precision, one token after another, so that pieces of any size give
    the same bits.

    Raises:
        RequestError: a `pooling` that does not exist.
    """

    def __init__(self, pooling: Pooling) -> None:
        if not isinstance(pooling, str) or pooling not in get_args(Pooling):
            raise RequestError(
                f"pooling is {pooling!r:.80}; it must be one of {', '.join(get_args(Pooling))}"
            )
        self._is_mean = pooling == "mean"
        self._value: NDArray[np.float64] | None = None
        self._count = 0

    def first_row(self, num_tokens: int) -> int:
        """The first position whose vector is wanted."""
        return 0 if self._is_mean else num_tokens - 1

    def add(self, vectors: NDArray[np.float32]) -> bool:
        """Take the vectors (N, E) of the next tokens; False where one is not finite."""
        rows = vectors.astype(np.float64)
        if self._is_mean and self._value is not None:
            rows = np.concatenate([self._value[None], rows])
        self._value = np.add.reduce(rows, axis=0)  # of rows: in order, never by halves
        self._count += len(vectors)
        return bool(np.isfinite(self._value).all())

    @property
    def vector(self) -> NDArray[np.float32]:
        """The result (E,)."""
        assert self._value is not None, "no token was read"
        return (self._value / self._count).astype(np.float32)
