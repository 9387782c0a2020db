"""A job that ends anywhere goes on, and its output is that of a job nobody touched."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from batch_tools import RunJob, read_rows, write_rows

from optlm.batch import ledger as ledger_module
from optlm.batch.job import BatchStopped
from optlm.batch.journal import Journal
from optlm.batch.ledger import Ledger, LedgerError, Result
from optlm.errors import RequestError

CALLS = ("write", "replace", "fsync", "fdatasync", "ftruncate", "unlink")
ALWAYS = {"sync_seconds": 0.0}


class Killed(BaseException):
    """Stands for a signal that cannot be caught."""


@contextmanager
def failing(at: int, error: BaseException) -> Iterator[list[int]]:
    """Let the call number `at` that changes a file fail; a write leaves half of it."""
    count = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] - 1 == at:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise error
            return real(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        yield count


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lengths = random.Random(1).choices(range(1, 30), k=12)
    prompts = [
        {"prompt": f"the cat {row}", "params": {"max_tokens": length}}
        for row, length in enumerate(lengths)
    ]
    return write_rows(tmp_path / "in.jsonl", [*prompts, {"broken": 1}])


@pytest.fixture
def whole(rows: Path, run_job: RunJob, tmp_path: Path) -> bytes:
    run_job(rows, tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("compact", [2**24, 300])
@pytest.mark.parametrize("kind", ["killed", "disk full"])
def test_every_call_that_changes_a_file_may_be_the_last(
    kind: str,
    compact: int,
    rows: Path,
    whole: bytes,
    run_job: RunJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "_COMPACT_BYTES", compact)
    error = Killed() if kind == "killed" else OSError(errno.ENOSPC, "No space left on device")
    with failing(-1, error) as count:
        run_job(rows, tmp_path / "counted.jsonl", job=ALWAYS)
    assert count[0] > (45 if compact == 300 else 30)
    for at in range(0, count[0], 1 if kind == "killed" else 4):
        out = tmp_path / f"{at}.jsonl"
        with failing(at, error), pytest.raises((Killed, OSError, BatchStopped)):
            run_job(rows, out, job=ALWAYS)
        run_job(rows, out, job=ALWAYS)
        assert out.read_bytes() == whole, at
        left = {path.name for path in tmp_path.glob(f"{at}.jsonl*")}
        assert left == {f"{at}.jsonl", f"{at}.jsonl.journal"}


def test_what_was_done_is_not_done_again(
    rows: Path, run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with failing(20, OSError(errno.ENOSPC, "full")), pytest.raises(BatchStopped) as stopped:
        run_job(rows, out, job=ALWAYS)
    kept = int(str(stopped.value).split("; ")[1].split()[0])
    assert 0 < kept < 13
    assert "Make room" in str(stopped.value)
    monkeypatch.setattr("optlm.batch.plain.PlainRows.start", counting := _Counting())
    assert run_job(rows, out).resumed_rows >= kept
    assert len(counting.rows) <= 13 - kept


class _Counting:
    """`PlainRows.start` that fails every row and notes which there were."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, row: int, content: object) -> Result:
        self.rows.append(row)
        return Result(b"{}")


@pytest.mark.parametrize("garbage", [b"", b"\0" * 50, b"12345678 R 99 0 0 0 {}\n"])
def test_a_journal_that_lost_its_end(
    garbage: bytes, rows: Path, whole: bytes, run_job: RunJob, tmp_path: Path
) -> None:
    """As after a loss of power: what was not synced may be missing, or be anything."""
    out, journal, part = (tmp_path / f"out.jsonl{end}" for end in ("", ".journal", ".part"))
    with failing(24, Killed()), pytest.raises(Killed):
        run_job(rows, out, job=ALWAYS)
    content, begun = journal.read_bytes(), part.read_bytes()
    promised = content.index(b"\n", content.index(b" M ")) + 1
    assert len(content) > promised + 300
    for size in range(promised, len(content), 97):
        journal.write_bytes(content[:size] + garbage)
        part.write_bytes(begun)
        run_job(rows, out)
        assert out.read_bytes() == whole
        out.unlink()


def test_a_finished_job_is_not_done_again(rows: Path, run_job: RunJob, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_job(rows, out)
    before = out.stat()
    report = run_job(rows, out)
    assert (report.rows, report.resumed_rows, report.errors) == (13, 13, 1)
    assert os.path.samestat(before, out.stat())
    out.unlink()
    with pytest.raises(LedgerError, match="finished and is gone"):
        run_job(rows, out)


def test_another_job_is_refused_with_what_differs(
    rows: Path, run_job: RunJob, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with failing(20, Killed()), pytest.raises(Killed):
        run_job(rows, out, job=ALWAYS)
    for changed, told in (
        ({"seed": 1}, "settings.seed was 0 and is 1"),
        ({"sampling": {"max_tokens": 6}}, "settings.sampling.max_tokens was 5 and is 6"),
        ({"keep": ("id",)}, r"settings.keep was \[\] and is \['id'\]"),
        ({"variant": "untied"}, "engine.weights was"),
    ):
        with pytest.raises(RequestError, match=told):
            run_job(rows, out, **changed)
    rows.write_bytes(rows.read_bytes() + b'"the"\n')
    with pytest.raises(RequestError, match=r"input\.rows was 13 and is 14"):
        run_job(rows, out)
    assert run_job(rows, out, job={"overwrite": True}).rows == 14
    assert len(read_rows(out)) == 14


def test_an_output_of_unknown_origin_is_left_alone(
    rows: Path, run_job: RunJob, tmp_path: Path
) -> None:
    for name in ("out.jsonl", "out.jsonl.part"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(RequestError, match="no journal"):
            run_job(rows, tmp_path / "out.jsonl")
        assert (tmp_path / name).read_text() == "precious"
        assert not (tmp_path / "out.jsonl.journal").exists()
        (tmp_path / name).unlink()


def test_an_output_that_was_changed_is_noticed(
    rows: Path, run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_COMPACT_BYTES", 300)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with failing(40, Killed()), pytest.raises(Killed):
        run_job(rows, out, job=ALWAYS)
    content = part.read_bytes()
    for changed, told in ((b"x" + content[1:], "was changed"), (content[:9], "has 9 bytes")):
        part.write_bytes(changed)
        with pytest.raises(LedgerError, match=told):
            run_job(rows, out)
    part.write_bytes(content)
    run_job(rows, out)


def test_two_runners_on_one_output(tmp_path: Path) -> None:
    first = Ledger.open(tmp_path / "out", {})
    with pytest.raises(RequestError, match="another process"):
        Ledger.open(tmp_path / "out", {})
    first.close()
    Ledger.open(tmp_path / "out", {}).close()


def test_a_journal_replaced_meanwhile_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal.open(path)
    first.rewrite([(b"H", b"x")])
    with pytest.raises(RequestError):
        Journal.open(path)
    first.close()
    assert [line[1:] for line in Journal.open(path).lines()] == [(b"H", b"x")]


def test_input_that_changes_meanwhile(
    rows: Path, run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing(_Counting):
        def __call__(self, row: int, content: object) -> Result:
            os.utime(rows, (1, 1))
            return super().__call__(row, content)

    monkeypatch.setattr("optlm.batch.plain.PlainRows.start", Changing())
    with pytest.raises(Exception, match="changed while it was read"):
        run_job(rows, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_kill_9(models: dict[str, Path], tmp_path: Path) -> None:
    """The command itself; `benchmarks/batch_kills.py` does it a hundred times."""
    prompts = [
        {"prompt": f"the cat {row}", "params": {"max_tokens": 1 + row % 50}} for row in range(600)
    ]
    source = write_rows(tmp_path / "in.jsonl", prompts)

    def start(out: Path) -> subprocess.Popen[bytes]:
        words = ["batch", str(source), str(out), "-m", str(models["base"]), "--json"]
        return subprocess.Popen(
            [sys.executable, "-m", "optlm", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    whole = start(tmp_path / "whole.jsonl")
    assert json.loads(whole.communicate()[0])["rows"] == 600
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    sizes = [0]
    for _ in range(2):
        runner = start(out)
        while not journal.exists() or journal.stat().st_size < sizes[-1] + 20_000:
            assert runner.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        runner.send_signal(signal.SIGKILL)
        runner.communicate()
        sizes.append(journal.stat().st_size)
    last = start(out)
    report = json.loads(last.communicate()[0])
    assert 0 < report["resumed_rows"] < 600
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    shutil.rmtree(tmp_path)
