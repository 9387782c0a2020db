"""How far a text is from those that were seen: Mahalanobis distance of its hidden state
(Lee et al. 2018, arXiv 1807.03888).

The covariance of D numbers from N texts is singular when N < D, so it is shrunk towards a multiple
of the identity by the share that Ledoit and Wolf (2004) found best. The share is part of the
result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from optlm.errors import RequestError
from optlm.uncertainty.reading import Float64

__all__ = ["Distance", "fit_distance"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Distance:
    """A cloud of N texts.

    Attributes:
        mean: (D,).
        precision: (D, D), the inverse of the shrunk covariance.
        shrinkage: share of the identity in the covariance, 0 to 1; near 1 the N texts say little
            about directions, and the distance is nearly Euclidean.
        texts: N.
    """

    mean: Float64
    precision: Float64
    shrinkage: float
    texts: int

    def of(self, states: ArrayLike) -> Float64:
        """Squared distances (M,) of hidden states (M, D); about D for a text like the N.

        Raises:
            RequestError: states of another width, or not finite.
        """
        apart = _as_states(states, self.mean.shape[0]) - self.mean
        result: Float64 = np.einsum("md,de,me->m", apart, self.precision, apart)
        return result


def fit_distance(states: ArrayLike) -> Distance:
    """Learn where hidden states (N, D) lie, such as `LLM.embed` of N texts.

    Raises:
        RequestError: fewer than 2 states, states that are all alike, or not finite.
    """
    values = _as_states(states, None)
    count, width = values.shape
    if count < 2:
        raise RequestError(f"{count} texts have no spread; give at least 2, best more than {width}")
    mean = values.mean(axis=0)
    centred = values - mean
    covariance = centred.T @ centred / count
    scale = float(np.trace(covariance)) / width
    if scale <= 0:
        raise RequestError(f"all {count} texts have the same hidden state; give texts that differ")
    shrinkage = _ledoit_wolf(centred, covariance, scale)
    shrunk = (1 - shrinkage) * covariance + shrinkage * scale * np.eye(width)
    return Distance(
        mean=mean,
        precision=np.linalg.pinv(shrunk, hermitian=True),
        shrinkage=shrinkage,
        texts=count,
    )


def _ledoit_wolf(centred: Float64, covariance: Float64, scale: float) -> float:
    """The best share of the identity (Ledoit and Wolf 2004, section 3.2)."""
    count, width = centred.shape
    apart = float((covariance**2).sum()) - width * scale**2  # |S - mu I|^2
    if apart <= 0:
        return 1.0
    squares = centred**2
    noise = (float((squares.T @ squares).sum()) / count - float((covariance**2).sum())) / count
    return float(min(max(noise / apart, 0.0), 1.0))


def _as_states(states: ArrayLike, width: int | None) -> Float64:
    values = np.asarray(states, np.float64)
    if values.ndim != 2 or not values.shape[1] or width not in (None, values.shape[1]):
        wanted = "(texts, width)" if width is None else f"(texts, {width})"
        raise RequestError(f"hidden states have the shape {values.shape}; it must be {wanted}")
    if not np.isfinite(values).all():
        raise RequestError("a hidden state holds NaN or infinity")
    return values
