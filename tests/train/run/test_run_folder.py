"""Checkpoints that survive crashes, full disks and second trainers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from optlm.errors import ConfigError
from optlm.train.run.folder import RunFolder, TrainingError


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((50,), float(step))}


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_keeps_the_last_two_and_the_best(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 8):
        folder.save(step, state(step), keep={min(step, 3)})
    assert names(tmp_path) == {f"step-0000000{step}.pt" for step in (3, 6, 7)}
    latest = folder.load_latest()
    assert latest is not None
    assert torch.equal(latest["weights"], torch.full((50,), 7.0))
    assert folder.load(3)["step"] == 3


def test_new_folder_has_nothing_to_resume(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).load_latest() is None


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_latest_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.save(1, state(1))
    folder.save(2, state(2))
    file = folder.checkpoint(2)
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-100], "empty": b"", "text": b"hello"}[damage])
    told: list[str] = []
    latest = folder.load_latest(log=told.append)
    assert latest is not None
    assert latest["step"] == 1
    assert "step-00000002.pt" in told[0]
    folder.checkpoint(1).write_bytes(b"")
    with pytest.raises(TrainingError, match="no checkpoint"):
        folder.load_latest()


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    folder = RunFolder(tmp_path)
    torch.save({"step": 1, "x": Evil()}, folder.checkpoint(1))
    with pytest.raises(TrainingError, match=r"step-00000001\.pt"):
        folder.load(1)
    assert not (tmp_path / "pwned").exists()


def test_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.save(1, state(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"No space left.*earlier checkpoints are unharmed"):
        folder.save(2, state(2))
    assert names(tmp_path) == {"step-00000001.pt"}


def test_crash_while_renaming_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.write("log.jsonl", b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            folder.write("log.jsonl", b"new")
    assert (tmp_path / "log.jsonl").read_bytes() == b"old"
    assert names(tmp_path) == {"log.jsonl"}


def test_one_trainer_at_a_time(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).locked({"a": 1}),
        pytest.raises(TrainingError, match="another trainer"),
        RunFolder(tmp_path).locked({"a": 1}),
    ):
        pass
    with RunFolder(tmp_path).locked({"a": 1}):
        pass


def test_other_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked({"loop": {"steps": 5, "x": (1, 2)}, "seed": 1}):
        pass
    with RunFolder(tmp_path).locked({"loop": {"steps": 5, "x": [1, 2]}, "seed": 1}):
        pass
    with (
        pytest.raises(ConfigError, match=r"different: loop\.steps, seed\)"),
        RunFolder(tmp_path).locked({"loop": {"steps": 6, "x": (1, 2)}, "seed": 2}),
    ):
        pass


def test_half_written_files_of_a_killed_trainer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.pt.abc").write_bytes(b"half")
    with RunFolder(tmp_path).locked({}):
        assert names(tmp_path) == {"lock", "run.json"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TrainingError, match="cannot write"), RunFolder(tmp_path / "x").locked({}):
        pass


def test_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="cannot write"),
        RunFolder(tmp_path / "file/x").locked({}),
    ):
        pass


def test_log_is_rewound_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6):
        folder.log({"step": step, "text": "Grüße\u2028x"})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "te')  # a crash in the middle of a line
    assert [event["step"] for event in folder.events()] == [2, 4, 6]
    folder.rewind_log(4)
    assert [event["step"] for event in folder.events()] == [2, 4]


# ---- hashes, changes, inputs
# ----------------------------------------------------------------------


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8, 0.999])
def test_one_changed_byte_is_found(tmp_path: Path, where: float) -> None:
    folder = RunFolder(tmp_path)
    folder.save(1, state(1))
    data = bytearray(folder.checkpoint(1).read_bytes())
    data[int(where * len(data))] ^= 1
    folder.checkpoint(1).write_bytes(data)
    with pytest.raises(TrainingError, match=r"step-00000001\.pt: its SHA-256"):
        folder.load(1)


def test_checkpoints_without_a_hash_and_by_plain_torch_are_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    torch.save(state(5), folder.checkpoint(5))
    assert folder.load(5)["step"] == 5
    folder.save(6, state(6))
    assert torch.load(folder.checkpoint(6), weights_only=True)["step"] == 6
    assert zipfile.is_zipfile(folder.checkpoint(6))
    with zipfile.ZipFile(folder.checkpoint(6)) as archive:
        assert archive.comment.startswith(b"sha256:")
        assert archive.testzip() is None


def test_only_named_settings_may_change(tmp_path: Path) -> None:
    before = {"loop": {"steps": 5, "every": 1}, "seed": 3}
    after = {"loop": {"steps": 9, "every": 2}, "seed": 3}
    with RunFolder(tmp_path).locked(before):
        pass
    folder = RunFolder(tmp_path)
    with pytest.raises(ConfigError, match=r"\(different: loop\.every\)"):
        folder.locked(after, may_change=("loop.steps",)).__enter__()
    with folder.locked(after, may_change=("loop.steps", "loop.every")):
        assert folder.changes == {"loop.steps": [5, 9], "loop.every": [1, 2]}
    with RunFolder(tmp_path).locked(after) as _:  # it is the run's from now on
        pass


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_settings_of_a_run_are_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainingError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).locked({"seed": 1}).__enter__()


def test_inputs_that_changed_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.stand_on({"parts": {"a": "1", "b": "2"}})
    folder.stand_on({"parts": {"a": "1", "b": "2"}})
    with pytest.raises(ConfigError, match=r"changed since \(parts\.b\)"):
        folder.stand_on({"parts": {"a": "1", "b": "3"}})


def test_full_disk_for_real(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail in the middle, as then."""
    code = """
import resource, signal, sys
from pathlib import Path
import torch
from optlm.train.run.folder import RunFolder, TrainingError
folder = RunFolder(Path(sys.argv[1]))
folder.save(1, {"step": 1, "weights": torch.zeros(50)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    folder.save(2, {"step": 2, "weights": torch.zeros(50_000)})
except TrainingError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "earlier checkpoints are unharmed" in done.stdout
    assert names(tmp_path) == {"step-00000001.pt"}
    assert RunFolder(tmp_path).load(1)["step"] == 1
