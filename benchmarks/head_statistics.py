"""Peak memory of head statistics over 2,048 tokens, beside a plain forward pass and dense maps.

python benchmarks/head_statistics.py                  random weights of the 125M shape
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import report

LENGTH = 2048
TASKS = ("load", "forward", "hidden", "statistics", "dense")
METHOD = (
    f"Each row is a fresh process: random float32 weights, one text of {LENGTH:,} random tokens. "
    "'Peak' is the kernel's VmHWM; 'above weights' is the peak less that of a process that only "
    "makes the model. 'hidden' is the pass without the head, so without logits; 'forward' has "
    "them; 'dense' keeps one layer's maps at a time. {threads} threads, medians of {rounds} "
    "processes."
)


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="125m", help="a published shape")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    wanted = common.parse(parser)
    if wanted.task:
        print(json.dumps(work(wanted.task, wanted.model, wanted.threads)))
        return
    found = {task: [run(task, wanted) for _ in range(wanted.rounds)] for task in TASKS}
    rows = rows_of(found, wanted.model)
    by_task = {row["task"]: row for row in rows}
    report.Report(
        name="head-statistics",
        title=f"Memory of head statistics, {LENGTH:,} tokens",
        method=METHOD.format(threads=wanted.threads, rounds=wanted.rounds),
        rows=rows,
        columns={
            "model": "model",
            "task": "task",
            "peak_mb": "peak MB",
            "above_mb": "above weights MB",
            "seconds": "processor seconds",
        },
        headline={
            "peak, statistics over forward": ratio(by_task, "forward", "peak_mb"),
            "peak, statistics over the pass without logits": ratio(by_task, "hidden", "peak_mb"),
            "above weights, statistics over the pass without logits": ratio(
                by_task, "hidden", "above_mb"
            ),
            "above weights, statistics over dense": ratio(by_task, "dense", "above_mb"),
        },
        packages={},
        failures={},
    ).publish(wanted)


def ratio(rows: dict[str, dict[str, Any]], other: str, key: str) -> float:
    return float(rows["statistics"][key] / rows[other][key])


def rows_of(found: dict[str, list[dict[str, float]]], model: str) -> list[dict[str, Any]]:
    peaks = {
        task: common.Spread.of([run["peak_mb"] for run in runs]) for task, runs in found.items()
    }
    return [
        {
            "model": model,
            "task": task,
            "peak_mb": peaks[task].median,
            "above_mb": peaks[task].median - peaks["load"].median,
            "seconds": common.Spread.of([run["seconds"] for run in runs]).median,
        }
        for task, runs in found.items()
    ]


def run(task: str, wanted: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable, str(Path(__file__)), "--task", task, "--model", wanted.model,
        "--threads", str(wanted.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(task: str, shape: str, threads: int) -> dict[str, float]:
    """Do one task in this process; its processor seconds and the peak of resident memory."""
    import numpy as np
    import torch

    from optlm.config import PUBLISHED
    from optlm.interpret import head_statistics, visit_attention
    from optlm.model import OPT

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = OPT(PUBLISHED[shape].config).eval()
    tokens = [2, *np.random.default_rng(0).integers(4, 50000, LENGTH - 1).tolist()]
    row = torch.tensor([tokens])
    tasks = {
        "load": lambda: None,
        "forward": lambda: model(row),
        "hidden": lambda: model.hidden(row),
        "statistics": lambda: head_statistics(model, [tokens]),
        "dense": lambda: visit_attention(model, tokens, lambda layer, maps: None),
    }
    with torch.no_grad():
        start = time.process_time()
        tasks[task]()
        seconds = time.process_time() - start
    return {"seconds": seconds, "peak_mb": peak_mb()}


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
