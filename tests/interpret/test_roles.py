"""Head roles, and the matching of two models' heads."""

from __future__ import annotations

import sys

import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import BackendError, RequestError
from optlm.interpret import align_heads, head_report
from optlm.model import OPT
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)


def permuted(model: OPT, order: list[int]) -> OPT:
    """The same function with the heads of every layer in another order."""
    twin = OPT(model.config).eval()
    twin.load_state_dict(model.state_dict())
    width = model.config.head_dim
    rows = torch.cat([torch.arange(h * width, (h + 1) * width) for h in order])
    with torch.no_grad():
        for layer in twin.decoder.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.copy_(linear.weight[rows])
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[rows])
            out = layer.self_attn.out_proj
            out.weight.copy_(out.weight[:, rows])
    return twin


@every_variant
def test_a_copy_with_permuted_heads_aligns_perfectly(name: str) -> None:
    model = tiny(name)
    heads = model.config.num_attention_heads
    order = [(h + 1) % heads for h in range(heads)]
    texts = [tokens(name, 40)]
    ours, theirs = head_report(model, texts, name="a"), head_report(permuted(model, order), texts)
    found = align_heads(ours, theirs)
    assert len(found.pairs) == heads * model.config.num_hidden_layers
    for pair in found.pairs:
        assert pair.ours.layer == pair.theirs.layer
        assert pair.ours.head == order[pair.theirs.head]
        assert pair.distance < 1e-5
    assert found.same_role_share == 1


def test_models_of_different_sizes() -> None:
    ours = head_report(tiny("base"), [tokens("base")])
    theirs = head_report(tiny("mini"), [tokens("mini")])
    found = align_heads(ours, theirs)
    assert len(found.pairs) == 6
    assert len({(p.theirs.layer, p.theirs.head) for p in found.pairs}) == 6
    assert [p.distance for p in found.pairs] == sorted(p.distance for p in found.pairs)


def test_roles_follow_the_threshold() -> None:
    strict = head_report(tiny("base"), [tokens("base")], threshold=1.0)
    assert {head.role for head in strict.roles} <= {"broad", "other"}
    loose = head_report(tiny("base"), [tokens("base")], threshold=1e-6)
    assert not {head.role for head in loose.roles} & {"broad", "other"}
    for role in {head.role for head in loose.roles}:
        found = loose.with_role(role)
        assert found == sorted(found, key=lambda head: -head.score)
        assert all(h.score == loose.scores[role][h.layer, h.head] for h in found)


@pytest.mark.parametrize("threshold", [0.0, 1.1, float("nan")])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(RequestError, match="threshold is"):
        head_report(tiny("base"), [tokens("base")], threshold=threshold)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    report = head_report(tiny("base"), [tokens("base")])
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(BackendError, match=r"needs scipy.*optlm\[interpret\]"):
        align_heads(report, report)
