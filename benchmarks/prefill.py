"""Tokens a second while reading a prompt: 512 tokens in, one row of logits out.

python benchmarks/prefill.py                 shapes 125m, 350m, 1.3b and the bundled model
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import report
from common import ENGINES, Spread, Worker
from decode import engines_for

METHOD = (
    "One prompt of {tokens} random tokens, {threads} threads, time to its first generated token "
    "(one row of logits). Every call has a new prompt, so no cache of prefixes helps. Engines "
    "take turns; medians of {rounds} rounds after one that does not count."
)


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", help="shapes, 'bundled', or checkpoint folders")
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    common.engine_option(parser)
    wanted = common.parse(parser)
    failures: dict[str, str] = {}
    packages: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    bandwidths: list[float] = []
    for model in wanted.models or ["125m", "350m", "1.3b", "bundled"]:
        names = wanted.engines or engines_for(model)
        with common.workers(names, model, wanted.threads, failures) as running:
            for worker in running.values():
                packages |= worker.packages
            new, speeds = measure(running, model, wanted, failures)
            rows += new
            bandwidths += speeds
    report.Report(
        name="prefill",
        title=f"Reading a prompt of {wanted.tokens} tokens",
        method=METHOD.format(tokens=wanted.tokens, threads=wanted.threads, rounds=wanted.rounds),
        rows=rows,
        columns={
            "model": "model",
            "engine": "engine",
            "tokens_per_s": "tokens/s",
            "ms": "ms",
            "ms_least": "least",
            "ms_most": "most",
        },
        headline=headline(rows),
        packages=packages,
        bandwidths=bandwidths,
        failures=failures,
    ).publish(wanted, plot=lambda path: plot(path, rows))


def measure(
    running: Mapping[str, Worker],
    model: str,
    wanted: argparse.Namespace,
    failures: dict[str, str],
) -> tuple[list[dict[str, Any]], list[float]]:
    tokens = wanted.tokens
    common.say(f"{model}: prompt of {tokens}")
    size = common.vocabulary(model)
    seconds, bandwidths = common.alternate(
        {name: partial(read, worker, tokens, size) for name, worker in running.items()},
        wanted.rounds,
        threads=wanted.threads,
        failed=lambda name, error: common.note(failures, model, name, error),
    )
    rows = []
    for name, taken in seconds.items():
        spread = Spread.of(taken)
        rows.append(
            {
                "model": Path(model).name,
                "engine": ENGINES[name].title,
                "tokens_per_s": tokens / spread.median,
                "ms": 1e3 * spread.median,
                "ms_least": 1e3 * spread.least,
                "ms_most": 1e3 * spread.most,
                "rounds": spread.count,
            }
        )
    return rows, bandwidths


def read(worker: Worker, tokens: int, vocabulary: int, turn: int) -> float:
    """Seconds from a prompt no call had before to its first generated token."""
    return worker.seconds(common.prompts(1, tokens, vocabulary, turn), 1)


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our int8 over the best peer, for every model."""
    found: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        best = report.ratio_to_best_peer([r for r in rows if r["model"] == model], "tokens_per_s")
        if best:
            found[f"{model}: optlm int8 over {best[1]}"] = best[0]
    return found


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        panels.setdefault(row["model"], {})[row["engine"]] = row["tokens_per_s"]
    report.plot_bars(path, "Reading a prompt", panels, "tokens/s", columns=2)


if __name__ == "__main__":
    main()
