"""Running commands in this process: exit code, stdout, stderr."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from cli_run import Result, Run

from optlm import cli
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("OPTLM_DEBUG", "")  # --debug sets it; undone after the test

    def call(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            code = cli.run([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse: bad usage, help, version
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for every variant."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(folder / name, config, make_state(config))
        for name, config in VARIANTS.items()
    }


@pytest.fixture
def base(models: dict[str, Path]) -> Path:
    return models["base"]
