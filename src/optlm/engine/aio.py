"""`AsyncLLM`: one engine on a thread of its own, many asyncio callers.

The thread is the only one that touches the `LLM`. Callers talk to it through a queue of commands;
results come back through each caller's event loop. A caller that goes away aborts its request
before the next step. When the engine dies, everyone who waits is told, and later calls are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from optlm.engine.generation import Generation
from optlm.engine.llm import LLM
from optlm.engine.outputs import EmbedOutput, RequestOutput, ScoreOutput, StreamOutput
from optlm.engine.params import SamplingParams
from optlm.engine.pooling import Pooling
from optlm.engine.prompts import OnePrompt
from optlm.engine.reading import Measure, Reading, normalizers
from optlm.engine.stats import EngineStats
from optlm.engine.tree import TokenTree
from optlm.engine.windows import join_scores
from optlm.errors import EngineError

__all__ = ["AsyncLLM"]

_Submit = Callable[[], Any]  # -> a Generation or Reading, or a list of them


class _Ticket:
    """A caller that waits for what `collect` makes of its jobs after each step."""

    def __init__(self, collect: Callable[[list[Any]], Sequence[Any]]) -> None:
        self.jobs: list[Any] = []  # Generations or Readings, the engine thread's
        self.wants = True  # whether the caller has read what was sent
        self.loop = asyncio.get_running_loop()
        self._collect = collect
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def finished(self) -> bool:
        return all(job.finished for job in self.jobs)

    def news(self) -> Sequence[Any]:
        """What the caller is to be told now."""
        failed = next((job.error for job in self.jobs if job.error is not None), None)
        if failed is not None:
            return [EngineError(failed)]
        if not (self.wants or self.finished):
            return []  # a slow reader finds all that is new in one piece when it comes back
        items = self._collect(self.jobs)
        self.wants = not items
        return items

    def send(self, item: Any) -> None:
        _hand_over({self.loop: [(self, [item])]})

    def put(self, items: Sequence[Any]) -> None:
        """Take what was sent; on the caller's loop."""
        for item in items:
            self._inbox.put_nowait(item)

    async def receive(self) -> Any:
        if self._inbox.empty():
            self.wants = True
        item = await self._inbox.get()
        if isinstance(item, BaseException):
            raise item
        return item


_Parcels = dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, Sequence[Any]]]]


def _hand_over(parcels: _Parcels) -> None:
    """Wake each loop once, however many of its callers have news: waking costs a system call."""
    for loop, parcel in parcels.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_unpack, parcel)


def _unpack(parcel: list[tuple[_Ticket, Sequence[Any]]]) -> None:
    for ticket, items in parcel:
        ticket.put(items)


class AsyncLLM:
    """Use as ``async with AsyncLLM(llm) as engine``; afterwards the `LLM` is free again.

    Attributes:
        error: why the engine no longer works; None while it does.
    """

    def __init__(self, llm: LLM) -> None:
        self.error: str | None = None
        self._llm = llm
        self._lock = threading.Lock()  # of `error` and `_tickets`
        self._tickets: set[_Ticket] = set()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="optlm-engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Abort what runs, tell who waits, and end the thread."""
        self._commands.put(None)
        self._thread.join()

    def stats(self) -> EngineStats:
        """Numbers for a metrics page; waits for nothing."""
        return self._llm.stats()

    async def generate(
        self, prompt: OnePrompt, params: SamplingParams, *, priority: int = 0
    ) -> RequestOutput:
        """Continue one prompt; see `LLM.submit`. Cancelling aborts the request."""
        ticket = _Ticket(lambda jobs: [jobs[0].output()] if jobs[0].finished else [])
        submit = partial(self._llm.submit, prompt, params, priority=priority)
        with self._serving(ticket, submit):
            output: RequestOutput = await ticket.receive()
            return output

    async def stream(
        self, prompt: OnePrompt, params: SamplingParams, *, priority: int = 0
    ) -> AsyncGenerator[StreamOutput, None]:
        """Yield increments of one prompt; see `LLM.stream`. Closing the iterator aborts it.

        What comes while the caller is busy with an increment waits in the request and is one
        increment (of each output) afterwards: a slow reader makes no queue grow.
        """
        ticket = _Ticket(lambda jobs: jobs[0].take())
        submit = partial(self._llm.submit, prompt, params, stream=True, priority=priority)
        with self._serving(ticket, submit):
            while True:
                piece: StreamOutput = await ticket.receive()
                yield piece
                if piece.result is not None:
                    return

    async def score(
        self,
        text: OnePrompt,
        *,
        on_overflow: Literal["error", "windows"] = "error",
        stride: int | None = None,
        adapter: str | None = None,
        priority: int = 0,
    ) -> ScoreOutput:
        """Score one text; see `LLM.score`."""
        ticket = _Ticket(
            lambda jobs: [join_scores(text, jobs)] if all(job.finished for job in jobs) else []
        )
        submit = partial(
            self._llm.submit_score, text, on_overflow, stride, adapter, priority=priority
        )
        with self._serving(ticket, submit):
            output: ScoreOutput = await ticket.receive()
            return output

    async def embed(
        self,
        prompt: OnePrompt,
        *,
        pooling: Pooling = "mean",
        adapter: str | None = None,
        priority: int = 0,
    ) -> EmbedOutput:
        """Return the vector of one text; see `LLM.embed`."""
        ticket = _Ticket(lambda jobs: [jobs[0].embedding()] if jobs[0].finished else [])
        submit = partial(self._llm.submit_embed, prompt, pooling, adapter, priority=priority)
        with self._serving(ticket, submit):
            output: EmbedOutput = await ticket.receive()
            return output

    async def read(
        self,
        tree: TokenTree,
        measure: Measure = normalizers,
        *,
        adapter: str | None = None,
        priority: int = 0,
    ) -> Reading:
        """Read token sequences, what they share once; see `LLM.read`."""
        ticket = _Ticket(lambda jobs: jobs if jobs[0].finished else [])
        submit = partial(self._llm.submit_reading, tree, measure, adapter, priority=priority)
        with self._serving(ticket, submit):
            reading: Reading = await ticket.receive()
            return reading

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """See `LLM.load_adapter`; no step runs meanwhile."""
        await self._ask(partial(self._llm.load_adapter, name, folder))

    async def unload_adapter(self, name: str) -> None:
        """See `LLM.unload_adapter`."""
        await self._ask(partial(self._llm.unload_adapter, name))

    async def _ask(self, call: Callable[[], None]) -> None:
        """Have the engine thread make a call between two steps."""
        ticket = _Ticket(lambda jobs: [])

        def submit() -> list[Generation]:
            call()
            ticket.send(None)
            return []

        with self._serving(ticket, submit):
            await ticket.receive()

    @contextlib.contextmanager
    def _serving(self, ticket: _Ticket, submit: _Submit) -> Iterator[None]:
        """Have the engine thread submit a ticket's jobs; afterwards abort what is left of them."""
        with self._lock:
            if self.error is not None:
                raise EngineError(self.error)
            self._tickets.add(ticket)
        self._commands.put(partial(self._submit, ticket, submit))
        try:
            yield
        finally:
            with self._lock:
                self._tickets.discard(ticket)
            self._commands.put(partial(self._abort, ticket))

    # ---- on the engine thread ------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._obey():
                self._llm.step()
                self._deliver()
            with self._lock:
                tickets = list(self._tickets)
            for ticket in tickets:
                self._abort(ticket)
        except BaseException as error:  # whatever it is, nobody may wait for ever
            reason = f"the engine failed: {type(error).__name__}: {error}"
        with self._lock:
            self.error = reason
            tickets = list(self._tickets)
        for ticket in tickets:
            ticket.send(EngineError(reason))

    def _obey(self) -> bool:
        """Carry out the commands that wait; without work wait for one. False: the end."""
        while not (self._commands.empty() and self._llm.has_work):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    def _deliver(self) -> None:
        with self._lock:
            tickets = [ticket for ticket in self._tickets if ticket.jobs]
        parcels: _Parcels = {}
        for ticket in tickets:
            if items := ticket.news():
                parcels.setdefault(ticket.loop, []).append((ticket, items))
            if ticket.finished:
                ticket.jobs = []
        _hand_over(parcels)

    def _submit(self, ticket: _Ticket, submit: _Submit) -> None:
        try:
            jobs = submit()
            ticket.jobs = jobs if isinstance(jobs, list) else [jobs]
        except Exception as error:  # a request that cannot be read harms nobody else
            ticket.send(error)
            return
        if ticket.finished:  # nothing to run, as with max_tokens=0
            for item in ticket.news():
                ticket.send(item)
            ticket.jobs = []

    def _abort(self, ticket: _Ticket) -> None:
        for job in ticket.jobs:
            if not job.finished:
                self._llm.abort(job)
        ticket.jobs = []
