"""Engines of every variant, shared by the tests of uncertainty; and a page in a real Chromium."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from optlm import LLM, cli
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder for every variant."""
    folder = tmp_path_factory.mktemp("uncertain")
    return {
        name: write_checkpoint(folder / name, config, make_state(config))
        for name, config in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def engine(folders: dict[str, Path]) -> Callable[[str], LLM]:
    """An engine of a variant, made once."""
    made: dict[str, LLM] = {}

    def get(name: str) -> LLM:
        if name not in made:
            made[name] = LLM(folders[name], dtype="f32", threads=1)
        return made[name]

    return get


@pytest.fixture
def base(engine: Callable[[str], LLM]) -> LLM:
    return engine("base")


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("OPTLM_DEBUG", "")

    def call(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            code = cli.run([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call
