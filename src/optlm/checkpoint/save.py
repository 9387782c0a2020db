"""Writing Hugging Face's layout: one safetensors file, config.json, tokenizer files."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import present, read_small
from optlm.checkpoint.names import Named, fit
from optlm.checkpoint.staging import current_umask, staged_folder, sync_folder
from optlm.checkpoint.tensor import Array, Tensor, is_finite, storage_dtype
from optlm.config import OPTConfig
from optlm.errors import did_you_mean

SAVED_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_TOKENIZER_LIMIT = 2**28  # bytes of one tokenizer file; OPT's largest has 2 MB
_ALIGNMENT = 64  # bytes; a mapped file then starts its data on a cache line


def save_checkpoint(
    folder: str | Path,
    config: OPTConfig,
    tensors: Mapping[str, Tensor | Array],
    *,
    dtype: str | None = None,
    tokenizer_from: str | Path | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and tokenizer files; return the folder.

    The files are written beside the folder and moved when all are complete (`staged_folder`), so an
    interrupted save leaves what was there before. Other files in the folder stay.

    Args:
        tensors: every name of ``config.parameter_shapes()``, as `Tensor`, float32 or float16 array.
            A tied
            ``lm_head.weight`` may be present; it is compared with the embedding and not stored.
        dtype: "f32", "f16" or "bf16" (rounded to nearest even); None keeps each weight as it is.
        tokenizer_from: a folder whose tokenizer files are copied.

    Raises:
        CheckpointError: names or shapes that do not fit `config`, values that are not finite in
            `dtype`, or a target that is no folder, cannot be written, or holds packed weights.
    """
    if dtype is not None and dtype not in SAVED_DTYPES:
        raise fault_error(
            "dtype", dtype, f"is not f32, f16 or bf16{did_you_mean(dtype, SAVED_DTYPES)}"
        )
    given = {name: _as_tensor(name, value) for name, value in tensors.items()}
    fitting, faults = fit(Named(tensors=given, prefixes=frozenset(), faults=[]), config)
    if faults:
        raise error_of(faults)
    folder = Path(folder)
    if os.path.lexists(folder / "weights.optlm"):
        message = "holds packed weights, which would hide the new ones; write into another folder"
        raise fault_error("packed-beside-others", folder, message)
    wanted = {name: SAVED_DTYPES[dtype] if dtype else t.dtype for name, t in fitting.items()}
    with staged_folder(folder, replaces=TOKENIZER_FILES if tokenizer_from else ()) as stage:
        if tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), stage)
        with atomic_file(stage / "model.safetensors") as file:
            _write_safetensors(file, fitting, wanted)
        with atomic_file(stage / "config.json") as file:
            file.write(_config_json(config, set(wanted.values())))
    return folder


def _as_tensor(name: str, value: Tensor | Array) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    if array.dtype not in names:
        message = f"is an array of {array.dtype}; float32, float16 or a Tensor is needed"
        raise fault_error("dtype", name, message)
    return Tensor(
        name=name,
        dtype=names[array.dtype],
        shape=array.shape,
        source="memory",
        read=lambda: array,
    )


def _config_json(config: OPTConfig, dtypes: set[str]) -> bytes:
    values = config.to_dict()
    if len(dtypes) == 1:
        values["torch_dtype"] = CONFIG_DTYPES[next(iter(dtypes))]
    return (json.dumps(values, indent=2) + "\n").encode()


def _write_safetensors(
    file: IO[bytes], tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]
) -> None:
    # Wide numbers first: then every tensor begins at a multiple of its item size.
    order = sorted(tensors, key=lambda name: -storage_dtype(dtypes[name]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, shape = end, tensors[name].shape
        end += int(np.prod(shape, dtype=np.int64)) * storage_dtype(dtypes[name]).itemsize
        header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(np.ascontiguousarray(_cast(tensors[name], dtypes[name])).data)


def _cast(tensor: Tensor, dtype: str) -> Array:
    raw = tensor.raw()
    if not is_finite(raw, tensor.dtype):
        raise fault_error("non-finite", tensor.name, "holds NaN or infinite values")
    if dtype == tensor.dtype:
        return raw
    values = tensor.numpy()
    if dtype == "BF16":
        cast: Array = to_bfloat16(values)
    else:
        with np.errstate(over="ignore"):
            cast = values.astype(storage_dtype(dtype))
    if not is_finite(cast, dtype):
        message = f"has values up to {float(np.abs(values).max()):.6g}, too large for {dtype}"
        raise fault_error("overflow", tensor.name, message + "; save it as bf16 or f32")
    return cast


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 rounded to the nearest bfloat16 (ties to even), as its 16 bits."""
    bits = values.view(np.uint32)
    lowest_kept = (bits >> 16) & 1
    return ((bits + 0x7FFF + lowest_kept) >> 16).astype(np.uint16)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file that replaces `path` when the block ends well, and vanishes when it does not."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files that are there; what is there and is no file is an error."""
    for name in TOKENIZER_FILES:
        if present(source / name):
            content = read_small(source / name, _TOKENIZER_LIMIT)
            with atomic_file(folder / name) as copy:
                copy.write(content)
