"""What the journal, the order and the rows of JSON cost: a batch job beside `LLM.generate`.

    python benchmarks/batch_speed.py

The same prompts with the same seeds, in one process and on one engine, in turns: in one call of
`LLM.generate`, and as a job from a file to a file, with the journal synced every second (the
default) and after every step. The texts are compared.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import report
from optlm import LLM, SamplingParams
from optlm.batch.inputs import find_input
from optlm.batch.job import BatchJob, Engine
from optlm.batch.settings import BatchSettings, row_seed

METHOD = (
    "The bundled model continues {rows:,} prompts of 2 to 60 tokens by {tokens} tokens each, "
    "sampled at temperature 1, the end token ignored; prefix cache off. {rounds} rounds, each "
    "beginning with another way; medians, and the median of the ratios within a round. A job reads "
    "its file twice (rows and digest first), writes journal and output, and syncs. The digest of "
    "the model is not part of it."
)
WORDS = "the cat sat on a mat and then it ran under house red Once upon time there was"


def prompts(rows: int) -> list[str]:
    words = WORDS.split()
    return [
        " ".join(words[(row * 7 + i * 3) % len(words)] for i in range(1 + row % 50)) + f" {row}"
        for row in range(rows)
    ]


def generate(llm: LLM, texts: list[str], tokens: int) -> list[str]:
    params = [
        SamplingParams(max_tokens=tokens, ignore_eos=True, seed=row_seed(0, row))
        for row in range(len(texts))
    ]
    return [output.text for output in llm.generate(texts, params)]


def batch(llm: LLM, source: Path, out: Path, tokens: int, sync_seconds: float) -> list[str]:
    BatchJob(
        source=find_input(source),
        out=out,
        settings=BatchSettings(sampling={"max_tokens": tokens, "ignore_eos": True}),
        engine=Engine(load=lambda: llm, described={}),
        sync_seconds=sync_seconds,
        overwrite=True,
    ).run()
    return [json.loads(line)["text"] for line in out.read_bytes().splitlines()]


def measure(llm: LLM, folder: Path, rows: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    texts = prompts(rows)
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(text) + "\n" for text in texts))
    ways = {
        "LLM.generate, one call": lambda: generate(llm, texts, tokens),
        "optlm batch": lambda: batch(llm, source, out, tokens, 1.0),
        "optlm batch, synced after every step": lambda: batch(llm, source, out, tokens, 0.0),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    wanted = generate(llm, texts, tokens)  # a round that does not count
    for number in range(rounds):
        order = list(ways)[number % 3 :] + list(ways)[: number % 3]
        for name in order:
            start = time.perf_counter()
            found = ways[name]()
            times[name].append(time.perf_counter() - start)
            assert found == wanted, f"{name}: other texts"
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = times["LLM.generate, one call"]
    return [
        {
            "way": name,
            "seconds": round(value, 3),
            "rows/s": round(rows / value, 1),
            "tokens/s": round(rows * tokens / value),
            "over generate": round(
                statistics.median(a / b for a, b in zip(times[name], base, strict=True)), 3
            ),
        }
        for name, value in medians.items()
    ]


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=32)
    wanted = parser.parse_args()
    llm = LLM(threads=wanted.threads, prefix_cache=False)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rows = measure(llm, Path(folder), wanted.rows, wanted.tokens, wanted.rounds)
    report.Report(
        name="batch-speed",
        title="A batch job beside one call of LLM.generate",
        method=METHOD.format(rows=wanted.rows, tokens=wanted.tokens, rounds=wanted.rounds),
        rows=rows,
        columns={name: name for name in rows[0]},
        headline={"a job over generate": rows[1]["over generate"]},
        packages={},
    ).publish(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
