"""Measure how fast a model runs on this machine, beside the speed of its memory.

The floor of a step is the time that reading every weight once would take. A
model that fits the processor's cache, or skips zeros, can be faster than that.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from optlm.cli.common import add_engine_options, add_json_option, engine_options, usage_error

if TYPE_CHECKING:
    from optlm.engine.llm import LLM
    from optlm.engine.runner import Runner

USAGE = "[options]"

_COUNTS = {
    "batch": (1, 1, 256, "texts generated together"),
    "tokens": (64, 2, 4096, "tokens of each text"),
    "prompt_tokens": (32, 1, 4096, "length of each prompt"),
    "repeat": (5, 1, 100, "runs, of which the median counts"),
}


def add_options(parser: ArgumentParser) -> None:
    for name, (default, _, _, told) in _COUNTS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=int, metavar="N", default=default, help=f"{told} (%(default)s)"
        )
    add_json_option(parser)
    add_engine_options(parser)


def run(options: Namespace) -> None:
    from optlm.assets import bundled_model
    from optlm.checkpoint import open_checkpoint
    from optlm.engine.llm import LLM
    from optlm.engine.runner import RunnerOptions, make_runner

    _check(options)
    checkpoint = open_checkpoint(options.model or bundled_model())
    length = checkpoint.config.max_position_embeddings
    if options.prompt_tokens + options.tokens > length:
        raise usage_error(f"prompt and tokens together exceed the context of {length}")
    runner = make_runner(checkpoint, RunnerOptions(**engine_options(options)))
    prefill, step = _measure(LLM.from_runner(runner), options)
    bandwidth = _read_bandwidth()
    report = {
        "model": options.model or "bundled",
        **_backend(runner),
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "prefill_tokens_per_s": options.batch * options.prompt_tokens / prefill,
        "decode_tokens_per_s": options.batch / step,
        "step_ms": 1e3 * step,
        "memory_read_gb_per_s": bandwidth / 1e9,
    }
    if core := getattr(runner, "core", None):
        floor = core.bytes_per_token / bandwidth
        report |= {"floor_ms": 1e3 * floor, "share_of_floor": floor / step}
    _write(report, options.json)


def _check(options: Namespace) -> None:
    for name, (_, low, high, _) in _COUNTS.items():
        if not low <= getattr(options, name) <= high:
            flag = "--" + name.replace("_", "-")
            value = getattr(options, name)
            raise usage_error(f"{flag} is {value}; it must lie between {low} and {high}")


def _write(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        print(f"{name.replace('_', ' '):<24}{shown}")


def _backend(runner: Runner) -> dict[str, Any]:
    core = getattr(runner, "core", None)
    if core is None:
        return {"backend": "torch"}
    return {
        "backend": f"native, {core.instruction_set}",
        "dtype": getattr(runner, "dtype", "f32"),
        "threads": core.threads,
    }


def _measure(llm: LLM, options: Namespace) -> tuple[float, float]:
    """Return the median seconds of reading the prompts, and of one step after that."""
    batch, length, tokens = options.batch, options.prompt_tokens, options.tokens
    first, rest = [], []
    _seconds(llm, _prompts(llm, batch, length, 0), 2)  # warm-up
    for turn in range(1, options.repeat + 1):
        one = _seconds(llm, _prompts(llm, batch, length, 2 * turn), 1)
        every = _seconds(llm, _prompts(llm, batch, length, 2 * turn + 1), tokens)
        first.append(one)
        rest.append(max(every - one, 1e-9) / (tokens - 1))
    return statistics.median(first), statistics.median(rest)


def _prompts(llm: LLM, batch: int, length: int, turn: int) -> list[list[int]]:
    """Prompts without a common beginning, new in every turn, so that no cache helps."""
    vocabulary = llm.config.vocab_size
    return [
        [(turn * 7919 + row * 104_729 + n * 31) % vocabulary for n in range(length)]
        for row in range(batch)
    ]


def _seconds(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    from optlm.engine.params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start


def _read_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second that a plain read of memory reaches with all cores, best of five."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    data = np.ones(megabytes * 2**17, dtype=np.int64)
    cores = os.cpu_count() or 1
    parts = np.array_split(data, cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, data.nbytes / (time.perf_counter() - start))
    return best
