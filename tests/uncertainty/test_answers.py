"""Whole answers: samples, meanings, p(true), flags; over every variant."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from optlm import LLM
from optlm.errors import ContextLengthError, RequestError
from optlm.uncertainty.answers import (
    Samples,
    continuation,
    disagreement,
    likelihoods,
    normal,
    sample,
)
from optlm.uncertainty.asking import ask
from optlm.uncertainty.flags import flags
from optlm.uncertainty.judgement import p_true
from optlm.uncertainty.meaning import group, meanings, mutual_shares
from optlm.uncertainty.selective import Rule
from optlm.uncertainty.stored import DataMark, StoredRule
from variants import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_answers(engine: Callable[[str], LLM], name: str) -> None:
    llm = engine(name)
    (answered, other) = ask(llm, ["the cat", "rain and"], samples=3, max_tokens=4, seed=1)
    assert len(answered.samples.texts) == len(answered.meanings.groups) == 3
    assert all(math.isfinite(value) for value in answered.figures.values())
    assert 0 <= answered.figures["p-true"] <= 1
    assert answered.figures != other.figures
    (alone,) = ask(llm, ["the cat"], samples=3, max_tokens=4, seed=1)
    assert alone.figures == answered.figures
    assert alone.samples == answered.samples


def test_a_continuation_is_what_follows_the_prompt(base: LLM) -> None:
    whole = continuation(base, "the cat", " sat on")
    assert base.tokenizer is not None
    assert base.tokenizer.decode(whole.ids[-whole.count :]) == " sat on"
    (ours,) = likelihoods(base, [("the cat", " sat on")])
    (scored,) = base.score([whole.ids])
    assert ours == pytest.approx(sum(scored.logprobs[-whole.count :]))  # type: ignore[arg-type]
    assert continuation(base, "", "the cat").count == len(base.tokenizer.encode("the cat")) - 1
    with pytest.raises(RequestError, match="the continuation is empty"):
        continuation(base, "the", "")
    assert likelihoods(base, []) == []


def test_disagreement_counts_pairs() -> None:
    def of(*texts: str) -> float:
        return disagreement(Samples(texts=list(texts), logprobs=[0.0] * len(texts)))

    assert of("a", "A.", " a ") == 0
    assert of("a", "b", "c") == 1
    assert of("a", "a", "b", "b") == pytest.approx(4 / 6)
    assert normal('  "The  Cat!" ') == "the cat"


def test_fewer_than_two_samples_are_refused(base: LLM) -> None:
    with pytest.raises(RequestError, match="1 samples cannot disagree"):
        sample(base, ["the"], count=1)
    with pytest.raises(RequestError, match="1 samples cannot disagree"):
        Samples(texts=["a"], logprobs=[0.0])
    with pytest.raises(RequestError, match="2 texts and 1 logprobs"):
        Samples(texts=["a", "b"], logprobs=[0.0])


# ---- meanings ------------------------------------------------------------------------------------


class Talker:
    """A model that knows which answers mean the same: they make each other twice as likely.

    Stands in for an engine; `score` reads "question answer [newline question answer]".
    """

    def __init__(self, meaning: dict[str, int]) -> None:
        self._meaning = meaning
        self.adapter: str | None = None

    def gain(self, before: str, after: str) -> float:
        return 2.0 if before == after else 1.5 * (self._meaning[before] == self._meaning[after])


@pytest.fixture
def talker(monkeypatch: pytest.MonkeyPatch) -> Talker:
    made = Talker({"paris": 0, "the city of paris": 0, "rome": 1, "it is rome": 1, "": 2})

    def scores(llm: Talker, asked: list, *, adapter: str | None = None) -> list[float]:
        values = []
        for text, answer in asked:
            parts = text.split("\n")
            before = parts[0].removeprefix("where").strip() if len(parts) == 2 else None
            values.append(-5.0 + (0 if before is None else llm.gain(before, answer.strip())))
        return values

    monkeypatch.setattr("optlm.uncertainty.meaning.likelihoods", scores)
    return made


def test_answers_that_make_each_other_likelier_mean_the_same(talker: Talker) -> None:
    texts = ["paris", "rome", "the city of paris", "paris", "it is rome", ""]
    logprobs = [math.log(p) for p in (0.4, 0.1, 0.1, 0.4, 0.1, 0.05)]
    found = meanings(talker, "where", Samples(texts=texts, logprobs=logprobs))  # type: ignore[arg-type]
    assert found.groups == [0, 1, 0, 0, 1, 2]
    assert found.count == 3
    probs = np.array([0.5, 0.2, 0.05]) / 0.75  # different wordings once each
    assert found.entropy == pytest.approx(-(probs * np.log(probs)).sum())
    counts = np.array([3, 2, 1]) / 6
    assert found.discrete == pytest.approx(-(counts * np.log(counts)).sum())


def test_one_meaning_has_no_entropy_and_a_hard_share_parts_wordings(talker: Talker) -> None:
    samples = Samples(texts=["paris", "the city of paris"], logprobs=[-1.0, -2.0])
    assert meanings(talker, "where", samples).entropy == 0  # type: ignore[arg-type]
    assert meanings(talker, "where", samples, share=0.9).count == 2  # type: ignore[arg-type]


def test_groups_do_not_depend_on_the_order() -> None:
    random = np.random.default_rng(2)
    shares = random.random((8, 8))
    groups = group(shares, 0.7)
    order = random.permutation(8)
    again = group(shares[np.ix_(order, order)], 0.7)
    for i in range(8):
        for j in range(8):
            assert (groups[order[i]] == groups[order[j]]) == (again[i] == again[j])


@pytest.mark.parametrize("name", VARIANTS)
def test_shares_of_a_real_engine(engine: Callable[[str], LLM], name: str) -> None:
    """One entry by hand: gain over the gain of a repetition."""
    llm = engine(name)

    def loglik(prompt: str, answer: str) -> float:
        return likelihoods(llm, [(prompt, answer)])[0]

    shares = mutual_shares(llm, "the cat", ["sat", "home", ""])
    alone = loglik("the cat", " home")
    own = loglik("the cat home\nthe cat", " home") - alone
    other = loglik("the cat sat\nthe cat", " home") - alone
    assert shares[0, 1] == pytest.approx(other / own if own > 0 else 0.0, abs=1e-4)
    assert shares.diagonal().tolist() == [1, 1, 1]
    assert shares[2, :2].tolist() == [0, 0]


def test_a_prompt_too_long_to_ask_twice_is_refused(base: LLM) -> None:
    with pytest.raises(ContextLengthError, match="Shorten the context"):
        meanings(base, "the cat sat " * 11, Samples(texts=["a", "b"], logprobs=[0.0, 0.0]))


# ---- p(true) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_p_true_is_the_ratio_of_two_likelihoods(engine: Callable[[str], LLM], name: str) -> None:
    llm = engine(name)
    (ours,) = p_true(llm, ["the cat"], ["sat"])
    prompt = "the cat\nProposed answer: sat\nThe proposed answer is"
    true, false = (likelihoods(llm, [(prompt, word)])[0] for word in (" true", " false"))
    assert ours == pytest.approx(math.exp(true) / (math.exp(true) + math.exp(false)), abs=1e-5)


def test_p_true_shows_other_answers_and_refuses_bad_input(base: LLM) -> None:
    shown = p_true(base, ["the"], ["cat"], others=[["a"]])
    assert shown != p_true(base, ["the"], ["cat"])
    assert p_true(base, [], []) == []
    with pytest.raises(RequestError, match="the answer is empty"):
        p_true(base, ["the"], [" "])
    with pytest.raises(RequestError, match="1 questions, 0 answers"):
        p_true(base, ["the"], [])


# ---- flags ---------------------------------------------------------------------------------------


def test_flags_say_what_they_rest_on() -> None:
    rule = Rule(
        threshold=0.5, risk=0.1, delta=0.05, accepted=80, errors=3, bound=0.09, proposed_on=25,
        tested=100,
    )  # fmt: skip
    data = DataMark(name="qa.jsonl", sha256="ab" * 32, items=125, of="items")
    stored = StoredRule(
        estimator="entropy", task="answers", settings="10 samples", rule=rule, model={}, data=data
    )
    calm, loud = flags({"entropy": 0.4, "margin": -0.1}, rules=[stored], thresholds={"margin": -1})
    assert (calm.raised, loud.raised) == (False, True)
    for fact in (
        "entropy",
        "0.5",
        "125 items of qa.jsonl",
        "abababababab",
        "0.1",
        "0.95",
        "10 samples",
    ):
        assert fact in calm.basis
    assert "not calibrated" in loud.basis
    with pytest.raises(RequestError, match="did you mean 'entropy'"):
        flags({"entropy": 0.4}, thresholds={"entropi": 1})
