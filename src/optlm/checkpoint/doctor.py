"""`diagnose`: everything that is wrong with a checkpoint, not only the first thing.

Exit codes of ``optlm doctor``: 0 sound, 1 warnings only, 2 faults.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from optlm.checkpoint.configfile import examine_config
from optlm.checkpoint.faults import faults_of
from optlm.checkpoint.files import present
from optlm.checkpoint.jsonfile import read_object
from optlm.checkpoint.load import resolve
from optlm.checkpoint.names import fit, to_hugging_face
from optlm.checkpoint.packed import PACKED_NAME, read_packed
from optlm.checkpoint.save import CONFIG_DTYPES
from optlm.checkpoint.settings import config_from_settings
from optlm.checkpoint.tensor import WEIGHT_DTYPES, Array, Tensor, as_float, is_finite, same_bits
from optlm.checkpoint.tokenizerfiles import examine_tokenizer
from optlm.checkpoint.weights import Weights, read_weights
from optlm.config import OPTConfig
from optlm.errors import Fault, OptlmError

LARGEST_F16 = 65504.0


def exit_code(faults: list[Fault]) -> int:
    """0 for a sound checkpoint, 1 when there are only warnings, 2 when there are faults."""
    if not faults:
        return 0
    return 2 if any(fault.severity == "error" for fault in faults) else 1


def diagnose(source: str | Path) -> list[Fault]:
    """Every fault of a folder or hub model, the grave ones first. Reads all weights once.

    Never raises for a broken checkpoint, and never executes anything in it.
    """
    try:
        folder = resolve(source)
    except OptlmError as error:
        return faults_of(error, source)
    config, faults = examine_config(folder / "config.json")
    weights = None
    if present(folder / PACKED_NAME):
        faults += _packed_faults(folder, config)
    else:
        weights, found = _examine_weights(folder)
        faults += found
    if weights is not None and weights.settings is not None and not present(folder / "config.json"):
        config, faults = _config_of(weights, folder)
    if weights is not None:
        faults += _examine_tensors(weights, config)
    if config is not None:
        faults += _dtype_faults(folder, weights)
    faults += examine_tokenizer(folder, config)
    return sorted(faults, key=lambda fault: fault.severity != "error")


def _warning(code: str, where: str, message: str) -> Fault:
    return Fault(code=code, severity="warning", where=where, message=message)


def _config_of(weights: Weights, folder: Path) -> tuple[OPTConfig | None, list[Fault]]:
    try:
        return config_from_settings(weights.settings, weights.tensors, str(folder)), []
    except OptlmError as error:
        return None, faults_of(error, folder)


def _packed_faults(folder: Path, config: OPTConfig | None) -> list[Fault]:
    if config is None:
        return []
    try:
        packed = read_packed(folder / PACKED_NAME, config)
    except OptlmError as error:
        return faults_of(error, folder)
    if packed.is_intact():
        return []
    message = "its bytes are not those that were written; convert again"
    return [Fault(code="packed-hash", where=PACKED_NAME, message=message)]


def _examine_weights(folder: Path) -> tuple[Weights | None, list[Fault]]:
    faults = []
    single, index = "model.safetensors", "model.safetensors.index.json"
    if present(folder / single) and present(folder / index):
        faults.append(
            _warning("several-weights", index, f"is ignored, because {single} is there too")
        )
    try:
        return read_weights(folder), faults
    except OptlmError as error:
        return None, faults + faults_of(error, folder)


def _examine_tensors(weights: Weights, config: OPTConfig | None) -> list[Fault]:
    named = to_hugging_face(weights.tensors)
    if config is None:
        tensors, faults = named.tensors, list(named.faults)
    else:
        tensors, faults = fit(named, config)
    readable = {name: t for name, t in tensors.items() if t.dtype in WEIGHT_DTYPES}
    for name, tensor in readable.items():
        faults += _number_faults(name, tensor)
    return faults + _repeated_layers(readable) + _mixed_dtypes(readable)


def _number_faults(name: str, tensor: Tensor) -> list[Fault]:
    raw = tensor.raw()
    if not raw.size:
        return []
    if not is_finite(raw, tensor.dtype):
        bits = as_float(raw, tensor.dtype)
        nan, infinite = int(np.isnan(bits).sum()), int(np.isinf(bits).sum())
        faults = []
        if nan:
            message = f"holds {nan} NaN of {raw.size} values"
            faults.append(Fault(code="nan", where=name, message=message))
        if infinite:
            message = f"holds {infinite} infinite of {raw.size} values"
            faults.append(Fault(code="infinite", where=name, message=message))
        return faults
    return _odd_numbers(name, tensor, raw)


def _odd_numbers(name: str, tensor: Tensor, raw: Array) -> list[Fault]:
    if not raw.any():
        if name.endswith("layer_norm.weight"):
            return [Fault(code="zero-norm", where=name, message="is all zero; nothing passes it")]
        if raw.ndim == 2:
            return [_warning("zero-matrix", name, "is all zero")]
        return []
    if raw.ndim == 2 and raw.size > 1 and (raw == raw.flat[0]).all():
        return [_warning("constant-matrix", name, "has the same value everywhere; untrained?")]
    if tensor.dtype == "F32":
        largest = max(float(raw.max()), -float(raw.min()))
        if largest > LARGEST_F16:
            return [
                _warning("large-values", name, f"has values up to {largest:.3g}; never use f16")
            ]
        if largest < np.finfo(np.float32).tiny:
            return [_warning("subnormal", name, "has subnormal values only; scaled wrongly?")]
    return []


def _repeated_layers(tensors: Mapping[str, Tensor]) -> list[Fault]:
    """Two layers with the same `fc1` are a slip of some merging script."""
    faults = []
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not name.endswith("fc1.weight") or not tensor.nbytes:
            continue
        raw = tensor.raw()
        checksum = zlib.crc32(raw[:16].tobytes())
        twin = seen.setdefault(checksum, name)
        if twin != name and raw.shape == tensors[twin].shape and raw.any():
            other = tensors[twin].raw()
            if raw.dtype == other.dtype and same_bits(raw, other):
                faults.append(_warning("repeated-layer", name, f"is the same as {twin}"))
    return faults


def _mixed_dtypes(tensors: Mapping[str, Tensor]) -> list[Fault]:
    kinds = Counter(tensor.dtype for tensor in tensors.values())
    if len(kinds) < 2:
        return []
    counts = ", ".join(f"{count} {dtype}" for dtype, count in kinds.most_common())
    return [_warning("dtype-mix", "weights", f"are stored in several dtypes: {counts}")]


def _dtype_faults(folder: Path, weights: Weights | None) -> list[Fault]:
    """``torch_dtype`` in config.json against what is stored: transformers believes the former."""
    try:
        values = read_object(folder / "config.json", 2**20, "config-json")
    except OptlmError:
        return []
    declared = values.get("torch_dtype") or values.get("dtype")
    stored = {tensor.dtype for tensor in weights.tensors.values()} if weights else set()
    if len(stored) != 1 or declared is None or stored - CONFIG_DTYPES.keys():
        return []
    actual = CONFIG_DTYPES[stored.pop()]
    if declared == actual:
        return []
    message = f"is {declared!r:.40}, but the weights are stored as {actual}"
    return [_warning("dtype-config", "config.json: torch_dtype", message)]
