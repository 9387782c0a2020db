"""The commands and programs of docs/evaluation.md run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from made_up import write_sets

from optlm.cli import run

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ optlm (.+)$", PAGE, re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_sets(tmp_path / "EVAL")
    examples = [
        {"text": f"thing {name} {i}", "label": label, "lang": "en"}
        for i in range(3)
        for name, label in (("x", "good"), ("y", "bad"))
    ]
    for name, tail in (("items", "?"), ("shots", ""), ("corpus", "!")):
        lines = [json.dumps(example | {"text": example["text"] + tail}) for example in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_has_examples() -> None:
    assert len(COMMANDS) >= 6
    assert len(PROGRAMS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(command)) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program: str, folder: Path) -> None:
    exec(program, {})
