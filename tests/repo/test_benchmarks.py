"""The benchmarks' own arithmetic, and a small run of our side; the peers are not needed."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tree import ROOT

from variants import VARIANTS, make_state, write_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))

import checkpoints
import common
import decode
import memory
import peers
import prefill
import report
import startup
import worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS["mini"]
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", config, make_state(config))


@pytest.fixture
def _small_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(common.read_bandwidth, "__defaults__", (4,))
    yield
    common._BUFFER.clear()


# ---- arithmetic ----------------------------------------------------------------------------------


def test_pins_are_exact_and_cover_the_engines() -> None:
    pins = peers.read_pins(peers.PINS.read_text(encoding="utf-8"))
    engines = {engine.environment for engine in common.ENGINES.values()} - {None}
    assert engines | {"vllm"} == set(pins)  # which is serving.py's alone
    for lines in pins.values():
        assert all(line.count("==") == 1 for line in lines)
        assert lines[0].startswith("torch==")
    torch = (ROOT / "constraints.txt").read_text().strip()
    assert {lines[0] for lines in pins.values()} == {torch}


def test_spread_of_an_odd_and_an_even_count() -> None:
    assert common.Spread.of([3, 1, 2]) == common.Spread(median=2, least=1, most=3, count=3)
    assert common.Spread.of([1, 2, 4, 9]).median == 3


def test_touched_bytes_leave_out_what_is_not_read() -> None:
    facts = {"bytes_per_token": 1000, "fc2_weights": 400, "active_share": 0.25}
    assert common.touched_bytes(facts) == 700
    assert common.touched_bytes(facts | {"active_share": None}) == 1000


def test_prompts_differ_between_calls_and_repeat_between_engines() -> None:
    first = common.prompts(3, 40, 500, seed=1)
    assert first == common.prompts(3, 40, 500, seed=1)
    rows = {tuple(row) for seed in range(10) for row in common.prompts(3, 40, 500, seed)}
    assert len(rows) == 30
    assert all(4 <= token < 500 for row in rows for token in row)


def test_engines_take_turns_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    def case(name: str, turn: int) -> float:
        log.append(f"{name}{turn}")
        if (name, turn) == ("b", 2):
            raise common.WorkerError("lost")
        return float(turn)

    monkeypatch.setattr(common, "read_bandwidth", lambda threads: log.append("-") or 1e9)
    failed: list[str] = []
    seconds, bandwidths = common.alternate(
        {name: lambda turn, name=name: case(name, turn) for name in "ab"},
        3,
        threads=1,
        failed=lambda name, error: failed.append(f"{name} {error}"),
    )
    assert log == ["a0", "b0", "-", "a1", "b1", "-", "a2", "b2", "-", "a3"]
    assert seconds == {"a": [1, 2, 3]}
    assert bandwidths == [1e9] * 3
    assert failed == ["b lost"]


def test_decode_step_is_the_difference() -> None:
    calls: list[tuple[Any, int]] = []

    def seconds(prompts: list[list[int]], tokens: int) -> float:
        calls.append((prompts, tokens))
        return 0.5 + 0.01 * tokens

    fake: Any = SimpleNamespace(seconds=seconds)
    assert decode.step_seconds(fake, 2, 10, 300, 1) == pytest.approx(0.01)
    assert [tokens for _, tokens in calls] == [1, 11]
    assert calls[0][0] != calls[1][0]


def test_headline_compares_with_the_best_peer() -> None:
    def row(engine: str, speed: float, share: float | None = None) -> dict[str, Any]:
        return {"model": "m", "batch": 1, "engine": engine, "tokens_per_s": speed} | {
            "share_of_floor": share
        }

    rows = [row("optlm int8", 300, 0.8), row("optlm bf16", 200, 0.7), row("A", 50), row("B", 100)]
    assert decode.headline(rows) == {
        "m, batch 1: optlm int8 over B": 3.0,
        "m, batch 1: share of the memory floor": 0.8,
    }
    assert decode.headline(rows[:2]) == {"m, batch 1: share of the memory floor": 0.8}
    assert report.ratio_to_best_peer(rows[2:], "tokens_per_s") is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (1234.5, "1,234"),
        (0.12345, "0.123"),
        (["a", "b"], "a, b"),
    ],
)
def test_show(value: object, shown: str) -> None:
    assert report.show(value) == shown


def test_failures_are_kept_without_folders() -> None:
    failures: dict[str, str] = {}
    common.note(failures, "125m", "openvino-int8", OSError("no file '/a/b-c/model.bin' in /d/e"))
    assert failures == {"125m openvino-int8": "no file 'model.bin' in e"}


def test_machine_tells_the_hardware_and_not_whose_it_is() -> None:
    found = json.dumps(report.machine([2e9, 1e9, 3e9]))
    assert '"memory read GB/s (median)": 2.0' in found
    assert "1.0 to 3.0" in found
    assert platform.node() not in found


def test_random_checkpoint_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optlm.checkpoint import open_checkpoint
    from optlm.tokenizer import Tokenizer

    monkeypatch.setattr(checkpoints, "TOKENIZER", tmp_path / "absent")
    monkeypatch.setattr(checkpoints, "NUM_TOKENS", VARIANTS["350m"].vocab_size)
    checkpoints.write_random(tmp_path, VARIANTS["350m"])
    opened = open_checkpoint(tmp_path)
    weight = opened.tensors["model.decoder.layers.0.fc1.weight"].raw()
    assert weight.dtype == np.float16
    assert float(np.std(weight.astype(np.float32))) == pytest.approx(0.1, rel=0.1)
    assert Tokenizer.from_folder(tmp_path, opened.config).encode("ab")[0] == 2


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothing: no checkpoint there; give one of 125m"):
        checkpoints.checkpoint(str(tmp_path / "nothing"))


# ---- processes -----------------------------------------------------------------------------------


def test_worker_refuses_a_short_answer() -> None:
    engine = SimpleNamespace(generate=lambda prompts, tokens: [[1, 2]])
    request = {"op": "generate", "prompts": [[5]], "tokens": 3}
    with pytest.raises(RuntimeError, match="asked 3 tokens"):
        worker.answer(engine, request)


def stands_still(pid: int) -> bool:
    """Whether the process is stopped, now or within a second: the signal takes its time."""
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_worker_runs_then_stands_still(folder: Path) -> None:
    failures: dict[str, str] = {}
    with common.workers(["optlm-f32"], str(folder), 1, failures) as running:
        assert not failures
        ours = running["optlm-f32"]
        assert ours.seconds([[5, 6], [7, 8]], 3) > 0
        pid = ours._process.pid
        assert stands_still(pid)
        with pytest.raises(common.WorkerError, match="AttributeError"):
            ours.ask("nonsense")
        assert ours.ask("memory")["peak"] > 1_000_000
    assert not Path(f"/proc/{pid}").exists()


def test_missing_peer_is_noted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTLM_PEERS", str(tmp_path))
    failures: dict[str, str] = {}
    with common.workers(["openvino-int8"], str(folder), 1, failures) as running:
        assert not running
    assert "peers.py install" in failures["tiny openvino-int8"]


@pytest.mark.parametrize("failing", [False, True])
def test_startup_reads_the_first_byte(failing: bool) -> None:
    code = "import time; print('x', end='', flush=True); time.sleep(0.2)"
    command: Any = [sys.executable, "-S", "-c", code + ("; raise SystemExit(3)" * failing)]
    if failing:
        with pytest.raises(RuntimeError, match="exit code 3"):
            startup.run_once(command, None)
        return
    first, whole = startup.run_once(command, None)
    assert 0 < first < whole - 0.15


RUNS: list[tuple[Any, list[str], str]] = [
    (decode, ["--models", "{}", "--batches", "1", "2", "--engines", "optlm-int8"], "decode"),
    (decode, ["--models", "{}", "--batches", "2", "--sparse"], "sparse"),
    (prefill, ["--models", "{}", "--tokens", "24", "--engines", "optlm-int8"], "prefill"),
    (memory, ["--models", "{}", "--engines", "optlm-int8"], "memory"),
]


@pytest.mark.usefixtures("_small_reads")
@pytest.mark.parametrize(("script", "arguments", "name"), RUNS, ids=[run[2] for run in RUNS])
def test_scripts(
    script: Any,
    arguments: list[str],
    name: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for constant in ("PROMPT", "STEPS_SMALL", "FACT_STEPS", "TOKENS"):
        if hasattr(script, constant):
            monkeypatch.setattr(script, constant, 4)
    common_options = ["--rounds", "1", "--threads", "1", "--results", str(tmp_path)]
    if name == "prefill":
        common_options += ["--name", "short"]
    argv = [name, *(a.replace("{}", str(folder)) for a in arguments), *common_options]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == name
    assert line["failures"] == {}
    assert all(row["model"] == "tiny" for row in line["rows"])
    if name == "sparse":
        assert line["headline"]["logits identical bit for bit"] is True
    written = {path.suffix: path for path in tmp_path.iterdir()}
    assert {path.stem[11:] for path in written.values()} == {"short" if name == "prefill" else name}
    assert written.keys() == {".json", ".md"} | ({".png"} if name != "sparse" else set())
    assert json.loads(written[".json"].read_text()) == line
    page = written[".md"].read_text()
    assert "## Machine and versions" in page
    assert str(folder) not in page
    assert os.environ.get("HOSTNAME") is None or os.environ["HOSTNAME"] not in page
