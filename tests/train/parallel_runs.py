"""Runs of one process and of many, and how they are compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from tiny_corpus import story, write_corpus

from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run.folder import RunFolder

HERE = Path(__file__).parent
STEPS = 10
Events = list[dict[str, Any]]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``settings.json`` and, in ``alone``, the run of one process."""
    folder = tmp_path_factory.mktemp("parallel")
    train = write_corpus(folder / "train.jsonl", [{"text": story(i)} for i in range(60)])
    valid = write_corpus(folder / "valid.jsonl", [{"text": story(i)} for i in range(100, 104)])
    settings = {
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.1,
        },
        "data": {
            "parts": [{"name": "tales", "file": str(train), "weight": 1}],
            "validation": {"stories": str(valid)},
            "vocab_size": 300,
        },
        "loop": {
            "steps": STEPS,
            "log_every": 1,
            "evaluate_every": 5,
            "checkpoint_every": 2,
            "keep_last": 3,
            "optim": {"learning_rate": 0.003, "warmup_steps": 2},
        },
        "batch_tokens": 128,
        "micro_batch_tokens": 32,
        "sequence_lengths": {"16": 1, "32": 1},
        "precision": "f32",
        "prompts": ["the cat"],
        "seed": 3,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    torch.set_num_threads(1)
    pretrain(PretrainConfig.from_dict(settings), folder / "alone")
    return folder


@pytest.fixture(scope="session")
def two(place: Path) -> Path:
    """The same run by two data-parallel processes, as a user starts it."""
    out = place / "two"
    line = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "optlm", "pretrain"]
    done = subprocess.run(
        [sys.executable, *line, place / "settings.json", "--out", out],
        env=environment() | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trained a tokenizer") == 1  # by one of them
    return out


def environment() -> dict[str, str]:
    path = f"{HERE}{os.pathsep}{HERE.parent}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Worker:
    process: BaseProcess
    errors: Path  # its stderr

    def ended(self, *, within: float = 60.0) -> tuple[int, str]:
        """Exit code and stderr."""
        self.process.join(within)
        told = self.errors.read_text() if self.errors.exists() else ""
        assert self.process.exitcode is not None, f"still at work after {within} s: {told}"
        return self.process.exitcode, told


@contextmanager
def workers(
    count: int, folder: Path, *job: object, port: int | None = None
) -> Iterator[list[Worker]]:
    """Start `count` processes of parallel_worker.py; none of them outlives the block."""
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]  # of the server that loads the module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_worker"])
    port = port or free_port()
    started = []
    try:
        for rank in range(count):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            group |= {"LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = {name: str(value) for name, value in group.items()}
            errors = folder / f"stderr-{rank}"
            arguments = (given, str(errors), tuple(map(str, job)))
            process = context.Process(target=parallel_worker.run, args=arguments)
            process.start()
            started.append(Worker(process=process, errors=errors))
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.join()


def trained(run: Path) -> Events:
    events = [e for e in RunFolder(run).events() if e["kind"] in ("train", "valid")]
    ignored = ("seconds", "tokens_per_second")
    return [{k: v for k, v in event.items() if k not in ignored} for event in events]


def assert_same_run(run: Path, reference: Path, step: int = STEPS) -> None:
    """Losses, norms, samples, weights, averages and moments within 1e-6."""
    assert_close(trained(run), trained(reference))
    one, other = (RunFolder(path).load(step) for path in (run, reference))
    assert torch.equal(one["random"], other["random"])
    for part in ("model", "average", "optimizer"):
        assert_close(one[part], other[part])


def assert_close(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_close(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=path)
    elif isinstance(one, float):
        assert abs(one - other) < 1e-6, path
    else:
        assert one == other, path
