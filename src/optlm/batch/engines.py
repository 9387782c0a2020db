"""Engines of a job: how one is loaded, here or in a worker, and what decides its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optlm.assets import bundled_model
from optlm.engine.llm import LLM
from optlm.serve.adapters import find_adapters

__all__ = ["describe_engine", "load_engine"]


def load_engine(model: str | Path | None, adapters: Path | None = None, **options: Any) -> LLM:
    """Load a model and every adapter in the subfolders of `adapters`, under their names.

    Args:
        options: those of `LLM`.

    Raises:
        as `LLM` and `LLM.load_adapter`.
    """
    llm = LLM(model, **options)
    if adapters is not None:
        for name in sorted(find_adapters(adapters)):
            llm.load_adapter(name, adapters / name)
    return llm


def describe_engine(
    model: str | Path | None,
    adapter: str | None,
    options: Mapping[str, Any],
    adapters: Path | None = None,
) -> dict[str, Any]:
    """What a model and its adapters are, by digests, with the options that change numbers.

    Raises:
        CheckpointError, ConfigError: the model cannot be used.
        OSError: the folder of adapters cannot be read.
    """
    from optlm.checkpoint import open_checkpoint
    from optlm.checkpoint.fingerprint import fingerprint

    checkpoint = open_checkpoint(bundled_model() if model is None else model)
    if checkpoint.packed is not None:
        known = {"weights": checkpoint.packed.sha256}
    else:
        known = fingerprint(checkpoint.config, checkpoint.tensors)
    described: dict[str, Any] = {**known, "tokenizer": _digest_of(checkpoint.folder, _TOKENIZER)}
    if adapter is not None:
        described["adapter"] = _digest_of(Path(adapter), ("*.json", "*.safetensors"))
    if adapters is not None:
        described["adapters"] = {
            name: _digest_of(adapters / name, ("*.json", "*.safetensors"))
            for name in sorted(find_adapters(adapters))
        }
    numeric = {name: options[name] for name in ("dtype", "kv_dtype", "backend") if name in options}
    return described | numeric


_TOKENIZER = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")


def _digest_of(folder: Path, patterns: tuple[str, ...]) -> str:
    """SHA-256 over the files of a folder that match, with their names."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
