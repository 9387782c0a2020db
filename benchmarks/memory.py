"""Peak resident memory of loading a model and generating with it.

python benchmarks/memory.py                  125m, int8, ours and the peers
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import common
import report
from common import ENGINES, Spread, Worker, WorkerError
from optlm.config import OPTConfig

PROMPT, TOKENS = 32, 64
METHOD = (
    f"A fresh process loads the model and generates {TOKENS} tokens after {PROMPT}. 'Peak' is the "
    "kernel's VmHWM, which counts mapped pages of the checkpoint too; 'after' is the resident set "
    "at the end. {threads} threads, medians of {rounds} processes. 'Over weights' divides by one "
    "(int8), two (bf16) or four (f32) bytes a parameter."
)


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", default=["125m"], help="shapes, 'bundled', folders")
    common.engine_option(parser)
    wanted = common.parse(parser)
    failures: dict[str, str] = {}
    packages: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for model in wanted.models:
        for name in wanted.engines or list(ENGINES):
            row = measure(model, name, wanted, failures, packages)
            rows += [row] if row else []
    report.Report(
        name="memory",
        title="Peak resident memory",
        method=METHOD.format(threads=wanted.threads, rounds=wanted.rounds),
        rows=rows,
        columns={
            "model": "model",
            "engine": "engine",
            "peak_mb": "peak MB",
            "after_mb": "after MB",
            "anonymous_mb": "own MB",
            "files_mb": "of files MB",
            "weights_mb": "weights MB",
            "peak_over_weights": "peak over weights",
            "after_over_weights": "after over weights",
        },
        headline=headline(rows),
        packages=packages,
        failures=failures,
    ).publish(wanted, plot=lambda path: plot(path, rows))


def measure(
    model: str,
    name: str,
    wanted: argparse.Namespace,
    failures: dict[str, str],
    packages: dict[str, str],
) -> dict[str, Any] | None:
    """One row of the table, or None with the reason noted in `failures`."""
    found = []
    for _ in range(wanted.rounds):
        with common.workers([name], model, wanted.threads, failures) as running:
            if name not in running:
                return None
            packages |= running[name].packages
            try:
                found.append(after_generating(running[name], model))
            except WorkerError as error:
                common.note(failures, model, name, error)
                return None
    median = {key: Spread.of([sample[key] for sample in found]).median / 1e6 for key in found[0]}
    config = OPTConfig.from_file(checkpoints.checkpoint(model) / "config.json")
    weights = config.weight_bytes(ENGINES[name].form) / 1e6
    return {
        "model": Path(model).name,
        "engine": ENGINES[name].title,
        "peak_mb": median["peak"],
        "after_mb": median["resident"],
        "anonymous_mb": median["anonymous"],
        "files_mb": median["files"],
        "weights_mb": weights,
        "peak_over_weights": median["peak"] / weights,
        "after_over_weights": median["resident"] / weights,
        "rounds": len(found),
    }


def after_generating(worker: Worker, model: str) -> dict[str, int]:
    """Bytes of the worker's process once it has generated."""
    worker.seconds(common.prompts(1, PROMPT, common.vocabulary(model), 1), TOKENS)
    reply: dict[str, int] = worker.ask("memory")
    return reply


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        if row["engine"] == ENGINES[common.OURS].title:
            found[f"{row['model']}: optlm int8, peak over the weights' bytes"] = row[
                "peak_over_weights"
            ]
            found[f"{row['model']}: optlm int8, resident after over the weights' bytes"] = row[
                "after_over_weights"
            ]
    return found


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        panels.setdefault(row["model"], {})[row["engine"]] = row["peak_mb"]
    report.plot_bars(path, "Peak resident memory", panels, "MB", columns=2)


if __name__ == "__main__":
    main()
