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

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from optlm.errors import ConfigError
from optlm.train.curve import draw_curve
from optlm.train.optim import OptimConfig, Optimizer, learning_rate
from optlm.train.run_folder import RunFolder, TrainingError
from optlm.train.state import averaged_copy, load_trained_state, trained_state

__all__ = ["LoopConfig", "Loss", "Trainer"]

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how often to look; everything is counted in steps."""

    steps: int
    log_every: int = 20
    evaluate_every: int = 500
    checkpoint_every: int = 200
    average_decay: float = 0.99  # of the weights' moving average, which is evaluated; 0: keep none
    patience: int | None = None  # stop after so many evaluations in a row without a better score
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "evaluate_every", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        if not 0.0 <= self.average_decay < 1.0:
            raise ConfigError(f"average_decay is {self.average_decay}; it must lie in [0, 1)")


@dataclass(frozen=True)
class Loss:
    """Summed loss of some predictions, and their number."""

    total: Tensor
    count: int


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
            checkpoint. It must leave PyTorch's random state as it was.
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
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model = model
        self.average = averaged_copy(model) if config.average_decay else model
        self.config = config
        self.step = 0  # optimizer steps done
        self.tokens = 0  # predictions trained on
        self.best: tuple[float, int] = (math.inf, 0)  # score and step
        self._stale = 0  # evaluations since the best
        self._unlogged: list[float] = []  # losses since the last line of the log
        self._folder = folder
        self._batches = batches
        self._loss = loss
        self._evaluate = evaluate
        self._tell = log
        self._optimizer = Optimizer(model, config.optim)
        self._seconds = 0.0  # spent so far, over all resumes

    # ---- running -----------------------------------------------------------------------------

    def run(self) -> None:
        """Train from the latest checkpoint to the last step, or until patience ends.

        A first Ctrl-C (or SIGTERM) ends the step, saves and raises `KeyboardInterrupt`.

        Raises:
            TrainingError: the loss is not a number, or a checkpoint cannot be written.
        """
        self._resume()
        self.model.train()
        started = time.monotonic() - self._seconds
        with _progress(self.config.steps, self.step) as report, _stop_signal() as stop:
            while not self.finished:
                loss, norm = self._one_step()
                self._seconds = time.monotonic() - started
                report(self.step, loss, self.tokens / self._seconds)
                self._after_step(loss, norm, stopping=stop.is_set())
                if stop.is_set():
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
        state = self._folder.load_latest(log=self._tell)
        if state is not None:
            self._restore(state)
            self._tell(f"resuming after step {self.step} of {self.config.steps}")
        self._folder.rewind_log(self.step)

    def _one_step(self) -> tuple[float, float]:
        """One optimizer step: the mean loss, and the norm of its gradient before clipping."""
        config = self.config.optim
        losses = [self._backward(batch) for batch in self._batches(self.step)]
        count = sum(loss.count for loss in losses)
        mean = sum(float(loss.total) for loss in losses) / count
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        for gradient in gradients:
            gradient /= count
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step} has loss {mean} and gradient norm {norm}; its weights were not "
                f"changed. Start again with a learning rate below {config.learning_rate}"
            )
        self._optimizer.step(learning_rate(config, self.step, self.config.steps))
        self._update_average()
        self.step += 1
        self.tokens += count
        return mean, norm

    def _backward(self, batch: B) -> Loss:
        loss = self._loss(self.model, batch)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return Loss(loss.total.detach(), loss.count)

    @torch.no_grad()
    def _update_average(self) -> None:
        """The average follows quickly at first, so that the fresh weights do not linger in it."""
        if not self._averaging:
            return
        decay = min(self.config.average_decay, (self.step + 1) / (self.step + 10))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        trained: list[tuple[Tensor, Tensor]] = [(a, w) for a, w in pairs if w.requires_grad]
        averaged, weights = [a for a, _ in trained], [w for _, w in trained]
        torch._foreach_lerp_(averaged, weights, 1 - decay)

    def _after_step(self, loss: float, norm: float, *, stopping: bool) -> None:
        config = self.config
        last = self.step == config.steps
        save = last or stopping or self.step % config.checkpoint_every == 0
        self._unlogged.append(loss)
        if self.step % config.log_every == 0 or last:
            rate = learning_rate(config.optim, self.step - 1, config.steps)
            mean = sum(self._unlogged) / len(self._unlogged)
            self._log("train", {"loss": mean, "norm": norm, "rate": rate})
            self._unlogged.clear()
        if self.step % config.evaluate_every == 0 or last:
            save = self._judge() or save
        if save or self.finished:
            self.save()

    def _judge(self) -> bool:
        """Evaluate, log the figures and draw the curve; whether this is the best so far."""
        self.average.eval()
        figures = self._evaluate(self.average)
        self.model.train()
        self._log("valid", figures)
        self._folder.write("loss.png", draw_curve(self._folder.events()))
        better = bool(figures["score"] < self.best[0])
        self._stale = 0 if better else self._stale + 1
        if better:
            self.best = (figures["score"], self.step)
        if self._stale == self.config.patience:
            self._tell(
                f"stopped after step {self.step}: no better score than {self.best[0]:.4f} "
                f"(step {self.best[1]}) in {self._stale} evaluations"
            )
        return better

    def _log(self, kind: str, figures: dict[str, Any]) -> None:
        seconds = round(self._seconds, 2)
        event = {"kind": kind, "step": self.step, "tokens": self.tokens, "seconds": seconds}
        self._folder.log({**event, **figures})

    # ---- state -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step."""
        state = {
            "model": trained_state(self.model),
            "average": trained_state(self.average, like=self.model) if self._averaging else None,
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "tokens": self.tokens,
            "best": list(self.best),
            "stale": self._stale,
            "unlogged": self._unlogged,
            "seconds": self._seconds,
        }
        self._folder.save(self.step, state, best=self.best[1])

    def _restore(self, state: dict[str, Any]) -> None:
        load_trained_state(self.model, state["model"])
        if self._averaging:
            load_trained_state(self.average, state["average"], like=self.model)
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.tokens, self._seconds = state["step"], state["tokens"], state["seconds"]
        self.best = (state["best"][0], state["best"][1])
        self._stale = state["stale"]
        self._unlogged = state["unlogged"]


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(steps: int, done: int) -> Iterator[Callable[[int, float, float], None]]:
    """Yield a function (step, loss, tokens a second) that moves a bar on a terminal's stderr."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("training", total=steps, completed=done, loss=math.nan, speed=0.0)

        def report(step: int, loss: float, speed: float) -> None:
            bar.update(task, completed=step, loss=loss, speed=speed)

        yield report
