"""The README's commands and program run, and so do the examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

from variants import VARIANTS, make_state, write_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "facebook/opt-125m"  # a tiny folder of the same kind stands in for it


FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCED if name == language]


COMMANDS = [
    line.removeprefix("$ ")
    for block in blocks("console")
    for line in block.splitlines()
    if line.startswith("$ ")
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS["base"]
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "opt", config, make_state(config))


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_set_up_is_exactly_two_commands() -> None:
    assert [line for line in COMMANDS if line.startswith("make")] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("optlm")])
def test_command(command: str, stand_in: Path, tmp_path: Path) -> None:
    words = [str(stand_in) if word == HUB_MODEL else word for word in shlex.split(command)]
    output = run(["-m", *words], tmp_path)
    assert output or words[1] == "convert"


def test_nothing_but_make_and_optlm_is_shown() -> None:
    assert {line.split()[0] for line in COMMANDS} == {"make", "optlm"}


@pytest.mark.parametrize("program", blocks("python"))
def test_program(program: str, tmp_path: Path) -> None:
    output = run(["-W", "error", "-c", program], tmp_path)
    assert output.startswith("Once upon a time")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_example(path: Path, stand_in: Path, tmp_path: Path) -> None:
    for model in ([], [str(stand_in)]):
        assert run(["-W", "error", str(path), *model], tmp_path).strip()


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_of_the_readme_is_true() -> None:
    (tree,) = (block for block in blocks("") if block.startswith("src/optlm/"))
    for line in tree.splitlines():
        folder = ROOT / "src" / "optlm" if line.startswith("  ") else ROOT
        assert (folder / line.split()[0]).exists(), line
