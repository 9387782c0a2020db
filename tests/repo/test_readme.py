"""The README's commands and program run, and so do the examples.

Commands stand alone, but for those of "Train your own", which a newcomer types one after another.
"""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT

from optlm import cli
from variants import VARIANTS, make_state, write_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "facebook/opt-125m"  # a tiny folder of the same kind stands in for it


WALK = README.split("\n## Train your own\n")[1].split("\n## ")[0]


def blocks(language: str, page: str = README) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(page: str) -> list[str]:
    lines = [line for block in blocks("console", page) for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


COMMANDS = commands(README.replace(WALK, ""))


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
    assert {line.split()[0] for line in commands(README)} == {"make", "optlm"}


WORDS = {
    "who": ["Anna", "The miller", "A grey heron", "My brother", "The postman", "Old Marta"],
    "did": ["walked to", "looked at", "painted", "forgot", "remembered", "sold"],
    "what": ["the river", "a small bridge", "the house of stone", "the market", "an empty boat"],
    "when": ["in the morning", "before the rain", "after supper", "on Sunday", "late at night"],
}


def test_train_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, adapt, merge, distil, generate: as shown, in one folder with own text."""
    draw = random.Random(0)
    lines = [" ".join(map(draw.choice, WORDS.values())) + ".\n" for _ in range(400)]
    texts = {"my-text": lines[:300], "held-out": lines[300:], "style": lines[:20]}
    for name, part in texts.items():
        text = "".join(part)
        (tmp_path / f"{name}.txt").write_text(text.upper() if name == "style" else text)
    names = re.findall(r"`(\w+\.json)`", WALK)
    for name, text in zip(names, blocks("json", WALK), strict=True):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for command in commands(WALK):
        words = shlex.split(command)
        assert cli.run(words[1:]) == 0, capsys.readouterr().err
        told = capsys.readouterr()
        if words[1] == "generate" and "--adapter" not in words:
            assert len(set(told.out.split()) & set(" ".join(lines).split())) >= 3, told.out
        if words[1] == "distil":
            assert told.out.count("\n| ") == 2  # student and teacher


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
