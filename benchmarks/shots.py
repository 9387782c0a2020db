"""A model on every evaluation set, zero-, one- and many-shot, and a sweep over the shots.

    python benchmarks/shots.py --data DIR [--model FOLDER] [--limit N] [--sweep]

DIR is a folder of the evaluation sets (docs/evaluation.md). Everything goes through the command
`optlm eval`; sets that take no shots are read whole. docs/evaluation.md has the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import common
import report
from optlm.evaluate.tasks import TASKS

SHOTS = "0,1,32"
SWEEP = ("copa", "cb", "arc_easy")
SWEEP_SHOTS = "0-8"


def main() -> None:
    wanted = arguments()
    names = wanted.tasks or [name for name in TASKS if name != "piqa_harness"]
    with_shots = [name for name in names if TASKS[name].takes_shots]
    whole = [name for name in names if not TASKS[name].takes_shots]
    rows = evaluated(wanted, with_shots, SHOTS, wanted.limit)
    rows += evaluated(wanted, whole, "0", None)
    swept = [name for name in SWEEP if name in names and wanted.sweep]
    sweep = evaluated(wanted, swept, SWEEP_SHOTS, wanted.limit)
    rows.sort(key=lambda row: (list(TASKS).index(row["task"]), row["shots"]))
    columns = {
        "task": "task", "items": "items", "shots": "shots", "fitted": "shots that fitted, mean",
        "metric": "metric", "value": "value", "low": "low", "high": "high", "chance": "chance",
        "cut": "questions cut",
    }  # fmt: skip
    for name, found in (("shots", rows), ("shots-sweep", sweep)):
        if not found:
            continue
        report.Report(
            name=name,
            title="The bundled model on the evaluation sets" if name == "shots" else "More shots",
            method=(
                f"`optlm eval --limit {wanted.limit} --cut --dtype {wanted.dtype}`: the first "
                f"{wanted.limit} items of a set (all of those that take no shots, and where there "
                "are fewer); shots are drawn anew for each item and left out whole where the "
                "context has no room. low, high: 95 % intervals."
            ),
            rows=found,
            columns=columns,
            headline={"clear of chance": clear_of_chance(found)},
            packages={"lm-eval": metadata.version("lm-eval")},
        ).publish(wanted, (lambda path: draw(path, sweep)) if name == "shots-sweep" else None)


def arguments() -> argparse.Namespace:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation sets")
    parser.add_argument("--model", help="checkpoint folder (the bundled model)")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--limit", type=int, default=500, help="items of a set")
    parser.add_argument("--sweep", action="store_true", help=f"also {SWEEP_SHOTS} shots of a few")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), help="only these")
    return common.parse(parser)


def evaluated(
    wanted: argparse.Namespace, tasks: Sequence[str], shots: str, limit: int | None
) -> list[dict[str, Any]]:
    """A row for each task and number of shots, by its protocol's metric."""
    if not tasks:
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [
            sys.executable, "-m", "optlm", "eval", "--tasks", ",".join(tasks),
            "--data", str(wanted.data), "--num-fewshot", shots, "--cut", "--run-code",
            "--dtype", wanted.dtype, "--threads", str(wanted.threads), "--json", str(file),
        ]  # fmt: skip
        command += ["--limit", str(limit)] if limit else []
        command += ["--model", wanted.model] if wanted.model else []
        subprocess.run(command, check=True, stdout=sys.stderr)
        runs = json.loads(file.read_text(encoding="utf-8"))
    return [row_of(result) for run in runs for result in run["results"]]


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    measure = result["measures"][result["metric"]]
    return {
        "task": result["task"],
        "items": result["items"],
        "shots": result["num_fewshot"],
        "fitted": result["shots_mean"],
        "metric": result["metric"],
        **measure,
        "chance": result["chance"],
        "cut": result["cut"],
        "groups": {name: group["value"] for name, group in result["groups"].items()},
    }


def clear_of_chance(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows whose interval does not hold what guessing gives."""
    return [
        f"{row['task']} {row['shots']}"
        for row in rows
        if row["chance"] is not None
        and row["low"] is not None
        and not row["low"] <= row["chance"] <= row["high"]
    ]


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Value over shots, one panel a task, with intervals and what guessing gives."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["task"] for row in rows))
    size = (2.8 * len(names), 2.8)
    figure, axes = pyplot.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        own = [row for row in rows if row["task"] == name]
        shots = [row["shots"] for row in own]
        axis.fill_between(
            shots, [row["low"] for row in own], [row["high"] for row in own],
            color=report.PEER_COLOR, alpha=0.5, linewidth=0,
        )  # fmt: skip
        axis.plot(shots, [row["value"] for row in own], color=report.OURS_COLOR, marker=".")
        axis.axhline(own[0]["chance"], color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{name}, {own[0]['metric']}", fontsize=9, loc="left")
        axis.set_xlabel("shots", fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
