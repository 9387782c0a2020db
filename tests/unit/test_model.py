"""The reference model on its own; its numbers are checked in parity/test_model_parity.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from optlm.errors import CheckpointError, ContextLengthError, RequestError
from optlm.model import OPT, OPTOutput
from variants import VARIANTS, make_state, write_checkpoint

every_variant = pytest.mark.parametrize("name", VARIANTS)
IDS = torch.tensor([[2, 40, 50, 60], [2, 70, 80, 90]])


def fresh(name: str, **changes: Any) -> OPT:
    torch.manual_seed(0)
    return OPT(dataclasses.replace(VARIANTS[name], **changes))


@every_variant
@pytest.mark.parametrize(
    ("stored", "dtype"), [("f32", None), ("f16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_loads_a_checkpoint_folder(
    name: str, stored: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    config = VARIANTS[name]
    state = make_state(config)
    model = OPT.from_checkpoint(write_checkpoint(tmp_path, config, state, dtype=stored))
    assert not model.training
    assert model.config == config
    for key, value in model.state_dict().items():
        wanted = torch.from_numpy(state[key])
        assert torch.equal(value, wanted if dtype is None else wanted.to(dtype).float()), key


def test_loads_in_a_dtype_and_refuses_a_broken_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, VARIANTS["base"], make_state(VARIANTS["base"]))
    model = OPT.from_checkpoint(folder, dtype=torch.bfloat16)
    assert model.head_weight.dtype == torch.bfloat16
    assert model(IDS).logits.isfinite().all()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        OPT.from_checkpoint(folder)


@every_variant
@torch.no_grad()
def test_what_stands_in_padding_changes_nothing(name: str) -> None:
    model = fresh(name).eval()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    other = torch.where(mask.bool(), IDS, 33)
    real = mask.bool()
    a, b = model(IDS, attention_mask=mask).logits, model(other, attention_mask=mask).logits
    assert torch.equal(a[real], b[real])


@every_variant
def test_every_weight_gets_a_gradient(name: str) -> None:
    model = fresh(name)
    model(IDS, labels=IDS).loss.backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().sum() > 0, key


@every_variant
def test_fresh_weights(name: str) -> None:
    """Residual writers are smaller by sqrt(2 L); norms are 1, biases 0."""
    model = fresh(name, init_std=0.05)
    deep = 0.05 / (2 * model.config.num_hidden_layers) ** 0.5
    for key, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.full_like(weight, float(key.endswith("weight"))))
        else:
            std = deep if "out_proj" in key or "fc2" in key else 0.05
            assert weight.std().item() == pytest.approx(std, rel=0.1), key


def test_layerdrop_acts_in_training_only() -> None:
    model = fresh("base", layerdrop=1.0, dropout=0.0)
    with torch.no_grad():
        embedded = model.decoder.embed(IDS, torch.arange(4))
        skipped = model.decoder.finish(embedded) @ model.head_weight.T
        torch.testing.assert_close(model.train()(IDS).logits, skipped)
        torch.testing.assert_close(model.hidden(IDS) @ model.head_weight.T, skipped)
        assert not torch.equal(model.eval()(IDS).logits, skipped)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS[0]}, r"\(B, T\)"),
        ({"input_ids": IDS[:, :0]}, "not empty"),
        ({"input_ids": torch.tensor([[2, 300]])}, r"token id 300 is not in 0\.\.299"),
        ({"input_ids": torch.tensor([[2, -1]])}, "token id -1"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \(2, 3\).*\(2, 4\)"),
        ({"position_ids": torch.zeros(1, 4).long()}, "position_ids has shape"),
        ({"labels": IDS[:, :2]}, "labels has shape"),
    ],
)
def test_inputs_that_make_no_sense(inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fresh("base")(**({"input_ids": IDS} | inputs))


def test_mask_must_cover_the_cache() -> None:
    model = fresh("base").eval()
    first: OPTOutput = model(IDS)
    with pytest.raises(RequestError, match=r"attention_mask has shape \(2, 4\).*\(2, 8\)"):
        model(IDS, attention_mask=torch.ones_like(IDS), past=first.cache)


def test_cache_ends_at_the_context() -> None:
    model = fresh("base", max_position_embeddings=7).eval()
    first = model(IDS)
    assert model(IDS[:, :3], past=first.cache).cache.length == 7
    with pytest.raises(ContextLengthError, match="8 tokens; the context is 7"):
        model(IDS, past=first.cache)
