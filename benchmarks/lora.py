"""LoRA on the 125M shape: peak memory and steps a second, beside peft on transformers.

python benchmarks/lora.py              rank 8 on q_proj and v_proj, 2 rows of 256 tokens a step
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import common
import report
from common import Spread

WORKER = Path(__file__).with_name("lora_worker.py")
WAYS = {"optlm": ("optlm", None), "peft": ("peft on transformers", "transformers")}
LIMIT_MB = 2500
METHOD = (
    "Random weights of the 125M shape in float32, LoRA of rank 8 on q_proj and v_proj, {rows} rows "
    "of {length} random tokens a step (peft also reads the last of a row), dropout as in the "
    "configuration, AdamW, {threads} threads. Peak is the kernel's VmHWM after all rounds, with "
    "PyTorch and the mapped checkpoint. Ways take turns, {steps} steps each; medians of {rounds} "
    "rounds after one that does not count."
)


class LoraWorker(common.Process):
    """A process that holds one way of training."""

    def __init__(self, kind: str, environment: str | None, wanted: argparse.Namespace) -> None:
        super().__init__(
            WORKER,
            kind,
            environment,
            wanted.threads,
            folder=str(checkpoints.checkpoint(wanted.model)),
            rows=wanted.rows,
            length=wanted.length,
            vocabulary=common.vocabulary(wanted.model),
        )

    def train(self, steps: int, turn: int) -> float:
        """Seconds of some steps."""
        return float(self.ask("train", steps=steps)["seconds"])


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="125m", help="a shape or a folder")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps timed at once")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    wanted = parser.parse_args()
    failures: dict[str, str] = {}
    packages: dict[str, str] = {}
    running: dict[str, LoraWorker] = {}
    with ExitStack() as stack:
        for name in wanted.ways:
            try:
                running[name] = LoraWorker(name, WAYS[name][1], wanted)
            except (RuntimeError, OSError) as error:
                common.note(failures, wanted.model, name, error)
                continue
            stack.callback(running[name].close)
            packages |= running[name].packages
        seconds, bandwidths = common.alternate(
            {name: partial(worker.train, wanted.steps) for name, worker in running.items()},
            wanted.rounds,
            threads=wanted.threads,
            failed=lambda name, error: common.note(failures, wanted.model, name, error),
        )
        rows = [
            row(WAYS[name][0], wanted.steps, times, running[name].ask("memory")["peak"])
            for name, times in seconds.items()
        ]
    report.Report(
        name="lora",
        title="LoRA on the 125M shape",
        method=METHOD.format(**vars(wanted)),
        rows=rows,
        columns={
            "engine": "way",
            "steps_per_s": "steps/s",
            "least": "least",
            "most": "most",
            "peak_mb": "peak MB",
        },
        headline=headline(rows),
        packages=packages,
        bandwidths=bandwidths,
        failures=failures,
    ).publish(wanted)


def row(title: str, steps: int, times: list[float], peak: int) -> dict[str, Any]:
    speed = Spread.of([steps / took for took in times])
    return {
        "engine": title,
        "steps_per_s": speed.median,
        "least": speed.least,
        "most": speed.most,
        "peak_mb": peak / 1e6,
        "rounds": speed.count,
    }


def headline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_way = {row["engine"]: row for row in rows}
    ours, theirs = by_way.get("optlm"), by_way.get(WAYS["peft"][0])
    found: dict[str, Any] = {}
    if ours:
        found[f"peak memory in MB (goal: under {LIMIT_MB})"] = ours["peak_mb"]
    if ours and theirs:
        found["steps/s over peft on transformers"] = ours["steps_per_s"] / theirs["steps_per_s"]
        found["peak memory over peft on transformers"] = ours["peak_mb"] / theirs["peak_mb"]
    return found


if __name__ == "__main__":
    main()
