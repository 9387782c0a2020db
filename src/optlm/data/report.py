"""What became of the lines of the input, and the error for text that cannot be used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from optlm.errors import OptlmError

__all__ = ["CorpusError", "ReadReport"]

_KEPT_EXAMPLES = 5


class CorpusError(OptlmError):
    """Training text that is missing, damaged or empty."""


@dataclass
class ReadReport:
    """Counts of what was read. Lines that cannot be used are counted, never silently lost.

    Attributes:
        max_broken: how many broken lines are left out before reading stops with an error;
            None: any number, 0: the first is an error.
    """

    documents: int = 0
    text_bytes: int = 0
    not_wanted: int = 0  # another source than asked for
    broken: int = 0
    examples: list[str] = field(
        default_factory=list
    )  # the first few broken lines: place and reason
    licenses: Counter[str] = field(default_factory=Counter)  # documents by their ``license``
    max_broken: int | None = None

    def add_broken(self, place: str, reason: str) -> None:
        """Count a line that cannot be used.

        Raises:
            CorpusError: there are more than `max_broken`.
        """
        self.broken += 1
        if len(self.examples) < _KEPT_EXAMPLES:
            self.examples.append(f"{place}: {reason}")
        if self.max_broken is not None and self.broken > self.max_broken:
            raise CorpusError(
                f"more than {self.max_broken:,} broken lines "
                f"({'; '.join(self.examples)}); repair the file, or allow more"
            )
