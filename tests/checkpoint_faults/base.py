"""The register of faults, and what several kinds of them need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from variants import VARIANTS

CONFIG = VARIANTS["base"]
Break = Callable[[Path], object]
BREAKS: list[tuple[str, str, Break]] = []  # code, short name, function

FC1 = "model.decoder.layers.0.fc1.weight"
NORM = "model.decoder.layers.0.final_layer_norm.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


def breaks(code: str, name: str = "") -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        BREAKS.append((code, name or function.__name__, function))
        return function

    return register


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))
