"""The chunked head and loss against PyTorch's operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from optlm.train.loop.loss import head_cross_entropy


@pytest.mark.parametrize("count", [1, 511, 512, 1300])
def test_equals_the_plain_way(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 8, generator=random, requires_grad=True)
    weight = torch.randn(31, 8, generator=random, requires_grad=True)
    targets = torch.randint(31, (count,), generator=random)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    wanted = torch.autograd.grad(plain * 0.3, [hidden, weight])
    ours = head_cross_entropy(hidden, weight, targets)
    got = torch.autograd.grad(ours * 0.3, [hidden, weight])
    torch.testing.assert_close(ours, plain)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1000.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert float(head_cross_entropy(hidden, weight, torch.tensor([0]))) == 0.0
    assert float(head_cross_entropy(hidden, weight, torch.tensor([2]))) == pytest.approx(2000.0)


def test_nothing_is_kept_without_gradients() -> None:
    weight = torch.randn(5, 4)
    with torch.no_grad():
        loss = head_cross_entropy(torch.randn(3, 4), weight, torch.tensor([0, 1, 2]))
    assert loss.grad_fn is None


def test_bf16_under_autocast_is_near() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=random, requires_grad=True)
    weight = (torch.randn(40, 16, generator=random) * 0.3).requires_grad_()
    targets = torch.randint(40, (64,), generator=random)
    wanted = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=0.01)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
