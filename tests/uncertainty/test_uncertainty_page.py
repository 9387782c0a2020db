"""The commands and programs of docs/uncertainty.md run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "uncertainty.md"
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
NAMES = ("dog", "cat", "fox", "girl", "boy", "bird", "bear", "king", "duck", "frog")
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
    made = tmp_path_factory.mktemp("page")
    subjects = [f"The {size} {name}" for size in ("big", "sad", "old", "red") for name in NAMES]
    pairs = [(f"{name} was happy.", f"{name} were happy.") for name in subjects]
    rows = [
        dict(zip(("good", "bad"), pair if place % 4 else pair[::-1], strict=True))
        for place, pair in enumerate(pairs)  # every fourth label is wrong
    ]
    (made / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"Once upon a time there was a {name}. The {name} liked to play." for name in NAMES]
    (made / "texts.txt").write_text("\n".join(texts))
    return made


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, folder: Path) -> None:
    assert python("-m", "optlm", *shlex.split(command), folder=folder)


@pytest.mark.parametrize("program", [text for name, text in FENCED if name == "python"])
def test_program(program: str, folder: Path) -> None:
    assert python("-W", "error", "-c", program, folder=folder)
