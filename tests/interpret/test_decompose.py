"""Parts of a logit sum to it on every variant, and each part is what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import RequestError
from optlm.interpret import decompose_logit, direct_attribution, run_with_cache, run_with_hooks
from optlm.model import OPT
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
@pytest.mark.parametrize("position", [0, 4, -1])
def test_parts_sum_to_the_logit(name: str, position: int) -> None:
    model, ids = tiny(name), tokens(name)
    logits = run_with_cache(model, ids, "hook_final").logits[position]
    found = decompose_logit(model, ids, position=position)
    assert logits[found.token] > logits.max() - 1e-5
    assert found.logit == pytest.approx(float(logits.max()), rel=1e-5)
    assert abs(found.gap) < 1e-4
    other = decompose_logit(model, ids, position=position, token=7, against=9)
    assert other.logit == pytest.approx(float(logits[7] - logits[9]), abs=1e-5)
    assert abs(other.gap) < 1e-4
    assert other.position == position % len(ids)


@every_variant
def test_parts_are_what_they_say(name: str) -> None:
    """With scales frozen the model is linear in each part: taking it away takes its value away."""
    model, ids = tiny(name), tokens(name)
    found = decompose_logit(model, ids, token=7)
    last = model.config.num_hidden_layers - 1
    frozen = frozen_twin(model, ids)

    def without(point: str, index: tuple[int, ...]) -> float:
        def remove(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[(0, -1, *index)] = 0
            return value

        return float(run_with_hooks(frozen, ids, {point: remove})[-1, 7])

    whole = float(run_with_hooks(frozen, ids, {})[-1, 7])
    assert whole == pytest.approx(found.logit, abs=1e-4)
    unit = int(np.abs(found.units[last]).argmax())
    taken = whole - without(f"layers.{last}.hook_ffn_act", (unit,))
    assert taken == pytest.approx(found.units[last, unit], abs=1e-4)
    for head in range(model.config.num_attention_heads):
        through = found.heads[last, head]
        taken = whole - without_through_ffn(frozen, ids, last, head)
        assert taken == pytest.approx(through, abs=1e-4)


class FrozenNorm(torch.nn.Module):
    """A layer norm whose scale is that of another pass."""

    def __init__(self, norm: torch.nn.LayerNorm, x: torch.Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.scale = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).rsqrt()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - x.mean(dim=-1, keepdim=True)) * self.scale
        return x * self.norm.weight + self.norm.bias if self.norm.elementwise_affine else x


@torch.no_grad()
def frozen_twin(model: OPT, ids: list[int]) -> OPT:
    """The model with every norm's scale as it is on `ids`."""
    twin = OPT(model.config).eval()
    twin.load_state_dict(model.state_dict())
    read: dict[str, torch.Tensor] = {}
    norms = {n: m for n, m in twin.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    handles = [
        m.register_forward_hook(lambda _m, args, _o, n=n: read.__setitem__(n, args[0]))
        for n, m in norms.items()
    ]
    twin(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for name, norm in norms.items():
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, FrozenNorm(norm, read[name]))
    return twin


def without_through_ffn(model: OPT, ids: list[int], layer: int, head: int) -> float:
    """The logit without a head, the units of its layer held at their values: the direct path."""
    units = run_with_cache(model, ids, f"layers.{layer}.hook_ffn_act")
    held = torch.from_numpy(units[f"layers.{layer}.hook_ffn_act"])[None]

    def remove(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[0, -1, head] = 0
        return value

    hooks = {
        f"layers.{layer}.self_attn.hook_heads": remove,
        f"layers.{layer}.hook_ffn_act": lambda _: held,
    }
    return float(run_with_hooks(model, ids, hooks)[-1, 7])


@every_variant
def test_largest_parts_are_named(name: str) -> None:
    found = decompose_logit(tiny(name), tokens(name), token=7)
    everything = found.largest(10**6)
    assert sum(part.value for part in everything) == pytest.approx(found.total, abs=1e-6)
    assert found.largest(3) == everything[:3]
    sizes = [abs(part.value) for part in everything]
    assert sizes == sorted(sizes, reverse=True)
    assert {"layers.0.head.1", "layers.0.ffn_bias"} <= {part.name for part in everything}
    assert any(".norm_bias." in part.name for part in everything) == (name == "350m")


@every_variant
def test_direct_attribution_is_the_decomposition_at_every_position(name: str) -> None:
    model, ids = tiny(name), tokens(name)
    found = direct_attribution(model, ids)
    assert found.gap < 1e-4
    logits = run_with_cache(model, ids, "hook_final").logits
    rows = np.arange(len(ids) - 1)
    own = logits[rows, ids[1:]] - logits[:-1].mean(1)
    np.testing.assert_allclose(found.logits, own, atol=1e-5)
    one = decompose_logit(model, ids, token=ids[6], against=8, position=5)
    two = decompose_logit(model, ids, token=ids[4], against=8, position=5)
    gained = one.heads - two.heads  # what the vocabulary's mean adds drops out
    other = direct_attribution(model, [*ids[:6], ids[4]])
    np.testing.assert_allclose(found.heads[5] - other.heads[5], gained, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"token": 300}, r"token id 300 is not in 0\.\.299"),
        ({"token": -1}, "token id -1"),
        ({"against": 1.5}, r"token id 1\.5"),
        ({"position": 11}, "no position 11; the text has 11 tokens"),
        ({"position": -12}, "no position -12"),
        ({"position": 1.0}, "must be a whole number"),
    ],
)
def test_questions_that_make_no_sense(wanted: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decompose_logit(tiny("base"), tokens("base"), **wanted)


def test_one_token_has_no_next() -> None:
    with pytest.raises(RequestError, match="give at least two"):
        direct_attribution(tiny("base"), [2])
