"""Tokens scored a second: whole windows of a text, every token given those before it.

python benchmarks/scoring.py --text wikitext2_raw_test.jsonl

The text is JSON Lines with "text" (the rows are joined by an empty line, as the GPTQ protocol has
it) or plain text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import report
from checkpoints import checkpoint
from common import ENGINES, Spread, Worker

METHOD = (
    "Windows of {tokens} tokens of {text} under the GPTQ protocol: {scored} predictions each, "
    "{threads} threads. transformers computes all logits of the window and their cross-entropy in "
    "one call; ours is `Scorer`. A round is one window, the same for all engines, which take "
    "turns; medians of {rounds} rounds after one that does not count. The difference is that of "
    "the mean log-probability of a round's tokens from transformers f32, the largest of all rounds."
)
NAMES = ("optlm-int8", "optlm-bf16", "optlm-f32", "transformers-bf16", "transformers-f32")
REFERENCE = "transformers-f32"


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="125m", help="a shape, 'bundled', or a folder")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what is scored")
    parser.add_argument("--tokens", type=int, default=2048, help="of a window")
    common.engine_option(parser)
    wanted = common.parse(parser)
    failures: dict[str, str] = {}
    packages: dict[str, str] = {}
    windows = read_windows(wanted.text, wanted.model, wanted.tokens, wanted.rounds + 1)
    with common.workers(wanted.engines or NAMES, wanted.model, wanted.threads, failures) as running:
        for worker in running.values():
            packages |= worker.packages
        rows, bandwidths = measure(running, windows, wanted, failures)
    report.Report(
        name="scoring",
        title=f"Scoring windows of {wanted.tokens} tokens",
        method=METHOD.format(
            tokens=wanted.tokens,
            scored=wanted.tokens - 1,
            text=wanted.text.name,
            threads=wanted.threads,
            rounds=wanted.rounds,
        ),
        rows=rows,
        columns={
            "model": "model",
            "engine": "engine",
            "tokens_per_s": "tokens/s",
            "ms": "ms",
            "ms_least": "least",
            "ms_most": "most",
            "difference": "difference, nats a token",
        },
        headline=headline(rows),
        packages=packages,
        bandwidths=bandwidths,
        failures=failures,
    ).publish(wanted)


def read_windows(text: Path, model: str, size: int, count: int) -> list[list[int]]:
    """The first `count` whole windows of the text."""
    from optlm.tokenizer import Tokenizer

    content = text.read_text(encoding="utf-8")
    if text.suffix == ".jsonl":
        content = "\n\n".join(json.loads(line)["text"] for line in content.splitlines())
    ids = Tokenizer.from_folder(checkpoint(model)).encode(content)
    windows = [ids[begin : begin + size] for begin in range(0, size * count, size)]
    if len(windows[-1]) < size:
        raise SystemExit(f"{text} has {len(ids)} tokens; {count} windows of {size} are needed")
    return windows


def measure(
    running: Mapping[str, Worker],
    windows: Sequence[Sequence[int]],
    wanted: argparse.Namespace,
    failures: dict[str, str],
) -> tuple[list[dict[str, Any]], list[float]]:
    totals: dict[str, list[float]] = {name: [] for name in running}

    def score(name: str, worker: Worker, turn: int) -> float:
        reply = worker.ask("score", windows=[windows[turn]])
        totals[name].append(reply["totals"][0])
        return float(reply["seconds"])

    seconds, bandwidths = common.alternate(
        {n: lambda turn, n=n, w=w: score(n, w, turn) for n, w in running.items()},
        wanted.rounds,
        threads=wanted.threads,
        failed=lambda name, error: common.note(failures, wanted.model, name, error),
    )
    rows = []
    for name, taken in seconds.items():
        spread = Spread.of(taken)
        rows.append(
            {
                "model": Path(wanted.model).name,
                "engine": ENGINES[name].title,
                "tokens_per_s": (wanted.tokens - 1) / spread.median,
                "ms": 1e3 * spread.median,
                "ms_least": 1e3 * spread.least,
                "ms_most": 1e3 * spread.most,
                "difference": largest_difference(totals, name, wanted.tokens - 1),
                "rounds": spread.count,
            }
        )
    return rows, bandwidths


def largest_difference(totals: Mapping[str, Sequence[float]], name: str, scored: int) -> float:
    """Nats a token between an engine and the reference; NaN without the reference."""
    pairs = zip(totals[name], totals.get(REFERENCE, ()), strict=False)
    return max((abs(mine - theirs) / scored for mine, theirs in pairs), default=float("nan"))


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Our int8 over the fastest of transformers, our f32 over its f32."""
    speeds = {row["engine"]: row["tokens_per_s"] for row in rows}
    theirs = {name: value for name, value in speeds.items() if name.startswith("transformers")}
    found: dict[str, Any] = {}
    if theirs and "optlm int8" in speeds:
        best = max(theirs, key=lambda name: theirs[name])
        found[f"optlm int8 over {best}"] = speeds["optlm int8"] / theirs[best]
    if "transformers f32" in speeds and "optlm f32" in speeds:
        found["optlm f32 over transformers f32"] = speeds["optlm f32"] / speeds["transformers f32"]
    return found


if __name__ == "__main__":
    main()
