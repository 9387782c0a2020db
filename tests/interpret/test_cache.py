"""Cached and hooked passes against the plain one: the same bits when hooks do nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import CheckpointError, ConfigError, ContextLengthError, RequestError
from optlm.interpret import hook_names, run_with_cache, run_with_hooks
from optlm.model import OPT, hooked
from variants import VARIANTS

transformers = pytest.importorskip("transformers")
every_variant = pytest.mark.parametrize("name", VARIANTS)


def plain(name: str, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return tiny(name)(torch.tensor([ids])).logits[0].numpy()


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@every_variant
@pytest.mark.parametrize("length", [1, 11, 64])
def test_cached_and_hooked_passes_have_the_bits_of_the_plain_one(name: str, length: int) -> None:
    """All points are watched, attention probabilities among them; the fused kernel still mixes."""
    ids = tokens(name, length)
    wanted = plain(name, ids)
    assert np.array_equal(run_with_cache(tiny(name), ids).logits, wanted)
    for nothing in (lambda value: None, lambda value: value):
        assert np.array_equal(run_with_hooks(tiny(name), ids, {"*": nothing}), wanted)
    assert np.array_equal(plain(name, ids), wanted)


@every_variant
def test_replaced_probabilities_go_through_plain_products(name: str) -> None:
    """A clone makes the model mix values with the matrix itself: the fused kernel's twin."""
    ids = tokens(name)
    slow = run_with_hooks(tiny(name), ids, {"self_attn.hook_probs": torch.clone})
    assert worst(slow, plain(name, ids)) < 1e-5
    uniform = {"self_attn.hook_probs": lambda probs: torch.full_like(probs, 0.1)}
    assert worst(run_with_hooks(tiny(name), ids, uniform), plain(name, ids)) > 1e-3


@every_variant
def test_cache_equals_transformers(name: str) -> None:
    model, ids = tiny(name), tokens(name)
    peer = peer_of(model)
    with torch.no_grad():
        theirs = peer(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    cache = run_with_cache(model, ids)
    assert worst(cache.logits, theirs.logits[0].numpy()) < 1e-5
    before = cache.stack("hook_resid_pre")
    for i in range(model.config.num_hidden_layers):
        assert worst(before[i], theirs.hidden_states[i][0].numpy()) < 1e-5
        ours = cache[f"layers.{i}.self_attn.hook_probs"]
        assert worst(ours, theirs.attentions[i][0].numpy()) < 1e-5
    assert worst(cache["hook_final"], theirs.hidden_states[-1][0].numpy()) < 1e-5


def peer_of(model: OPT) -> torch.nn.Module:
    values = model.config.to_dict() | {"dropout": 0.0}
    config = transformers.OPTConfig(**values, attn_implementation="eager")
    peer = transformers.OPTForCausalLM(config)
    peer.load_state_dict(model.state_dict(), strict=False)
    peer.tie_weights()
    return peer.eval()


@every_variant
def test_parts_of_the_cache_fit_together(name: str) -> None:
    model = tiny(name)
    cache = run_with_cache(model, tokens(name))
    assert tuple(cache.values) == hook_names(model.config)
    embedded = cache["hook_embed"] + cache["hook_pos_embed"]
    assert np.array_equal(embedded, cache["layers.0.hook_resid_pre"])
    post = cache.stack("hook_resid_post")
    assert np.array_equal(post[:-1], cache.stack("hook_resid_pre")[1:])
    if model.config.do_layer_norm_before:
        mid = cache.stack("hook_resid_pre") + cache.stack("hook_attn_out")
        assert np.array_equal(mid, cache.stack("hook_resid_mid"))
        assert np.array_equal(mid + cache.stack("hook_ffn_out"), post)
    else:
        assert np.array_equal(cache.stack("hook_resid_mid"), cache.stack("hook_ffn_in"))
        assert np.array_equal(cache.stack("hook_resid_pre"), cache.stack("self_attn.hook_in"))


@every_variant
def test_a_hook_that_replaces_is_obeyed(name: str) -> None:
    ids = tokens(name)
    wanted = plain(name, ids)
    for point in hook_names(VARIANTS[name]):
        changed = run_with_hooks(tiny(name), ids, {point: lambda value: value * 0.5})
        assert not np.array_equal(changed, wanted), point


def test_hooks_on_one_point_act_in_the_order_given() -> None:
    ids = tokens("base")
    doubled = {"hook_final": lambda v: v + 1, "hook_fin*": lambda v: v * 2}
    turned = {"hook_fin*": lambda v: v * 2, "hook_final": lambda v: v + 1}
    final = run_with_cache(tiny("base"), ids, "hook_final")["hook_final"]
    head = tiny("base").head_weight.detach().numpy()
    for hooks, state in ((doubled, (final + 1) * 2), (turned, final * 2 + 1)):
        assert worst(run_with_hooks(tiny("base"), ids, hooks), state @ head.T) < 1e-5


def test_hooks_are_gone_after_an_error() -> None:
    model, ids = tiny("base"), tokens("base")

    def fail(value: torch.Tensor) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run_with_hooks(model, ids, {"hook_final": fail})
    with hooked(model, {}):
        assert not any(m._forward_hooks for m in model.modules())


def test_only_what_was_chosen_is_kept() -> None:
    cache = run_with_cache(tiny("base"), tokens("base"), "hook_resid_mid")
    assert list(cache.values) == ["layers.0.hook_resid_mid", "layers.1.hook_resid_mid"]
    with pytest.raises(
        ConfigError, match=r"'layers\.1\.hook_resid_post' is not in this cache; did you"
    ):
        _ = cache["layers.1.hook_resid_post"]
    with pytest.raises(ConfigError, match="no layer's 'hook_ffn_act' is in this cache"):
        cache.stack("hook_ffn_act")


def test_bfloat16_becomes_float32() -> None:
    model = OPT(VARIANTS["base"]).to(torch.bfloat16).eval()
    cache = run_with_cache(model, tokens("base"), "hook_final")
    assert cache["hook_final"].dtype == cache.logits.dtype == np.float32


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        ([], RequestError, "no tokens"),
        ([2, 300], RequestError, r"300 is not in 0\.\.299"),
        ([2] * 65, ContextLengthError, "65 tokens; the context is 64"),
    ],
)
def test_tokens_that_make_no_sense(ids: list[int], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        run_with_cache(tiny("base"), ids)
    with pytest.raises(kind, match=message):
        run_with_hooks(tiny("base"), ids, {})


@every_variant
def test_weights_with_nan_are_named(name: str) -> None:
    model = OPT(VARIANTS[name]).eval()
    with torch.no_grad():
        model.decoder.layers[1].fc2.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinity: model\.decoder\.layers\.1\.fc2\."):
        run_with_cache(model, tokens(name))


def test_overflow_of_finite_weights_is_told() -> None:
    model = OPT(VARIANTS["no_final_norm"]).eval()
    with torch.no_grad():
        model.decoder.embed_tokens.weight.fill_(1e30)
    with pytest.raises(CheckpointError, match="overflows although all weights are finite"):
        run_with_cache(model, tokens("base"))
