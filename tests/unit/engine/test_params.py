"""Every field of `SamplingParams` refuses what makes no sense, and says so."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from optlm.engine.params import SamplingParams
from optlm.errors import RequestError

NAN, INF = math.nan, math.inf

BAD: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 1.5, "1", True, 10**9, 2**63, None, NAN]),
    ("best_of", [0, -1, 1.5, True, 10**9, "2"]),
    ("max_tokens", [-1, 10**10, "5", 1.0, True, None]),
    ("min_tokens", [-1, "1", 0.5, True]),
    ("temperature", [NAN, INF, -INF, 1e308, -1, -1e-320, 1e-320, 0.001, "0.7", True, None, [1]]),
    ("top_p", [0, NAN, 1.0000001, -0.1, "1", INF]),
    ("top_k", [-1, 1.5, True, 2**40, "3"]),
    ("min_p", [-0.1, 1.1, NAN, "0"]),
    ("repetition_penalty", [0, -1, NAN, INF, 1e308, 1e-40]),
    ("presence_penalty", [NAN, 1e308, -1e308, "1"]),
    ("frequency_penalty", [NAN, INF, -INF, True]),
    ("logprobs", [-2, 1.5, True, "most", "5"]),
    ("prompt_logprobs", [-2, 1.5, True, "every"]),
    ("stop", [[""], "", ["a", 3], 5, b"x", ["x"] * 1025, "x" * 5000, {"a": 1}, "a\ud800"]),
    ("stop_token_ids", [[-1], [1.5], [True], "12", 7, [2**64], [1] * 2000]),
    ("logit_bias", [{-1: 1}, {"1e3": 1}, {"٣": 1}, {1: NAN}, {1: INF}, {1.0: 1}, {True: 1}, [1]]),
    ("seed", [2**64, -1, 1.5, True, "7"]),
    ("beam_width", [0, -1, 257, 2.5, True]),
    ("length_penalty", [NAN, INF, "1"]),
    ("penalty_alpha", [-0.1, 1.1, NAN, True]),
    ("include_stop", [1, "yes", None]),
    ("ignore_eos", [0, "no"]),
    ("on_overflow", ["truncate", None, 1]),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD for v in values], ids=str)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name.split("_")[0]):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams)])
@pytest.mark.parametrize(
    "value", [10**400, 10**5000, np.array([1, 2]), np.array("x"), Decimal("sNaN"), 1j], ids=range(6)
)
def test_strange_numbers_are_refused_as_requests(name: str, value: Any) -> None:
    for given in [value] if name != "logit_bias" else [value, {5: value}]:
        with pytest.raises(RequestError, match=name.split("_")[0]):
            SamplingParams(**{name: given})


def test_min_tokens_needs_a_token_that_does_not_stop() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=range(300))
    params.check_vocabulary(400)
    with pytest.raises(RequestError, match="min_tokens"):
        params.check_vocabulary(300)


@pytest.mark.parametrize(
    "values",
    [
        {"n": 3, "best_of": 2},
        {"min_tokens": 5, "max_tokens": 4},
        {"beam_width": 2},
        {"beam_width": 2, "temperature": 0, "penalty_alpha": 0.6, "top_k": 4},
        {"beam_width": 2, "temperature": 0, "n": 3},
        {"beam_width": 2, "temperature": 0, "top_p": 0.5},
        {"beam_width": 2, "temperature": 0, "stop": "x"},
        {"beam_width": 2, "temperature": 0, "logprobs": 1},
        {"penalty_alpha": 0.6, "temperature": 0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"penalty_alpha": 0.6, "temperature": 0, "top_k": 4, "n": 2},
    ],
    ids=str,
)
def test_contradictions_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SamplingParams(**values)


def test_unknown_names_are_refused_and_the_nearest_is_named() -> None:
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        SamplingParams(temprature=0.5)
    with pytest.raises(RequestError, match="unknown sampling parameter 'xyzzy'"):
        SamplingParams(xyzzy=1)


def test_values_take_one_form() -> None:
    params = SamplingParams(
        stop="x", logprobs="all", temperature=np.float32(0.5), n=np.int64(2), stop_token_ids=[1, 2]
    )
    assert params.stop == ("x",)
    assert params.logprobs == -1
    assert params.stop_token_ids == (1, 2)
    assert type(params.temperature) is float
    assert type(params.n) is int
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert SamplingParams(temperature=-0.0).is_greedy


def test_params_are_frozen_and_copy() -> None:
    params = SamplingParams(seed=2**64 - 1, stop=["a"], logit_bias={3: 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, n=2).n == 2
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]


def test_ids_are_checked_against_the_vocabulary() -> None:
    SamplingParams(logit_bias={99: 1}, stop_token_ids=[99], logprobs=100).check_vocabulary(100)
    for bad in (
        SamplingParams(logit_bias={100: 1}),
        SamplingParams(stop_token_ids=[100]),
        SamplingParams(logprobs=101),
        SamplingParams(prompt_logprobs=101),
    ):
        with pytest.raises(RequestError, match="vocabulary"):
            bad.check_vocabulary(100)
