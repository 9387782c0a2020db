"""What must not be in a file of the repository."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from tree import ROOT, files

BINARY = {".safetensors", ".png", ".so", ".npz"}
WRITTEN_BY_PROGRAMS = {"tokenizer.json"}
TEXT = [
    path for path in files() if path.suffix not in BINARY and path.name not in WRITTEN_BY_PROGRAMS
]
LARGEST = 24_000_000  # bytes; the bundled weights

# Put together here, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.~])/(?:" + "|".join(["work", "root", "home", "tmp"]) + r")/\w")
UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", TEXT, ids=name)
def test_text(path: Path) -> None:
    text = path.read_bytes().decode("utf-8")
    assert "\r" not in text
    assert not text or text.endswith("\n")
    assert not (found := MACHINE_PATHS.search(text)), found
    assert not (found := UNFINISHED.search(text)), found
    if path.suffix != ".md":  # two blanks at a line's end mean something there
        assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_extras_are_the_promised_ones() -> None:
    extras = re.findall(
        r"^(\w+) = \[",
        (ROOT / "pyproject.toml")
        .read_text(encoding="utf-8")
        .partition("[project.optional-dependencies]")[2]
        .partition("\n[")[0],
        re.MULTILINE,
    )
    assert extras == ["train", "serve", "ray", "eval", "interpret", "all", "dev"]


def test_nothing_is_too_large() -> None:
    assert {name(path) for path in files() if path.stat().st_size > LARGEST} == set()


def test_scripts_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_targets(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = {"demo": "optlm generate", "test": "-m pytest", "lint": "ruff check"}[target]
    assert wanted in done.stdout


def test_files_of_tests_have_names_of_their_own() -> None:
    """Folders of tests are no packages, so files are told by their names alone.

    Scripts of benchmarks/ are imported by tests too: a helper of the same name would hide one.
    """
    rooms = ("tests", "benchmarks")
    found = [path for path in files() if path.relative_to(ROOT).parts[0] in rooms]
    names = [path.name for path in found if path.suffix == ".py" and path.stem != "conftest"]
    assert sorted(names) == sorted(set(names))
