"""The programs of docs/training.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_program_of_another_technique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Another technique")[1]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(match[1], names)
    assert names["trainer"].step == 50  # type: ignore[attr-defined]
    assert (tmp_path / "RUN" / "step-00000050.pt").exists()
