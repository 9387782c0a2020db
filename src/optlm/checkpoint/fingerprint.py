"""What a model is, in two short digests: so that an adapter knows its base again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from optlm.checkpoint.tensor import Tensor, as_float
from optlm.config import OPTConfig

__all__ = ["fingerprint"]

# They say how a model is trained or prompted, not what it computes.
_LEFT_OUT = ("dropout", "attention_dropout", "layerdrop", "init_std")
_CHUNKS, _CHUNK = 16, 256  # of each tensor: places, and numbers read at each


def fingerprint(config: OPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digests of the ``config`` and of the ``weights``.

    The second covers every name and shape, and of the numbers up to 4096 of each tensor, at 16
    places: training changes nearly all of a tensor's numbers, and reading them all would take
    longer than loading. The same numbers stored as float32, float16 or bfloat16, in any layout of
    files, give the same digest.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in _LEFT_OUT}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        flat = tensor.raw().reshape(-1)
        for start in np.linspace(0, max(0, flat.size - _CHUNK), _CHUNKS).astype(int):
            part = flat[start : start + _CHUNK]
            digest.update(as_float(part, tensor.dtype).astype("<f4").tobytes())
    text = json.dumps(values, sort_keys=True)
    return {"config": hashlib.sha256(text.encode()).hexdigest(), "weights": digest.hexdigest()}
