"""The scripts that measure and torment the training loop, at the smallest sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train_worker
import training

BENCHMARKS = Path(training.__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["pretrain", "finetune", "distil"])
def test_runs_survive_kills(technique: str, tmp_path: Path) -> None:
    """Two kills of every kind of run here; benchmarks/results has many."""
    command = [sys.executable, str(BENCHMARKS / "kills.py"), "--technique", technique]
    command += ["--kills", "2", "--steps", "18", "--seed", "5", "--longest", "0.6"]
    command += ["--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert len(rows) == (1 if technique == "pretrain" else 3)
    for row in rows:
        assert row["same bits"] is row["same log"] is True
        assert row["while training"] + row["with a half-written file"] == 2


@pytest.mark.parametrize("kind", ["optlm", "plain", "transformers"])
def test_every_loop_learns_the_same_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "transformers":
        pytest.importorskip("transformers")
    shape = {"vocab": 64, "width": 16, "layers": 2, "heads": 2, "context": 32}
    monkeypatch.setattr(train_worker, "SHAPE", shape)
    monkeypatch.setattr(train_worker, "RATE", 0.02)
    first = train_worker.rows_of(0, 4, 16)
    monkeypatch.setattr(train_worker, "rows_of", lambda step, rows, length: first)
    loop = train_worker.LOOPS[kind]()
    request: dict[str, Any] = {"op": "load", "form": "bf16", "threads": 1, "rows": 4, "length": 16}
    assert "torch" in train_worker.answer(loop, request)["packages"]
    before = train_worker.answer(loop, {"op": "train", "steps": 1})
    after = train_worker.answer(loop, {"op": "train", "steps": 12})
    assert after["loss"] < 0.97 * before["loss"]
    assert before["seconds"] > 0


def test_headline_is_the_median_of_ratios_within_rounds() -> None:
    seconds = {"optlm": [1.0, 2.0, 1.0], "plain": [1.5, 3.0, 9.0], "transformers": [2.0, 4.0, 3.0]}
    assert training.headline(seconds) == {
        "optlm over plain loop": 1.5,
        "optlm over transformers' Trainer": 2.0,
    }
    assert training.row("x", 8192, 2, [1.0, 2.0])["step_ms"] == 750
