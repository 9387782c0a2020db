"""Adapters in peft's file format: read and checked against their base, without PyTorch.

    adapter_config.json          peft's settings
    adapter_model.safetensors    the numbers (or .bin, read without executing anything in it)
    optlm_adapter.json           of adapters made by optlm: digests of the base and of the numbers

Letters: D hidden size, E embedding width, L layers, n virtual tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.checkpoint.adapterconfig import (
    ADAPTER_CONFIG,
    AdapterSettings,
    read_adapter_config,
)
from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import map_file, present
from optlm.checkpoint.fingerprint import fingerprint
from optlm.checkpoint.jsonfile import read_object
from optlm.checkpoint.load import Checkpoint
from optlm.checkpoint.lowrank import LowRank, read_matrices
from optlm.checkpoint.safetensors import read_safetensors
from optlm.checkpoint.tensor import WEIGHT_DTYPES, Tensor, is_finite
from optlm.checkpoint.torchzip import read_torch
from optlm.config import OPTConfig
from optlm.errors import Fault

__all__ = ["SIDECAR", "WEIGHTS", "Adapter", "open_adapter"]

WEIGHTS = "adapter_model.safetensors"
WEIGHTS_TORCH = "adapter_model.bin"
SIDECAR = "optlm_adapter.json"
PROMPT = "prompt_embeddings"
_LIMIT = 2**16


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that fits its base."""

    folder: Path
    settings: AdapterSettings
    matrices: Mapping[str, LowRank]  # by module name; of "lora" only
    prompt: Tensor | None  # "prefix": (n, 2 L D) keys and values; "prompt": (n, E) embeddings
    text_start: int  # position of the first token of the text: 0, or n as peft on transformers

    @property
    def mergeable(self) -> bool:
        return self.settings.kind == "lora"


def open_adapter(folder: str | Path, base: Checkpoint, *, force: bool = False) -> Adapter:
    """Open an adapter for `base`.

    Args:
        force: use it although it was made for a base with other weights; shapes must fit.

    Raises:
        CheckpointError: files that are missing, broken, not understood, half-written, or made for
            another base.
    """
    folder = Path(folder)
    settings = read_adapter_config(folder)
    if base.packed is not None:
        raise fault_error(
            "packed", base.folder, "holds packed weights; adapt the checkpoint they were made from"
        )
    sidecar = _read_sidecar(folder)
    tensors = _read_weights(folder, sidecar)
    if sidecar and not force:
        _check_base(folder, sidecar, base)
    matrices: dict[str, LowRank] = {}
    prompt = None
    if settings.kind == "lora":
        matrices = read_matrices(folder, settings, tensors, base)
    else:
        prompt = _prompt(folder, settings, tensors, base.config)
    own = sidecar is not None
    return Adapter(
        folder=folder,
        settings=settings,
        matrices=matrices,
        prompt=prompt,
        text_start=0 if own else settings.virtual_tokens,
    )


# ---- files ---------------------------------------------------------------------------------------


def _read_sidecar(folder: Path) -> dict[str, Any] | None:
    path = folder / SIDECAR
    if not present(path):
        return None
    values = read_object(path, _LIMIT, "adapter-sidecar")
    base = values.get("base")
    if not isinstance(base, dict) or not isinstance(values.get("weights_sha256"), str):
        raise fault_error("adapter-sidecar", path, "lacks base or weights_sha256; it is damaged")
    return values


def _read_weights(folder: Path, sidecar: dict[str, Any] | None) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if present(path):
        tensors = read_safetensors(path)
        wanted = sidecar and sidecar["weights_sha256"]
        if wanted and hashlib.sha256(map_file(path).data).hexdigest() != wanted:
            raise fault_error(
                "adapter-half-written",
                path,
                f"is not the file that {SIDECAR} was written with; the adapter is half-written or "
                "files of two adapters are mixed. Save or copy it again",
            )
    elif present(folder / WEIGHTS_TORCH):
        tensors = read_torch(folder / WEIGHTS_TORCH)
    else:
        raise fault_error(
            "adapter-half-written",
            folder,
            f"has {ADAPTER_CONFIG} but neither {WEIGHTS} nor {WEIGHTS_TORCH}; copy it again",
        )
    faults = []
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            faults.append(Fault(code="dtype", where=name, message=f"is stored as {tensor.dtype}"))
        elif not is_finite(tensor.raw(), tensor.dtype):
            message = "holds NaN or infinite values"
            faults.append(Fault(code="non-finite", where=name, message=message))
    if faults:
        raise error_of(faults)
    return tensors


def _check_base(folder: Path, sidecar: dict[str, Any], base: Checkpoint) -> None:
    found = fingerprint(base.config, base.tensors)
    differ = [part for part, digest in found.items() if sidecar["base"].get(part) != digest]
    if differ:
        raise fault_error(
            "adapter-base",
            folder,
            f"was made for another base than {base.folder}: the {' and the '.join(differ)} differ. "
            "Give the model it was trained on; --force (force=True) uses it all the same if the "
            "shapes fit",
        )


# ---- virtual tokens ------------------------------------------------------------------------------


def _prompt(
    folder: Path, settings: AdapterSettings, tensors: Mapping[str, Tensor], config: OPTConfig
) -> Tensor:
    if set(tensors) != {PROMPT}:
        message = f"must hold {PROMPT} alone, not {sorted(tensors)[:5]}"
        raise fault_error("adapter-key", folder, message)
    width = config.embed_dim
    if settings.kind == "prefix":
        width = 2 * config.num_hidden_layers * config.hidden_size
    wanted = (settings.virtual_tokens, width)
    found = tensors[PROMPT].shape
    if found != wanted:
        raise fault_error(
            "adapter-shape",
            folder,
            f"{PROMPT} has shape {list(found)}; this base needs {list(wanted)}",
        )
    if settings.kind == "prefix" and settings.heads not in (None, config.num_attention_heads):
        raise fault_error(
            "adapter-shape",
            folder,
            f"has {settings.heads} attention heads; this base has {config.num_attention_heads}",
        )
    if settings.virtual_tokens >= config.max_position_embeddings:
        raise fault_error(
            "adapter-shape",
            folder,
            f"has {settings.virtual_tokens} virtual tokens; the context of the base is "
            f"{config.max_position_embeddings}",
        )
    return tensors[PROMPT]
