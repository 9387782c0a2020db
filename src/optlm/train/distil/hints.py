"""States between the layers as a lesson: the student's shall resemble the teacher's.

The distance is the mean squared difference of the numbers of a state (FitNets, arXiv 1412.6550,
section 2.2, "hints"; TinyBERT, arXiv 1909.10351, section 3, for transformers). Widths that differ
are bridged by a matrix: a learned one brings the student's states to the teacher's width, or the
basis by which the student was cut brings the teacher's to the student's.

Letters: N positions, d and D the widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from optlm.config import OPTConfig
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.distil.narrow import Stream
from optlm.train.distil.recipe import HiddenConfig

__all__ = ["HintedOPT", "Hints"]


class HintedOPT(OPT):
    """A student with the matrices (D, d) that bridge to the teacher's width, one a hint.

    They are trained with it and saved in its checkpoints; the finished student goes without them.
    """

    def __init__(self, config: OPTConfig, teacher_width: int, count: int) -> None:
        super().__init__(config)
        self.hints = nn.ModuleList(
            [nn.Linear(config.hidden_size, teacher_width, bias=False) for _ in range(count)]
        )


class Hints:
    """The distance between states, as the settings want it.

    Raises:
        ConfigError: a layer that does not exist, or widths that nothing bridges.
    """

    def __init__(
        self, config: HiddenConfig, student: OPTConfig, teacher: OPTConfig, stream: Stream | None
    ) -> None:
        for side, shape, place in (("student", student, 0), ("teacher", teacher, 1)):
            for pair in config.pairs:
                if pair[place] >= shape.num_hidden_layers:
                    raise ConfigError(
                        f"losses.hidden: pair {list(pair)} names layer {pair[place]} of the {side},"
                        f" which has 0 to {shape.num_hidden_layers - 1}"
                    )
        same = student.hidden_size == teacher.hidden_size
        if config.projection == "none" and not same:
            raise ConfigError(
                f"losses.hidden: projection is 'none', but widths {student.hidden_size} and "
                f"{teacher.hidden_size} differ; use 'learned', or 'basis' for a cut student"
            )
        if config.projection == "basis" and stream is None:
            raise ConfigError(
                "losses.hidden: projection is 'basis', but the student was not cut from the "
                "teacher; use 'learned'"
            )
        self._config = config
        self._stream = stream

    @property
    def student_layers(self) -> list[int]:
        return [pair[0] for pair in self._config.pairs]

    @property
    def teacher_layers(self) -> list[int]:
        return [pair[1] for pair in self._config.pairs]

    def distance(
        self, model: OPT, students: Mapping[int, Tensor], teachers: Mapping[int, Tensor]
    ) -> Tensor:
        """Weighted sum over positions of the mean squared difference, mean over the pairs."""
        total = torch.zeros((), device=model.head_weight.device)
        for index, (mine, other) in enumerate(self._config.pairs):
            student, teacher = students[mine], teachers[other]
            if isinstance(model, HintedOPT):
                student = model.hints[index](student)
            elif self._config.projection == "basis" and self._stream is not None:
                teacher = self._stream.written(teacher.float().T).T
            total = total + (student.float() - teacher.float()).square().mean(dim=1).sum()
        return total * (self._config.weight / len(self._config.pairs))
