"""The reference model against transformers' OPTForCausalLM, in float32, on every variant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optlm.config import OPTConfig
from optlm.errors import ConfigError, ContextLengthError
from optlm.model import IGNORE, OPT, KVCache, hooked
from variants import VARIANTS, make_state

transformers = pytest.importorskip("transformers")

every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(name: str) -> OPT:
    config = VARIANTS[name]
    model = OPT(config)
    model.load_state_dict(
        {key: torch.from_numpy(value) for key, value in make_state(config).items()}
    )
    return model.eval()


def build_peer(model: OPT) -> torch.nn.Module:
    values = model.config.to_dict() | {"dropout": 0.0}
    peer = transformers.OPTForCausalLM(
        transformers.OPTConfig(**values, attn_implementation="eager")
    )
    result = peer.load_state_dict(model.state_dict(), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(result.missing_keys) <= tied
    assert not result.unexpected_keys
    peer.tie_weights()
    return peer.eval()


def tokens(config: OPTConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(4, config.vocab_size, (batch, length), generator=random)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max() / theirs.abs().max()
    assert worst < 1e-5, f"largest relative difference {worst:.2e}"


@every_variant
def test_state_dict_is_what_the_config_lists(name: str) -> None:
    config = VARIANTS[name]
    state = OPT(config).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == config.parameter_shapes()


@every_variant
@torch.no_grad()
def test_logits(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 3, 17)
    assert_close(model(ids).logits, build_peer(model)(ids).logits)


@every_variant
@torch.no_grad()
def test_full_context(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 1, model.config.max_position_embeddings)
    assert_close(model(ids).logits, build_peer(model)(ids).logits)


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(name: str, side: str) -> None:
    """Padded rows equal transformers and equal the same rows without padding."""
    model = build(name)
    lengths, longest = (4, 11, 7), 11
    ids = torch.full((3, longest), model.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, None) if side == "left" else slice(0, length)
        ids[row, place] = tokens(model.config, 1, length, seed=row)[0]
        mask[row, place] = 1
    ours = model(ids, attention_mask=mask).logits
    theirs = build_peer(model)(ids, attention_mask=mask).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()])
    assert torch.isfinite(ours).all()
    for row, length in enumerate(lengths):
        alone = model(tokens(model.config, 1, length, seed=row)).logits[0]
        assert_close(ours[row][mask[row].bool()], alone)


@every_variant
@torch.no_grad()
def test_position_ids(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 2, 9)
    positions = torch.arange(9).expand(2, 9) + torch.tensor([[5], [30]])
    theirs = build_peer(model)(ids, position_ids=positions).logits
    assert_close(model(ids, position_ids=positions).logits, theirs)


@every_variant
@torch.no_grad()
def test_cache_step_by_step(name: str) -> None:
    """Any cut of the input into calls gives the logits of one call."""
    model = build(name)
    ids = tokens(model.config, 2, 13)
    full = model(ids)
    cache: KVCache | None = None
    pieces = []
    for piece in ids.split([1, 5, 1, 4, 2], dim=1):
        output = model(piece, past=cache)
        cache = output.cache
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), full.logits)
    assert cache is not None
    assert cache.length == 13
    for ours, theirs in zip(cache.keys, full.cache.keys, strict=True):
        assert_close(ours, theirs)


@every_variant
@torch.no_grad()
def test_cache_with_left_padding(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    first = model(ids[:, :8], attention_mask=mask[:, :8])
    rest = model(ids[:, 8:], attention_mask=mask, past=first.cache)
    assert_close(rest.logits, build_peer(model)(ids, attention_mask=mask).logits[:, 8:])


@every_variant
@torch.no_grad()
def test_labels(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 2, 12)
    labels = ids.clone()
    labels[0, :5] = IGNORE
    ours = model(ids, labels=labels).loss
    assert ours is not None
    assert_close(ours, build_peer(model)(ids, labels=labels).loss)


@every_variant
@torch.no_grad()
def test_hidden_states_and_attentions(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 2, 9)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(ids, **wanted), build_peer(model)(ids, **wanted)
    assert (
        len(ours.hidden_states) == len(theirs.hidden_states) == model.config.num_hidden_layers + 1
    )
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert_close(a, b)


@every_variant
@torch.no_grad()
def test_eager_attention_equals_the_fused_one(name: str) -> None:
    """Probabilities that a hook returned are used; those that are only watched change no bit."""
    model = build(name)
    ids = tokens(model.config, 2, 14)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    points = [f"layers.{i}.self_attn.hook_probs" for i in range(model.config.num_hidden_layers)]
    for padding in (None, mask):
        fused = model(ids, attention_mask=padding).logits
        watched = model(ids, attention_mask=padding, output_attentions=True).logits
        with hooked(model, dict.fromkeys(points, torch.clone)):
            eager = model(ids, attention_mask=padding).logits
        assert torch.equal(watched, fused)
        assert_close(eager, fused)


@every_variant
def test_gradients(name: str) -> None:
    model = build(name)
    peer = build_peer(model)
    ids = tokens(model.config, 2, 12)
    model(ids, labels=ids).loss.backward()
    peer(ids, labels=ids).loss.backward()
    theirs = dict(peer.named_parameters())
    for key, weight in model.named_parameters():
        if key != "model.decoder.embed_tokens.weight":  # the peer gives the padding row no gradient
            torch.testing.assert_close(weight.grad, theirs[key].grad, rtol=1e-4, atol=1e-5)


@every_variant
@torch.no_grad()
def test_short_way_for_training(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 2, 12)
    assert_close(model.hidden(ids) @ model.head_weight.T, model(ids).logits)


@every_variant
@torch.no_grad()
def test_every_hook_point_is_reached_and_can_replace(name: str) -> None:
    model = build(name)
    ids = tokens(model.config, 1, 6)
    plain = model(ids).logits
    points = [
        key for key, m in model.decoder.named_modules() if key.split(".")[-1].startswith("hook")
    ]
    seen: dict[str, Tensor] = {}

    def record(key: str) -> object:
        return lambda value: seen.__setitem__(key, value)

    with hooked(model, {key: record(key) for key in points}):
        watched = model(ids).logits
    assert torch.equal(watched, plain)
    assert set(seen) == set(points)
    summed = seen["layers.1.self_attn.hook_probs"].sum(-1)
    assert_close(summed, torch.ones(1, model.config.num_attention_heads, 6))
    for key in points:
        with hooked(model, {key: lambda value: value * 0.5}):
            assert not torch.equal(model(ids).logits, plain), key
    assert torch.equal(model(ids).logits, plain)


def test_unknown_hook_point_names_the_nearest() -> None:
    with (
        pytest.raises(ConfigError, match=r"layers\.0\.hook_attn_out"),
        hooked(build("base"), {"layers.0.hook_atn_out": lambda value: None}),
    ):
        pass


def test_too_long_input_is_refused() -> None:
    model = build("base")
    limit = model.config.max_position_embeddings
    with pytest.raises(ContextLengthError, match=f"{limit + 1} tokens.*{limit}"):
        model(tokens(model.config, 1, limit + 1))


def test_dropout_acts_in_training_only() -> None:
    model = build("base")
    ids = tokens(model.config, 1, 8)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
