"""The optimizers, and the learning rate as a function of the step.

AdamW is what OPT was trained with. Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982, section
2.2) is a choice for the matrices inside the layers: on the mini family it reached in 250 steps the
loss that took AdamW 350, for a tenth more time a step (docs/log.md).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optlm.errors import ConfigError, did_you_mean

__all__ = ["OptimConfig", "Optimizer", "clip", "decay_begin", "layer_of", "learning_rate"]

METHODS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer settings; the defaults are the OPT paper's (arXiv 2205.01068, section 2.2)."""

    method: str = "adamw"  # "muon": the matrices inside the layers by Muon, the rest by AdamW
    learning_rate: float = 6e-4  # highest, reached after the warm-up
    muon_learning_rate: float | None = None  # the same for Muon's matrices; None: `learning_rate`
    warmup_steps: int = 100
    decay_share: float = (
        1.0  # last share of all steps in which the rate falls; before it stays constant
    )
    final_share: float = 0.1  # of the highest rate, at the last step
    momentum: float = 0.95  # of Muon
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"method is {self.method!r}; it must be one of {', '.join(METHODS)}"
                f"{did_you_mean(str(self.method), METHODS)}"
            )
        if self.method != "muon" and self.muon_learning_rate is not None:
            raise ConfigError("muon_learning_rate is given, but method is not 'muon'")
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("muon_learning_rate", 0.0, 1.0),
            ("momentum", 0.0, 0.999999),
            ("decay_share", 0.0, 1.0),
            ("final_share", 0.0, 1.0),
            ("beta1", 0.0, 0.999999),
            ("beta2", 0.0, 0.999999),
            ("epsilon", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0),
            ("clip_norm", 1e-6, 1e6),
        ):
            value = getattr(self, name)
            if value is None and name == "muon_learning_rate":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}")
        if not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps!r}; it must be a whole number from 0"
            )


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of 0-based `step` out of `steps`: linear warm-up, constant, linear fall."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    begin = decay_begin(config, steps)
    if step < begin:
        return config.learning_rate
    done = (step - begin + 1) / max(1, steps - begin)
    return config.learning_rate * (1 - (1 - config.final_share) * done)


def decay_begin(config: OptimConfig, steps: int) -> int:
    """First 0-based step at which the rate falls."""
    return max(config.warmup_steps, round(steps * (1 - config.decay_share)))


@torch.no_grad()
def clip(
    model: nn.Module, highest: float, *, divide_by: float = 1.0
) -> tuple[float, dict[str, float]]:
    """Divide all gradients, then scale them down to a norm of at most `highest`.

    Returns:
        The norm after the division and before the scaling, of all and by layer. If it is no finite
        number the gradients are not worth using.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    gradients = [gradient for _, gradient in named]
    squares: dict[str, float] = {}
    for (name, _), norm in zip(named, torch.stack(_norms(gradients)).tolist(), strict=True):
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + (norm / divide_by) ** 2
    total = math.sqrt(sum(squares.values()))
    if math.isfinite(total):
        torch._foreach_mul_(gradients, min(1.0, highest / (total + 1e-6)) / divide_by)
    return total, {name: math.sqrt(square) for name, square in squares.items()}


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(gradients, 2, dtype=torch.float32))


def layer_of(name: str) -> str:
    """ "layer 3" of "model.decoder.layers.3.fc1.weight"; of other names, the module."""
    inside = re.search(r"layers\.(\d+)\.", name)
    return f"layer {inside[1]}" if inside else ".".join(name.split(".")[-2:-1]) or name


class Optimizer:
    """AdamW alone, or Muon for the matrices inside the layers with AdamW for everything else.

    Weight decay acts on matrices and not on biases and norms.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inside = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
        by_muon = inside if config.method == "muon" else []
        others = _without([p for _, p in trained], by_muon)
        groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []  # each with its highest rate
        if groups := [group for group in groups if group["params"]]:
            adamw = torch.optim.AdamW(
                groups,
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.epsilon,
                fused=True,
            )
            self._parts.append((adamw, config.learning_rate))
        if by_muon:
            rate = config.muon_learning_rate or config.learning_rate
            muon = torch.optim.Muon(
                by_muon,
                lr=rate,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append((muon, rate))
        self._highest = config.learning_rate

    def step(self, rate: float) -> None:
        """Change the weights by their gradients at `rate`, then forget the gradients.

        Muon's rate is in the same proportion to its highest as `rate` is to `learning_rate`.
        """
        for part, highest in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * (highest / self._highest)
            part.step()
            part.zero_grad(set_to_none=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part, _ in self._parts for group in part.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {type(part).__name__: part.state_dict() for part, _ in self._parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, _ in self._parts:
            part.load_state_dict(state[type(part).__name__])


def _without(weights: list[nn.Parameter], left_out: list[nn.Parameter]) -> list[nn.Parameter]:
    names = {id(weight) for weight in left_out}
    return [weight for weight in weights if id(weight) not in names]
