"""A server under half an hour of mixed load: what breaks, what grows, whether answers change.

    python benchmarks/soak.py [--minutes 30] [--clients 12]

Clients of one `optlm serve` do at random what clients do: complete, stream, hang up in the middle,
read slowly, score, tokenize, embed, send nonsense, ask for adapters that come and go. Wanted: no
answer of 500 or more, refusals for nonsense only, one text for one request however often and under
whatever load it is asked, memory that does not grow, and nothing left running in the end; the exit
status is 1 where one of them fails. The KV cache is filled before memory is watched: its pages are
the system's until a block is first used, so until then it grows by design, to its size.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import checkpoints
import common
import report
from serving import free_port

SAME: dict[str, dict[str, Any]] = {  # each must have one answer, whatever else runs
    "sampled": {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.9, "seed": 11},
    "greedy": {"prompt": "The old man", "max_tokens": 30, "temperature": 0},
    "three": {"prompt": "A dog", "max_tokens": 12, "n": 3, "seed": 5, "temperature": 1.2},
    "scored": {"prompt": "The sun was", "max_tokens": 8, "seed": 2, "logprobs": 2, "echo": True},
}
NONSENSE: list[Any] = [
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "n": 10**9},
    {"prompt": [[1, -5]]},
    {"prompt": "a", "no_such_field": 1},
    {"prompt": "a", "logprobs": 10**6},
    {"prompt": {"a": 1}},
    {"prompt": "word " * 20_000},
    {"prompt": "a", "model": "../../etc/passwd"},
    [],
    "not an object",
]
STORY = "One day, a little girl named Lily found a big, shiny thing in the garden. "


class Soak:
    """Counts what happened; every client is one endless `client` task."""

    def __init__(self, model: str, port: int, end: float) -> None:
        self.model, self.end = model, end
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits
        )
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.answers: dict[str, collections.Counter[str]] = {
            name: collections.Counter() for name in SAME
        }

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        kinds: list[tuple[int, Callable[[random.Random], Awaitable[None]]]] = [
            (4, self.complete),
            (4, self.stream),
            (3, self.hang_up),
            (1, self.read_slowly),
            (2, self.nonsense),
            (2, self.ask_adapter),
            (2, self.score),
            (1, self.tokenize),
            (1, self.embed),
            (2, self.ask_the_same),
        ]
        weights, actions = zip(*kinds, strict=True)
        while time.monotonic() < self.end:
            action = chance.choices(actions, weights)[0]
            try:
                await action(chance)
                self.done[action.__name__] += 1
            except Exception as error:
                self.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}"[:300])

    def body(self, chance: random.Random, **values: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": STORY * chance.randrange(1, 12),
            "max_tokens": chance.randrange(1, 60),
            "temperature": chance.choice([0, 0.7, 1.2]),
            "n": chance.choice([1, 1, 1, 3]),
            **values,
        }

    async def post(self, path: str, body: Any, wanted: int = 200) -> Any:
        answer = await self.http.post(path, json=body)
        if answer.status_code != wanted:
            raise RuntimeError(f"{answer.status_code} where {wanted} was due: {answer.text[:200]}")
        return answer.json()

    async def complete(self, chance: random.Random) -> None:
        extra = chance.choice([{}, {"logprobs": 3, "echo": True}, {"stop": [".", "!"]}])
        await self.post("/v1/completions", self.body(chance, **extra))

    async def stream(self, chance: random.Random) -> None:
        await self._stream(self.body(chance), stop_after=None, pause=0)

    async def hang_up(self, chance: random.Random) -> None:
        body = self.body(chance, max_tokens=200)
        await self._stream(body, stop_after=chance.randrange(0, 9), pause=0)

    async def read_slowly(self, chance: random.Random) -> None:
        await self._stream(self.body(chance, max_tokens=30, n=1), stop_after=None, pause=0.05)

    async def _stream(self, body: dict[str, Any], stop_after: int | None, pause: float) -> None:
        async with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as got:
            if got.status_code != 200:
                raise RuntimeError(f"{got.status_code}: {(await got.aread())[:200]!r}")
            events, last = 0, ""
            async for line in got.aiter_lines():
                if not line.startswith("data: "):
                    continue
                events, last = events + 1, line
                if stop_after is not None and events > stop_after:
                    return
                if '"error"' in line:
                    raise RuntimeError(line[:200])
                await asyncio.sleep(pause)
            if last != "data: [DONE]":
                raise RuntimeError(f"a stream ended with {last[:100]!r}")

    async def nonsense(self, chance: random.Random) -> None:
        body = chance.choice(NONSENSE)
        if isinstance(body, dict):
            body = {"model": self.model, **body}
        answer = await self.http.post("/v1/completions", json=body)
        if not 400 <= answer.status_code < 500 or "message" not in answer.json()["error"]:
            raise RuntimeError(f"{answer.status_code} for nonsense: {answer.text[:200]}")

    async def ask_adapter(self, chance: random.Random) -> None:
        body = self.body(chance, model=f"adapter-{chance.randrange(3)}")
        answer = await self.http.post("/v1/completions", json=body)
        if answer.status_code not in (200, 404):
            raise RuntimeError(f"{answer.status_code} of an adapter: {answer.text[:200]}")
        self.done[f"adapter {answer.status_code}"] += 1

    async def score(self, chance: random.Random) -> None:
        body = {"model": self.model, "context": STORY, "continuations": [" It was red.", " No."]}
        await self.post("/v1/score", body)

    async def tokenize(self, chance: random.Random) -> None:
        found = await self.post("/tokenize", {"model": self.model, "prompt": STORY})
        await self.post("/detokenize", {"model": self.model, "tokens": found["tokens"]})

    async def embed(self, chance: random.Random) -> None:
        await self.post("/v1/embeddings", {"model": self.model, "input": [STORY, "a cat"]})

    async def ask_the_same(self, chance: random.Random) -> None:
        name = chance.choice(list(SAME))
        answer = await self.post("/v1/completions", {"model": self.model, **SAME[name]})
        self.answers[name][json.dumps(answer["choices"])] += 1

    async def fill_the_cache(self) -> None:
        """Use every block of the KV cache once: it has room for 16 full contexts."""
        chance = random.Random(0)
        for _ in range(20):
            prompt = [chance.randrange(4, 8000) for _ in range(1023)]
            body = {"model": self.model, "prompt": prompt, "max_tokens": 1}
            await self.post("/v1/completions", body)


async def adapters_come_and_go(
    soak: Soak, process: subprocess.Popen[bytes], made: Path, folder: Path
) -> None:
    chance = random.Random(-1)
    while time.monotonic() < soak.end:
        name = folder / f"adapter-{chance.randrange(3)}"
        if name.exists():
            shutil.rmtree(name)
        else:
            shutil.copytree(made, folder / "..part")
            (folder / "..part").rename(name)
        process.send_signal(signal.SIGHUP)
        await asyncio.sleep(4)


async def watch(soak: Soak, pid: int, samples: list[tuple[float, float]]) -> None:
    start = time.monotonic()
    while time.monotonic() < soak.end:
        samples.append((time.monotonic() - start, resident(pid)))
        await asyncio.sleep(5)


def resident(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a soak left.

    Attributes:
        empty: resident MiB before the KV cache was filled.
        samples: seconds and resident MiB afterwards.
        left: the metrics page when all clients had gone.
        alive: the server had not ended by itself.
    """

    soak: Soak
    empty: float
    samples: list[tuple[float, float]]
    left: dict[str, float]
    alive: bool

    @property
    def slope(self) -> float:
        """MiB an hour over the second half."""
        later = np.array(self.samples[len(self.samples) // 2 :])
        return float(np.polyfit(later[:, 0] / 3600, later[:, 1], 1)[0])

    def faults(self) -> list[str]:
        """What must not be."""
        still = {name: self.left[name] for name in MUST_BE_ZERO if self.left[name]}
        several = [name for name, seen in self.soak.answers.items() if len(seen) != 1]
        return [
            *(
                [f"{len(self.soak.wrong)} errors that are not the client's"]
                if self.soak.wrong
                else []
            ),
            *([f"left over: {still}"] if still else []),
            *([f"not one answer for: {several}"] if several else []),
            *([] if self.alive else ["the server ended"]),
        ]


MUST_BE_ZERO = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "optlm:kv_blocks_used",
    "optlm:requests_admitted",
    "optlm:tokens_admitted",
)


async def load(
    wanted: argparse.Namespace,
    process: subprocess.Popen[bytes],
    port: int,
    made: Path,
    folder: Path,
) -> Found:
    soak = Soak("mini-8m", port, 0.0)
    soak.model = (await soak.http.get("/v1/models")).json()["data"][0]["id"]
    samples: list[tuple[float, float]] = []
    empty = resident(process.pid)
    await soak.fill_the_cache()
    soak.end = time.monotonic() + 60 * wanted.minutes
    await asyncio.gather(
        adapters_come_and_go(soak, process, made, folder),
        watch(soak, process.pid, samples),
        *(soak.client(number) for number in range(wanted.clients)),
    )
    await asyncio.sleep(1)
    left = numbers((await soak.http.get("/metrics")).text)
    await soak.http.aclose()
    alive = process.poll() is None
    return Found(soak=soak, empty=empty, samples=samples, left=left, alive=alive)


def numbers(metrics: str) -> dict[str, float]:
    """The values of a metrics page by name, summed over labels."""
    found: collections.Counter[str] = collections.Counter()
    for line in metrics.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]
    return dict(found)


def make_adapter(folder: Path) -> Path:
    """Some LoRA of the bundled model."""
    (folder / "text.txt").write_text(STORY * 40)
    command = [sys.executable, "-m", "optlm", "finetune", "--data", folder / "text.txt", "--out"]
    command += [folder / "made", "--max-steps", "2", "--seq-len", "64", "--batch-tokens", "128"]
    command += ["--micro-batch-tokens", "128"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    adapter = folder / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "made" / name, adapter / name)
    return adapter


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    wanted = common.parse(parser)
    port = free_port()
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryFile() as talk:
        made = make_adapter(Path(work))
        folder = Path(work) / "adapters"
        folder.mkdir()
        command = [sys.executable, "-m", "optlm", "serve", "--model", checkpoints.BUNDLED]
        command += ["--adapters", folder, "--port", port, "--threads", wanted.threads]
        process = subprocess.Popen([str(word) for word in command], stdout=talk, stderr=talk)
        try:
            wait_for(port)
            found = asyncio.run(load(wanted, process, port, made, folder))
        finally:
            process.terminate()
            process.wait(60)
    publish(wanted, found)
    if faults := found.faults():
        raise SystemExit("; ".join(faults))


def wait_for(port: int) -> None:
    for _ in range(200):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not start")


def publish(wanted: argparse.Namespace, found: Found) -> None:
    soak, memory = found.soak, [size for _, size in found.samples]
    rows = [{"what": name, "times": count} for name, count in sorted(soak.done.items())]
    kinds = collections.Counter(text.split(":")[0] for text in soak.wrong)
    report.Report(
        name="soak",
        title=f"A server under {wanted.minutes:g} minutes of mixed load",
        method=(
            f"The bundled model, {wanted.clients} clients, {wanted.threads} threads; adapters "
            "come or go every 4 seconds. Memory is resident, watched every 5 seconds from when the "
            "KV cache is full, its slope a line through the second half."
        ),
        rows=rows,
        columns={"what": "what", "times": "times"},
        headline={
            "requests": sum(soak.done.values()),
            "errors that are not the client's": len(soak.wrong),
            "different answers to one request under load": ", ".join(
                f"{name} {len(seen)} of {sum(seen.values())}" for name, seen in soak.answers.items()
            ),
            "memory, MiB, before the KV cache is full": round(found.empty, 1),
            "memory, MiB, at first, half, end and most": (
                f"{memory[0]:.1f}, {memory[len(memory) // 2]:.1f}, {memory[-1]:.1f}, "
                f"{max(memory):.1f}"
            ),
            "memory slope of the second half, MiB an hour": round(found.slope, 2),
            "server alive": found.alive,
            **{name: found.left[name] for name in MUST_BE_ZERO},
        },
        packages={},
        failures={kind: f"{count} times" for kind, count in kinds.items()},
    ).publish(wanted)
    for text in soak.wrong[:20]:
        common.say(json.dumps(text))


if __name__ == "__main__":
    main()
