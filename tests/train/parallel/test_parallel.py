"""Many processes train as one does, and what they save is any other number's to use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from parallel_runs import STEPS, assert_same_run, workers

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.layout import Grid
from optlm.checkpoint.reshard import reshard
from optlm.errors import CheckpointError
from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run.export import export_run
from optlm.train.run.folder import RunFolder, TrainingError

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


def test_damaged_in_all_places_is_an_error(two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    for step in run.glob("step-*.parts"):
        (step / "manifest.json").unlink()
    with pytest.raises(TrainingError, match="no checkpoint of this run is whole"):
        RunFolder(run).load_latest()
