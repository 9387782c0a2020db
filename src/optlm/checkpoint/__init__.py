"""Checkpoints: any layout of OPT weights in, one strict mapping of tensors out.

    checkpoint = open_checkpoint("facebook/opt-125m")
    checkpoint.tensors["model.decoder.embed_tokens.weight"].numpy()    # (V, E) float32

Nothing here imports PyTorch, and no pickle is ever executed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optlm.checkpoint.doctor import diagnose, exit_code
    from optlm.checkpoint.load import Checkpoint, open_checkpoint
    from optlm.checkpoint.packed import PackedWeights, save_packed
    from optlm.checkpoint.save import save_checkpoint
    from optlm.checkpoint.tensor import Tensor, is_finite
    from optlm.errors import Fault

__all__ = [
    "Checkpoint",
    "Fault",
    "PackedWeights",
    "Tensor",
    "diagnose",
    "exit_code",
    "is_finite",
    "open_checkpoint",
    "save_checkpoint",
    "save_packed",
]

_HOME = {
    "Checkpoint": "optlm.checkpoint.load",
    "Fault": "optlm.errors",
    "PackedWeights": "optlm.checkpoint.packed",
    "Tensor": "optlm.checkpoint.tensor",
    "diagnose": "optlm.checkpoint.doctor",
    "exit_code": "optlm.checkpoint.doctor",
    "is_finite": "optlm.checkpoint.tensor",
    "open_checkpoint": "optlm.checkpoint.load",
    "save_checkpoint": "optlm.checkpoint.save",
    "save_packed": "optlm.checkpoint.packed",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
