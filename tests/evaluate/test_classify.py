"""Choosing among labels: methods, ensembles, packing, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optlm import LLM
from optlm.errors import ContextLengthError, RequestError
from optlm.evaluate.classify import Classifier, classify
from optlm.evaluate.labels import Example, Template, verbalized
from optlm.evaluate.prompt_report import prompt_report
from optlm.score import Scorer
from variants import VARIANTS

SHOTS = [Example(text=f"{w} one", label=w) for w in ("good", "bad")] * 3
ITEMS = [Example(text=f"a {w} day {i}", label=w) for i in range(6) for w in ("good", "bad")]


class Planted:
    """Likes a label that its text names, by 2 nats, and has the biases it is told."""

    def __init__(self, *, context: int = 10_000, recency: float = 0.0, **favour: float) -> None:
        self.context = context
        self.favour = favour
        self.recency = recency
        self.asked: list[str] = []

    def count(self, text: str) -> int:
        return 1 + len(text)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        self.asked += [prompt for prompt, _ in pairs]
        return [(self._nats(prompt, label.strip()), len(label)) for prompt, label in pairs]

    def _nats(self, prompt: str, label: str) -> float:
        *shots, query = prompt.split("\n\n")
        last = shots[-1].rsplit(" ", 1)[1] if shots else ""
        return (
            -5 + 2 * (label in query) + self.favour.get(label, 0) + self.recency * (label == last)
        )


@pytest.mark.parametrize("method", ["calibrated", "pmi"])
def test_a_planted_preference_is_undone(method: Any) -> None:
    model = Planted(bad=3.0)
    assert {a.label for a in Classifier(model, ["good", "bad"])(["a good day", "a bad day"])} == {
        "bad"
    }
    found = Classifier(model, ["good", "bad"], method=method, shots=SHOTS)(["a good day", "bad!"])
    assert [answer.label for answer in found] == ["good", "bad"]
    assert found[0].probabilities["good"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_mean_is_a_token() -> None:
    (answer,) = Classifier(Planted(), ["good", "very very bad"], method="mean")(["x"])
    assert answer.probabilities["good"] < 0.5  # -5 over 5 "tokens" against -5 over 14


def test_the_engine_gives_the_scores_of_the_labels(base: LLM) -> None:
    labels = {"yes": " sat on the mat", "no": " in the rain and then home"}
    template = Template(prompt="{text} :")
    (answer,) = classify("the cat", labels, llm=base, templates=template)
    totals = [s.total for s in Scorer(base).continuations("the cat :", list(labels.values()))]
    wanted = 1 / (1 + math.exp(totals[1] - totals[0]))
    assert answer.probabilities["yes"] == pytest.approx(wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_method(variant: str, folders: dict[str, Path]) -> None:
    llm = LLM(str(folders[variant]), dtype="f32")
    for method in ("plain", "mean", "calibrated", "pmi"):
        (answer,) = classify(
            "the cat", ["good", "rather bad"], llm=llm, shots=[SHOTS[0]], method=method
        )  # type: ignore[call-overload]
        assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_ensembles_average_their_members() -> None:
    templates = [Template(), Template(prompt="text: {text}\nkind:")]
    classifier = Classifier(
        Planted(recency=1.0), ["good", "bad"], templates=templates, shots=SHOTS[:2], orders=5
    )
    (answer,) = classifier(["a day"])
    assert len(answer.members) == 4  # two shots have two orders
    assert answer.probabilities["good"] == pytest.approx(0.5)  # each label is last in half of them
    assert answer.agreement == 0.5
    again = classifier(["a day"])
    assert again == [answer]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(30, 400),
    st.lists(st.text("ab ", max_size=40), max_size=8),
    st.text("cd ", max_size=59).map("c".__add__),
)
def test_packing_never_cuts(context: int, texts: list[str], query: str) -> None:
    """The prompt fits, its query is whole, its shots are the last ones, and one more would not."""
    model = Planted(context=context)
    shots = [Example(text=text, label="good") for text in texts]
    classifier = Classifier(model, ["good", "bad"], shots=shots)
    template = Template()
    try:
        (answer,) = classifier([query])
    except ContextLengthError:
        assert model.count(template.query(query) + " good") > context
        return
    prompt = model.asked[0]
    kept = answer.num_shots
    shown = [template.query(text) + " good" for text in texts]
    assert prompt == "\n\n".join([*shown[len(shown) - kept :], template.query(query)])
    assert model.count(prompt + " good") <= context
    if kept < len(shown):
        longer = "\n\n".join([*shown[len(shown) - kept - 1 :], template.query(query)])
        assert model.count(longer + " good") > context


def test_a_query_alone_over_the_context_is_told() -> None:
    with pytest.raises(ContextLengthError, match=r"'xxx.* takes 72 tokens .* holds 50"):
        Classifier(Planted(context=50), ["good", "bad"])(["x" * 59])


def test_empty_texts_are_told(base: LLM) -> None:
    for texts in (["the cat", ""], ["the cat", " \n"]):
        with pytest.raises(RequestError, match="text 1 is empty; there is nothing to classify"):
            classify(texts, ["good", "bad"], llm=base, method="calibrated")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["good"], "at least two labels"),
        (["good", ""], "label '' is empty"),
        ({"a": " x", "b": " "}, "label 'b' is empty"),
        (["good", "good"], "given twice"),
        (["good", "good enough"], r"'good' begins the label 'good enough'.*terminator"),
        ("good,bad", "not the text"),
    ],
)
def test_labels_that_cannot_be_compared(labels: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        verbalized(labels)


def test_a_terminator_tells_labels_apart(base: LLM) -> None:
    labels = verbalized(["good", "good enough"], "\n")
    assert labels == {"good": " good\n", "good enough": " good enough\n"}
    assert classify("a", ["good", "good enough"], llm=base, terminator="\n")[0].label in labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method is 'magic'; use one of plain, mean, calibrated, pmi"),
        ({"orders": 0}, "orders is 0"),
        ({"templates": []}, "templates is empty"),
        ({"shots": [Example(text="x", label="ugly")]}, "label 'ugly'; labels: good, bad"),
        ({"method": "calibrated", "content_free": ()}, "content_free is empty"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Classifier(Planted(), ["good", "bad"], **options)


def test_templates_are_checked() -> None:
    with pytest.raises(RequestError, match="one place for the text"):
        Template(prompt="no place")
    with pytest.raises(RequestError, match="ends in white space"):
        Template(prompt="{text}\nLabel: ")


def test_a_recency_bias_is_exposed() -> None:
    honest = prompt_report(Planted(), ["good", "bad"], ITEMS, pool=SHOTS)
    assert honest.recency == 0
    assert honest.orders.deviation == 0
    assert honest.orders.mean == 1
    biased = prompt_report(Planted(recency=5.0), ["good", "bad"], ITEMS, pool=SHOTS)
    assert biased.recency == 1  # whatever comes last is said
    assert biased.orders.mean == 0.5
    lopsided = prompt_report(Planted(bad=4.0), ["good", "bad"], ITEMS, pool=SHOTS)
    assert lopsided.predicted["bad"] == 1
    assert lopsided.gold["bad"] == 0.5
    assert lopsided.label_bias["bad"] == pytest.approx(1 / (1 + math.exp(-4)))
    assert "recency bias" in str(biased)


def test_the_influence_of_a_shot_is_what_leaving_it_out_changes() -> None:
    class Helped(Planted):
        """Knows the answer only while it sees the text "key"."""

        def _nats(self, prompt: str, label: str) -> float:
            return super()._nats(prompt, label) if "key" in prompt else -5.0

    pool = [Example(text="key", label="good"), Example(text="other", label="bad")]
    found = prompt_report(Helped(), ["good", "bad"], ITEMS, pool=pool, num_shots=2, seeds=1)
    influence = {shot.text: value for shot, value in found.influence}
    assert influence["other"] == pytest.approx(0)
    assert influence["key"] == pytest.approx(math.log(2 / (1 + math.exp(-2))))


def test_spreads_cover_draws_and_templates(base: LLM) -> None:
    templates = [Template(), Template(prompt="{text} is"), Template(prompt="say of {text}:")]
    pool = [Example(text=f"{w} thing {i}", label=w) for i in range(3) for w in ("good", "bad")]
    found = prompt_report(
        base, ["good", "bad"], ITEMS[:2], pool=pool, num_shots=2, templates=templates, orders=3,
        seeds=2,
    )  # fmt: skip
    counts = [len(s.accuracies) for s in (found.orders, found.seeds, found.templates)]
    assert counts == [3, 2, 3]
    assert found.told()["num_texts"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": []}, "no items"),
        ({"num_shots": 9}, "num_shots is 9; the pool has 6"),
        ({"pool": ITEMS}, "among the items and in the pool"),
        ({"orders": 0}, "orders is 0"),
        ({"items": [Example(text="x", label="ugly")]}, "label 'ugly'"),
    ],
)
def test_reports_that_cannot_be_made(options: dict[str, Any], message: str) -> None:
    arguments = {"items": ITEMS, "pool": SHOTS, "num_shots": 2} | options
    with pytest.raises(RequestError, match=message):
        prompt_report(Planted(), ["good", "bad"], **arguments)
