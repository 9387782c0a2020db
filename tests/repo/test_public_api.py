"""The public names, and that importing them is cheap until they are used."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import optlm
from variants import VARIANTS, make_state, write_checkpoint

PUBLIC = {
    "LLM",
    "SamplingParams",
    "RequestOutput",
    "OPTConfig",
    "PUBLISHED",
    "Tokenizer",
    "Checkpoint",
    "open_checkpoint",
    "save_checkpoint",
    "bundled_model",
    "OptlmError",
    "classify",
}


def test_the_list_is_deliberate() -> None:
    assert set(optlm.__all__) == PUBLIC
    assert set(optlm.__dir__()) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(optlm, name)
    assert value.__doc__
    assert getattr(value, "__module__", "optlm").startswith("optlm")


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = optlm.nonsense


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after `statement`."""
    code = f"""
import json, sys
try:
    {statement}
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {
    "torch",
    "transformers",
    "rich",
    "huggingface_hub",
    "matplotlib",
    "asyncio",
    "typer",
    "pydantic",
}


def test_import_loads_nothing_heavy() -> None:
    assert not modules_after("import optlm") & (HEAVY | {"numpy", "tokenizers", "argparse"})


@pytest.mark.parametrize("command", ["", "generate", "bench", "pretrain"])
def test_help_loads_nothing_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    statement = f"from optlm.cli import run; run({arguments!r})"
    assert not modules_after(statement) & (HEAVY | {"numpy", "tokenizers"})


def test_native_generation_loads_no_torch(tmp_path: Path) -> None:
    config = VARIANTS["mini"]
    folder = write_checkpoint(tmp_path / "model", config, make_state(config))
    arguments = ["generate", "the", "-m", str(folder), "--max-tokens", "2", "--backend", "native"]
    statement = f"from optlm.cli import run; run({arguments!r})"
    assert not modules_after(statement) & HEAVY


def test_help_is_fast() -> None:
    """Against a bare interpreter on the same machine: 150 ms where that takes 10."""

    def best(*arguments: str) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("-m", "optlm", "--help") < 15 * best("-c", "pass")
