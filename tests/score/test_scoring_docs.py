"""The commands and programs of docs/scoring.md run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for kind, text in BLOCKS
    for line in text.splitlines()
    if kind == "console"
]


def run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    assert "optlm" in run(["-m", *shlex.split(command)])


@pytest.mark.parametrize("program", [text for kind, text in BLOCKS if kind == "python"])
def test_program(program: str) -> None:
    assert "'convention': 'optlm'" in run(["-W", "error", "-c", program])
