"""A finished run is a model: its folder goes wherever a model goes, and others say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import story, write_corpus

from optlm import LLM, cli
from optlm.checkpoint import open_checkpoint
from optlm.errors import CheckpointError, ConfigError
from optlm.model import OPT
from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run import export
from optlm.train.run.folder import RunFolder, TrainingError
from optlm.train.tokens.corpus import CorpusError


def assert_holds(model: Path, state: dict[str, torch.Tensor]) -> None:
    for name, value in OPT.from_checkpoint(model).state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_run_ends_with_the_model_that_was_judged_best(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, told = tmp_path / "run", list[str]()
    pretrain(config, run, log=told.append)
    latest = RunFolder(run).load_latest()
    assert latest is not None
    best = latest["best"][1]
    assert f"the model of step {best} is in {run / 'model'}" in told[-1]
    assert_holds(run, RunFolder(run).load(best)["average"])
    assert open_checkpoint(run).folder == run / "model"
    assert LLM(run, threads=1).generate("the cat")[0].token_ids
    for command in (["generate", "the cat"], ["score", "--text", "the cat"], ["info"], ["doctor"]):
        place = [str(run)] if command[0] in ("info", "doctor") else ["--model", str(run)]
        assert cli.run([*command, *place]) == 0, capsys.readouterr().err


def test_without_held_out_text_the_last_step_is_the_model(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    del recipe["data"]["validation"]
    pretrain(PretrainConfig.from_dict(recipe), tmp_path / "run")
    assert_holds(tmp_path / "run", RunFolder(tmp_path / "run").load(12)["average"])
    with pytest.raises(ConfigError, match=r"name some in data\.validation, or leave patience out"):
        PretrainConfig.from_dict(recipe | {"loop": recipe["loop"] | {"patience": 2}})


def test_a_continued_run_replaces_its_model(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["data"]["validation"]
    for steps in (3, 5):
        recipe["loop"]["steps"] = steps
        config = PretrainConfig.from_dict(recipe)
        pretrain(config, tmp_path / "run", may_change={"loop.steps", "loop.optim.warmup_steps"})
        assert_holds(tmp_path / "run", RunFolder(tmp_path / "run").load(steps)["average"])


def test_a_full_disk_at_the_end_loses_nothing(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_checkpoint", full)
        with pytest.raises(TrainingError, match=r"No space left.*the same command again"):
            pretrain(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match="give the same command again"):
        open_checkpoint(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    pretrain(config, tmp_path / "run")
    open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.json": '{"technique": "pretrain"}'}, r"\(pretrain\).*give the same command again"),
        ({"run.json": '{"technique": "teacher-cache"}'}, "a teacher's predictions and no model"),
        ({"run.json": "{", "adapter_config.json": "{}"}, "--model MODEL --adapter DIR"),
        ({"run.json": '{"technique": 3}'}, "model.safetensors"),  # another program's run.json
        ({"run.json": "[" * 100_000}, "model.safetensors"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


# ---- runs that failed before they began ---------------------------------------------------------


def test_mended_settings_are_taken_by_a_run_that_never_began(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """First too many entries for the text, then held-out text that is not there."""
    run = tmp_path / "run"
    large = json.loads(json.dumps(recipe))
    large["model"]["vocab_size"] = large["data"]["vocab_size"] = 5000
    with pytest.raises(CorpusError, match=r"or set data\.vocab_size to that or less"):
        pretrain(PretrainConfig.from_dict(large), run)
    blind = recipe | {"data": recipe["data"] | {"validation": {"none": str(tmp_path / "no.txt")}}}
    with pytest.raises(CorpusError, match=r"no\.txt"):
        pretrain(PretrainConfig.from_dict(blind), run)
    assert (run / "data" / "manifest.json").exists()
    pretrain(PretrainConfig.from_dict(recipe), run)
    with pytest.raises(ConfigError, match=r"different: data\.validation"):
        pretrain(PretrainConfig.from_dict(blind), run)


def test_packed_data_that_were_named_are_never_replaced(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    recipe["loop"]["steps"] = 1
    pretrain(PretrainConfig.from_dict(recipe), tmp_path / "one", data_folder=packed)
    other = write_corpus(tmp_path / "other.jsonl", [{"text": story(i)} for i in range(30)])
    recipe["data"]["parts"] = [{"name": "other", "file": str(other)}]
    with pytest.raises(ConfigError, match="holds data of another configuration"):
        pretrain(PretrainConfig.from_dict(recipe), tmp_path / "two", data_folder=packed)


@pytest.mark.parametrize("given", ["model", "data", "neither"])
def test_vocabulary_is_said_once(recipe: dict[str, Any], given: str) -> None:
    for place in {"model", "data"} - {given}:
        del recipe[place]["vocab_size"]
    config = PretrainConfig.from_dict(recipe)
    wanted = 8192 if given == "neither" else 300
    assert config.model.vocab_size == config.data.vocab_size == wanted
    del recipe["sequence_lengths"]
    assert PretrainConfig.from_dict(recipe).sequence_lengths == {64: 1.0}  # the context
    named = {"model": "tiny", "data": recipe["data"] | {"vocab_size": 290}}
    assert PretrainConfig.from_dict(named).model.vocab_size == 290
