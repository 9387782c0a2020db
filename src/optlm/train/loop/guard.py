"""What a step may not do: overflow in half precision, or spike.

`LossScale` is fairseq's dynamic scale, with which OPT was trained in fp16. `SpikeWatch` does by
rule what OPT-175B's chronicles tell was done by hand: notice that the loss jumped, note what went
before, and then go on, lower the rate, or leave the batch out. Both are functions of the losses
alone and are saved with every checkpoint, so a resumed run decides as the uninterrupted one did.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from optlm.errors import ConfigError, did_you_mean
from optlm.train.run.folder import TrainingError

__all__ = ["LossScale", "SpikeConfig", "SpikeWatch", "StepRecord"]

POLICIES = ("record", "lower_rate", "skip")
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 1e-3  # of the median: losses that hardly vary make no spike of a trifle
_SMALLEST_SCALE = 2.0**-14
_MOST_SKIPS = 10  # in a row


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """When a loss is a spike, and what is done about it.

    A spike lies more than `threshold` robust deviations (1.4826 times the median distance from the
    median) above the median of the last `window` losses.
    """

    policy: str = "record"  # "lower_rate": multiply the rate from then on; "skip": drop the batch
    threshold: float = 8.0
    window: int = (
        128  # losses of good steps the median is taken over; none is a spike before a half
    )
    rate_factor: float = 0.9
    remember: int = 8  # steps whose norms go into the logbook

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(
                f"the policy for spikes is {self.policy!r}; it must be one of "
                f"{', '.join(POLICIES)}{did_you_mean(str(self.policy), POLICIES)}"
            )
        for name, low, high in (
            ("threshold", 1.0, 1e6),
            ("window", 4, 10_000),
            ("rate_factor", 0.01, 1.0),
            ("remember", 1, 1000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"spikes.{name} is {getattr(self, name)}; it must lie between {low} and {high}"
                )


@dataclass(kw_only=True)
class StepRecord:
    """What one step did. Norms are of the gradient of the mean loss, before clipping."""

    step: int  # 0-based, as for `batches`
    loss: float = math.nan  # mean, nats
    norm: float = math.nan
    rate: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)  # norm by layer
    activations: list[float] = field(default_factory=list)  # as the loss function gave them
    outcome: str = "taken"  # "overflow", "skipped", "left out": the weights did not change


class LossScale:
    """Factor that lifts half-precision gradients out of the underflow.

    Halved when a gradient overflows (that step is lost), doubled after `window` good steps.
    """

    def __init__(self, *, initial: float = 128.0, window: int = 2000) -> None:
        self.value = initial
        self.overflows = 0
        self._window = window
        self._good = 0

    def good(self) -> None:
        self._good += 1
        if self._good == self._window:
            self.value, self._good = self.value * 2, 0

    def overflow(self) -> None:
        """Halve the scale.

        Raises:
            TrainingError: it became so small that the model itself must be broken.
        """
        self.value, self._good = self.value / 2, 0
        self.overflows += 1
        if self.value < _SMALLEST_SCALE:
            raise TrainingError(
                f"the loss scale fell below {_SMALLEST_SCALE:g} and gradients still overflow; "
                "resume from an earlier checkpoint with a lower learning rate, or use bf16"
            )

    def state(self) -> list[float]:
        return [self.value, self.overflows, self._good]

    def restore(self, state: list[float]) -> None:
        self.value, self.overflows, self._good = state[0], int(state[1]), int(state[2])


class SpikeWatch:
    """Judges the steps of a run in order."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.factor = 1.0  # on the learning rate
        self.recent: deque[StepRecord] = deque(maxlen=config.remember)
        self._losses: deque[float] = deque(maxlen=config.window)
        self._skips = 0  # in a row

    def deviations(self, loss: float) -> float:
        """How far `loss` lies above the median, in robust deviations; 0 before half a window."""
        if len(self._losses) < self.config.window // 2:
            return 0.0
        median = statistics.median(self._losses)
        spread = statistics.median(abs(known - median) for known in self._losses)
        least = _LEAST_DEVIATION * abs(median)
        return (loss - median) / max(_MAD_TO_DEVIATION * spread, least, 1e-12)

    def judge(self, record: StepRecord) -> float | None:
        """Take note of a step; its deviations from the median if it is a spike.

        With the policy "skip" the record's outcome becomes "skipped".

        Raises:
            TrainingError: too many batches in a row were left out, or the loss is no number and the
                policy is not to leave its batch out.
        """
        finite = math.isfinite(record.loss) and math.isfinite(record.norm)
        if not finite and self.config.policy != "skip":
            raise TrainingError(
                f"step {record.step} has loss {record.loss} and gradient norm {record.norm}; its "
                f"weights were not changed and the checkpoints before it stay. Begin again with a "
                f"learning rate below {record.rate:g}; a pretraining run can also resume without "
                f"this batch: {record.step} in loop.leave_out, --allow-change loop.leave_out"
            )
        deviations = self.deviations(record.loss) if finite else math.inf
        spike = deviations > self.config.threshold
        if spike and self.config.policy == "skip":
            record.outcome = "skipped"
            self._count_skip(record)
        else:
            self._skips = 0
        if spike and self.config.policy == "lower_rate":
            self.factor *= self.config.rate_factor
        return deviations if spike else None

    def note(self, record: StepRecord) -> None:
        """Remember a finished step; only losses that changed the weights move the median."""
        self.recent.append(record)
        if record.outcome == "taken":
            self._losses.append(record.loss)

    def _count_skip(self, record: StepRecord) -> None:
        self._skips += 1
        if self._skips > _MOST_SKIPS:
            raise TrainingError(
                f"the batches of {self._skips} steps in a row, up to step {record.step}, spiked "
                f"(loss {record.loss}); the model has diverged. Resume from an earlier checkpoint "
                "with a lower learning rate"
            )

    def state(self) -> dict[str, Any]:
        return {
            "factor": self.factor,
            "losses": list(self._losses),
            "skips": self._skips,
            "recent": [asdict(record) for record in self.recent],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.factor, self._skips = state["factor"], state["skips"]
        self._losses = deque(state["losses"], maxlen=self.config.window)
        records = (StepRecord(**record) for record in state["recent"])
        self.recent = deque(records, maxlen=self.config.remember)
