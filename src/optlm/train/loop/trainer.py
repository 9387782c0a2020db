"""The one training loop: any model, any loss function, any source of batches.

Resuming is exact: weights, averaged weights, optimizer, random state and step come back bit by bit,
and the batches are a function of the step. An interrupted run therefore ends with the same bits as
one that was never stopped.

A technique brings four things: a model whose trained weights require gradients, `batches(step)`,
`loss(model, batch)` and `evaluate(model)`; and one dict, its claim on the run folder, from which
all of these follow:

    folder = RunFolder(out)
    with folder.locked(claim("finetune", settings, base=fingerprint)):
        trainer = Trainer(model, config=..., folder=folder, batches=..., loss=..., evaluate=...)
        trainer.run()                     # resumes by itself; trainer.average is the result
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from optlm.errors import ConfigError
from optlm.train.loop.diary import Diary
from optlm.train.loop.guard import LossScale, SpikeConfig, SpikeWatch, StepRecord
from optlm.train.loop.optim import OptimConfig, Optimizer, learning_rate
from optlm.train.loop.progress import progress, stop_signal
from optlm.train.loop.state import averaged_copy, load_trained_state, trained_state
from optlm.train.parallel.alone import Alone
from optlm.train.run.folder import RunFolder

__all__ = ["LoopConfig", "Loss", "Trainer"]

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, how often to look, what to keep; in steps unless said otherwise."""

    steps: int
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 200
    keep_last: int = 2  # checkpoints; the best by score is kept besides
    keep_every: int | None = None  # also write and keep a checkpoint every so many steps
    keep_tokens: tuple[int, ...] = ()  # and when so many predictions have been trained on,
    keep_words: tuple[int, ...] = ()  # or so many words read; both are evaluated then
    average_decay: float = 0.99  # of the weights' moving average, which is evaluated; 0: keep none
    patience: int | None = None  # stop after so many evaluations in a row without a better score
    leave_out: tuple[int, ...] = ()  # 0-based steps whose batch is not trained on
    optim: OptimConfig = field(default_factory=OptimConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        counts = ("steps", "log_every", "evaluate_every", "checkpoint_every", "keep_last")
        for name in (*counts, "keep_every", "patience"):
            value = getattr(self, name)
            if value is None and name not in counts:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        for name in ("keep_tokens", "keep_words", "leave_out"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if not all(isinstance(v, int) and v >= 0 for v in values) or list(values) != sorted(
                set(values)
            ):
                raise ConfigError(f"{name} is {list(values)}; it must be rising whole numbers")
        if not 0.0 <= self.average_decay < 1.0:
            raise ConfigError(f"average_decay is {self.average_decay}; it must lie in [0, 1)")


@dataclass(frozen=True)
class Loss:
    """Summed loss of some predictions, and their number.

    `words` counts the words read, for techniques that count them; `activations` are sizes between
    the layers (scalars), which the logbook shows when the loss spikes.
    """

    total: Tensor
    count: int
    words: int = 0
    activations: list[Tensor] = field(default_factory=list)


class Trainer(Generic[M, B]):
    """Runs `config.steps` optimizer steps, each over the micro-batches of `batches(step)`.

    Args:
        model: only parameters that require gradients are trained, averaged and written to
            checkpoints; the frozen ones must be given again on resume, so name them in the claim.
        folder: locked by the caller for as long as the trainer runs.
        batches: the micro-batches of a 0-based step; a function of the step and of nothing else.
        loss: called with the model and a micro-batch. The gradient is that of the mean over all
            predictions of the step, so splitting a batch changes nothing but memory.
        evaluate: called with the averaged model (without averaging: the model) in evaluation mode;
            returns named figures for the log, of which `"score"` (lower is better) picks the best
            checkpoint; without one the last counts. PyTorch's random state must stay as it was.
        describe: what the batch of a step is made of, as JSON values, for the logbook.
        half: gradients are computed in float16, so the loss is scaled up for them.
        flops_per_token: arithmetic of one prediction, forward and backward; with `peak_flops` of
            the machine, progress and log show the share of it that is used (MFU).
        parallel: the processes that train together, and their devices, to which model and batches
            are brought; by default this process alone, on the CPU.
        log: told what a user should know, a line at a time.

    Attributes:
        average: the moving average of the weights; `model` itself with ``average_decay`` 0.
    """

    def __init__(
        self,
        model: M,
        *,
        config: LoopConfig,
        folder: RunFolder,
        batches: Callable[[int], list[B]],
        loss: Callable[[M, B], Loss],
        evaluate: Callable[[M], dict[str, Any]],
        describe: Callable[[int], Any] | None = None,
        half: bool = False,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        parallel: Alone | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model = model
        self.average = averaged_copy(model) if config.average_decay else model
        self.config = config
        self.step = 0  # steps done, those that changed nothing included
        self.tokens = 0  # predictions trained on
        self.words = 0  # words read, if the loss function counts them
        self.best: tuple[float, int] = (math.inf, 0)  # score and step
        self._kept: list[int] = []  # steps whose checkpoints stay for good
        self._stale = 0  # evaluations since the best
        self._unlogged: list[float] = []  # losses since the last line of the log
        self._folder = folder
        self._batches = batches
        self._loss = loss
        self._evaluate = evaluate
        self._flops = (flops_per_token, peak_flops)
        self._tell = log
        self._parallel = parallel or Alone()
        device = self._parallel.device
        self._diary = Diary(folder, tell=log, describe=describe, device=device)
        # What this process owns of both; in a single process, the models themselves.
        own = self._parallel.place(model, self.average, config.optim.method)
        self._own, self._own_average = own
        self._optimizer = Optimizer(self._own, config.optim)
        self._watch = SpikeWatch(config.spikes)
        self._scale = LossScale() if half else None
        self._seconds = 0.0  # spent so far, over all resumes
        self._speed = 0.0  # predictions a second since the start or resume
        self._before = {"tokens": 0, "words": 0}  # counters before the step at hand

    # ---- running -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the latest checkpoint to the last step, or until patience ends.

        A first Ctrl-C (or SIGTERM) ends the step, saves and raises `KeyboardInterrupt`.

        Raises:
            TrainingError: the loss is not a number, or a checkpoint cannot be written.
        """
        self._resume()
        self.model.train()
        started, tokens = time.monotonic(), self.tokens
        before = self._seconds
        flops, peak = self._flops
        shown: dict[str, Any] = {
            "flops_per_token": flops,
            "peak_flops": peak,
            "shown": self._folder.writes,
        }
        with progress(self.config.steps, self.step, **shown) as report, stop_signal() as stop:
            while not self.finished:
                record = self._one_step()
                elapsed = time.monotonic() - started
                self._seconds = before + elapsed
                self._speed = (self.tokens - tokens) / elapsed
                report(self.step, record.loss, self._speed)
                stopping = self._parallel.any(stop.is_set())
                self._after_step(record, stopping=stopping)
                if stopping:
                    raise KeyboardInterrupt
        self.average.eval()

    @property
    def _averaging(self) -> bool:
        return self.average is not self.model

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or ``patience`` evaluations brought no better score."""
        patience = self.config.patience
        stopped_early = patience is not None and self._stale >= patience
        return stopped_early or self.step >= self.config.steps

    def _resume(self) -> None:
        state = self._parallel.load_latest(self._folder, self._optimizer, log=self._tell)
        if state is not None:
            self._restore(state)
            self._tell(f"resuming after step {self.step} of {self.config.steps}")
        if not self.finished:
            self._diary.begin(self.step)

    def _one_step(self) -> StepRecord:
        """One optimizer step, or the step of a batch that is left out."""
        self._before = {"tokens": self.tokens, "words": self.words}
        if self.step in self.config.leave_out:
            self.step += 1
            return StepRecord(step=self.step - 1, outcome="left out")
        random = torch.get_rng_state()
        scale = self._scale.value if self._scale else 1.0
        batches = self._parallel.share(self._batches(self.step))
        losses = [self._backward(batch, scale) for batch in batches]
        figures = [(float(loss.total), loss.count, loss.words) for loss in losses]
        sums = self._parallel.sum([sum(column) for column in zip(*figures, strict=True)])
        total, count, words = sums
        highest = self.config.optim.clip_norm
        norm, by_layer = self._parallel.clip(self._own, highest, divide_by=count * scale)
        record = StepRecord(
            step=self.step,
            loss=total / count,
            norm=norm,
            rate=self._rate(self.step),
            gradients=by_layer,
            activations=torch.stack(losses[0].activations).tolist()
            if losses[0].activations
            else [],
        )
        if self._accepted(record):
            self._optimizer.step(self._rate(self.step))
            self._update_average()
            self.tokens += int(count)
            self.words += int(words)
        else:
            self._own.zero_grad(set_to_none=True)
            torch.set_rng_state(random)  # as though the batch had never been
        self._watch.note(record)
        self.step += 1
        return record

    def _rate(self, step: int) -> float:
        return self._watch.factor * learning_rate(self.config.optim, step, self.config.steps)

    def _backward(self, batch: B, scale: float) -> Loss:
        loss = self._parallel.call(self._loss, self.model, batch)
        (loss.total * scale).backward()  # type: ignore[no-untyped-call]
        return dataclasses.replace(loss, total=loss.total.detach())

    def _accepted(self, record: StepRecord) -> bool:
        """Whether the gradient may change the weights; what is out of the ordinary is logged."""
        if self._scale and math.isfinite(record.loss) and not math.isfinite(record.norm):
            self._scale.overflow()
            record.outcome = "overflow"
            self._diary.note("overflow", {"batch_step": record.step, "scale": self._scale.value})
            return False
        deviations = self._watch.judge(record)
        if deviations is not None:
            self._diary.spike(record, deviations, self._watch)
        if self._scale and record.outcome == "taken":
            self._scale.good()
        return record.outcome == "taken"

    @torch.no_grad()
    def _update_average(self) -> None:
        """The average follows quickly at first, so that the fresh weights do not linger in it."""
        if not self._averaging:
            return
        decay = min(self.config.average_decay, (self.step + 1) / (self.step + 10))
        pairs = zip(self._own_average.parameters(), self._own.parameters(), strict=True)
        trained: list[tuple[Tensor, Tensor]] = [(a, w) for a, w in pairs if w.requires_grad]
        averaged, weights = [a for a, _ in trained], [w for _, w in trained]
        torch._foreach_lerp_(averaged, weights, 1 - decay)

    # ---- after a step ------------------------------------------------------------------------

    def _after_step(self, record: StepRecord, *, stopping: bool) -> None:
        config = self.config
        last = self.step == config.steps
        self._diary.at = self._position()
        if record.outcome == "taken":
            self._unlogged.append(record.loss)
        if self._unlogged and (self.step % config.log_every == 0 or last):
            self._diary.note("train", self._figures(record))
            self._unlogged.clear()
        reached = self._reached()
        save = bool(reached) or last or stopping or self.step % config.checkpoint_every == 0
        if self.step % config.evaluate_every == 0 or last or reached:
            save = self._judge(reached) or save
        if reached or (config.keep_every and self.step % config.keep_every == 0):
            self._kept.append(self.step)
            save = True
        if save or self.finished:
            self.save()

    def _reached(self) -> dict[str, int]:
        """The milestone of ``keep_tokens`` and of ``keep_words`` that this step passed, if any."""
        marks = {"tokens": self.config.keep_tokens, "words": self.config.keep_words}
        passed: dict[str, int] = {}
        for name, before in self._before.items():
            crossed = [mark for mark in marks[name] if before < mark <= getattr(self, name)]
            if crossed:
                passed[name] = crossed[-1]
        return passed

    def _position(self) -> dict[str, Any]:
        at = {"step": self.step, "tokens": self.tokens, "seconds": round(self._seconds, 2)}
        return at | ({"words": self.words} if self.words else {})

    def _figures(self, record: StepRecord) -> dict[str, Any]:
        mean = sum(self._unlogged) / len(self._unlogged)
        figures = {"loss": mean, "norm": record.norm, "rate": record.rate}
        figures["tokens_per_second"] = round(self._speed, 1)
        flops, peak = self._flops
        if flops and peak:
            figures["mfu"] = round(self._speed * flops / peak, 4)
        if self._scale:
            figures |= {"scale": self._scale.value, "overflows": self._scale.overflows}
        return figures

    def _judge(self, reached: dict[str, int]) -> bool:
        """Evaluate, log the figures and draw the curve; whether this is the best so far."""
        self.average.eval()
        figures = self._parallel.judge(self._evaluate, self.average)
        self.model.train()
        self._diary.judged(figures | ({"reached": reached} if reached else {}))
        if "score" not in figures:
            return False
        better = bool(figures["score"] < self.best[0])
        self._stale = 0 if better else self._stale + 1
        if better:
            self.best = (figures["score"], self.step)
        if self._stale == self.config.patience:
            self._diary.stopped(
                f"stopped after step {self.step}: no better score than {self.best[0]:.4f} "
                f"(step {self.best[1]}) in {self._stale} evaluations"
            )
        return better

    # ---- state -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step."""
        average = trained_state(self._own_average, like=self._own) if self._averaging else None
        state = {
            "model": trained_state(self._own),
            "average": average,
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "tokens": self.tokens,
            "words": self.words,
            "best": list(self.best),
            "kept": self._kept,
            "stale": self._stale,
            "unlogged": self._unlogged,
            "watch": self._watch.state(),
            "scale": self._scale.state() if self._scale else None,
            "seconds": self._seconds,
        }
        kept = {self.best[1], *self._kept}
        last = self.config.keep_last
        self._parallel.save(self._folder, self.step, state, self._optimizer, keep=kept, last=last)

    def _restore(self, state: dict[str, Any]) -> None:
        load_trained_state(self._own, state["model"])
        if self._averaging:
            load_trained_state(self._own_average, state["average"], like=self._own)
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.tokens, self.words = state["step"], state["tokens"], state["words"]
        self.best = (state["best"][0], state["best"][1])
        self._kept, self._stale, self._unlogged = state["kept"], state["stale"], state["unlogged"]
        self._watch.restore(state["watch"])
        if self._scale:
            self._scale.restore(state["scale"])
        self._seconds = state["seconds"]
        self._diary.at = self._position()
