"""Attributions through captum: complete where they promise it, refused where they are not."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import BackendError, RequestError
from optlm.interpret import attribute_tokens
from optlm.interpret.attribution import BASELINES, METHODS
from optlm.model import hooked
from variants import VARIANTS

captum = pytest.importorskip("captum")
every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
@pytest.mark.parametrize("method", METHODS)
def test_methods(name: str, method: str) -> None:
    model, ids = tiny(name), tokens(name, 6)
    steps = 400 if method == "integrated_gradients" else 4
    found = attribute_tokens(model, ids, method=method, steps=steps, tolerance=0.1)
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert found.target == int(logprobs.argmax())
    assert found.values.shape == (6,)
    assert found.values[0] == pytest.approx(0, abs=1e-6)  # the start token stands in the baseline
    assert found.delta == pytest.approx(float(found.values.sum()) - found.explained, abs=1e-5)
    assert found.complete == METHODS[method]
    if method == "shapley":
        assert abs(found.delta) < 1e-4
    assert all(weight.grad is None for weight in model.parameters())


@every_variant
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_are_what_they_say(name: str, baseline: str) -> None:
    """What is explained is the way from a text whose other tokens have the baseline's embedding."""
    model, ids = tiny(name), tokens(name, 5)
    found = attribute_tokens(model, ids, method="occlusion", baseline=baseline)
    table = model.decoder.embed_tokens.weight
    absent = {"mean": table.mean(0), "zero": 0 * table[0], "end": table[2]}[baseline]
    inputs = absent.expand(1, 5, -1).clone()
    inputs[0, 0] = table[ids[0]]
    if model.decoder.project_in is not None:
        inputs = model.decoder.project_in(inputs)

    def logprob() -> float:
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[found.target])

    whole = logprob()
    with hooked(model, {"hook_embed": lambda _: inputs}):
        assert found.explained == pytest.approx(whole - logprob(), abs=1e-4)
    assert found.baseline == baseline


def test_shapley_of_two_tokens_is_the_mean_of_both_orders() -> None:
    """With two tokens at stake occlusion tells one order; Shapley's values lie between orders."""
    model, ids = tiny("base"), tokens("base", 3)
    found = attribute_tokens(model, ids, method="shapley", steps=60)
    occluded = attribute_tokens(model, ids, method="occlusion")
    alone = found.explained - occluded.values[[0, 2, 1]]  # what each adds to the bare baseline
    low, high = (f(alone, occluded.values) for f in (np.minimum, np.maximum))
    assert (found.values[1:] >= low[1:] - 1e-4).all()
    assert (found.values[1:] <= high[1:] + 1e-4).all()


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(RequestError, match=r"misses completeness by .*; raise steps above 1"):
        attribute_tokens(tiny("base"), tokens("base"), steps=1, tolerance=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "gradcam"}, "no method 'gradcam'; there are integrated_gradients"),
        ({"baseline": "eos"}, "no baseline 'eos'; there are mean, zero, end"),
        ({"steps": 0}, r"steps \(0\)"),
        ({"tolerance": float("nan")}, r"tolerance \(nan\)"),
        ({"target": 300}, r"token id 300 is not in 0\.\.299"),
    ],
)
def test_questions_that_make_no_sense(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        attribute_tokens(tiny("base"), tokens("base"), **wrong)


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(BackendError, match=r"need captum.*optlm\[interpret\]"):
        attribute_tokens(tiny("base"), tokens("base"))
