"""The learning-rate schedule and which weights decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.loop.optim import OptimConfig, Optimizer, learning_rate
from variants import VARIANTS


def rates(steps: int, **values: Any) -> list[float]:
    config = OptimConfig(**({"learning_rate": 1.0} | values))
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_then_linear_fall_to_a_tenth() -> None:
    given = rates(14, warmup_steps=4)
    assert given[:4] == [0.25, 0.5, 0.75, 1.0]
    assert given[4:] == pytest.approx([1 - 0.09 * (i + 1) for i in range(10)])


def test_constant_part() -> None:
    given = rates(20, warmup_steps=2, decay_share=0.25, final_share=0.0)
    assert given[1:15] == [1.0] * 14
    assert given[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_warm_up_longer_than_the_run(steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(steps, warmup_steps=10))


def test_only_matrices_decay() -> None:
    model = OPT(VARIANTS["base"])
    decayed, free = Optimizer(model, OptimConfig()).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(weight.ndim == 2 for weight in decayed["params"])
    assert all(weight.ndim == 1 for weight in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_muon_takes_the_matrices_inside_the_layers(variant: str) -> None:
    model = OPT(VARIANTS[variant])
    config = OptimConfig(method="muon", learning_rate=0.01, muon_learning_rate=0.02)
    optimizer = Optimizer(model, config)
    by_muon = {
        id(p) for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]
    }
    inside = {id(p) for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    assert by_muon == inside
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(map(id, model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step(0.005)
    assert all((p != before[name]).any() for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert {group["lr"] for group in optimizer.param_groups} == {0.005, 0.01}


def test_muon_steps_are_orthogonal() -> None:
    """Every direction of the update has about the same length, which AdamW's have not."""
    model = OPT(VARIANTS["base"])
    weight = model.decoder.layers[0].fc1.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight) * torch.logspace(0, -1.5, weight.shape[1])
    config = OptimConfig(method="muon", learning_rate=1.0, weight_decay=0.0)
    Optimizer(model, config).step(1.0)
    lengths = torch.linalg.svdvals(before - weight.detach()) / (0.2 * max(weight.shape) ** 0.5)
    assert float(lengths.min()) > 0.3
    assert float(lengths.max()) < 1.4


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"beta2": 1.0},
        {"warmup_steps": -1},
        {"warmup_steps": 1.5},
        {"decay_share": 1.1},
        {"clip_norm": 0.0},
        {"weight_decay": "0.1"},
        {"method": "moun"},
        {"muon_learning_rate": 0.1},
        {"momentum": 1.0, "method": "muon"},
    ],
)
def test_nonsense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        OptimConfig(**values)
