"""Many processes train as one does, and end together."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
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

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.layout import Grid
from optlm.checkpoint.reshard import reshard
from optlm.errors import CheckpointError, ConfigError
from optlm.train.export import export_run
from optlm.train.parallel import Alone, GroupConfig, join
from optlm.train.pretrain import pretrain
from optlm.train.recipe import PretrainConfig
from optlm.train.run_folder import RunFolder, TrainingError

HERE = Path(__file__).parent
STEPS = 10
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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
def workers(count: int, folder: Path, *job: object) -> Iterator[list[Worker]]:
    """Start `count` processes of parallel_worker.py; none of them outlives the block."""
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]  # of the server that loads the module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_worker"])
    port = free_port()
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


# ---- the same results ---------------------------------------------------------------------------


def test_two_processes_train_as_one_does(place: Path, two: Path) -> None:
    assert_same_run(two, place / "alone")
    starts = [event for event in RunFolder(two).events() if event["kind"] == "start"]
    assert len(starts) == 1  # only one process writes
    assert (two / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((two / "tensorboard").iterdir())) == 1
    kept = sorted(path.name for path in two.glob("step-*"))
    assert kept == [f"step-{step:08d}.parts" for step in (6, 8, 10)]  # the best is among the last


def test_four_processes_continue_what_two_began(place: Path, two: Path, tmp_path: Path) -> None:
    """Two groups that read different rows, of two that share the matrices; then one alone."""
    run = cut_back(two, tmp_path / "run", 6)
    with workers(4, tmp_path, "train", place / "settings.json", run, 2) as started:
        for worker in started:
            code, told = worker.ended()
            assert code == 0, told
    assert_same_run(run, place / "alone")
    shutil.rmtree(run / "step-00000010.parts")
    pretrain(PretrainConfig.from_file(place / "settings.json"), run)
    assert (run / "step-00000010.pt").exists()
    assert_same_run(run, place / "alone")


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was after `step`."""
    shutil.copytree(run, copy)
    for later in RunFolder(copy).steps():
        if later > step:
            shutil.rmtree(RunFolder(copy).checkpoint(later))
    return copy


def test_every_variant_cut_in_every_way_computes_the_same(tmp_path: Path) -> None:
    with workers(4, tmp_path, "variants") as started:
        for worker in started:
            code, told = worker.ended(within=150)
            assert code == 0, told


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["average", "model"])
def test_parts_become_one_safetensors_file_and_parts_again(
    two: Path, tmp_path: Path, weights: str
) -> None:
    step = two / f"step-{STEPS:08d}.parts"
    done = reshard(step, tmp_path / "one", weights=weights)
    state = RunFolder(two).load(STEPS)[weights]
    checkpoint = open_checkpoint(tmp_path / "one")
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.raw().tobytes() == state[name].numpy().tobytes()
    assert reshard(tmp_path / "one", tmp_path / "cut", grid=Grid(data=2)) == done
    for rank_file in sorted((tmp_path / "cut").glob("*.safetensors")):
        assert rank_file.stat().st_size == (step / weights / rank_file.name).stat().st_size


def test_a_run_of_many_processes_is_exported_as_any_other(two: Path, tmp_path: Path) -> None:
    assert export_run(two, tmp_path / "model", dtype="f32") == STEPS
    average = RunFolder(two).load(STEPS)["average"]
    name = "model.decoder.layers.0.fc1.weight"
    found = open_checkpoint(tmp_path / "model").tensors[name].numpy()
    assert found.tobytes() == average[name].numpy().tobytes()


@pytest.mark.parametrize("damage", ["missing", "flipped", "no manifest", "short rest"])
def test_a_damaged_part_is_found_and_the_one_before_is_used(
    two: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    step = run / f"step-{STEPS:08d}.parts"
    file = next((step / "exp_avg").iterdir())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "no manifest":
        (step / "manifest.json").unlink()
    else:
        (step / "rest.pt").write_bytes((step / "rest.pt").read_bytes()[:-100])
    told: list[str] = []
    state = RunFolder(run).load_latest(log=told.append)
    assert state is not None
    assert state["step"] == 8
    assert len(told) == 1
    assert step.name in told[0]


def test_half_written_parts_are_never_chosen_and_are_swept(two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    half = run / ".step-00000012.parts"
    shutil.copytree(run / f"step-{STEPS:08d}.parts", half)
    assert RunFolder(run).steps() == [6, 8, 10]
    claim = json.loads((run / "run.json").read_text())
    with RunFolder(run).locked(claim):
        assert not half.exists()


def test_a_run_folder_is_no_source_for_reshard(two: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name a checkpoint in it: step-\d+\.parts"):
        reshard(two, tmp_path / "out")


# ---- ending together ----------------------------------------------------------------------------


def test_a_killed_process_ends_the_others_and_the_run_resumes(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with workers(2, tmp_path, "train", place / "settings.json", run, 1, "kill 1 5") as started:
        assert started[1].ended()[0] == -9
        died = time.monotonic()
        code, told = started[0].ended()
        assert time.monotonic() - died < 20
    assert code == 3
    assert "rank 1 was killed or is stopped" in told
    assert "start again to resume from the last checkpoint" in told
    assert RunFolder(run).steps() == [2, 4, 5]
    pretrain(PretrainConfig.from_file(place / "settings.json"), run)  # alone: any number will do
    assert_same_run(run, place / "alone")


def test_an_error_of_one_process_is_that_of_all(place: Path, tmp_path: Path) -> None:
    job = ("train", place / "settings.json", tmp_path / "run", 1, "raise 1 3")
    with workers(2, tmp_path, *job) as started:
        told = [worker.ended() for worker in started]
    assert [code for code, _ in told] == [3, 3]
    assert "rank 1 failed: a planned error at step 3" in told[0][1]
    assert told[1][1].endswith("OptlmError: a planned error at step 3\n")


def test_a_stopped_process_is_named_and_the_run_ends(place: Path, tmp_path: Path) -> None:
    """The patience of the others is 3 s."""
    run = tmp_path / "run"
    with workers(2, tmp_path, "train", place / "settings.json", run, 1, "stop 1 5") as started:
        code, told = started[0].ended()
    assert code == 1
    assert "rank 1 was killed or is stopped (silent for 4 s; last: " in told
    assert "parallel_worker.py" in told  # the stack shows where this process waited


# ---- what is refused ----------------------------------------------------------------------------


def test_a_single_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as parallel:
        assert type(parallel) is Alone


@pytest.mark.parametrize(
    ("world", "values", "message"),
    [
        (None, {"tensor": 2}, "1 processes cannot be divided into groups of 2"),
        ("6", {"tensor": 4}, "6 processes cannot be divided into groups of 4"),
        ("many", {}, "WORLD_SIZE is 'many'"),
        (None, {"tensor": 0}, "must be at least 1"),
        (None, {"patience": 0.1}, "patience is 0.1; it must lie between 1 and 86400"),
    ],
)
def test_groups_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, world: str | None, values: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=message), join(GroupConfig(**values)):
        pass


def test_damaged_in_all_places_is_an_error(two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    for step in run.glob("step-*.parts"):
        (step / "manifest.json").unlink()
    with pytest.raises(TrainingError, match="no checkpoint of this run is whole"):
        RunFolder(run).load_latest()
