"""Everything a run writes about itself: log, logbook, curve, TensorBoard events.

``log.jsonl`` is the truth. The logbook and the picture are drawn from it again whenever they have
news.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from optlm.train.loop.guard import SpikeWatch, StepRecord
from optlm.train.run.board import Board
from optlm.train.run.curve import draw_curve
from optlm.train.run.environment import changed, environment
from optlm.train.run.folder import RunFolder
from optlm.train.run.logbook import NOTED, render_logbook

__all__ = ["Diary"]


class Diary:
    """The notes of one run.

    Args:
        tell: told what a user should know at once, a line at a time.
        describe: what the batch of a step is made of, as JSON values.
        device: where it computes.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        tell: Callable[[str], None],
        describe: Callable[[int], Any] | None,
        device: torch.device,
    ) -> None:
        self._folder = folder
        self._tell = tell
        self._describe = describe
        self._device = device
        self._board: Board | None = None
        self.at: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}  # begins every event

    def begin(self, step: int) -> None:
        """Forget what was noted after `step`; note where, and under which changes, it goes on."""
        self._folder.rewind_log(step)
        if self._folder.writes:
            self._board = Board(self._folder.path / "tensorboard", step=step)
        if self._folder.changes:
            self.note("changed", {"changes": self._folder.changes})
        now = environment(self._device)
        starts = [event for event in self._folder.events() if event["kind"] == "start"]
        differs = changed(starts[-1]["environment"], now) if starts else []
        if differs:
            self._tell(
                f"the run was begun in another world ({'; '.join(differs)}); "
                "it goes on, but not to the same bits"
            )
        self.note("start", {"environment": now, "differs": differs})

    def note(self, kind: str, figures: dict[str, Any]) -> None:
        """Log one event; what is out of the ordinary goes into the logbook too.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        event = {"kind": kind, **self.at, **figures}
        self._folder.log(event)
        if kind in NOTED:
            text = render_logbook(self._folder.events())
            self._folder.write("logbook.md", text.encode())
        elif self._board:
            self._board.add(event)

    def judged(self, figures: dict[str, Any]) -> None:
        """Log the figures of an evaluation and draw the curve."""
        self.note("valid", figures)
        self._folder.write("loss.png", draw_curve(self._folder.events()))

    def spike(self, record: StepRecord, deviations: float, watch: SpikeWatch) -> None:
        """Note a spike with its batch and the steps before it."""
        self._tell(f"the loss of step {record.step} spiked ({record.loss:.4f}); see logbook.md")
        figures = {
            "batch_step": record.step,
            "loss": record.loss,
            "norm": record.norm,
            "deviations": deviations if math.isfinite(deviations) else None,
            "action": watch.config.policy,
            "factor": watch.factor,
            "batch": self._describe(record.step) if self._describe else None,
            "before": [dataclasses.asdict(each) for each in (*watch.recent, record)],
        }
        self.note("spike", figures)

    def stopped(self, reason: str) -> None:
        self._tell(reason)
        self.note("stopped", {"reason": reason})
