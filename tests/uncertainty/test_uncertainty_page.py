"""The commands and programs of docs/uncertainty.md run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "uncertainty.md"
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.removeprefix("$ optlm ")
    for name, block in FENCED
    if name == "console"
    for line in block.splitlines()
    if line.startswith("$ optlm ")
]


def python(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands, in the order of the page: some use what others wrote."""
    return tmp_path_factory.mktemp("page")


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path) -> None:
    assert python("-m", "optlm", *shlex.split(command), folder=folder)


@pytest.mark.parametrize("program", [text for name, text in FENCED if name == "python"])
def test_program(program: str, folder: Path) -> None:
    assert python("-W", "error", "-c", program, folder=folder)
