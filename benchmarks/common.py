"""Engines side by side: each in its own process and environment, taking turns in one run.

A process that is not being measured is stopped, since some engines keep their threads spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
import peers

WORKER = Path(__file__).with_name("worker.py")
_PATIENCE = 1800  # seconds until a silent worker counts as hung


class WorkerError(RuntimeError):
    """An engine failed; the others go on without it."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One line of a table: an engine with weights in one format."""

    kind: str  # in worker.ENGINES
    form: str
    title: str
    environment: str | None = None  # None: the one that runs this

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.form}"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(kind="optlm", form="int8", title="optlm int8"),
        Engine(kind="optlm", form="bf16", title="optlm bf16"),
        Engine(kind="optlm", form="f32", title="optlm f32"),
        Engine(kind="openvino", form="int8", title="OpenVINO int8", environment="openvino"),
        Engine(
            kind="ctranslate2", form="int8", title="CTranslate2 int8", environment="transformers"
        ),
        Engine(
            kind="transformers", form="bf16", title="transformers bf16", environment="transformers"
        ),
        Engine(
            kind="transformers", form="f32", title="transformers f32", environment="transformers"
        ),
    )
}
OURS = "optlm-int8"
BATCH_TOKENS = 512  # of one pass of our engine, its default


def python_of(environment: str | None) -> Path:
    """The Python of a peers' environment; of this one for None.

    Raises:
        WorkerError: it is not installed.
    """
    python = peers.binary(environment) if environment else Path(sys.executable)
    if not python.exists():
        raise WorkerError("not installed; run: python benchmarks/peers.py install")
    return python


class Process:
    """A process that answers requests, a JSON line each; stopped except while it works on one.

    Attributes:
        packages: versions that it told when it had loaded.
    """

    def __init__(
        self, script: Path, kind: str, environment: str | None, threads: int, **load: Any
    ) -> None:
        """Start `script kind` with the Python of an environment (None: this one) and load.

        Args:
            load: values of its first request.

        Raises:
            WorkerError: the environment is not installed, or loading failed.
        """
        python = python_of(environment)
        base = checkpoints.offline() if environment else dict(os.environ)
        own = {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [python, script, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._talk,
            text=True,
            env=base | own,
        )
        try:
            self.packages: dict[str, str] = self.ask("load", threads=threads, **load)["packages"]
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **values: Any) -> Any:
        """Send one request and wait for its reply.

        Raises:
            WorkerError: the engine failed, died, or said nothing for half an hour.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._signal(signal.SIGCONT)
        try:
            stdin.write(json.dumps({"op": op, **values}) + "\n")
            stdin.flush()
            ready, _, _ = select.select([stdout], [], [], _PATIENCE)
            line = stdout.readline() if ready else ""
        except BrokenPipeError:
            line = ""
        self._signal(signal.SIGSTOP)
        if not line:
            raise WorkerError(f"ended or hung during {op}: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()
        self._talk.close()

    def _last_words(self) -> str:
        self._talk.seek(0)
        return self._talk.read().decode(errors="replace").strip()[-300:]

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, number)


class Worker(Process):
    """A process that holds one engine."""

    def __init__(
        self, engine: Engine, folder: Path, threads: int, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        super().__init__(
            WORKER,
            engine.kind,
            engine.environment,
            threads,
            folder=str(folder),
            form=engine.form,
            batch_tokens=batch_tokens,
        )

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Time of generating exactly `tokens` tokens for every prompt."""
        reply = self.ask("generate", prompts=prompts, tokens=tokens)
        return float(reply["seconds"])


@contextmanager
def workers(
    names: Sequence[str],
    model: str,
    threads: int,
    failures: dict[str, str],
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[dict[str, Worker]]:
    """Start the engines on one model; one that cannot start is noted in `failures`."""
    folder = checkpoints.checkpoint(model)
    started: dict[str, Worker] = {}
    with ExitStack() as stack:
        for name in names:
            engine = ENGINES[name]
            say(f"{model}: loading {engine.title}")
            try:
                python_of(engine.environment)  # before the work of converting for it
                ready = checkpoints.converted(folder, engine.kind, engine.form)
                started[name] = Worker(engine, ready, threads, batch_tokens)
                stack.callback(started[name].close)
            except (RuntimeError, OSError) as error:
                note(failures, model, name, error)
        yield started


def note(failures: dict[str, str], model: str, name: str, error: Exception) -> None:
    """Keep a failure for the report, without its folders, and tell it at once."""
    failures[f"{Path(model).name} {name}"] = re.sub(r"(?<!\w)/(?:[^\s/'\"]+/)*", "", str(error))
    say(f"{model}: {name} is left out: {error}")


def alternate(
    cases: Mapping[str, Callable[[int], float]],
    rounds: int,
    *,
    threads: int,
    failed: Callable[[str, Exception], None],
) -> tuple[dict[str, list[float]], list[float]]:
    """Measure every case once a round, after one round that does not count.

    Args:
        cases: each gives the seconds it took; called with the number of the round.
        failed: told of a case that broke; it takes no further part.

    Returns:
        seconds by case and round, and the memory bandwidth of each round in bytes a second.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    bandwidths = []
    for turn in range(rounds + 1):
        if turn:
            bandwidths.append(read_bandwidth(threads))
        for name in list(seconds):
            try:
                took = cases[name](turn)
            except WorkerError as error:
                failed(name, error)
                del seconds[name]
                continue
            if turn:
                seconds[name].append(took)
    return seconds, bandwidths


def prompts(batch: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random prompts, different for every seed, so that no prefix cache has seen them."""
    random = np.random.default_rng([seed, batch, length])
    rows: list[list[int]] = random.integers(4, vocabulary, (batch, length)).tolist()
    return rows


def vocabulary(model: str) -> int:
    """Number of tokens prompts are drawn from."""
    config = json.loads((checkpoints.checkpoint(model) / "config.json").read_text())
    return min(int(config["vocab_size"]), checkpoints.NUM_TOKENS)


_BUFFER: list[np.ndarray[Any, Any]] = []


def read_bandwidth(threads: int, megabytes: int = 512) -> float:
    """Bytes a second of a plain read loop: `threads` threads, each the maximum of its part of a
    512 MiB array of int64 (numpy compares 64 bytes an instruction); the best of three passes.
    """
    if not _BUFFER or _BUFFER[0].nbytes != megabytes << 20:
        _BUFFER[:] = [np.ones(megabytes << 17, np.int64)]
    parts = np.array_split(_BUFFER[0], threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _BUFFER[0].nbytes / (time.perf_counter() - start))
    return best


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, least and most of several measurements."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            median=statistics.median(values), least=min(values), most=max(values), count=len(values)
        )


def touched_bytes(facts: Mapping[str, Any]) -> float:
    """Weight bytes one decode step of one sequence reads, less the rows of fc2 it leaves out."""
    share = facts["active_share"]
    skipped = 0.0 if share is None else (1.0 - share) * facts["fc2_weights"]
    return float(facts["bytes_per_token"] - skipped)


def options(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each engine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bundled", metavar="FOLDER", help="where the bundled model is")
    parser.add_argument("--json", metavar="FILE", help="write the JSON line there too")
    parser.add_argument("--name", help="of the result files, instead of the benchmark's own")
    parser.add_argument(
        "--results",
        metavar="FOLDER",
        type=Path,
        default=Path(__file__).with_name("results"),
        help="where the dated results go",
    )
    return parser


def engine_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), help="instead of those that suit the size"
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; `--bundled` takes effect here."""
    wanted = parser.parse_args()
    if wanted.bundled:
        checkpoints.BUNDLED = Path(wanted.bundled)
    return wanted


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cache_bytes() -> int:
    """Size of the processor's largest cache; 0 where the system does not tell."""
    units = {"K": 2**10, "M": 2**20}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=0)
