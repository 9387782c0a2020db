"""A job over a Ray cluster: Ray Data hands pieces of the input to engines, one in each worker.

Workers get places in the file, not rows: every node must see the input and the model under the same
path. A worker that dies is replaced and its piece done again; results come as pieces finish, and
the ledger of the process that asked puts them in order, so crash and resume are as without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.batch.inputs import RowFault, lines_at, places
from optlm.batch.ledger import Ledger, Result
from optlm.batch.settings import BatchSettings
from optlm.batch.starters import starter_for
from optlm.batch.work import complete
from optlm.data.inputs import InputFile
from optlm.engine.llm import LLM
from optlm.errors import RequestError
from optlm.serve.cluster.connect import connected, free_places

__all__ = ["RayOptions", "complete_on_ray"]

_PIECE = 256  # rows; an engine is full until the last of them
_MOST_PIECES = 10_000  # of larger files the pieces grow


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where to run.

    Attributes:
        address: of a cluster, such as "auto"; None starts one on this machine, for this job.
        workers: engines; None for one a free processor (`threads` processors each).
        threads: of each engine.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")


def complete_on_ray(
    source: InputFile,
    load: Callable[[], LLM],
    settings: BatchSettings,
    ledger: Ledger,
    total: int,
    options: RayOptions,
) -> Iterator[list[tuple[int, Result]]]:
    """Yield rows as pieces of the input finish.

    Args:
        load: makes the engine, in each worker.

    Raises:
        RequestError: Ray is missing, or the input cannot be read from the middle.
    """
    if source.format != "jsonl" or source.compression:
        raise RequestError(
            f"{source.path}: workers begin in the middle of the input, which takes plain JSON "
            "Lines; convert it, or run without --ray"
        )
    with connected(options.address, "ray.data") as ray:
        yield from _results(ray, source, load, settings, ledger, total, options)


def _results(
    ray: Any,
    source: InputFile,
    load: Callable[[], LLM],
    settings: BatchSettings,
    ledger: Ledger,
    total: int,
    options: RayOptions,
) -> Iterator[list[tuple[int, Result]]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.print_on_execution_start = False
    pieces = list(_pieces(source.path, ledger, total))
    workers = min(options.workers or max(free_places(ray, options.threads), 1), len(pieces))
    made = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        PieceWorker,
        fn_constructor_kwargs={"path": str(source.path), "load": load, "settings": settings},
        batch_size=None,
        batch_format="pandas",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=options.threads,
    )
    for batch in made.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield [
            (values["row"], Result(values["line"], *(values[name] for name in _COUNTS)))
            for values in batch.to_pylist()
        ]


_COUNTS = ("failed", "prompt_tokens", "completion_tokens")


def _pieces(path: Path, ledger: Ledger, total: int) -> Iterator[dict[str, Any]]:
    """Pieces of the input that hold rows which are not done, and which of them are."""
    size = max(_PIECE, -(-total // _MOST_PIECES))
    for first, place in places(path, size):
        rows = range(first, min(first + size, total))
        done = [row for row in rows if ledger.is_done(row)]
        if len(done) < len(rows):
            yield {"first": first, "place": place, "count": len(rows), "done": done}


class PieceWorker:
    """One engine in a worker of Ray's, which does piece after piece."""

    def __init__(self, path: str, load: Callable[[], LLM], settings: BatchSettings) -> None:
        self._path = Path(path)
        self._llm = load()
        self._starter = starter_for(self._llm, settings)

    def __call__(self, pieces: Any) -> Any:
        """Do the pieces of a table; return a table of rows."""
        import pyarrow

        done = [item for piece in pieces.to_dict("records") for item in self._complete(piece)]
        rows = {
            "row": [row for row, _ in done],
            "line": pyarrow.array([result.line for _, result in done], pyarrow.large_binary()),
            **{name: [getattr(result, name) for _, result in done] for name in _COUNTS},
        }
        return pyarrow.table(rows)

    def _complete(self, piece: dict[str, Any]) -> Iterator[tuple[int, Result]]:
        done = set(piece["done"])
        rows: Iterator[tuple[int, bytes | RowFault]] = (
            (row, content)
            for row, content in enumerate(
                lines_at(self._path, piece["place"], piece["count"]), piece["first"]
            )
            if row not in done
        )
        for finished in complete(self._llm, self._starter, rows):
            yield from finished
