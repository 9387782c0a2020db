"""The bound of selective answering, over 500 draws of the data."""

from __future__ import annotations

import numpy as np
import pytest

from optlm.errors import RequestError
from optlm.uncertainty.selective import binomial_tail, clopper_pearson_upper, learn_rule

SEEDS, ITEMS, RISK, DELTA = 500, 1500, 0.1, 0.1


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Uncertainty uniform on 0 to 1; an answer is wrong with half that probability."""
    random = np.random.default_rng(seed)
    uncertainty = random.random(ITEMS)
    return uncertainty, random.random(ITEMS) < uncertainty / 2


def true_risk(threshold: float) -> float:
    return min(threshold, 1) / 4  # the mean of u / 2 below the threshold


def test_the_bound_holds_in_as_many_draws_as_promised() -> None:
    broken = answered = careless = 0
    for seed in range(SEEDS):
        uncertainty, wrong = draw(seed)
        rule = learn_rule(uncertainty, wrong, risk=RISK, delta=DELTA, seed=seed)
        if rule.threshold is not None:
            answered += 1
            broken += true_risk(rule.threshold) > RISK
        order = np.argsort(uncertainty)
        seen = np.cumsum(wrong[order]) / np.arange(1, ITEMS + 1)
        last = np.flatnonzero(seen <= RISK)
        careless += bool(len(last)) and true_risk(uncertainty[order[last[-1]]]) > RISK
    assert broken <= DELTA * SEEDS  # promised: at most 50, but for the luck of these draws
    assert answered > 0.6 * SEEDS  # and not by never answering
    assert careless > 2 * DELTA * SEEDS  # the observed rate alone breaks it far more often


def test_the_rule_tells_what_it_was_learned_on() -> None:
    rule = learn_rule(*draw(1), risk=0.15)
    assert rule.threshold is not None
    assert (rule.proposed_on, rule.tested) == (300, 1200)
    assert rule.errors / rule.accepted < rule.bound <= 0.15
    assert rule.coverage == rule.accepted / 1200
    assert rule.answers(rule.threshold)
    assert not rule.answers(rule.threshold + 1e-9)


def test_nothing_is_answered_where_nothing_is_certain() -> None:
    rule = learn_rule(np.random.default_rng(0).random(200), np.ones(200), risk=0.1)
    assert (rule.threshold, rule.coverage, rule.bound) == (None, 0, 1)
    assert not rule.answers(-1e9)


def test_all_right_answers_are_all_given() -> None:
    rule = learn_rule(np.arange(100.0), np.zeros(100), risk=0.1)
    assert rule.coverage > 0.9


def test_too_few_items_are_refused() -> None:
    with pytest.raises(RequestError, match=r"10 items cannot bound a risk of 0\.01"):
        learn_rule(np.arange(10.0), np.zeros(10), risk=0.01)
    with pytest.raises(RequestError, match="risk is 0"):
        learn_rule(np.arange(10.0), np.zeros(10), risk=0)
    with pytest.raises(RequestError, match="10 labels are needed"):
        learn_rule(np.arange(10.0), [], risk=0.5)


@pytest.mark.parametrize(("k", "n", "p"), [(0, 10, 0.1), (3, 20, 0.3), (120, 1000, 0.1), (5, 5, 1)])
def test_the_tail_is_that_of_the_binomial(k: int, n: int, p: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert binomial_tail(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p))
    if 0 < k < n:
        upper = stats.beta.ppf(0.95, k + 1, n - k)
        assert clopper_pearson_upper(k, n, 0.05) == pytest.approx(upper)


def test_bounds_of_no_errors_and_only_errors() -> None:
    assert clopper_pearson_upper(0, 30, 0.05) == pytest.approx(1 - 0.05 ** (1 / 30))
    assert clopper_pearson_upper(30, 30, 0.05) == 1
    with pytest.raises(RequestError, match="31 errors among 30"):
        clopper_pearson_upper(31, 30, 0.05)
