"""Ablation, patching and causal tracing: against hooks written by hand, and on planted effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import ConfigError, RequestError
from optlm.interpret import (
    Site,
    ablate,
    logit_difference,
    patch,
    run_with_cache,
    run_with_hooks,
    sweep_ablation,
    sweep_patching,
    trace_fact,
)
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)
HEADS = "layers.1.self_attn.hook_heads"


def loss(logits: np.ndarray, ids: list[int]) -> float:
    chosen = torch.from_numpy(logits)[:-1].double().log_softmax(-1)
    return -float(chosen[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean())


@every_variant
def test_three_ways_to_ablate(name: str) -> None:
    model, ids = tiny(name), tokens(name)
    reference = [tokens(name, 14, seed=5), tokens(name, 6, seed=6)]
    site = Site(point=HEADS, head=1)
    values = [run_with_cache(model, text, HEADS)[HEADS] for text in reference]
    new = {
        "zero": np.zeros(model.config.head_dim, np.float32),
        "mean": np.concatenate(values)[:, 1].mean(0),
        "resample": values[0][:11, 1],
    }
    for how, value in new.items():

        def put(heads: torch.Tensor, value: np.ndarray = value) -> torch.Tensor:
            heads = heads.clone()
            heads[0, :, 1] = torch.from_numpy(value)
            return heads

        found = ablate(model, ids, [site], how, reference=reference)
        np.testing.assert_allclose(found, run_with_hooks(model, ids, {HEADS: put}), atol=1e-5)


@pytest.mark.parametrize(
    ("site", "index"),
    [
        (Site(point="layers.0.self_attn.hook_q", head=2, position=4), (0, 2, 4)),
        (Site(point="layers.0.self_attn.hook_probs", head=0), (0, 0)),
        (Site(point="layers.1.hook_ffn_act", unit=7, position=3), (0, 3, 7)),
        (Site(point="layers.1.hook_resid_pre", position=10), (0, 10)),
        (Site(point="hook_final"), ()),
    ],
)
def test_sites_name_what_they_say(site: Site, index: tuple[int, ...]) -> None:
    model, ids = tiny("base"), tokens("base")

    def clear(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[index] = 0
        return value

    wanted = run_with_hooks(model, ids, {site.point: clear})
    np.testing.assert_allclose(ablate(model, ids, [site]), wanted, atol=1e-6)


@every_variant
def test_sweeps_of_ablation(name: str) -> None:
    model, texts = tiny(name), [tokens(name, 11), tokens(name, 7, seed=3)]
    grown = sweep_ablation(model, texts)
    assert grown.shape == (model.config.num_hidden_layers, model.config.num_attention_heads)
    site = Site(point=HEADS, head=1)
    wanted = 0.0
    for ids in texts:
        plain = run_with_cache(model, ids, "hook_final").logits
        wanted += (loss(ablate(model, ids, [site]), ids) - loss(plain, ids)) * (len(ids) - 1)
    assert grown[1, 1] == pytest.approx(wanted / 16, abs=1e-5)
    for kind in ("attention", "ffn"):
        assert sweep_ablation(model, texts, kind).shape == (model.config.num_hidden_layers, 1)


@every_variant
def test_patching_everything_restores_everything(name: str) -> None:
    model = tiny(name)
    clean, corrupted = tokens(name, seed=1), tokens(name, seed=2)
    plain = run_with_cache(model, clean, "hook_final").logits
    last = model.config.num_hidden_layers - 1
    whole = patch(model, clean, corrupted, [Site(point=f"layers.{last}.hook_resid_post")])
    np.testing.assert_allclose(whole, plain, atol=1e-5)
    metric = logit_difference(7, 9)
    swept = sweep_patching(model, clean, corrupted, metric, "hook_resid_post")
    assert swept.shape == (last + 1, len(clean))
    assert swept[last, -1] == pytest.approx(1, abs=1e-4)  # the last state decides
    np.testing.assert_allclose(swept[last, :-1], 0, atol=1e-4)
    one = patch(model, clean, corrupted, [Site(point="layers.0.hook_resid_post", position=4)])
    base, best = (run_with_cache(model, t, "hook_final").logits for t in (corrupted, clean))
    share = [float(x[-1, 7] - x[-1, 9]) for x in (one, base, best)]
    assert swept[0, 4] == pytest.approx((share[0] - share[1]) / (share[2] - share[1]), abs=1e-3)
    heads = sweep_patching(model, clean, corrupted, metric, "self_attn.hook_heads")
    assert heads.shape == (last + 1, model.config.num_attention_heads)


@every_variant
def test_a_fact_is_traced(name: str) -> None:
    model, ids = tiny(name), tokens(name)
    found = trace_fact(model, ids, (2, 5), samples=4, seed=1)
    probabilities = torch.from_numpy(run_with_cache(model, ids, "hook_final").logits[-1]).softmax(
        -1
    )
    assert found.answer == int(probabilities.argmax())
    assert found.clean == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert found.restored.shape == (model.config.num_hidden_layers, len(ids))
    # Before the subject nothing changed; after the last layer only the last state counts.
    np.testing.assert_allclose(found.effects[:, :2], 0, atol=1e-6)
    np.testing.assert_allclose(found.effects[-1, :-1], 0, atol=1e-6)
    assert found.restored[-1, -1] == pytest.approx(found.clean, rel=1e-4)
    assert found.corrupted != pytest.approx(found.clean, rel=1e-3)
    again = trace_fact(model, ids, (2, 5), samples=4, seed=1)
    assert np.array_equal(again.restored, found.restored)


@every_variant
def test_tracing_blocks_in_windows(name: str) -> None:
    model, ids = tiny(name), tokens(name)
    for part in ("attention", "ffn"):
        found = trace_fact(model, ids, (2, 5), part=part, window=2, samples=2, answer=9)
        assert found.restored.shape == (model.config.num_hidden_layers, len(ids))
        assert found.answer == 9


@pytest.mark.parametrize(
    ("site", "kind", "message"),
    [
        (Site(point="layers.0.hook_ffn_acts"), ConfigError, "did you mean 'layers.0.hook_ffn_act'"),
        (Site(point="hook_resid_pre"), RequestError, "full name of one point"),
        (Site(point=HEADS, head=3), RequestError, "no head 3; the model has heads 0 to 2"),
        (Site(point="hook_final", head=0), RequestError, "hook_final has no heads"),
        (Site(point=HEADS, position=11), RequestError, "no position 11; the text has 11 tokens"),
        (Site(point="layers.0.hook_ffn_act", unit=112), RequestError, "units 0 to 111"),
        (Site(point="hook_final", unit=0), RequestError, "hook_final has no units"),
    ],
)
def test_sites_that_are_not_there(site: Site, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        ablate(tiny("base"), tokens("base"), [site])
    with pytest.raises(kind, match=message):
        patch(tiny("base"), tokens("base"), tokens("base", seed=1), [site])


def test_references_that_do_not_serve() -> None:
    model, ids, site = tiny("base"), tokens("base"), Site(point=HEADS, head=0)
    for how, reference, message in (
        ("mean", [], "mean ablation needs reference texts"),
        ("resample", [tokens("base", 6)], "has 6 tokens; resampling needs 11"),
        ("median", [ids], "how is 'median'; it must be zero, mean or resample"),
    ):
        with pytest.raises(RequestError, match=message):
            ablate(model, ids, [site], how, reference=reference)
    with pytest.raises(RequestError, match="have no mean"):
        ablate(model, ids, [Site(point="layers.0.self_attn.hook_probs")], "mean", reference=[ids])


def test_sweeps_that_make_no_sense() -> None:
    model, ids = tiny("base"), tokens("base")
    metric = logit_difference(7, 9)
    with pytest.raises(RequestError, match="has 11 tokens and the corrupted one 10"):
        sweep_patching(model, ids, ids[:-1], metric)
    with pytest.raises(RequestError, match="nothing can be brought back"):
        sweep_patching(model, ids, ids, metric)
    with pytest.raises(RequestError, match="not one point of each layer"):
        sweep_patching(model, ids, tokens("base", seed=1), metric, "hook_final")
    with pytest.raises(RequestError, match="no kind of sites 'head'"):
        sweep_ablation(model, [ids], "head")
    with pytest.raises(RequestError, match="at least two tokens"):
        sweep_ablation(model, [])


@pytest.mark.parametrize(
    ("subject", "wrong", "message"),
    [
        ((3, 3), {}, r"subject \(3, 3\) does not lie in the 11 tokens"),
        ((3, 12), {}, "does not lie"),
        ((1, 2), {"part": "mlp"}, "no part 'mlp'; there are state, attention, ffn"),
        ((1, 2), {"samples": 0}, r"samples \(0\)"),
        ((1, 2), {"strength": float("nan")}, r"strength \(nan\)"),
        ((1, 2), {"answer": 300}, r"token id 300 is not in 0\.\.299"),
    ],
)
def test_traces_that_make_no_sense(
    subject: tuple[int, int], wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        trace_fact(tiny("base"), tokens("base"), subject, **wrong)
