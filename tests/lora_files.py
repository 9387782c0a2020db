"""LoRA files as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from optlm.config import OPTConfig


def write_lora(
    folder: Path,
    config: OPTConfig,
    seed: int,
    modules: tuple[str, ...] = ("q_proj", "fc1"),
    **more: Any,
) -> Path:
    """A LoRA of rank 4 as peft saves it, strong enough to change every text."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config.parameter_shapes().items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module.rsplit(".", 1)[-1] not in modules:
            continue
        key = f"base_model.model.{module}"
        for part, size in (("lora_A", (4, shape[1])), ("lora_B", (shape[0], 4))):
            values = random.normal(0, 0.6, size).astype(np.float32)
            tensors[f"{key}.{part}.weight"] = values
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 3,
        "target_modules": list(modules),
        **more,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
