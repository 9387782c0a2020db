"""A job over a local Ray cluster of two workers, one of which is killed."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from batch_tools import RunJob, mixed, write_rows

from lora_files import write_lora
from optlm import LLM
from optlm.batch import inputs
from optlm.batch.engines import describe_engine, load_engine
from optlm.batch.inputs import RowFault, find_input, lines_at, places, read_input
from optlm.batch.job import BatchJob, Engine
from optlm.batch.settings import BatchSettings
from optlm.errors import RequestError
from optlm.serve.cluster.connect import connected
from variants import VARIANTS

ROWS = 96


@pytest.fixture
def source(tmp_path: Path) -> Path:
    prompts = [
        {"prompt": f"the cat {row}", "params": {"max_tokens": 1 + row % 9}} for row in range(ROWS)
    ]
    return write_rows(tmp_path / "in.jsonl", [*prompts, {"broken": 1}, "the end"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with connected(None, "ray.data", processors=2) as ray:
        yield ray


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_costs_nothing(
    source: Path,
    models: dict[str, Path],
    run_job: RunJob,
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optlm.batch import cluster as cluster_module

    monkeypatch.setattr(cluster_module, "_PIECE", 8)
    run_job(source, tmp_path / "alone.jsonl")
    model, pids = models["base"], tmp_path / "pids"
    pids.mkdir()
    killed: list[int] = []

    def load() -> LLM:  # in the workers
        (pids / str(os.getpid())).touch()
        return LLM(model, threads=1)

    def kill_one(rows: int, tokens: int) -> None:
        if not killed:
            killed.append(int(next(pids.iterdir()).name))
            os.kill(killed[0], signal.SIGKILL)

    def job(engine: Any, progress: Any = lambda rows, tokens: None) -> BatchJob:
        return BatchJob(
            source=find_input(source),
            out=tmp_path / "ray.jsonl",
            settings=BatchSettings(sampling={"max_tokens": 5}),
            engine=Engine(load=engine, described=describe_engine(model, None, {})),
            ray=cluster_module.RayOptions(workers=2),
            progress=lambda total, done: progress,
        )

    assert cluster.util.get_node_ip_address() == "127.0.0.1"
    report = job(load, kill_one).run()
    assert len(killed) == 1
    assert len(list(pids.iterdir())) >= 2
    assert (report.rows, report.errors) == (ROWS + 2, 1)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_requests_of_every_kind(
    models: dict[str, Path], cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters by name, to the bytes of a run without Ray."""
    from optlm.batch import cluster as cluster_module

    monkeypatch.setattr(cluster_module, "_PIECE", 8)
    folder = tmp_path / "adapters"
    write_lora(folder / "one", VARIANTS["base"], 1)
    named = {"prompt": "the cat", "model": "one", "max_tokens": 9}
    last = {"custom_id": "last", "method": "POST", "url": "/v1/completions", "body": named}
    source = write_rows(tmp_path / "in.jsonl", [*mixed(20), last])

    def run(out: str, **more: Any) -> bytes:
        BatchJob(
            source=find_input(source),
            out=tmp_path / out,
            settings=BatchSettings(model_name="tiny"),
            engine=Engine(
                load=partial(load_engine, models["base"], folder, threads=1),
                described=describe_engine(models["base"], None, {}, folder),
            ),
            **more,
        ).run()
        return (tmp_path / out).read_bytes()

    found = run("ray.jsonl", ray=cluster_module.RayOptions(workers=2))
    assert found == run("alone.jsonl")
    assert len(found.splitlines()) == 21


@pytest.mark.parametrize("every", [1, 3, 100])
def test_pieces_join_to_the_input(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "LINE_LIMIT", 30)
    monkeypatch.setattr(inputs, "_PIECE", 7)
    source = tmp_path / "in.jsonl"
    lines = [b"\xef\xbb\xbf1", b"", b'"' + b"x" * 28 + b'"', b"x" * 31, b" \r", b"2\r", b"y" * 90]
    for end in (b"\n", b""):
        source.write_bytes(b"\n".join(lines) + end)
        whole = list(read_input(find_input(source)))
        assert [isinstance(row, RowFault) for row in whole] == [False, False, True, False, True]
        parts = [
            row for _, place in places(source, every) for row in lines_at(source, place, every)
        ]
        assert parts == whole


def test_what_workers_cannot_read(run_job: RunJob, tmp_path: Path) -> None:
    from optlm.batch.cluster import RayOptions

    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b'"the"\n'))
    with pytest.raises(RequestError, match="plain JSON Lines"):
        run_job(tmp_path / "in.jsonl.gz", tmp_path / "out", job={"ray": RayOptions()})
    for name in ("workers", "threads"):
        with pytest.raises(RequestError, match=f"{name} is 0"):
            RayOptions(**{name: 0})


def test_without_ray_the_extra_is_named(source: Path, models: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from optlm import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    words = ["batch", str(source), f"{source}.out", "--ray", "-m", str(models["base"])]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "optlm[ray]" in done.stderr
