"""From a training run to a folder that optlm and transformers load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optlm.checkpoint.save import atomic_file, save_checkpoint
from optlm.config import OPTConfig
from optlm.errors import CheckpointError
from optlm.train.run.folder import RunFolder

__all__ = ["export_run"]


def export_run(
    run: Path,
    folder: Path,
    *,
    dtype: str = "bf16",
    step: int | None = None,
    averaged: bool = True,
) -> int:
    """Write the weights of a run's best checkpoint, with its configuration and tokenizer.

    Works while the run is still going on.

    Args:
        dtype: "bf16", "f16" or "f32".
        step: take this checkpoint and not the best one by validation.
        averaged: take the moving average, which validation judges, if the run keeps one; else the
            weights as trained.

    Returns:
        The step that was exported.

    Raises:
        CheckpointError: `run` is no run folder.
        TrainingError: the run has no checkpoint yet, or the one asked for is missing or damaged.
    """
    try:
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
        tokenizer = (run / "tokenizer.json").read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run} is no folder of a training run: {error}") from error
    config = OPTConfig.from_dict(settings["model"])
    step, state = _choose(RunFolder(run), step)
    chosen = (state["average"] if averaged else None) or state["model"]
    names = config.parameter_shapes()  # a distillation may have trained projections beside them
    weights = {name: weight.numpy() for name, weight in chosen.items() if name in names}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "tokenizer.json") as file:
        file.write(tokenizer)
    _write_json(folder / "tokenizer_config.json", _tokenizer_settings(config))
    _write_json(folder / "generation_config.json", _generation_settings(config))
    save_checkpoint(folder, config, weights, dtype=dtype)
    return step


def _choose(run: RunFolder, step: int | None) -> tuple[int, dict[str, Any]]:
    if step is not None:
        return step, run.load(step)
    latest = run.load_latest()
    if latest is None:
        raise CheckpointError(f"{run.path} has no checkpoint yet")
    best = latest["best"][1]
    return (best, run.load(best)) if best else (latest["step"], latest)


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
