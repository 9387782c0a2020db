"""AdamW as OPT was trained with, and the learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from optlm.errors import ConfigError

__all__ = ["OptimConfig", "build_optimizer", "decay_begin", "learning_rate"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer settings; the defaults are the OPT paper's (arXiv 2205.01068, section 2.2)."""

    learning_rate: float = 6e-4  # highest, reached after the warm-up
    warmup_steps: int = 100
    decay_share: float = (
        1.0  # last share of all steps in which the rate falls; before it stays constant
    )
    final_share: float = 0.1  # of the highest rate, at the last step
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("decay_share", 0.0, 1.0),
            ("final_share", 0.0, 1.0),
            ("beta1", 0.0, 0.999999),
            ("beta2", 0.0, 0.999999),
            ("epsilon", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0),
            ("clip_norm", 1e-6, 1e6),
        ):
            value = getattr(self, name)
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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on biases and norms."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
