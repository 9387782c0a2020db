"""Reliability and temperature: against slow twins, and planted miscalibration that is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from optlm import LLM, SamplingParams
from optlm.errors import RequestError
from optlm.model import OPT
from optlm.uncertainty.calibration import reliability
from optlm.uncertainty.measures import measure
from optlm.uncertainty.temperature import (
    Derivatives,
    best_temperature,
    choice_derivatives,
    fit_choices,
    fit_tokens,
)
from variants import VARIANTS

RANDOM = np.random.default_rng(5)


def slow_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    total = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = (confidence > low) & (confidence <= high)
        inside |= (confidence == 0) & (index == 0)
        if inside.any():
            gap = abs(confidence[inside].mean() - correct[inside].mean())
            total += gap * inside.mean()
    return total


def test_ece_is_that_of_its_definition() -> None:
    confidence = np.append(RANDOM.random(500), [0.0, 1.0])
    correct = RANDOM.random(502) < confidence**2
    ours = reliability(confidence, correct, bins=15)
    assert ours.ece == pytest.approx(slow_ece(confidence, correct, 15))
    assert ours.counts.sum() == 502
    assert ours.low <= ours.ece <= ours.high


def test_intervals_hold_and_whole_groups_widen_them() -> None:
    confidence = np.full(2000, 0.7)
    correct = np.repeat(RANDOM.random(20) < 0.5, 100)  # a document is right or wrong as a whole
    alone = reliability(confidence, correct)
    grouped = reliability(confidence, correct, groups=np.repeat(np.arange(20), 100))
    assert (grouped.groups, alone.groups) == (20, 2000)
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_bins_of_equal_mass() -> None:
    confidence = RANDOM.random(1000) ** 4
    ours = reliability(confidence, np.zeros(1000), bins=10, binning="mass")
    assert ours.counts.tolist() == [100] * 10
    assert reliability([0.5] * 4, [0, 1, 1, 0], binning="mass").ece == 0


@pytest.mark.parametrize(
    ("confidence", "correct", "told"),
    [
        ([], [], "at least one number"),
        ([0.5, 1.2], [0, 1], "between 0 and 1"),
        ([0.5, 0.6], [], "2 labels are needed"),
    ],
)
def test_what_has_no_reliability_is_refused(confidence: list, correct: list, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        reliability(confidence, correct)


# ---- temperature ---------------------------------------------------------------------------------


def planted(temperature: float, items: int = 4000) -> tuple[list[np.ndarray], list[int]]:
    """Scores whose labels are drawn from softmax(scores / temperature)."""
    random = np.random.default_rng(1)
    scores, gold = [], []
    for _ in range(items):
        each = random.normal(0, 2, random.integers(2, 6))
        probs = np.exp(each / temperature)
        scores.append(each)
        gold.append(int(random.choice(len(each), p=probs / probs.sum())))
    return scores, gold


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_planted_temperatures_are_found(temperature: float) -> None:
    assert fit_choices(*planted(temperature)) == pytest.approx(temperature, rel=0.1)


def test_derivatives_are_those_of_the_loss() -> None:
    scores, gold = planted(1.5, items=50)
    at = choice_derivatives(scores, gold)
    losses = [
        -float(torch.log_softmax(torch.tensor(each) * 0.7, 0)[right])
        for each, right in zip(scores, gold, strict=True)
    ]
    assert at(0.7).nll == pytest.approx(np.mean(losses))
    step = 1e-5
    assert at(0.7).slope == pytest.approx((at(0.7 + step).nll - at(0.7 - step).nll) / (2 * step))
    slopes = at(0.7 + step).slope - at(0.7 - step).slope
    assert at(0.7).curvature == pytest.approx(slopes / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_temperature_of_tokens_is_the_best_of_a_grid(
    engine: Callable[[str], LLM], folders: dict[str, Path], name: str
) -> None:
    llm = engine(name)
    params = SamplingParams(temperature=1.6, max_tokens=40, ignore_eos=True, seed=4, n=3)
    (written,) = llm.generate([[2]], params)  # hotter than the model: the temperature to find
    sequences = [[2, *output.token_ids] for output in written.outputs]
    found = fit_tokens(llm, sequences)
    model = OPT.from_checkpoint(folders[name])
    with torch.no_grad():
        logits = model(torch.tensor(sequences)).logits[:, :-1].double()
    targets = torch.tensor(sequences)[:, 1:, None]

    def loss(temperature: float) -> float:
        return -float(torch.log_softmax(logits / temperature, -1).gather(-1, targets).mean())

    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 600))
    best = grid[np.argmin([loss(t) for t in grid])]
    assert found == pytest.approx(best, rel=0.02)
    assert found == pytest.approx(1.6, rel=0.35)
    measured = measure(llm, sequences, temperature=found)
    mean = -float(np.concatenate([each.logprob for each in measured]).mean())
    assert mean == pytest.approx(loss(found), abs=1e-3)


def test_labels_that_cannot_calibrate_are_refused() -> None:
    with pytest.raises(RequestError, match="all right"):
        fit_choices([[0.0, 1.0], [3.0, 1.0]], [1, 0])
    with pytest.raises(RequestError, match="no better than chance"):
        fit_choices([[0.0, 1.0], [3.0, 1.0]], [0, 1])
    with pytest.raises(RequestError, match="0 items and 0 labels"):
        fit_choices([], [])
    with pytest.raises(RequestError, match="1 items and 0 labels"):
        fit_choices([[0.0, 1.0]], [])
    with pytest.raises(RequestError, match="label 2 is none of its 2 choices"):
        fit_choices([[0.0, 1.0]], [2])
    with pytest.raises(RequestError, match="item 0: give finite scores"):
        fit_choices([[0.0, np.nan]], [1])


def test_no_texts_are_refused(base: LLM) -> None:
    with pytest.raises(RequestError, match="no texts to calibrate on"):
        fit_tokens(base, [])


def test_newton_steps_stay_inside_the_bracket() -> None:
    """A loss whose curvature misleads: the bracket is halved instead."""

    def at(inverse: float) -> Derivatives:
        return Derivatives(0.0, float(np.tanh(inverse - 3)), 1e-9)

    assert best_temperature(at) == pytest.approx(1 / 3, rel=1e-3)
