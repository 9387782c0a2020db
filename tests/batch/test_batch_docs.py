"""The commands of docs/batch.md run, on the rows the page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from optlm import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (optlm .*)$", PAGE, re.MULTILINE)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = re.search(r"`prompts.jsonl` such as\n\n```json\n(.*?)```", PAGE, re.DOTALL)
    assert rows
    Path("prompts.jsonl").write_text(rows[1], encoding="utf-8")
    assert len(COMMANDS) >= 2
    for command in COMMANDS:
        assert cli.run(shlex.split(command)[1:]) == 0, command
