"""Training tokens a second on the processor: our loop beside transformers' Trainer and a plain
loop.

python benchmarks/training.py                the mini-8m shape, 4,096 tokens a step in rows of 256
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import report
from common import Spread

WORKER = Path(__file__).with_name("train_worker.py")
METHOD = (
    "Shape of mini-8m ({shape}), {rows} rows of {length} random tokens a step, no dropout, weights "
    "and AdamW (fused) in float32, products in bfloat16 by autocast, gradients clipped at 1, "
    "{threads} threads. transformers: OPTForCausalLM in its Trainer. Plain: a GPT-2 of the same "
    "shape (one product for query, key and value, GELU, tied head) in a loop in the manner of "
    "nanoGPT. Loops take turns, {steps} steps each; medians of {rounds} rounds after one that does "
    "not count (it compiles)."
)


@dataclass(frozen=True, kw_only=True)
class TrainLoop:
    kind: str  # in train_worker.LOOPS
    form: str
    title: str
    environment: str | None = None


LOOPS = {
    "optlm": TrainLoop(kind="optlm", form="bf16", title="optlm"),
    "optlm-compiled": TrainLoop(kind="optlm", form="bf16-compiled", title="optlm, compiled"),
    "transformers": TrainLoop(
        kind="transformers",
        form="bf16",
        title="transformers' Trainer",
        environment="transformers",
    ),
    "plain": TrainLoop(kind="plain", form="bf16", title="plain loop"),
    "plain-compiled": TrainLoop(kind="plain", form="bf16-compiled", title="plain loop, compiled"),
}


class TrainWorker(common.Process):
    """A process that holds one loop."""

    def __init__(self, loop: TrainLoop, wanted: argparse.Namespace) -> None:
        super().__init__(
            WORKER,
            loop.kind,
            loop.environment,
            wanted.threads,
            form=loop.form,
            rows=wanted.rows,
            length=wanted.length,
        )

    def train(self, steps: int, turn: int) -> float:
        """Seconds of some steps."""
        return float(self.ask("train", steps=steps)["seconds"])


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps timed at once")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    wanted = parser.parse_args()
    failures: dict[str, str] = {}
    packages: dict[str, str] = {}
    with ExitStack() as stack:
        cases = {}
        for name in wanted.loops:
            try:
                worker = TrainWorker(LOOPS[name], wanted)
            except (RuntimeError, OSError) as error:
                common.note(failures, "mini-8m", name, error)
                continue
            stack.callback(worker.close)
            packages |= worker.packages
            cases[name] = partial(worker.train, wanted.steps)
        seconds, bandwidths = common.alternate(
            cases,
            wanted.rounds,
            threads=wanted.threads,
            failed=lambda name, error: common.note(failures, "mini-8m", name, error),
        )
    publish(wanted, seconds, bandwidths, packages, failures)


def publish(
    wanted: argparse.Namespace,
    seconds: dict[str, list[float]],
    bandwidths: list[float],
    packages: dict[str, str],
    failures: dict[str, str],
) -> None:
    tokens = wanted.rows * wanted.length * wanted.steps
    rows = [row(LOOPS[name].title, tokens, wanted.steps, times) for name, times in seconds.items()]
    report.Report(
        name="training",
        title="Training on the processor, tokens a second",
        method=METHOD.format(
            shape="8 layers, width 256, 4 heads, vocabulary 8,192",
            rows=wanted.rows,
            length=wanted.length,
            threads=wanted.threads,
            steps=wanted.steps,
            rounds=wanted.rounds,
        ),
        rows=rows,
        columns={
            "engine": "loop",
            "tokens_per_s": "tokens/s",
            "least": "least",
            "most": "most",
            "step_ms": "ms a step",
        },
        headline=headline(seconds),
        packages=packages,
        bandwidths=bandwidths,
        failures=failures,
    ).publish(wanted)


def row(title: str, tokens: int, steps: int, seconds: list[float]) -> dict[str, Any]:
    speed = Spread.of([tokens / s for s in seconds])
    return {
        "engine": title,
        "tokens_per_s": speed.median,
        "least": speed.least,
        "most": speed.most,
        "step_ms": 1e3 * statistics.median(seconds) / steps,
    }


def headline(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Each of our loops over each other loop: medians of the ratios within a round."""
    ratios = {}
    for ours in (name for name in seconds if name.startswith("optlm")):
        for peer in (name for name in seconds if not name.startswith("optlm")):
            pairs = zip(seconds[peer], seconds[ours], strict=True)
            title = f"{LOOPS[ours].title} over {LOOPS[peer].title}"
            ratios[title] = statistics.median(theirs / mine for theirs, mine in pairs)
    return ratios


if __name__ == "__main__":
    main()
