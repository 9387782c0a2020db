"""The teacher: its files, what tells it from others, and its forward pass.

Letters: B rows, S tokens of each, N = B S predictions, D hidden size, E embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optlm.assets import bundled_model
from optlm.checkpoint import Checkpoint, open_checkpoint
from optlm.model import OPT, hooked
from optlm.tokenizer.files import load_backend, read_settings
from optlm.train.distil.divergence import LiveRows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "BUNDLED",
    "LiveTeacher",
    "open_teacher",
    "states_between",
    "teacher_digest",
    "teacher_tokenizer",
]

BUNDLED = "bundled"
# They say how a model is trained or prompted, not what it computes.
_LEFT_OUT = ("dropout", "attention_dropout", "layerdrop", "init_std")


def open_teacher(source: str) -> Checkpoint:
    """The teacher's files; "bundled" is the bundled model.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    return open_checkpoint(bundled_model() if source == BUNDLED else source)


def teacher_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The vocabulary beside the teacher's weights.

    Raises:
        TokenizerError: its files are missing or damaged.
    """
    return load_backend(checkpoint.folder, read_settings(checkpoint.folder))


def teacher_digest(checkpoint: Checkpoint) -> str:
    """sha256 of the configuration and of every stored number, whatever the layout of the files."""
    values = {k: v for k, v in checkpoint.config.to_dict().items() if k not in _LEFT_OUT}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.raw().reshape(-1).view("u1").data)
    return digest.hexdigest()


class LiveTeacher:
    """The teacher in memory, which is asked and never trained.

    Raises:
        CheckpointError: its weights hold NaN or infinity.
    """

    def __init__(self, model: OPT) -> None:
        self.model = model.eval()
        for weight in self.model.parameters():
            weight.requires_grad_(False)

    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        temperature: float,
        layers: Iterable[int] = (),
        counted: slice | None = None,
    ) -> tuple[LiveRows, dict[int, Tensor]]:
        """Distributions after the `counted` (all) of `tokens` (B, S), and what leaves `layers`."""
        with states_between(self.model, layers) as states:
            hidden = self.model.hidden(tokens)
        hidden = (hidden if counted is None else hidden[:, counted]).flatten(0, 1)
        head = self.model.head_weight
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            head = head.to(torch.get_autocast_dtype(kind))
        return LiveRows(states=hidden, head=head, temperature=temperature), states


@contextmanager
def states_between(model: OPT, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """A dict that a forward pass inside the block fills: layer -> what leaves it, (N, D)."""
    states: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> None:
        states[layer] = value.flatten(0, 1)

    hooks = {f"layers.{i}.hook_resid_post": lambda v, i=i: keep(i, v) for i in layers}
    with hooked(model, hooks):
        yield states
