"""Run with cache, and run with hooks.

With no hook that changes a value, both give the very bits of a plain forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.errors import ConfigError, did_you_mean
from optlm.interpret.points import select
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = ["Cache", "Hook", "array", "run_with_cache", "run_with_hooks"]

Hook = Callable[[Tensor], Tensor | None]  # gets the value with B = 1; what it returns replaces it
Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cache:
    """What one forward pass computed, without the batch dimension.

    `values` maps names of hook points to float32 arrays, such as (T, D) for a residual stream and
    (H, T, T) for probabilities; see `optlm.interpret.points`.
    """

    tokens: tuple[int, ...]
    logits: Array  # (T, V)
    values: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        """The value at a hook point.

        Raises:
            ConfigError: it was not kept.
        """
        if name not in self.values:
            raise ConfigError(
                f"hook point {name!r} is not in this cache{did_you_mean(name, self.values)}"
            )
        return self.values[name]

    def stack(self, kind: str) -> Array:
        """The values of one kind in all layers, such as "hook_resid_post": (L, ...).

        Raises:
            ConfigError: none was kept.
        """
        names = [name for name in self.values if name.endswith("." + kind)]
        if not names:
            raise ConfigError(f"no layer's {kind!r} is in this cache")
        return np.stack([self.values[name] for name in names])


@torch.no_grad()
def run_with_cache(model: OPT, tokens: Sequence[int], points: str | Iterable[str] = "*") -> Cache:
    """Read `tokens` and keep what passes the chosen points.

    The probabilities of all layers together take L H T T floats (0.6 GB for 12 layers, 12 heads and
    1,024 tokens): name the points you need, or use `attention_maps`.

    Args:
        points: names, kinds or patterns, as `optlm.interpret.points.select` takes them.

    Raises:
        ConfigError: a pattern matches nothing; the nearest name is told.
        RequestError: no tokens, too many, or ids outside the vocabulary.
        CheckpointError: weights hold NaN.
    """
    ids = token_rows(model, tokens)
    values: dict[str, Array] = {}

    def keep(name: str, value: Tensor) -> None:
        values[name] = array(value[0])

    with hooked(model, {name: partial(keep, name) for name in select(points, model.config)}):
        logits = model(ids).logits
    check_finite(logits)
    return Cache(tokens=tuple(tokens), logits=array(logits[0]), values=values)


@torch.no_grad()
def run_with_hooks(model: OPT, tokens: Sequence[int], hooks: Mapping[str, Hook]) -> Array:
    """Logits (T, V) of a pass in which `hooks` watch or replace values.

    A hook gets the value with a leading batch dimension of 1 and returns what goes on in its place,
    or None. A hook must not change its value in place.

    Args:
        hooks: by name, kind or pattern; where two match one point the first given acts first.

    Raises:
        As `run_with_cache`.
    """
    ids = token_rows(model, tokens)
    acting: dict[str, list[Hook]] = {}
    for pattern, hook in hooks.items():
        for name in select(pattern, model.config):
            acting.setdefault(name, []).append(hook)
    with hooked(model, {name: _chain(several) for name, several in acting.items()}):
        logits = model(ids).logits
    check_finite(logits)
    return array(logits[0])


def _chain(hooks: Sequence[Hook]) -> Hook:
    """All of `hooks` as one; the same tensor when none returns another."""

    def run(value: Tensor) -> Tensor | None:
        for hook in hooks:
            result = hook(value)
            value = value if result is None else result
        return value

    return run


def array(value: Tensor) -> Array:
    """A float32 numpy copy, from any device and dtype."""
    result: Array = value.detach().to("cpu", torch.float32, copy=True).numpy()
    return result
