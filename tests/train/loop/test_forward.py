"""Switches that change speed and memory: the same loss and gradients within rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from optlm.config import OPTConfig
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.loop import forward as module
from optlm.train.loop.device import autocast
from optlm.train.loop.forward import Forward
from optlm.train.loop.loss import head_cross_entropy
from variants import VARIANTS


def model_of(config: OPTConfig, dropout: float = 0.0) -> OPT:
    torch.manual_seed(0)
    return OPT(dataclasses.replace(config, dropout=dropout, init_std=0.02)).train()


def loss_and_gradient(
    model: OPT, forward: Forward | None, precision: str = "f32"
) -> tuple[Tensor, Tensor]:
    """Of 3 rows of 24 tokens; without `forward` by the model's own short way."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (3, 25), generator=random)
    model.zero_grad()
    torch.manual_seed(2)
    with autocast(precision, tokens.device):
        hidden = forward(model, tokens[:, :-1])[0] if forward else model.hidden(tokens[:, :-1])
        loss = head_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())
    (loss * 64).backward()
    gradients = [p.grad.flatten() / 64 for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_by_layer_is_the_model(variant: str) -> None:
    model = model_of(VARIANTS[variant])
    plain = loss_and_gradient(model, None)
    assert all(map(torch.equal, plain, loss_and_gradient(model, Forward())))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_changes_no_bit(variant: str, dropout: float) -> None:
    model = model_of(VARIANTS[variant], dropout)
    plain = loss_and_gradient(model, Forward())
    assert all(map(torch.equal, plain, loss_and_gradient(model, Forward(recompute=True))))


def test_recomputing_keeps_less() -> None:
    model = model_of(VARIANTS["base"])

    def kept(forward: Forward) -> int:
        total = 0

        def pack(saved: Tensor) -> Tensor:
            nonlocal total
            total += saved.numel() if not isinstance(saved, torch.nn.Parameter) else 0
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            forward(model, torch.ones(2, 32, dtype=torch.long))
        return total

    assert kept(Forward(recompute=True)) < 0.25 * kept(Forward())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiling_changes_only_rounding(
    variant: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by torch.compile; its code generator takes long and is left out."""
    compiled = torch.compile(module._run_layer, backend="aot_eager")
    monkeypatch.setattr(module, "_compiled_layer", [compiled])
    model = model_of(VARIANTS[variant])
    plain = loss_and_gradient(model, Forward())
    fused = loss_and_gradient(model, Forward(recompute=recompute, compiled=True))
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-5, atol=0)
    assert float((fused[1] - plain[1]).norm() / plain[1].norm()) < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("f16", 1.5e-2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_precision_is_near(variant: str, precision: str, tolerance: float) -> None:
    model = model_of(VARIANTS[variant])
    plain = loss_and_gradient(model, Forward())
    mixed = loss_and_gradient(model, Forward(), precision)
    assert float((mixed[0] - plain[0]).abs() / plain[0]) < tolerance / 10
    assert 0 < float((mixed[1] - plain[1]).norm() / plain[1].norm()) < tolerance


def test_sizes_between_the_layers() -> None:
    model = model_of(VARIANTS["base"])
    seen = []
    for layer in model.decoder.layers:
        layer.hook_resid_pre.register_forward_hook(lambda _, args, out: seen.append(out))
    model.decoder.layers[-1].hook_resid_post.register_forward_hook(
        lambda _, args, out: seen.append(out)
    )
    _, sizes = Forward()(model, torch.arange(20)[None])
    expected = torch.stack([x.detach().pow(2).mean().sqrt() for x in seen])
    torch.testing.assert_close(torch.stack(sizes), expected)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="'int8'; use one of f32, bf16, f16"):
        autocast("int8", torch.device("cpu"))
