"""The fast sampler against `slow_sampling`, option by option, ties and extremes included."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import slow_sampling as slow
from numpy.random import Philox

from optlm.engine import sampling
from optlm.engine.outputs import TokenLogprobs
from optlm.engine.params import SamplingParams
from optlm.engine.sampling import Chooser

V = 600  # more than two blocks of 256, and no multiple


def peaked(seed: int, spread: float = 3.0, vocab_size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, vocab_size).astype(np.float32)


def tied(seed: int) -> np.ndarray:
    """Few distinct values, so every cut falls among equals."""
    return np.random.default_rng(seed).integers(-3, 4, V).astype(np.float32)


ROWS = {
    "peaked": peaked(0),
    "sharp": peaked(1, 20.0),
    "flat": peaked(2, 0.01),
    "tied": tied(3),
    "equal": np.zeros(V, np.float32),
    "one": np.where(np.arange(V) == 77, 0, -1e9).astype(np.float32),
    "last": np.where(np.arange(V) == V - 1, 50, 0).astype(np.float32),
    "huge": (peaked(4) * 1e30).astype(np.float32),
    "masked": np.where(np.arange(V) % 7 == 0, peaked(5), -np.inf).astype(np.float32),
    "short": peaked(6, 2.0, 5),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.01},
    {"temperature": 1e4},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.5, "temperature": 2.0},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 1e-9},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    {"top_k": 3, "top_p": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_draws_equal_those_of_the_definition(name: str, options: dict[str, Any]) -> None:
    row = ROWS[name]
    params = SamplingParams(**options)
    kept = slow.probabilities([float(x) for x in row], params)
    edges = np.cumsum([0.0, *kept.values()])
    for u in [*np.random.default_rng(9).random(40).tolist(), 0.0, 1 - 2.0**-53]:
        got = sampling.draw(row, float(row.max()), params, u)
        if np.abs(edges - u).min() < 1e-6:  # within rounding of the border between two tokens
            assert kept[got] > 0
        else:
            assert got == slow.draw(kept, u), (u, got)


@pytest.mark.parametrize("name", ["peaked", "flat", "tied", "equal", "huge", "sharp"])
def test_kept_sets_equal_the_definition(name: str) -> None:
    row = ROWS[name]
    scaled = row - row.max()
    values = [float(x) for x in scaled]
    for k in (1, 2, 5, 100, V - 1):
        ids = sampling.keep_top_k(scaled, k)
        assert ids is not None
        assert ids.tolist() == sorted(slow.probabilities(values, SamplingParams(top_k=k)))
    for p in (0.01, 0.3, 0.9, 0.99):
        got = sampling.keep_top_p(scaled, p).tolist()
        wanted = sorted(slow.probabilities(values, SamplingParams(top_p=p)))
        # One token at the edge may differ by rounding of the sums.
        assert len(set(got) ^ set(wanted)) <= (1 if name == "flat" else 0)
    for p in (0.01, 0.5, 1.0):
        got = sampling.keep_min_p(scaled, p).tolist()
        assert got == sorted(slow.probabilities(values, SamplingParams(min_p=p)))


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_of_a_large_vocabulary(spread: float) -> None:
    """Nuclei of a few tokens and of most of them."""
    scaled = peaked(3, spread, 9000)
    scaled -= scaled.max()
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order].astype(np.float64))
    mass = np.cumsum(probabilities) / probabilities.sum()
    for p in (0.1, 0.5, 0.95):
        kept = sampling.keep_top_p(scaled, p)
        count = len(kept)
        assert kept.tolist() == sorted(order[:count].tolist())
        assert mass[count - 1] > p - 1e-6
        assert count == 1 or mass[count - 2] < p + 1e-6


def test_frequencies_follow_the_probabilities() -> None:
    row = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    params = SamplingParams(seed=3)
    chooser = Chooser(params, [0], stop_ids=[], seed=3, sample=0)
    counts = Counter(chooser.choose(row.copy(), position) for position in range(20000))
    for token, probability in enumerate([0.5, 0.25, 0.125, 0.125]):
        assert counts[token] / 20000 == pytest.approx(probability, abs=0.012)


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 1e4},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1e4},
    {"logit_bias": {0: 5.0, 4: -1e4, 299: 3.5}},
    {"min_tokens": 4},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {5: 2.0, 6: 2.0},
        "min_tokens": 3,
    },
]


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_processed_logits_equal_the_definition(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, **options)
    prompt, output, stop_ids = [2, 5, 5, 9, 299], [], [2, 7]
    chooser = Chooser(params, prompt, stop_ids=stop_ids, seed=0, sample=0)
    for step in range(90):  # beyond the first 64 distinct tokens
        row = peaked(step, 1.0, 300)
        row[2] += 4.0
        row[step % 11] += 3.0
        wanted = slow.process([float(x) for x in row], params, prompt, output, stop_ids)
        token = chooser.choose(row, len(prompt) + step)
        np.testing.assert_allclose(row, np.array(wanted, np.float32), rtol=2e-5, atol=2e-5)
        assert token == int(np.argmax(wanted))
        output.append(token)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.zeros(V, np.float32)
    row[[300, 40, 599]] = 1.0
    chooser = Chooser(SamplingParams(temperature=0), [2], stop_ids=[2], seed=0, sample=0)
    assert chooser.choose(row, 1) == 40


@pytest.mark.parametrize("name", [n for n in ROWS if n != "masked"])
def test_log_softmax(name: str) -> None:
    row = ROWS[name]
    wanted = slow.log_softmax([float(x) for x in row])
    np.testing.assert_allclose(sampling.log_softmax(row), wanted, rtol=1e-6, atol=2e-6)
    targets = [0, len(row) - 1]
    got = sampling.chosen_logprobs(np.stack([row, row]), targets)
    assert got == pytest.approx([wanted[t] for t in targets], rel=1e-6, abs=1e-6)


def test_token_logprobs_reports_top_rank_and_vocabulary() -> None:
    row = ROWS["tied"]
    normalizer = sampling.log_normalizer(row)
    wanted = [float(x) - normalizer for x in row]
    token = int(np.flatnonzero(row == row.max())[3])

    def reported(token: int, count: int) -> TokenLogprobs:
        return sampling.token_logprobs(row, normalizer, token, count)

    report = reported(token, 5)
    order = sorted(range(V), key=lambda i: (-row[i], i))
    assert report.top_ids.tolist() == order[:5]
    assert list(report.top()) == order[:5]
    assert report.rank == 1
    assert report.logprob == wanted[token] == sampling.chosen_logprobs(row[None], [token])[0]
    assert reported(order[-1], 0).rank == 1 + int((row > row.min()).sum())
    assert len(reported(token, 0).top_ids) == 0
    assert reported(token, V).top_ids.tolist() == order
    whole = reported(token, -1)
    assert whole.top_ids.tolist() == list(range(V))
    assert whole.top_logprobs.tolist() == wanted


def test_random_numbers_are_philox_by_seed_sample_and_position() -> None:
    for seed, sample, position in ((0, 0, 0), (2**64 - 1, 3, 2047), (5, 1, 7)):
        key = np.array([seed, sample], np.uint64)
        raw = int(Philox(key=key, counter=position).random_raw())
        assert sampling.uniform(seed, sample, position) == (raw >> 11) / 2**53
    numbers = {sampling.uniform(1, s, p) for s in range(20) for p in range(20)}
    assert len(numbers) == 400
    assert all(0 <= u < 1 for u in numbers)


def test_numbers_do_not_depend_on_the_order_of_draws() -> None:
    params = SamplingParams()
    row = peaked(8, 1.0)
    one = Chooser(params, [2], stop_ids=[], seed=11, sample=0)
    forward = [one.choose(row.copy(), position) for position in range(30)]
    two = Chooser(params, [2], stop_ids=[], seed=11, sample=0)
    backward = [two.choose(row.copy(), position) for position in reversed(range(30))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 5


def test_bits_of_the_last_random_number_never_leave_the_vocabulary() -> None:
    row = np.full(V, -200.0, np.float32)  # all but the first underflow to weight 0
    row[0] = 0.0
    assert sampling.draw(row, 0.0, SamplingParams(), math.nextafter(1.0, 0.0)) == 0
