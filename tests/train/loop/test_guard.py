"""Spikes, overflows, and the logbook that tells of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_tools import (
    Batch,
    Killed,
    bits,
    data,
    one_batch,
    plain_error,
    squared_error,
    trainer,
)
from torch import Tensor, nn

from optlm.errors import ConfigError
from optlm.train.loop import diary
from optlm.train.loop.guard import LossScale, SpikeConfig
from optlm.train.loop.trainer import LoopConfig, Loss, Trainer
from optlm.train.run.folder import RunFolder, TrainingError

# ---- spikes, overflows, milestones --------------------------------------------------------------

SPIKED = 11


def spiked_batches(step: int) -> list[Batch]:
    x, y = data(step)
    return [(x, y + 50.0 if step == SPIKED else y)]


def spike_trainer(folder: Path, policy: str, **values: Any) -> Trainer[nn.Module, Batch]:
    spikes = SpikeConfig(policy=policy, window=8, threshold=12.0, rate_factor=0.5, remember=3)
    return trainer(folder, **({"batches": spiked_batches, "spikes": spikes, "steps": 20} | values))


@pytest.mark.parametrize("policy", ["record", "lower_rate", "skip"])
def test_spike_is_noted_and_the_policy_followed(tmp_path: Path, policy: str) -> None:
    run = spike_trainer(tmp_path, policy)
    run._diary._describe = lambda step: {"rows": [["part", step]]}
    run.run()
    (spike,) = [e for e in RunFolder(tmp_path).events() if e["kind"] == "spike"]
    assert spike["batch_step"] == SPIKED
    assert spike["deviations"] > 12.0
    assert spike["batch"] == {"rows": [["part", SPIKED]]}
    assert [record["step"] for record in spike["before"]] == [
        SPIKED - 3,
        SPIKED - 2,
        SPIKED - 1,
        SPIKED,
    ]
    assert set(spike["before"][0]["gradients"]) == {"weight", "bias"}
    assert run.tokens == (19 if policy == "skip" else 20) * 12
    assert run._watch.factor == (0.5 if policy == "lower_rate" else 1.0)
    book = (tmp_path / "logbook.md").read_text()
    assert f"Step {SPIKED} had loss" in book
    assert '"rows": [["part", 11]]' in book


@pytest.mark.parametrize("policy", ["record", "lower_rate", "skip"])
def test_spikes_are_judged_alike_after_a_resume(tmp_path: Path, policy: str) -> None:
    whole = spike_trainer(tmp_path / "a", policy)
    whole.run()

    def until_killed(step: int) -> list[Batch]:
        if step == SPIKED:
            raise Killed
        return spiked_batches(step)

    with pytest.raises(Killed):
        spike_trainer(tmp_path / "b", policy, batches=until_killed).run()
    resumed = spike_trainer(tmp_path / "b", policy)
    resumed.run()
    assert bits(resumed.model) == bits(whole.model)
    spikes = [
        [e | {"seconds": 0} for e in RunFolder(tmp_path / name).events() if e["kind"] == "spike"]
        for name in "ab"
    ]
    assert spikes[0] == spikes[1]


def test_skipping_a_spike_is_replaying_without_its_batch(tmp_path: Path) -> None:
    skipped = spike_trainer(tmp_path / "a", "skip")
    skipped.run()
    replayed = spike_trainer(tmp_path / "b", "record", leave_out=(SPIKED,))
    replayed.run()
    spoiled = spike_trainer(tmp_path / "c", "record")
    spoiled.run()
    assert bits(replayed.model) == bits(skipped.model) != bits(spoiled.model)
    assert replayed.tokens == skipped.tokens


def test_a_batch_whose_loss_is_no_number_can_be_skipped(tmp_path: Path) -> None:
    def broken(step: int) -> list[Batch]:
        x, y = data(step)
        return [(x, y * math.nan if step == 5 else y)]

    skipped = spike_trainer(tmp_path / "a", "skip", batches=broken)
    skipped.run()
    replayed = spike_trainer(tmp_path / "b", "record", batches=broken, leave_out=(5,))
    replayed.run()
    assert bits(skipped.model) == bits(replayed.model)
    with pytest.raises(TrainingError, match="step 5 has loss nan"):
        spike_trainer(tmp_path / "c", "record", batches=broken).run()


def test_a_model_that_diverged_is_not_skipped_for_ever(tmp_path: Path) -> None:
    def broken(step: int) -> list[Batch]:
        x, y = data(step)
        return [(x, y * math.nan if step >= 5 else y)]

    with pytest.raises(TrainingError, match=r"11 steps in a row, up to step 15.*diverged"):
        spike_trainer(tmp_path / "a", "skip", batches=broken).run()


def test_overflow_halves_the_scale_and_loses_the_step(tmp_path: Path) -> None:
    """A gradient that overflows above a scale of 20 stands for float16."""

    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient if float(gradient.max()) < 20 else gradient * math.inf

    def loss(model: nn.Module, batch: Batch) -> Loss:
        plain = squared_error(model, batch)
        return Loss(Overflowing.apply(plain.total), plain.count)

    def run(folder: Path, *, kill_at: int | None = None) -> Trainer[nn.Module, Batch]:
        def batches(step: int) -> list[Batch]:
            if step == kill_at:
                raise Killed
            return one_batch(step)

        made = trainer(folder, loss=loss, batches=batches)
        made._scale = LossScale(window=5)
        return made

    whole = run(tmp_path / "a")
    whole.run()
    assert whole._scale is not None
    # 128, 64, 32 overflow; five good steps at 16; 32 overflows; five good; 32 overflows; one good
    assert whole._scale.state() == [16.0, 5, 1]
    assert whole.tokens == 11 * 12
    events = RunFolder(tmp_path / "a").events()
    lost = [event["batch_step"] for event in events if event["kind"] == "overflow"]
    assert lost == [0, 1, 2, 8, 14]
    assert "the loss scale is now 64" in (tmp_path / "a" / "logbook.md").read_text()
    with pytest.raises(Killed):
        run(tmp_path / "b", kill_at=11).run()
    resumed = run(tmp_path / "b")
    resumed.run()
    assert bits(resumed.model) == bits(whole.model)
    assert resumed._scale is not None
    assert resumed._scale.state() == whole._scale.state()


def test_scale_that_falls_to_nothing_is_an_error() -> None:
    scale = LossScale(initial=2.0**-13)
    scale.overflow()
    with pytest.raises(TrainingError, match="still overflow"):
        scale.overflow()


def test_milestones_are_evaluated_and_kept(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Batch) -> Loss:
        plain = plain_error(model, batch)
        return Loss(plain.total, plain.count, words=7)

    run = trainer(
        tmp_path, loss=loss, steps=30, evaluate_every=100, keep_tokens=(30, 100), keep_words=(70,
        150), keep_every=12, keep_last=1,
    )  # fmt: skip
    run.run()
    assert run.words == 210
    events = [e for e in RunFolder(tmp_path).events() if e["kind"] == "valid"]
    reached = {e["step"]: e.get("reached") for e in events}
    words = {3: {"tokens": 30}, 9: {"tokens": 100}, 10: {"words": 70}, 22: {"words": 150}}
    assert reached == words | {30: None}
    assert set(RunFolder(tmp_path).steps()) == {3, 9, 10, 22, 12, 24, 30}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_tokens": (5, 3)}, "keep_tokens"),
        ({"leave_out": (-1,)}, "leave_out"),
        ({"patience": 0}, "patience"),
        ({"keep_last": 0}, "keep_last"),
    ],
)
def test_nonsense_about_keeping_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoopConfig(steps=5, **values)


@pytest.mark.parametrize(
    "values", [{"policy": "ignore"}, {"threshold": 0.5}, {"window": 2}, {"rate_factor": 0.0}]
)
def test_nonsense_about_spikes_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SpikeConfig(**values)


# ---- the diary ----------------------------------------------------------------------------------


def test_another_world_is_said_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(tmp_path, steps=8)
    first.run()
    now = diary.environment(torch.device("cpu")) | {"torch": "99.0"}
    monkeypatch.setattr(diary, "environment", lambda _: now)
    second = trainer(tmp_path, steps=12)
    told: list[str] = []
    second._diary._tell = told.append
    second.run()
    assert "torch: " in told[0]
    assert "-> 99.0" in told[0]
    book = (tmp_path / "logbook.md").read_text()
    assert book.count("## After step") == 2
    assert "**changed** torch" in book


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def until_killed(step: int) -> list[Batch]:
        if step == 12:
            raise Killed
        return one_batch(step)

    with pytest.raises(Killed):
        trainer(tmp_path, batches=until_killed, checkpoint_every=8).run()
    trainer(tmp_path, checkpoint_every=8).run()
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    events = [e for e in RunFolder(tmp_path).events() if e["kind"] == "train"]
    shown = [(s.step, s.value) for s in board.Scalars("train/loss")]
    assert shown == [(e["step"], pytest.approx(e["loss"])) for e in events]
    assert [s.step for s in board.Scalars("valid/score")] == [8, 16]
