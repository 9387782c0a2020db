"""Tokens a second while generating: our engine and the peers, taking turns in one run.

python benchmarks/decode.py                  shapes 125m, 350m, 1.3b and the bundled model
python benchmarks/decode.py --sparse         fc2 without its zero inputs, on against off
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import checkpoints
import common
import report
from common import ENGINES, OURS, Spread, Worker
from optlm.config import OPTConfig

PROMPT = 32
STEPS = 32  # decode steps timed at once
STEPS_BIG = 16  # from batch 32 on, of the slow sizes
STEPS_SMALL = 128  # a small model's steps are too short to be timed in tens
FACT_STEPS = 128
SMALL = 50_000_000  # parameters
BIG = ("350m", "1.3b")  # float32 takes too much time and memory there
METHOD = (
    "Greedy, prompts of {prompt} random tokens, {threads} threads, token ids in and out. A "
    "decode step is (time of N+1 tokens - time of 1 token) / N, N = {steps}. Engines take "
    "turns; medians of {rounds} rounds after one that does not count. The published shapes have "
    "random weights, so about half of the inputs of fc2 are zero (trained models have more "
    "zeros). Floor: weight bytes read a step over the memory bandwidth that a plain read loop "
    "reached between the same rounds, at batch 1; a dash where the weights fit the processor's "
    "cache."
)
SPARSE_METHOD = (
    "The same engine with and without skipping the rows of fc2 whose input is exactly zero, "
    "int8, greedy, {threads} threads, medians of {rounds} alternating rounds. All logits of all "
    "steps are compared bit for bit."
)


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", help="shapes, 'bundled', or checkpoint folders")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--sparse", action="store_true", help="compare with and without zeros")
    common.engine_option(parser)
    wanted = common.parse(parser)
    (sparse if wanted.sparse else dense)(wanted)


# ---- beside the peers ----------------------------------------------------------------------------


def dense(wanted: argparse.Namespace) -> None:
    models = wanted.models or ["125m", "350m", "1.3b", "bundled"]
    failures: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    packages: dict[str, str] = {}
    bandwidths: list[float] = []
    for model in models:
        names = wanted.engines or engines_for(model)
        with common.workers(
            names, model, wanted.threads, failures, longest(wanted.batches)
        ) as running:
            for worker in running.values():
                packages |= worker.packages
            for batch in wanted.batches:
                new, speeds = measure(running, model, batch, wanted, failures)
                rows += new
                bandwidths += speeds
    result = report.Report(
        name="decode",
        title="Decoding, tokens a second",
        method=METHOD.format(
            prompt=PROMPT,
            threads=wanted.threads,
            rounds=wanted.rounds,
            steps=f"{STEPS} ({STEPS_SMALL} for small models, {STEPS_BIG} for batch 32 of big ones)",
        ),
        rows=rows,
        columns={
            "model": "model",
            "batch": "batch",
            "engine": "engine",
            "tokens_per_s": "tokens/s",
            "step_ms": "step ms",
            "step_ms_least": "least",
            "step_ms_most": "most",
            "share_of_floor": "share of floor",
        },
        headline=headline(rows),
        packages=packages,
        bandwidths=bandwidths,
        failures=failures,
    )
    result.publish(wanted, plot=lambda path: plot(path, rows))


def engines_for(model: str) -> list[str]:
    return [name for name in ENGINES if not (model in BIG and name.endswith("f32"))]


def longest(batches: Sequence[int]) -> int:
    """Tokens one pass must carry so that all prompts are read at once and stay in step."""
    return max(common.BATCH_TOKENS, PROMPT * max(batches))


def num_steps(model: str, batch: int) -> int:
    config = OPTConfig.from_file(checkpoints.checkpoint(model) / "config.json")
    if config.parameter_count() < SMALL:
        return STEPS_SMALL
    return STEPS_BIG if model in BIG and batch >= 32 else STEPS


def measure(
    running: Mapping[str, Worker],
    model: str,
    batch: int,
    wanted: argparse.Namespace,
    failures: dict[str, str],
) -> tuple[list[dict[str, Any]], list[float]]:
    """Time one batch size on all engines; rows of the table, and bandwidths."""
    common.say(f"{model}: batch {batch}")
    size, steps = common.vocabulary(model), num_steps(model, batch)
    seconds, bandwidths = common.alternate(
        {
            name: partial(step_seconds, worker, batch, steps, size)
            for name, worker in running.items()
        },
        wanted.rounds,
        threads=wanted.threads,
        failed=lambda name, error: common.note(failures, model, name, error),
    )
    rows = []
    for name, taken in seconds.items():
        row = as_row(model, batch, ENGINES[name].title, taken)
        if name == OURS and batch == 1:
            try:
                row |= floor(running[name], size, statistics.median(bandwidths), taken)
            except common.WorkerError as error:
                common.note(failures, model, f"{name}, floor", error)
        rows.append(row)
    return rows, bandwidths


def step_seconds(worker: Worker, batch: int, steps: int, vocabulary: int, turn: int) -> float:
    """Seconds of one decode step; every call has prompts of its own."""
    one, many = (common.prompts(batch, PROMPT, vocabulary, 2 * turn + k) for k in (0, 1))
    first = worker.seconds(one, 1)
    return max(worker.seconds(many, steps + 1) - first, 1e-9) / steps


def as_row(model: str, batch: int, engine: str, steps: Sequence[float]) -> dict[str, Any]:
    spread = Spread.of(steps)
    return {
        "model": Path(model).name,
        "batch": batch,
        "engine": engine,
        "tokens_per_s": batch / spread.median,
        "step_ms": 1e3 * spread.median,
        "step_ms_least": 1e3 * spread.least,
        "step_ms_most": 1e3 * spread.most,
        "rounds": spread.count,
        "share_of_floor": None,
    }


def floor(
    worker: Worker, vocabulary: int, bandwidth: float, steps: Sequence[float]
) -> dict[str, Any]:
    """The step's memory floor. The share of active fc2 inputs comes from steps of single tokens."""
    worker.ask("facts")
    worker.seconds(common.prompts(1, 1, vocabulary, 0), FACT_STEPS)
    facts = worker.ask("facts")["result"]
    touched = common.touched_bytes(facts)
    fits = touched < 2 * common.cache_bytes()
    return {
        "bytes_per_step": touched,
        "active_fc2_inputs": facts["active_share"],
        "instruction_set": facts["instruction_set"],
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "floor_ms": 1e3 * touched / bandwidth,
        "share_of_floor": None if fits else touched / bandwidth / statistics.median(steps),
    }


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our int8 over the best peer, for every model and batch size; the share of the floor."""
    found: dict[str, Any] = {}
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        group = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        best = report.ratio_to_best_peer(group, "tokens_per_s")
        if best:
            found[f"{model}, batch {batch}: optlm int8 over {best[1]}"] = best[0]
        share = group[0]["share_of_floor"]
        if share and group[0]["engine"] == ENGINES[OURS].title:
            found[f"{model}, batch {batch}: share of the memory floor"] = share
    return found


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        panel = panels.setdefault(f"{row['model']}, batch {row['batch']}", {})
        panel[row["engine"]] = row["tokens_per_s"]
    batches = len({row["batch"] for row in rows})
    report.plot_bars(path, "Decoding", panels, "tokens/s", columns=batches)


# ---- without the zeros ---------------------------------------------------------------------------


def sparse(wanted: argparse.Namespace) -> None:
    """Our int8 with and without reading the rows of fc2 whose input is zero."""
    failures: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    bandwidths: list[float] = []
    for model in wanted.models or ["bundled", "125m"]:
        with common.workers(
            [OURS], model, wanted.threads, failures, longest(wanted.batches)
        ) as running:
            for batch in wanted.batches if running else []:
                row, speeds = compare_sparse(running[OURS], model, batch, wanted)
                rows.append(row)
                bandwidths += speeds
    if not rows:
        raise SystemExit(f"nothing was measured: {failures}")
    report.Report(
        name="sparse",
        title="Decoding without the zeros of the feed-forward layer",
        method=SPARSE_METHOD.format(threads=wanted.threads, rounds=wanted.rounds),
        rows=rows,
        columns={
            "model": "model",
            "batch": "batch",
            "active_fc2_inputs": "active inputs of fc2",
            "on_ms": "step ms, skipping",
            "off_ms": "step ms, reading all",
            "speedup": "faster by",
            "identical": "same bits",
        },
        headline={
            f"{row['model']}, batch {row['batch']}: skipping over reading all": row["speedup"]
            for row in rows
        }
        | {"logits identical bit for bit": all(row["identical"] for row in rows)},
        packages={},
        bandwidths=bandwidths,
        failures=failures,
    ).publish(wanted)


def compare_sparse(
    worker: Worker, model: str, batch: int, wanted: argparse.Namespace
) -> tuple[dict[str, Any], list[float]]:
    common.say(f"{model}: batch {batch}, with and without zeros")
    size, steps = common.vocabulary(model), num_steps(model, batch)

    def timed(skip: bool, turn: int) -> float:
        worker.ask("skip_zeros", on=skip)
        return step_seconds(worker, batch, steps, size, turn)

    def broken(name: str, error: Exception) -> None:
        raise error

    cases = {"on": partial(timed, True), "off": partial(timed, False)}
    seconds, bandwidths = common.alternate(
        cases, wanted.rounds, threads=wanted.threads, failed=broken
    )
    on, off = (Spread.of(seconds[name]) for name in cases)
    prompt = common.prompts(batch, PROMPT, size, 1)
    row = {
        "model": Path(model).name,
        "batch": batch,
        "active_fc2_inputs": active_share(worker, size),
        "on_ms": 1e3 * on.median,
        "off_ms": 1e3 * off.median,
        "on_ms_least": 1e3 * on.least,
        "on_ms_most": 1e3 * on.most,
        "off_ms_least": 1e3 * off.least,
        "off_ms_most": 1e3 * off.most,
        "speedup": off.median / on.median,
        "identical": digest(worker, prompt, on=True) == digest(worker, prompt, on=False),
    }
    return row, bandwidths


def active_share(worker: Worker, vocabulary: int) -> float | None:
    """Share of fc2's inputs that are not zero, over decode steps."""
    worker.ask("facts")
    worker.seconds(common.prompts(1, 1, vocabulary, 0), FACT_STEPS)
    share: float | None = worker.ask("facts")["result"]["active_share"]
    return share


def digest(worker: Worker, prompts: list[list[int]], *, on: bool) -> str:
    worker.ask("skip_zeros", on=on)
    reply: str = worker.ask("hash_logits", prompts=prompts, tokens=STEPS)["result"]
    return reply


if __name__ == "__main__":
    main()
