"""Evaluate a model on tasks, zero- to many-shot, by the protocol of the OPT paper.

The tasks run through lm-evaluation-harness (extra `eval`). Their data are read
from a folder of JSON Lines files (--data); `--tasks list` shows the tasks.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    load_model,
    say,
    usage_error,
)
from optlm.cli.progress import count_bar

if TYPE_CHECKING:
    from optlm.evaluate.run import Evaluation

USAGE = "--tasks T[,T] [--data DIR] [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--tasks", required=True, metavar="T[,T]", help="tasks; 'list' shows them")
    parser.add_argument("--data", metavar="DIR", help="folder of the evaluation sets")
    parser.add_argument(
        "--num-fewshot", default="0", metavar="K", help="shots: 1, 0,1,32 or 0-8 (0)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of a task")
    parser.add_argument("--seed", type=int, default=1234, help="of the draw of shots (1234)")
    parser.add_argument("--cache", metavar="DIR", help="keep answers here, to go on after a stop")
    parser.add_argument(
        "--cut", action="store_true", help="questions beyond the context lose their beginning"
    )
    parser.add_argument(
        "--run-code", action="store_true", help="allow tasks that run programs the model writes"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the results here; - for stdout")
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    if options.tasks == "list":
        _list_tasks()
        return
    shots = _shots(options.num_fewshot)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; ours is enough
    from optlm.evaluate.published import size_of
    from optlm.evaluate.run import evaluate
    from optlm.evaluate.table import table

    llm = load_model(options)
    runs: list[Evaluation] = []
    for count in shots:
        with closing(_Bars()) as bars:
            runs.append(
                evaluate(
                    llm,
                    options.tasks.split(","),
                    data=options.data,
                    num_fewshot=count,
                    limit=options.limit,
                    seed=options.seed,
                    cache=options.cache,
                    cut=options.cut,
                    run_code=options.run_code,
                    size=size_of(llm),
                    progress=bars.follow,
                )
            )
    if options.json != "-":
        print(table([result for each in runs for result in each.results]))
    if options.json is not None:
        _write(options.json, runs)


def _shots(text: str) -> list[int]:
    """``0,1,32`` or ``0-8`` as numbers."""
    counts: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            counts += range(int(first), int(last or first) + 1)
    except ValueError:
        counts = []
    if not counts:
        raise usage_error(f"--num-fewshot is {text!r}; give numbers such as 1, 0,1,32 or 0-8")
    return counts


class _Bars:
    """A bar for each task, when stderr is a terminal."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._task = ""
        self._done = 0
        self._advance: Callable[[int], None] = lambda count: None

    def follow(self, task: str, done: int, total: int) -> None:
        if task != self._task:
            self.close()
            self._task, self._done = task, 0
            self._advance = self._stack.enter_context(count_bar(task, total))
        self._advance(done - self._done)
        self._done = done

    def close(self) -> None:
        self._stack.close()


def _list_tasks() -> None:
    from optlm.evaluate.tasks import TASKS

    for spec in TASKS.values():
        print(f"{spec.name:<14} {spec.title:<42} {spec.file}.jsonl  {spec.metric}")


def _write(target: str, runs: list[Evaluation]) -> None:
    text = json.dumps([each.told() for each in runs], indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    place = Path(target)
    part = place.with_name(place.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(place)
    say(f"results are in {place}")
