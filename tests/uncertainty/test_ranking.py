"""AUROC, AURC and PRR: against scikit-learn, counting, and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from optlm.errors import RequestError
from optlm.uncertainty.ranking import (
    auroc,
    auroc_resampled,
    rank_errors,
    resampling,
    risk_coverage,
)


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    wrong = random.random(200) < 0.4
    return np.round(random.normal(wrong.astype(float)), 1), wrong  # with ties


def test_auroc_is_that_of_scikit_learn(data: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    uncertainty, wrong = data
    assert auroc(uncertainty, wrong) == pytest.approx(metrics.roc_auc_score(wrong, uncertainty))
    weights = resampling(200, 5, seed=1)
    ours = auroc_resampled(uncertainty, wrong, weights)
    for row, value in zip(weights, ours, strict=True):
        theirs = metrics.roc_auc_score(wrong, uncertainty, sample_weight=row)
        assert value == pytest.approx(theirs)


def test_auroc_counts_pairs() -> None:
    assert auroc([1, 2, 2, 3], [0, 0, 1, 1]) == pytest.approx((2 + 2 - 0.5) / 4)


def test_risk_is_the_mean_over_orders_of_equals(data: tuple[np.ndarray, np.ndarray]) -> None:
    uncertainty, wrong = data
    random = np.random.default_rng(0)
    curves = []
    for _ in range(3000):
        order = np.lexsort((random.random(len(wrong)), uncertainty))
        curves.append(np.cumsum(wrong[order]) / np.arange(1, len(wrong) + 1))
    assert risk_coverage(uncertainty, wrong) == pytest.approx(np.mean(curves, axis=0), abs=0.03)


def test_extremes() -> None:
    wrong = np.array([0, 0, 0, 1, 1], bool)
    best = rank_errors(wrong.astype(float), wrong)
    assert (best.auroc, best.prr) == (1, 1)
    worst = rank_errors(-wrong.astype(float), wrong)
    assert worst.auroc == 0
    assert worst.prr < 0
    constant = rank_errors(np.zeros(5), wrong)
    assert constant.auroc == 0.5
    assert constant.aurc == pytest.approx(0.4)
    assert constant.prr == pytest.approx(0)


@pytest.mark.parametrize(
    ("uncertainty", "wrong", "told"),
    [
        ([], [], "at least one number"),
        ([1.0, 2.0], [], "2 labels are needed"),
        ([1.0, np.nan], [0, 1], "number 1 is nan"),
        ([1.0, 2.0], [0, 2], "true or false"),
        ([1.0, 2.0], [1, 1], "all 2 answers are wrong"),
        ([1.0, 2.0], [0, 0], "all 2 answers are right"),
    ],
)
def test_what_cannot_be_ranked_is_refused(uncertainty: list, wrong: list, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        rank_errors(uncertainty, wrong)
    with pytest.raises(RequestError, match=told):
        auroc(uncertainty, wrong)
