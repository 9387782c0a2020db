"""What goes wrong in the middle of a fine-tuning or a distillation costs nothing that was saved."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distil_settings import settings

from optlm.errors import CheckpointError
from optlm.train.distil.distil import distil
from optlm.train.distil.fill_cache import cache_teacher
from optlm.train.distil.recipe import DistilConfig
from optlm.train.finetune import finetune as finetuning
from optlm.train.finetune.finetune import FinetuneConfig, finetune
from optlm.train.loop.trainer import Trainer
from optlm.train.run import export, folder
from optlm.train.run.folder import RunFolder, TrainingError

Job = Callable[..., object]  # trains 6 steps in a folder, with a checkpoint every 2
_RESULT = {"finetune": "adapter_model.safetensors", "distil": "model/model.safetensors"}


@pytest.fixture(params=sorted(_RESULT))
def technique(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def job(technique: str, recipe: dict[str, Any], tmp_path: Path) -> Job:
    values = settings(recipe, tmp_path / "base")
    values["loop"] |= {"steps": 6, "evaluate_every": 2}
    if technique == "distil":
        distilled = DistilConfig.from_dict(values)
        return lambda run, **given: distil(distilled, run, data_folder=tmp_path / "data", **given)
    config = FinetuneConfig(
        max_steps=6, evaluate_every=2, batch_tokens=64, micro_batch_tokens=64, seq_len=32,
        learning_rate=0.01,
    )  # fmt: skip
    examples = ({"text": f"the cat number {i} sat on the mat"} for i in range(12))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, examples)))
    return lambda run, **given: finetune(tmp_path / "base", data, run, config, **given)


@pytest.fixture
def wanted(job: Job, technique: str, tmp_path: Path) -> bytes:
    """The result of a run in which nothing went wrong."""
    job(tmp_path / "whole")
    return (tmp_path / "whole" / _RESULT[technique]).read_bytes()


def no_number_at(step: int) -> Any:
    plain = Trainer._backward

    def backward(self: Trainer[Any, Any], batch: Any, scale: float) -> Any:
        loss = plain(self, batch, scale)
        factor = float("nan" if self.step == step else 1)
        return dataclasses.replace(loss, total=loss.total * factor)

    return backward


def full_after(checkpoints: int) -> Any:
    """A disk that fills up in the middle of the next checkpoint."""
    plain, written = folder.write_signed, []

    def write(file: Any, state: dict[str, Any]) -> None:
        if len(written) == checkpoints:
            file.write(b"PK half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        plain(file, state)

    return write


@pytest.mark.parametrize("trouble", ["loss is no number", "disk is full"])
def test_trouble_keeps_the_last_checkpoint_and_the_same_command_goes_on(
    job: Job, technique: str, wanted: bytes, tmp_path: Path, trouble: str
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        if trouble == "disk is full":
            patch.setattr(folder, "write_signed", full_after(2))
            message = r"No space left.*earlier checkpoints are unharmed, free some space and resume"
        else:
            patch.setattr(Trainer, "_backward", no_number_at(4))
            message = r"step 4 has loss nan.*not changed and the checkpoints before it stay.*below"
        with pytest.raises(TrainingError, match=message):
            job(run)
    assert RunFolder(run).steps() == [2, 4]
    assert RunFolder(run).load(4)["step"] == 4
    assert not [file for file in run.iterdir() if file.name.startswith(".")]
    assert not (run / _RESULT[technique]).exists()
    job(run)
    assert (run / _RESULT[technique]).read_bytes() == wanted


@pytest.mark.parametrize("kept", [0, 500, -400])
def test_half_written_newest_checkpoint(
    job: Job, technique: str, wanted: bytes, tmp_path: Path, kept: int
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_backward", no_number_at(5))
        with pytest.raises(TrainingError):
            job(run)
    newest = RunFolder(run).checkpoint(4)
    newest.write_bytes(newest.read_bytes()[:kept])
    told: list[str] = []
    job(run, log=told.append)
    assert any("cannot read" in line and newest.name in line for line in told), told
    assert "resuming after step 2 of 6" in told
    assert (run / _RESULT[technique]).read_bytes() == wanted


def test_full_disk_when_the_result_is_written(
    job: Job, technique: str, wanted: bytes, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    module, name = {
        "distil": (export, "save_checkpoint"),
        "finetune": (finetuning, "save_adapter"),
    }[technique]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(
            TrainingError, match=r"checkpoints are unharmed.*the same command again"
        ):
            job(run)
    job(run)
    assert (run / _RESULT[technique]).read_bytes() == wanted


def test_two_trainers(job: Job, wanted: bytes, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    held = json.loads((whole / "run.json").read_text())
    with RunFolder(whole).locked(held), pytest.raises(TrainingError, match="another trainer"):
        job(whole)


def test_two_writers_of_one_cache(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = DistilConfig.from_dict(settings(recipe, tmp_path / "teacher"))
    cache = tmp_path / "cache"
    cache_teacher(config, cache, top_k=4)
    held = json.loads((cache / "run.json").read_text())
    with RunFolder(cache).locked(held), pytest.raises(TrainingError, match="another trainer"):
        cache_teacher(config, cache, top_k=4)


def test_a_teacher_must_be_a_model(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Neither an adapter nor another cache."""
    values = settings(recipe, tmp_path / "teacher")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter, no model"):
        DistilConfig.from_dict(values | {"teacher": str(tmp_path / "other")})
