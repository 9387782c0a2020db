"""Students cut from teachers: the same where nothing changes, near where little is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optlm.checkpoint import Checkpoint, open_checkpoint
from optlm.config import OPTConfig
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.distil.narrow import activation_moments, choose_basis, weight_moments
from optlm.train.distil.student import cut_stream, cut_student, kept_layers, why_no_cut
from optlm.train.distil.weights_of import weights_of
from variants import VARIANTS, make_state, write_checkpoint

IDS = torch.randint(4, 290, (4, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    config = VARIANTS[request.param]
    return open_checkpoint(write_checkpoint(tmp_path, config, make_state(config)))


def cut(checkpoint: Checkpoint, moments: Tensor | None = None, **shape: Any) -> OPT:
    """A student whose config differs by `shape`."""
    teacher, weights = checkpoint.config, weights_of(checkpoint)
    config = dataclasses.replace(teacher, **shape)
    stream = cut_stream(teacher, config, moments)
    model = OPT(config)
    model.load_state_dict(cut_student(teacher, config, weights, stream=stream))
    return model.eval()


def teacher_of(checkpoint: Checkpoint) -> OPT:
    return OPT.from_checkpoint(checkpoint.folder)


@torch.no_grad()
def kl(teacher: OPT, student: OPT) -> float:
    log_p, log_q = (m(IDS).logits.log_softmax(-1) for m in (teacher, student))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_student_of_the_same_shape_is_the_teacher(checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        ours, theirs = (m(IDS).logits for m in (cut(checkpoint), teacher_of(checkpoint)))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "change", ["layers", "ffn", "fewer heads", "narrow", "narrow own embedding", "by weights"]
)
def test_cut_student_is_nearer_than_a_fresh_one(checkpoint: Checkpoint, change: str) -> None:
    config, teacher = checkpoint.config, teacher_of(checkpoint)
    moments = None
    shape: dict[str, Any] = {
        "layers": {"num_hidden_layers": config.num_hidden_layers - 1},
        "ffn": {"ffn_dim": config.ffn_dim * 3 // 4},
        "fewer heads": {"num_attention_heads": 1},
    }.get(change, {})
    if not shape:
        width = config.hidden_size - 2 * config.num_attention_heads
        embedding = None if "own" in change else config.embed_dim
        shape = {"hidden_size": width, "word_embed_proj_dim": embedding}
        by_weights = change == "by weights"
        weights = weights_of(checkpoint)
        moments = (
            weight_moments(config, weights) if by_weights else activation_moments(teacher, [IDS])
        )
    student = dataclasses.replace(config, **shape)
    if reason := why_no_cut(config, student, ()):
        assert change == "narrow own embedding"
        assert config.has_projections
        with pytest.raises(ConfigError, match="word_embed_proj_dim"):
            cut(checkpoint, moments, **shape)
        assert "word_embed_proj_dim" in reason
        return
    torch.manual_seed(0)
    assert kl(teacher, cut(checkpoint, moments, **shape)) < kl(teacher, OPT(student).eval())


def planted(config: OPTConfig, tmp_path: Path, rank: int) -> Checkpoint:
    """A teacher that uses `rank` directions of its stream, and 12 of 16 numbers of each head."""
    state = {name: torch.from_numpy(value) for name, value in make_state(config).items()}
    mixed = torch.randn(config.hidden_size, rank, generator=torch.Generator().manual_seed(1))
    directions = torch.linalg.qr(mixed - mixed.mean(0)).Q
    keep = directions @ directions.T
    used = (torch.arange(config.hidden_size) % config.head_dim < 12).float()
    for name, value in state.items():
        if name.endswith(("out_proj.weight", "fc2.weight", "out_proj.bias", "fc2.bias")):
            state[name] = keep @ value
        elif "embed_" in name:
            state[name] = value @ keep
        elif "_proj.weight" in name or "_proj.bias" in name:
            state[name] = used.reshape(-1, *[1] * (value.ndim - 1)) * value
    last = "model.decoder.final_layer_norm."
    if last + "bias" in state:  # what the head gets from it must be a sum of kept directions
        state[last + "bias"] = state[last + "weight"] * (keep @ state[last + "bias"])
    arrays = {name: value.numpy() for name, value in state.items()}
    return open_checkpoint(write_checkpoint(tmp_path, config, arrays))


@pytest.mark.parametrize(
    ("variant", "embedding"),
    [
        ("base", 48),
        ("galactica", 48),
        ("galactica", None),
        ("untied", 48),
        ("untied", None),
        ("no_final_norm", 48),
        ("no_final_norm", None),
    ],
)
@pytest.mark.parametrize("basis", ["activations", "weights"])
def test_narrow_student_is_exact_where_the_teacher_is_narrow_inside(
    variant: str, embedding: int | None, basis: str, tmp_path: Path
) -> None:
    """Norms, biases, heads and both ends are folded right, or this would not come out."""
    config = VARIANTS[variant]
    checkpoint = planted(config, tmp_path, rank=30)
    teacher, weights = teacher_of(checkpoint), weights_of(checkpoint)
    by_weights = basis == "weights"
    moments = weight_moments(config, weights) if by_weights else activation_moments(teacher, [IDS])
    student = cut(checkpoint, moments, hidden_size=42, word_embed_proj_dim=embedding)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, rtol=1e-2, atol=1e-2)


def test_basis_keeps_the_most(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    stream = torch.randn(500, 6, generator=random) @ torch.randn(6, 20, generator=random)
    stream = stream - stream.mean(1, keepdim=True)
    moments = stream.T @ stream
    basis = choose_basis(moments, 7, pick=False)
    torch.testing.assert_close(stream @ basis @ basis.T, stream, rtol=1e-3, atol=1e-3)
    assert float((stream @ basis).sum(1).abs().max()) < 1e-3  # the norm takes nothing off
    picked = choose_basis(moments, 3, pick=True)
    assert picked.sum() == 3
    assert float(moments.diagonal()[picked.sum(1) > 0].min()) >= float(
        moments.diagonal()[picked.sum(1) == 0].max()
    )


def test_wider_heads_are_padded_and_exact(tmp_path: Path) -> None:
    """Heads of the teacher that do nothing are dropped, and the others get their numbers."""
    config = VARIANTS["base"]
    state = make_state(config)
    for name, value in state.items():
        if name.endswith("out_proj.weight"):
            value[:, 16:32] = 0.0  # the middle head of three
            value[:, :16] = 0.0
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, state))
    student, teacher = cut(checkpoint, num_attention_heads=1), teacher_of(checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, rtol=1e-3, atol=1e-3)


def test_layers_are_spread_evenly() -> None:
    assert kept_layers(12, 6) == (0, 2, 4, 7, 9, 11)
    assert kept_layers(12, 12) == tuple(range(12))
    assert kept_layers(5, 1) == (0,)
    assert kept_layers(3, 2) == (0, 2)


def test_given_layers_are_taken(tmp_path: Path) -> None:
    config = VARIANTS["mini"]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, make_state(config)))
    weights = weights_of(checkpoint)
    student = dataclasses.replace(config, num_hidden_layers=2)
    state = cut_student(
        config, student, weights, stream=cut_stream(config, student, None), layers=(2, 1)
    )
    assert torch.equal(
        state["model.decoder.layers.0.fc1.weight"], weights("model.decoder.layers.2.fc1.weight")
    )


@pytest.mark.parametrize(
    ("shape", "layers", "message"),
    [
        ({"hidden_size": 96}, (), "hidden_size is 96, above the teacher's 48"),
        ({"num_hidden_layers": 4}, (), "num_hidden_layers is 4"),
        ({"ffn_dim": 113}, (), "ffn_dim is 113"),
        ({"activation_function": "gelu"}, (), "activation_function is gelu, the teacher's relu"),
        ({"tie_word_embeddings": False}, (), "tie_word_embeddings"),
        ({"num_hidden_layers": 1}, (0, 1), "lists 2 layers, the model has 1"),
        ({}, (0, 2), r"\[0, 2\]; the teacher has 0 to 1"),
        ({"word_embed_proj_dim": 24}, (), "between with and without projections"),
    ],
)
def test_what_cannot_be_cut(
    shape: dict[str, Any], layers: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    config = VARIANTS["base"]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config, make_state(config)))
    if "hidden_size" in shape:
        shape["word_embed_proj_dim"] = 48
    student = dataclasses.replace(config, **shape)
    stream = cut_stream(config, config, None)
    with pytest.raises(ConfigError, match=f"{message}.*'random'"):
        cut_student(config, student, weights_of(checkpoint), stream=stream, layers=layers)
