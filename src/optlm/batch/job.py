"""A whole job: from an input and an output to the report of what was done."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.batch.inputs import RowFault, read_input, summarize
from optlm.batch.ledger import Ledger, Result
from optlm.batch.settings import BatchSettings, describe_job
from optlm.batch.starters import find_format, starter_for
from optlm.batch.work import Row, complete
from optlm.data.inputs import InputFile
from optlm.engine.llm import LLM
from optlm.errors import OptlmError, RequestError

if TYPE_CHECKING:
    from optlm.batch.cluster import RayOptions

__all__ = ["BatchJob", "BatchReport", "BatchStopped", "Engine", "Progress"]

_AHEAD = 2**14  # rows that may be finished or begun beyond the first that is not
_NOT_LINES = (".parquet", ".gz", ".zst")  # endings that promise what is not written
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Rows = Iterator[bytes | RowFault]
Progress = Callable[[int, int], None]  # told rows and tokens, each as they are done


class BatchStopped(OptlmError):
    """The output could not be written on; what was done is kept."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that is loaded when there is work for it.

    Attributes:
        described: what decides its numbers (`describe_engine`).
    """

    load: Callable[[], LLM]
    described: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BatchReport:
    """What a run did.

    Attributes:
        rows, errors, prompt_tokens, completion_tokens: of the whole output.
        resumed_rows: of them, those that earlier runs had done.
        seconds: of this run, loading included.
    """

    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    resumed_rows: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        new = self.rows - self.resumed_rows
        rate = new / self.seconds if self.seconds else 0.0
        return {
            "rows": self.rows,
            "errors": self.errors,
            "resumed_rows": self.resumed_rows,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(rate, 2),
        }


@dataclass(kw_only=True)
class BatchJob:
    """One input to one output.

    Attributes:
        out: a file, or None for standard output, which nothing can resume.
        sync_seconds: how often the disk is made to hold what is done.
        overwrite: begin anew whatever is there.
        ray: run it over a cluster.
        progress: makes what is told of the progress, from all rows and those done earlier.
    """

    source: InputFile
    out: Path | None
    settings: BatchSettings
    engine: Engine
    sync_seconds: float = 1.0
    overwrite: bool = False
    ray: RayOptions | None = None
    progress: Callable[[int, int], Progress] = field(
        default=lambda total, done: lambda rows, tokens: None
    )

    def run(self) -> BatchReport:
        """Do all rows that are not done.

        Raises:
            RequestError: the output's name promises another format than JSON Lines.
            RequestError, LedgerError: as `Ledger.open`.
            CorpusError: the input is damaged or changed meanwhile; what was done is kept.
            BatchStopped: no room for the output; what was done is kept.
        """
        start = time.monotonic()
        if self.out is not None and self.out.suffix in _NOT_LINES:
            raise RequestError(
                f"the output is plain JSON Lines, which {self.out.name!r} does not say; name it "
                "something.jsonl and convert it afterwards"
            )
        self.settings = self.settings.resolved(lambda: find_format(read_input(self.source)))
        summary = summarize(self._read())
        if self.out is None:
            ledger = Ledger.for_stream(_write_stdout)
        else:
            header = describe_job(self.settings, summary, self.engine.described)
            ledger = Ledger.open(
                self.out, header, sync_seconds=self.sync_seconds, overwrite=self.overwrite
            )
        resumed = ledger.kept
        try:
            if not ledger.finished:
                self._work(ledger, summary.rows)
        finally:
            ledger.close()
        tally = ledger.tally
        return BatchReport(
            rows=tally.rows,
            errors=tally.errors,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            resumed_rows=resumed,
            seconds=time.monotonic() - start,
        )

    def _work(self, ledger: Ledger, total: int) -> None:
        tell = self.progress(total, ledger.kept)
        try:
            for done in self._results(ledger, total):
                for row, result in done:
                    ledger.record(row, result)
                ledger.commit()
                tell(len(done), sum(r.prompt_tokens + r.completion_tokens for _, r in done))
            self.source.check_unchanged()
            ledger.finish()
        except OSError as error:
            if error.errno in _NO_ROOM and self.out is not None:
                raise BatchStopped(
                    f"no room to write {self.out} ({os.strerror(error.errno)}); {ledger.kept:,} "
                    "rows are kept. Make room and give the same command again"
                ) from error
            raise

    def _results(self, ledger: Ledger, total: int) -> Iterator[list[tuple[int, Result]]]:
        if ledger.kept == total:
            return
        if self.ray is not None:
            yield from self._results_of_ray(self.ray, ledger, total)
            return
        rows = _not_done(self._read(), ledger)
        llm = self.engine.load()
        starter = starter_for(llm, self.settings)
        yield from complete(llm, starter, rows, lambda row: row - ledger.next_row < _AHEAD)

    def _results_of_ray(
        self, ray: RayOptions, ledger: Ledger, total: int
    ) -> Iterator[list[tuple[int, Result]]]:
        from optlm.batch.cluster import complete_on_ray

        source, load, settings = self.source, self.engine.load, self.settings
        return complete_on_ray(source, load, settings, ledger, total, ray)

    def _read(self) -> Rows:
        return read_input(self.source, columns=self.settings.columns)


def _not_done(rows: Iterable[bytes | RowFault], ledger: Ledger) -> Iterator[Row]:
    return (row for row in enumerate(rows) if not ledger.is_done(row[0]))


def _write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
