"""Which texts to label next: those the model is least sure of, and not the same one many times."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from optlm.errors import RequestError
from optlm.uncertainty.checks import as_figures

__all__ = ["select"]


def select(
    uncertainty: ArrayLike, states: ArrayLike, count: int, *, breadth: float = 5.0
) -> list[int]:
    """Choose `count` of N texts: among the most uncertain, each as far as can be from those chosen.

    The `breadth` x `count` most uncertain are candidates. The most uncertain is taken, then again
    and again the one whose nearest chosen text is farthest (Sener and Savarese 2018, arXiv
    1708.00489). With a breadth of 1 it is uncertainty alone.

    Args:
        uncertainty: (N,).
        states: a vector for each text (N, D), such as its hidden state.

    Returns:
        indices in the order they were chosen; equals are taken in their order.

    Raises:
        RequestError: other counts, figures that are not finite, or more wanted than there are.
    """
    figures = as_figures(uncertainty, "uncertainty")
    vectors = np.asarray(states, np.float64)
    if vectors.ndim != 2 or len(vectors) != len(figures) or not np.isfinite(vectors).all():
        raise RequestError(
            f"states have the shape {vectors.shape}; give {len(figures)} finite vectors"
        )
    if not 0 < count <= len(figures):
        raise RequestError(f"{count} of {len(figures)} texts; choose 1 to {len(figures)}")
    if not breadth >= 1:
        raise RequestError(f"breadth is {breadth}; it must be at least 1")
    ranked = np.argsort(-figures, kind="stable")
    candidates = ranked[: max(count, min(len(ranked), round(breadth * count)))]
    points = vectors[candidates]
    chosen = [0]
    nearest = np.linalg.norm(points - points[0], axis=1)
    while len(chosen) < count:
        nearest[chosen] = -1.0
        following = int(nearest.argmax())
        chosen.append(following)
        nearest = np.minimum(nearest, np.linalg.norm(points - points[following], axis=1))
    return [int(candidates[place]) for place in chosen]
