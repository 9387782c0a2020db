"""`ClusterOptions`: where replicas run, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from optlm.errors import RequestError

__all__ = ["ClusterOptions"]


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where replicas run, and how many.

    Attributes:
        address: of a cluster that runs, such as "auto"; None starts one on this machine.
        least, most: replicas; None for `most` is one a free processor (`threads` processors each).
        threads: of each engine.

    Raises:
        RequestError: a value out of range.
    """

    address: str | None = None
    least: int = 1
    most: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("least", "most", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")
        if self.most is not None and self.most < self.least:
            raise RequestError(
                f"at most {self.most} replicas are less than the {self.least} that are always there"
            )
