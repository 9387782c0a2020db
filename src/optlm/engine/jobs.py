"""`RunsJobs`: what an engine does with jobs that wait: run them to their end, or abort them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from optlm.engine.scheduler import Scheduler
from optlm.engine.search import Job, Search
from optlm.errors import EngineError

__all__ = ["RunsJobs"]


class RunsJobs(ABC):
    """The queues of an engine; `step` is the subclass's."""

    _scheduler: Scheduler
    _searches: list[Search]  # the first is under way
    _arrivals: int  # jobs so far

    @abstractmethod
    def step(self) -> None:
        """Bring all jobs on by one forward pass."""

    @abstractmethod
    def _reset(self) -> None:
        """Start with empty queues and an empty cache."""

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting or self._searches)

    def abort(self, job: Job) -> None:
        """Stop a job and free its blocks; what it has stays, finish_reason is "abort"."""
        for sample in job.samples:
            self._scheduler.remove(sample.request)
        for search in [search for search in self._searches if search.generation is job]:
            self._drop_search(search)
        job.end("abort")

    def check_integrity(self) -> None:
        """Assert the invariants of scheduler and block pool."""
        tables = [table for search in self._searches for table in search.branches.tables]
        self._scheduler.check_integrity(tables)

    # ---- inside --------------------------------------------------------------------------------

    def _drop_search(self, search: Search) -> None:
        self._searches.remove(search)
        search.branches.release()

    def _jobs(self) -> list[Job]:
        """All that is not finished; one with several samples may stand there several times."""
        requests = self._scheduler.running + self._scheduler.waiting
        return [s.generation for s in self._searches] + [r.owner.generation for r in requests]

    def _run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            while not job.finished:
                self._advance(job)
            job.check()

    def _advance(self, job: Job) -> None:
        if self.has_work:
            self.step()
        elif not job.finished:
            raise EngineError("the request was lost when another was interrupted")

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Abort what was submitted inside when an exception ends it."""
        first = self._arrivals
        try:
            yield
        except BaseException:
            self._abandon(range(first, self._arrivals))
            raise

    def _abandon(self, arrivals: range) -> None:
        """Abort jobs by arrival, after an exception that may have struck anywhere."""
        try:
            for job in self._jobs():
                if job.arrival in arrivals:
                    self.abort(job)
            self.check_integrity()
        except Exception:  # the exception left the bookkeeping torn: all that runs is lost
            for job in self._jobs():
                job.end("abort")
            self._reset()
