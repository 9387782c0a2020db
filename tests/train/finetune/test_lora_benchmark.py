"""benchmarks/lora.py on a tiny model, our side alone; the peer is not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from variants import VARIANTS, make_state, write_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def test_our_side_runs(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path / "tiny", config, make_state(config))
    sizes = ["--rows", "1", "--length", "16", "--rounds", "1", "--steps", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "lora.py", "--model", folder, "--ways", "optlm", *sizes,
         "--results", tmp_path],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("*-lora.json")
    values = json.loads(result.read_text())
    assert not values["failures"]
    assert values["rows"][0]["steps_per_s"] > 0
    assert values["headline"]["peak memory in MB (goal: under 2500)"] < 2500
