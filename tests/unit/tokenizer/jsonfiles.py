"""Writing and editing the JSON files of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def edit(path: Path, change: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    write(path, values)
