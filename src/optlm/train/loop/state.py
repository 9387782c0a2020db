"""The part of a model that training changes: what a checkpoint of a run holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from optlm.train.run.folder import TrainingError

__all__ = ["averaged_copy", "load_trained_state", "trained_state"]

M = TypeVar("M", bound=nn.Module)


def trained_state(model: nn.Module, *, like: nn.Module | None = None) -> dict[str, Tensor]:
    """Parameters that require gradients, by name, and persistent buffers; nothing that is frozen.

    Args:
        like: the model that is trained, where `model` is its average, which requires no gradients.
    """
    return {name: value.detach() for name, value in _trained(model, like or model)}


@torch.no_grad()
def load_trained_state(
    model: nn.Module, state: Mapping[str, Tensor], *, like: nn.Module | None = None
) -> None:
    """Copy what `trained_state` gave for the same model back into `model`.

    Raises:
        TrainingError: names or shapes differ; nothing was copied.
    """
    own = dict(_trained(model, like or model))
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise TrainingError(
            "the checkpoint does not fit the model that is being trained; these differ: "
            f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
        )
    for name, value in own.items():
        value.copy_(state[name])


def averaged_copy(model: M) -> M:
    """A copy in evaluation mode; it shares the frozen weights and has its own trained ones."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    copied = copy.deepcopy(model, dict(shared))
    for weight in copied.parameters():
        if id(weight) not in shared:
            weight.requires_grad_(False)
    return copied.eval()


def _trained(model: nn.Module, like: nn.Module) -> Iterator[tuple[str, Tensor]]:
    pairs = zip(model.named_parameters(), like.parameters(), strict=True)
    yield from ((name, weight) for (name, weight), other in pairs if other.requires_grad)
    stored = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
