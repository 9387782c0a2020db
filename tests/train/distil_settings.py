"""Settings of a distillation small enough for a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variants import VARIANTS, make_state, write_checkpoint


def settings(
    recipe: dict[str, Any], folder: Path, variant: str = "base", **changes: Any
) -> dict[str, Any]:
    """The tiny recipe with a random teacher of `variant` in `folder`; `changes` win."""
    config = VARIANTS[variant]
    write_checkpoint(folder, config, make_state(config))
    values = {key: value for key, value in recipe.items() if key != "model"}
    values["data"] = {k: v for k, v in recipe["data"].items() if k != "vocab_size"}
    values["loop"] = recipe["loop"] | {"steps": 4, "evaluate_every": 4, "checkpoint_every": 2}
    return {
        **values,
        "teacher": str(folder),
        "model": {"num_hidden_layers": 1},
        "losses": {"forward_kl": 1.0, "labels": 0.5},
        "sequence_lengths": {"16": 1},
        "precision": "f32",
        "prompts": [],
        **changes,
    }
