"""Head roles: which heads look back one token, rest on the start token, or copy by induction.

Scores are shares between 0 and 1, so heads of models of different sizes can be compared and
matched. Previous-token, start and self attention are measured on text, duplicate and induction
scores on a random block of tokens repeated once, where chance gives next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optlm.errors import BackendError, RequestError
from optlm.interpret.statistics import HeadStatistics, head_statistics, repeated_tokens
from optlm.model import OPT

__all__ = ["HeadAlignment", "HeadPair", "HeadReport", "HeadRole", "align_heads", "head_report"]

ON_TEXT = ("previous", "start", "itself", "spread", "reach")
ON_REPEATS = ("duplicate", "induction")
_ROLES = ("induction", "duplicate", "previous", "itself", "start")
_BROAD = 0.8  # of the largest entropy


@dataclass(frozen=True, kw_only=True)
class HeadRole:
    """A head, its role ("induction", "duplicate", "previous", "itself", "start", "broad" or
    "other"), and the score that gave it: the share of attention, for "broad" the spread."""

    layer: int
    head: int
    role: str
    score: float


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadReport:
    """All heads of a model: scores by name (L, H), between 0 and 1, and the role of each."""

    model: str
    text: HeadStatistics
    repeats: HeadStatistics
    scores: dict[str, NDArray[np.float64]]
    roles: tuple[HeadRole, ...]  # by layer, then head
    threshold: float

    def with_role(self, role: str) -> list[HeadRole]:
        """The heads of one role, strongest first."""
        return sorted((h for h in self.roles if h.role == role), key=lambda h: -h.score)


@dataclass(frozen=True, kw_only=True)
class HeadPair:
    """Two heads that were matched; `distance` is Euclidean over the scores and relative depth."""

    ours: HeadRole
    theirs: HeadRole
    distance: float

    @property
    def same_role(self) -> bool:
        return self.ours.role == self.theirs.role


@dataclass(frozen=True, kw_only=True)
class HeadAlignment:
    """The one-to-one matching of heads of two models with the least total distance."""

    models: tuple[str, str]
    pairs: tuple[HeadPair, ...]  # nearest first; as many as the smaller model has heads

    @property
    def same_role_share(self) -> float:
        return sum(pair.same_role for pair in self.pairs) / len(self.pairs)


def head_report(
    model: OPT,
    texts: Sequence[Sequence[int]],
    *,
    name: str = "model",
    threshold: float = 0.3,
    seeds: Sequence[int] = (0, 1, 2),
) -> HeadReport:
    """Score all heads on `texts` and on repeated random tokens, and name their roles.

    Args:
        threshold: share of attention from which a head has a role; the largest score wins.
        seeds: one repeated block of tokens each.

    Raises:
        RequestError: `threshold` is not in (0, 1]; texts as in `head_statistics`.
        CheckpointError: weights hold NaN.
    """
    if not 0 < threshold <= 1:
        raise RequestError(f"threshold is {threshold}; it must be above 0 and at most 1")
    text = head_statistics(model, texts)
    probes = [repeated_tokens(model.config, seed=seed) for seed in seeds]
    repeats = head_statistics(model, probes)
    scores = {key: text.scores[key] for key in ON_TEXT}
    scores |= {key: repeats.scores[key] for key in ON_REPEATS}
    layers, heads = scores["start"].shape
    return HeadReport(
        model=name,
        text=text,
        repeats=repeats,
        scores=scores,
        roles=tuple(
            _role(i, j, {key: float(score[i, j]) for key, score in scores.items()}, threshold)
            for i in range(layers)
            for j in range(heads)
        ),
        threshold=threshold,
    )


def align_heads(ours: HeadReport, theirs: HeadReport) -> HeadAlignment:
    """Match the heads of two models by their scores and relative depth.

    The models may differ in layers and heads; the larger one's remaining heads stay unmatched.
    The matching is the Hungarian method's (scipy).

    Raises:
        BackendError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise BackendError(
            "aligning heads needs scipy; install it with: pip install 'optlm[interpret]'"
        ) from None
    a, b = _vectors(ours), _vectors(theirs)
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    rows, columns = linear_sum_assignment(distances)
    pairs = (
        HeadPair(ours=ours.roles[i], theirs=theirs.roles[j], distance=float(distances[i, j]))
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    )
    return HeadAlignment(
        models=(ours.model, theirs.model),
        pairs=tuple(sorted(pairs, key=lambda pair: pair.distance)),
    )


def _role(layer: int, head: int, scores: dict[str, float], threshold: float) -> HeadRole:
    best = max(_ROLES, key=lambda role: scores[role])
    if scores[best] >= threshold:
        return HeadRole(layer=layer, head=head, role=best, score=scores[best])
    if scores["spread"] >= _BROAD:
        return HeadRole(layer=layer, head=head, role="broad", score=scores["spread"])
    return HeadRole(layer=layer, head=head, role="other", score=scores[best])


def _vectors(report: HeadReport) -> NDArray[np.float64]:
    """(L H, scores + 1): the scores of each head and its layer as a share of the depth."""
    scores = np.stack([report.scores[key] for key in (*ON_TEXT, *ON_REPEATS)], axis=-1)
    layers, heads, _ = scores.shape
    depth = np.repeat(np.arange(layers) / max(layers - 1, 1), heads)
    return np.concatenate([scores.reshape(layers * heads, -1), depth[:, None]], axis=1)
