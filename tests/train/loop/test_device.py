"""The device: what the setting means, and that no technique forgets a value on another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distil_settings import settings
from pretend_gpu import ELSEWHERE, elsewhere, moved
from torch import nn

from optlm.cli import run as command_line
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.distil.distil import Batch, _loss
from optlm.train.distil.divergence import CachedRows
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.report import closeness
from optlm.train.distil.teacher import open_teacher
from optlm.train.finetune.adapters import Adapted, AdapterConfig, attach
from optlm.train.finetune.examples import Example
from optlm.train.finetune.finetune import _mean_loss
from optlm.train.finetune.forgetting import ForgettingMeter, own_texts
from optlm.train.finetune.packing import make_rows
from optlm.train.loop.device import autocast, to_device, training_device
from optlm.train.loop.trainer import Loss
from optlm.train.parallel import Alone, GroupConfig, join
from optlm.train.pretrain import pretrain as pretraining
from optlm.train.pretrain.pairs import log_probabilities
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.pretrain.validate import bits_per_byte, sample
from variants import VARIANTS

CPU = torch.device("cpu")


# ---- the setting --------------------------------------------------------------------------------


def gpus(patch: pytest.MonkeyPatch, count: int) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "local_rank", "wanted"),
    [
        (0, "auto", 0, "cpu"),
        (0, "cpu", 3, "cpu"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda", 0, "cuda:0"),
        (2, "cpu", 0, "cpu"),
    ],
)
def test_what_a_name_stands_for(
    monkeypatch: pytest.MonkeyPatch, count: int, name: str, local_rank: int, wanted: str
) -> None:
    gpus(monkeypatch, count)
    assert training_device(name, local_rank=local_rank) == torch.device(wanted)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with join(GroupConfig(device=name)) as parallel:
        assert parallel.device == torch.device(wanted)


@pytest.mark.parametrize(
    ("count", "name", "local_rank", "message"),
    [
        (0, "cuda", 0, "finds no GPU here; take 'cpu' or 'auto'"),
        (0, "gpu", 0, "device is 'gpu'; it must be one of auto, cpu, cuda"),
        (4, "cud", 0, "did you mean 'cuda'"),
        (1, "auto", 1, "process 1 of this machine has no GPU: PyTorch finds 1"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, count: int, name: str, local_rank: int, message: str
) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(ConfigError, match=message):
        training_device(name, local_rank=local_rank)


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "SETTINGS", "--out", "OUT"],
        ["babylm", "train", "BABYLM", "--out", "OUT"],
        ["babylm", "test", "--text", "SETTINGS"],
        ["distil", "DISTIL", "--out", "OUT"],
        ["teacher-cache", "DISTIL", "--out", "OUT"],
        ["finetune", "--data", "SETTINGS", "--out", "OUT"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_refuses_a_gpu_that_is_not_there(
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    import json

    gpus(monkeypatch, 0)
    loop = {key: value for key, value in recipe["loop"].items() if key != "steps"}
    files = {
        "SETTINGS": recipe,
        "BABYLM": recipe | {"loop": loop, "babylm": {}},
        "DISTIL": settings(recipe, tmp_path / "teacher"),
    }
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    line = [str(tmp_path / word) if word.isupper() else word for word in command]
    assert command_line([*line, "--device", "cuda"]) == 2
    assert "device is 'cuda', but PyTorch" in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()
    assert command_line([*line, "--device", "tpu"]) == 2
    assert "it must be one of auto, cpu, cuda" in capsys.readouterr().err


def test_what_is_brought_to_a_device() -> None:
    class Pair(NamedTuple):
        tokens: torch.Tensor
        words: int

    rows = make_rows([[Example([2, 4, 5])]], 1)
    cached = CachedRows(ids=torch.ones(2), logs=torch.ones(2), rest=torch.ones(2))
    batch = Batch(tokens=torch.ones(1, 3), cached=cached, seed=4, words=2)
    for value in (Pair(torch.ones(2), 3), (torch.ones(1), (torch.ones(1), "a")), rows, batch):
        placed = to_device(value, ELSEWHERE)
        assert type(placed) is type(value)
        tensors = [each for each in flat(placed) if isinstance(each, torch.Tensor)]
        assert tensors
        assert {tensor.device for tensor in tensors} == {ELSEWHERE}
        others = [each for each in flat(placed) if not isinstance(each, torch.Tensor)]
        assert others == [each for each in flat(value) if not isinstance(each, torch.Tensor)]


def flat(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [each for part in value for each in flat(part)]
    if hasattr(value, "__dataclass_fields__"):
        return [each for part in vars(value).values() for each in flat(part)]
    return [value]


def test_precision_on_a_device() -> None:
    a = torch.ones(2, 2)
    for precision, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, CPU):
            assert (a @ a).dtype == dtype


def test_the_run_notes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from optlm.train.run.environment import changed, environment

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    on_gpu = environment(torch.device("cuda", 1))
    assert changed(environment(CPU), on_gpu) == ["gpu: none -> card 1"]


# ---- nothing is left behind ---------------------------------------------------------------------


def step(loss: Any, model: nn.Module, batch: Any) -> None:
    """Forward and backward elsewhere; the batch comes from the CPU."""
    found = Alone(ELSEWHERE).call(loss, model, batch)
    assert isinstance(found, Loss)
    found.total.backward()
    gradients = {p.grad.device for p in model.parameters() if p.grad is not None}
    assert gradients == {ELSEWHERE}


def test_another_device_finds_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own tool: values of two devices do not mix."""
    with elsewhere(monkeypatch), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=ELSEWHERE) + torch.ones(2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pretraining_elsewhere(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    loss = pretraining._loss(config)
    with elsewhere(monkeypatch):
        model = moved(OPT(VARIANTS[variant]))
        rows = pretraining.Rows(torch.randint(4, 50, (2, 9)), words=3)
        step(loss, model.train(), rows)

        def evaluate(model: OPT) -> dict[str, Any]:
            bits_per_byte(model, [[2, 5, 6, 7]], 5)
            sample(model, [2, 5], count=2, seed=1)
            return {"scores": log_probabilities(model, [[2, 5], [2, 7]])}

        assert len(Alone(ELSEWHERE).judge(evaluate, model.eval())["scores"]) == 2


@pytest.mark.parametrize("method", ["full", "prefix", "prompt"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_finetuning_elsewhere(monkeypatch: pytest.MonkeyPatch, variant: str, method: str) -> None:
    """Without LoRA: peft moves modules by itself, which fake tensors refuse."""
    with elsewhere(monkeypatch):
        base = OPT(VARIANTS[variant])
        settings = AdapterConfig(method="prefix" if method == "full" else method, virtual_tokens=3)
        if method == "full":
            adapted = Adapted(moved(base), method="full")
        else:
            adapted = attach(moved(base), settings, torch.tensor([5, 6, 7]).to(ELSEWHERE))
        rows = make_rows([[Example([2, 5, 6, 2]), Example([2, 7, 2], first=2)]], 1)
        step(Adapted.loss, adapted, rows)
        _mean_loss(adapted, [rows])
        if method == "full":
            meter = ForgettingMeter(adapted, own_texts(adapted.base, seed=1))
            meter(adapted)


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_distilling_elsewhere(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    values = settings(recipe, tmp_path / "teacher")
    config = DistilConfig.from_dict(values)
    checkpoint = open_teacher(config.teacher)
    shape = config.training.model
    made: list[Any] = []
    monkeypatch.setattr(OPT, "to", lambda model, device: made.append(device) or moved(model))
    with elsewhere(monkeypatch):
        student = OPT(shape)
        teacher = moved(OPT(checkpoint.config))
        monkeypatch.setattr("optlm.train.distil.distil._in_memory", lambda _: teacher)
        loss = _loss(config, checkpoint, None, live=kind != "cached", device=ELSEWHERE)
        cached = None
        if kind == "cached":
            ids = torch.arange(5).repeat(16, 1)
            cached = CachedRows(ids=ids, logs=torch.zeros(16, 5), rest=torch.zeros(16))
        batch = Batch(tokens=torch.randint(4, 50, (2, 9)), cached=cached, seed=None, words=1)
        step(loss, moved(student).train(), batch)
        closeness(student, teacher, [[2, 5, 6, 7]])
    assert made == ([] if kind == "cached" else [ELSEWHERE])
