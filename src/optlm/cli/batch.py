"""Run a file of prompts through a model, one line of output for each row.

Rows are JSON: a text, a list of token ids, an object with a prompt, or a request in
OpenAI's batch format. The output has their order. A run that ends early, even by
kill -9, goes on where it was when the same command is given again; the result is
the same to the byte.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import (
    adapter_options,
    add_adapter_options,
    add_engine_options,
    engine_options,
    model_name,
    say,
    usage_error,
)
from optlm.cli.sampling import add_sampling_options, sampling_values

if TYPE_CHECKING:
    from optlm.batch.cluster import RayOptions
    from optlm.batch.job import BatchReport, Progress
    from optlm.batch.settings import BatchSettings
    from optlm.data.inputs import InputFile
    from optlm.engine.llm import LLM

USAGE = "IN OUT [options]"

_TELL_EVERY = 30.0  # seconds between lines of progress where no bar can be drawn


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="IN",
        help="JSON Lines (also .gz, .zst) or Parquet; - reads standard input",
    )
    parser.add_argument(
        "out", metavar="OUT", help="JSON Lines; - writes standard output, which cannot be resumed"
    )
    parser.add_argument(
        "--format",
        dest="row_format",
        metavar="F",
        help="plain prompts, or openai: requests of its batch API (auto: what the first row is)",
    )
    parser.add_argument("--name", help="what requests call the model (default: its folder's name)")
    parser.add_argument(
        "--adapters",
        type=Path,
        metavar="DIR",
        help="folder with a subfolder for each adapter that rows may name",
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="how chats are written out, in Jinja"
    )
    parser.add_argument(
        "--prompt-field", metavar="NAME", help="where rows that are objects have it (prompt)"
    )
    parser.add_argument(
        "--keep",
        action="append",
        metavar="NAME",
        help="copy this field of a row to its output; may be repeated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever is there of OUT"
    )
    parser.add_argument(
        "--sync-seconds",
        type=float,
        metavar="X",
        help="how much work a loss of power may cost; kill -9 costs none (1.0)",
    )
    parser.add_argument("--json", action="store_true", help="write a summary to standard output")
    group = parser.add_argument_group("over a Ray cluster (pip install 'optlm[ray]')")
    group.add_argument("--ray", action="store_true", help="one engine in each of many workers")
    group.add_argument(
        "--ray-address", metavar="A", help="of a cluster that runs (a new one on this machine)"
    )
    group.add_argument(
        "--ray-workers", type=int, metavar="N", help="engines (all processors / --threads)"
    )
    add_sampling_options(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.batch.engines import describe_engine
    from optlm.batch.job import BatchJob, Engine

    out = None if options.out == "-" else Path(options.out)
    if options.json and out is None:
        raise usage_error("--json and - both write to standard output; give one")
    if options.sync_seconds is not None and not options.sync_seconds >= 0:
        raise usage_error(f"--sync-seconds is {options.sync_seconds}; it is 0 or more")
    if options.adapters is not None and options.adapter is not None:
        raise usage_error("--adapter changes every row and --adapters some; give one")
    settings = _settings(options)
    described = describe_engine(
        options.model, options.adapter, engine_options(options), options.adapters
    )
    ray = _ray_options(options)
    _refuse_one_file(options.source, out)
    with _source(options.source) as source:
        job = BatchJob(
            source=source,
            out=out,
            settings=settings,
            engine=Engine(load=_loader(options), described=described),
            overwrite=options.overwrite,
            ray=ray,
            **({} if options.sync_seconds is None else {"sync_seconds": options.sync_seconds}),
        )
        with _progress() as job.progress:
            report = job.run()
    _tell(report)
    if options.json:
        print(json.dumps(report.to_dict()))


def _ray_options(options: Namespace) -> RayOptions | None:
    given = {"address": options.ray_address, "workers": options.ray_workers}
    there = {name: value for name, value in given.items() if value is not None}
    if not options.ray:
        if there:
            raise usage_error(f"--ray-{next(iter(there))} goes with --ray")
        return None
    if options.threads is not None:
        there["threads"] = options.threads
    from optlm.batch.cluster import RayOptions

    return RayOptions(**there)


def _loader(options: Namespace) -> Callable[[], LLM]:
    """Loads the engine, here or in a worker of a cluster."""
    from optlm.batch.engines import load_engine

    given = engine_options(options) | adapter_options(options)
    if options.ray:
        given.setdefault("threads", 1)
    return partial(load_engine, options.model, options.adapters, **given)


def _refuse_one_file(source: str, out: Path | None) -> None:
    there = out is not None and os.path.exists(source) and os.path.exists(out)
    if out is not None and there and os.path.samefile(source, out):
        raise usage_error(f"{out} is input and output, the same file; name another output")


def _settings(options: Namespace) -> BatchSettings:
    from optlm.batch.settings import BatchSettings

    sampling = sampling_values(options)
    given: dict[str, Any] = {
        "row_format": options.row_format,
        "model_name": options.name or model_name(options.model),
        "seed": sampling.pop("seed", None),
        "prompt_field": options.prompt_field,
        "keep": options.keep and tuple(options.keep),
        "chat_template": _template(options.chat_template),
    }
    there = {name: value for name, value in given.items() if value is not None}
    return BatchSettings(sampling=sampling, **there)


def _template(path: Path | None) -> str | None:
    """The text of a template that is one."""
    if path is None:
        return None
    from optlm.serve.chat import make_template, read_template_text

    text = read_template_text(path)
    make_template(text, str(path))
    return text


@contextmanager
def _source(name: str) -> Iterator[InputFile]:
    """The input; what comes from standard input is put into a nameless file first."""
    from optlm.batch.inputs import find_input
    from optlm.data.inputs import InputFile

    if name != "-":
        yield find_input(name)
        return
    if sys.stdin is None:
        raise usage_error("standard input is closed; name a file")
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.flush()
        stat = os.fstat(file.fileno())
        path = Path(f"/proc/self/fd/{file.fileno()}")
        yield InputFile(path=path, format="jsonl", size=stat.st_size, modified=stat.st_mtime_ns)


# ---- what is told -------------------------------------------------------------------------------


def _tell(report: BatchReport) -> None:
    values = report.to_dict()
    earlier = f", {report.resumed_rows:,} of them by earlier runs" if report.resumed_rows else ""
    say(
        f"{report.rows:,} rows{earlier}; {report.errors:,} with an error; "
        f"{report.prompt_tokens:,} tokens read, {report.completion_tokens:,} written; "
        f"{report.seconds:.1f} s, {values['rows_per_second']:g} rows/s"
    )


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield what makes a `Progress`: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:

        def begin(total: int, done: int) -> Progress:
            task = bar.add_task("rows", total=total, completed=done, rate="")
            clock = _Rate()

            def tell(rows: int, tokens: int) -> None:
                clock.add(rows, tokens)
                bar.update(task, advance=rows, rate=clock.told())

            return tell

        yield begin


class _Rate:
    """Rows and tokens a second since it was made."""

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self._start = time.monotonic()

    def add(self, rows: int, tokens: int) -> None:
        self.rows += rows
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def told(self) -> str:
        return f"{self.rows / self.seconds:.1f} rows/s, {self.tokens / self.seconds:,.0f} tokens/s"


class _Lines:
    """Progress where no bar can be drawn: a line on stderr every half minute."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._rate = _Rate()
        self._next = _TELL_EVERY

    def __call__(self, rows: int, tokens: int) -> None:
        rate = self._rate
        rate.add(rows, tokens)
        self._done += rows
        if rate.seconds >= self._next:
            left = (self._total - self._done) * rate.seconds / max(rate.rows, 1)
            say(f"{self._done:,} of {self._total:,} rows, {rate.told()}, {left:.0f} s left")
            self._next = rate.seconds + _TELL_EVERY
