"""`optlm batch`: what a user types, reads and gets."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from batch_tools import write_rows

from optlm import cli

ROWS = ["the cat", {"prompt": "on the mat", "id": 1}, {"id": 2}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", ROWS)


def batch(*words: object, model: Path) -> int:
    try:
        return cli.run(["batch", *map(str, words), "--max-tokens", "4", "-m", str(model)])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def base(models: dict[str, Path]) -> Path:
    return models["base"]


def test_summary_and_talk(
    source: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(source, out, "--json", "--keep", "id", model=base) == 0
    said = capfd.readouterr()
    summary = json.loads(said.out)
    assert (summary["rows"], summary["errors"], summary["resumed_rows"]) == (3, 1, 0)
    assert "3 rows; 1 with an error" in said.err
    assert [json.loads(line).get("input") for line in out.read_text().splitlines()] == [
        None,
        {"id": 1},
        {"id": 2},
    ]
    assert batch(source, out, "--keep", "id", model=base) == 0
    assert "3 rows, 3 of them by earlier runs" in capfd.readouterr().err


def test_standard_input_and_output(
    source: Path,
    base: Path,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def piped(*words: object) -> bytes:
        stream = io.TextIOWrapper(io.BytesIO(source.read_bytes()))
        monkeypatch.setattr("sys.stdin", stream)
        assert batch(*words, model=base) == 0
        return capfdbinary.readouterr().out

    assert batch(source, tmp_path / "out.jsonl", model=base) == 0
    wanted = (tmp_path / "out.jsonl").read_bytes()
    assert piped("-", "-") == wanted
    assert piped(source, "-") == wanted
    piped("-", tmp_path / "piped.jsonl")
    assert (tmp_path / "piped.jsonl").read_bytes() == wanted
    assert {path.name for path in tmp_path.iterdir()} == {
        "in.jsonl",
        *(f"{name}{end}" for name in ("out.jsonl", "piped.jsonl") for end in ("", ".journal")),
    }


def test_what_cannot_be(
    source: Path, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    taken = tmp_path / "taken.jsonl"
    taken.write_text("precious")
    for words, code, told in (
        ((source,), 2, "required: OUT"),
        ((tmp_path / "none.jsonl", out), 2, "none.jsonl: No such file"),
        ((source, tmp_path / "no" / "out.jsonl"), 2, "No such file"),
        ((source, taken), 2, "--overwrite"),
        ((source, "-", "--json"), 2, "both write to standard output"),
        ((source, out, "--temperature", "-3"), 2, "temperature"),
        ((source, out, "--force"), 2, "--force goes with --adapter"),
        ((source, out, "--sync-seconds", "nan"), 2, "sync-seconds"),
        ((source, source), 2, "same file"),
        ((source, tmp_path / "out.parquet"), 2, "plain JSON Lines"),
        ((source, tmp_path / "out.jsonl.zst"), 2, "plain JSON Lines"),
    ):
        assert batch(*words, model=base) == code, words
        assert told in capfd.readouterr().err
    assert taken.read_text() == "precious"
    assert not out.exists()


def test_a_full_disk(source: Path, base: Path) -> None:
    """/dev/full for the output stream; test_batch_crashes.py has the files."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    words = [sys.executable, "-m", "optlm", "batch", str(source), "-", "-m", str(base)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
