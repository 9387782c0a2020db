"""The training loop on a model of one matrix: accumulation, averaging, resuming, failing."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_tools import (
    Batch,
    Killed,
    adapter_trainer,
    bits,
    data,
    distance,
    one_batch,
    plain_error,
    trainer,
)
from torch import nn

from optlm.errors import ConfigError
from optlm.train.loop.guard import StepRecord
from optlm.train.loop.optim import OptimConfig
from optlm.train.loop.trainer import LoopConfig, Loss
from optlm.train.run.folder import RunFolder, TrainingError


@pytest.mark.parametrize("kill_at", [1, 4, 8, 15])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, kill_at: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()

    def until_killed(step: int) -> list[Batch]:
        if step == kill_at:
            raise Killed
        return one_batch(step)

    with pytest.raises(Killed):
        trainer(tmp_path / "cut", batches=until_killed).run()
    resumed = trainer(tmp_path / "cut")
    resumed.run()
    assert bits(resumed.model) == bits(whole.model)
    assert bits(resumed.average) == bits(whole.average)
    assert resumed.best == whole.best
    assert (resumed.step, resumed.tokens) == (16, 192)
    untimed = [
        [
            {k: v for k, v in event.items() if k not in ("seconds", "tokens_per_second")}
            for event in RunFolder(path).events()
            if event["kind"] != "start"
        ]
        for path in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def interrupted(step: int) -> list[Batch]:
        if step == 5:
            os.kill(os.getpid(), number)
        return one_batch(step)

    stopped = trainer(tmp_path / "a", batches=interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert stopped.step == 6
    assert signal.getsignal(number) is before
    resumed = trainer(tmp_path / "a")
    resumed.run()
    whole = trainer(tmp_path / "b")
    whole.run()
    assert bits(resumed.model) == bits(whole.model)


def test_finished_run_changes_nothing(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    written = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("step-*.pt")}
    again = trainer(tmp_path)
    again.run()
    assert again.step == 16
    assert written == {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("step-*.pt")}


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    """Pieces of unequal size count by their predictions."""

    def pieces(step: int) -> list[Batch]:
        x, y = data(step)
        return list(zip(x.split([1, 7, 4]), y.split([1, 7, 4]), strict=True))

    large = trainer(tmp_path / "a", loss=plain_error)
    split = trainer(tmp_path / "b", loss=plain_error, batches=pieces)
    large.run()
    split.run()
    torch.testing.assert_close(split.model.state_dict(), large.model.state_dict())


def test_it_learns_and_the_best_is_kept(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        loss=plain_error,
        steps=100,
        evaluate_every=30,
        optim=OptimConfig(learning_rate=0.1, warmup_steps=100),
    )
    run.run()
    events = RunFolder(tmp_path).events()
    scores = {e["step"]: e["score"] for e in events if e["kind"] == "valid"}
    losses = [e["loss"] for e in events if e["kind"] == "train"]
    assert losses[-1] < 0.1 * losses[0]
    assert run.best == min((score, step) for step, score in scores.items())
    assert RunFolder(tmp_path).checkpoint(run.best[1]).exists()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_log_holds_the_mean_loss_since_the_line_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, steps=7, log_every=3)
    plain, losses = run._one_step, []

    def recorded() -> StepRecord:
        losses.append(plain())
        return losses[-1]

    monkeypatch.setattr(run, "_one_step", recorded)
    run.run()
    means = [e["loss"] for e in RunFolder(tmp_path).events() if e["kind"] == "train"]
    first, second, last = losses[:3], losses[3:6], losses[6:]
    assert means == [sum(r.loss for r in part) / len(part) for part in (first, second, last)]


def test_average_follows_the_weights(tmp_path: Path) -> None:
    """Recomputed from its definition."""
    run = trainer(tmp_path, loss=plain_error, average_decay=0.6)
    average = run.model.weight.detach().clone()
    for step in range(6):
        run._one_step()
        decay = min(0.6, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * run.model.weight.detach()
    torch.testing.assert_close(run.average.weight, average)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_no_number_stops_before_the_weights_change(tmp_path: Path, bad: float) -> None:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        good = plain_error(model, batch)
        return Loss(good.total * bad, good.count) if run.step == 9 else good

    run = trainer(tmp_path, loss=loss)
    with pytest.raises(
        TrainingError, match=r"step 9 .*learning rate below 0\.0257.*: 9 in loop\.leave_out"
    ):
        run.run()
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())
    latest = RunFolder(tmp_path).load_latest()
    assert latest is not None
    assert latest["step"] == 8


@pytest.mark.parametrize("values", [{"steps": 0}, {"log_every": -1}, {"average_decay": 1.0}])
def test_nonsense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        LoopConfig(**({"steps": 5} | values))


# ---- what is trained, averaged and saved --------------------------------------------------------


def test_only_what_is_trained_is_averaged_and_saved(tmp_path: Path) -> None:
    run = adapter_trainer(tmp_path)
    assert run.average.base.weight is run.model.base.weight  # no second base in memory
    assert run.average.correction.weight is not run.model.correction.weight
    before = run.model.base.weight.clone()
    run.run()
    assert torch.equal(run.model.base.weight, before)
    state = RunFolder(tmp_path).load_latest()
    assert state is not None
    assert set(state["model"]) == set(state["average"]) == {"correction.weight", "seen"}


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_adapter_run_resumes_to_the_same_bits(tmp_path: Path, decay: float) -> None:
    whole = adapter_trainer(tmp_path / "a", average_decay=decay)
    whole.run()
    cut = adapter_trainer(tmp_path / "b", average_decay=decay)
    cut._batches = lambda step: one_batch(step) if step < 5 else (_ for _ in ()).throw(Killed())
    with pytest.raises(Killed):
        cut.run()
    resumed = adapter_trainer(tmp_path / "b", average_decay=decay)
    resumed.run()
    assert bits(resumed.model) == bits(whole.model)
    assert bits(resumed.average) == bits(whole.average)


def test_without_averaging_the_model_itself_is_evaluated(tmp_path: Path) -> None:
    run = trainer(tmp_path, average_decay=0.0)
    judged: list[tuple[bool, bool]] = []

    def evaluate(model: nn.Module) -> dict[str, Any]:
        judged.append((model is run.model, model.training))
        return distance(model)

    run._evaluate = evaluate
    run.run()
    assert judged == [(True, False)] * 2
    assert run.average is run.model
    state = RunFolder(tmp_path).load_latest()
    assert state is not None
    assert state["average"] is None


def test_training_goes_on_in_training_mode_after_an_evaluation(tmp_path: Path) -> None:
    modes: list[bool] = []

    def loss(model: nn.Module, batch: Batch) -> Loss:
        modes.append(model.training)
        return plain_error(model, batch)

    trainer(tmp_path, loss=loss, average_decay=0.0).run()
    assert modes == [True] * 16


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter_trainer(tmp_path).run()
    other = trainer(tmp_path, steps=20)
    before = bits(other.model)
    with pytest.raises(TrainingError, match=r"does not fit.*bias, correction\.weight, seen"):
        other.run()
    assert bits(other.model) == before


def test_patience_ends_the_run_and_a_resume_keeps_it_ended(tmp_path: Path) -> None:
    def worse(model: nn.Module) -> dict[str, Any]:
        return {"score": float(run.step)}

    values: dict[str, Any] = {"steps": 100, "evaluate_every": 4, "patience": 2}
    run = trainer(tmp_path, **values)
    run._evaluate = worse
    told: list[str] = []
    run._diary._tell = told.append
    run.run()
    assert (run.step, run.best) == (12, (4.0, 4))
    assert told == ["stopped after step 12: no better score than 4.0000 (step 4) in 2 evaluations"]
    again = trainer(tmp_path, **values)
    again.run()
    assert again.step == 12
