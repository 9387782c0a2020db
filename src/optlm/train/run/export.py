"""From a training run to a folder that optlm and transformers load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from optlm.checkpoint.save import atomic_file, save_checkpoint
from optlm.checkpoint.staging import staged_folder
from optlm.config import OPTConfig
from optlm.errors import CheckpointError
from optlm.train.run.folder import RunFolder, TrainingError

__all__ = ["MODEL", "export_run", "writing"]

MODEL = "model"  # folder of the finished model, in the folder of its run


def export_run(
    run: Path,
    folder: Path,
    *,
    dtype: str = "bf16",
    step: int | None = None,
    averaged: bool = True,
    untrained: Mapping[str, Tensor] | None = None,
    tokenizer_from: Path | None = None,
) -> int:
    """Write the weights of a run's best checkpoint, with its configuration and tokenizer.

    Works while the run is still going on. `folder` changes as a whole or not at all.

    Args:
        dtype: "bf16", "f16" or "f32".
        step: take this checkpoint and not the best one by validation.
        averaged: take the moving average, which validation judges, if the run keeps one; else the
            weights as trained.
        untrained: weights that the run leaves alone, and therefore has in no checkpoint.
        tokenizer_from: a folder whose tokenizer files are copied; None writes the run's own.

    Returns:
        The step that was exported.

    Raises:
        CheckpointError: `run` is no run folder.
        TrainingError: the run has no checkpoint yet, the one asked for is missing or damaged, or
            `folder` cannot be written.
    """
    try:
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
        tokenizer = (run / "tokenizer.json").read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run} is no folder of a training run: {error}") from error
    config = OPTConfig.from_dict(settings["model"])
    step, state = _choose(RunFolder(run), step)
    chosen = (untrained or {}) | ((state["average"] if averaged else None) or state["model"])
    names = config.parameter_shapes()  # a distillation may have trained projections beside them
    weights = {
        name: weight.detach().cpu().numpy() for name, weight in chosen.items() if name in names
    }
    with writing(folder), staged_folder(folder) as stage:
        if tokenizer_from is None:
            _write_tokenizer(stage, tokenizer, config)
        save_checkpoint(stage, config, weights, dtype=dtype, tokenizer_from=tokenizer_from)
    return step


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A result of a run is being written to `folder`.

    Raises:
        TrainingError: instead of an OSError of the block: what to do about a full disk.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {folder}: {error}; the checkpoints are unharmed: free some space "
            "and give the same command again"
        ) from error


def _choose(run: RunFolder, step: int | None) -> tuple[int, dict[str, Any]]:
    if step is not None:
        return step, run.load(step)
    latest = run.load_latest()
    if latest is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet")
    best = latest["best"][1]
    return (best, run.load(best)) if best else (latest["step"], latest)


def _write_tokenizer(folder: Path, tokenizer: bytes, config: OPTConfig) -> None:
    with atomic_file(folder / "tokenizer.json") as file:
        file.write(tokenizer)
    _write_json(folder / "tokenizer_config.json", _tokenizer_settings(config))
    _write_json(folder / "generation_config.json", _generation_settings(config))


def _tokenizer_settings(config: OPTConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


def _generation_settings(config: OPTConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
