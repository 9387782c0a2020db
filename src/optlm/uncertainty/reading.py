"""Every distribution a model gives while it reads texts, chunk by chunk, never all at once.

Letters: R rows of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from optlm.engine.params import SamplingParams
from optlm.engine.prompts import OnePrompt
from optlm.engine.request import as_token_ids
from optlm.engine.windows import plan_windows
from optlm.errors import RequestError

if TYPE_CHECKING:
    from optlm.engine.generation import Generation
    from optlm.engine.llm import LLM

__all__ = ["Float32", "Float64", "Ints", "Progress", "Rows", "as_ids", "read_rows"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Ints = NDArray[np.intp]
Progress = Callable[[int], None]  # told how many more texts are done

_IN_FLIGHT = 64  # texts that the engine reads together


class Rows(NamedTuple):
    """Consecutive distributions of one text."""

    text: int  # its index
    position: int  # of the first of `targets` in the text's tokens
    logprobs: Float32  # (R, V) natural logarithms, over the whole vocabulary
    targets: Ints  # (R,) the tokens that stand there


def as_ids(llm: LLM, text: OnePrompt) -> list[int]:
    """Token ids of a text that has something to score.

    Raises:
        RequestError: an empty text, or one token with nothing before it.
    """
    if isinstance(text, str) and not text:
        raise RequestError("the text is empty; there is nothing to be sure or unsure of")
    ids = as_token_ids(text, llm.tokenizer, llm.config)
    if len(ids) < 2:
        raise RequestError(
            "the text has one token and nothing before it, so no distribution; give a longer one"
        )
    return ids


def read_rows(
    llm: LLM, sequences: Sequence[list[int]], *, adapter: str | None = None
) -> Iterator[Rows]:
    """Yield the distribution of every token but the first of each sequence, in order within it.

    Sequences are read together; chunks of different ones come interleaved. One longer than the
    context is read in overlapping windows, as `LLM.score` does.

    Raises:
        RequestError: a sequence that cannot be read.
        EngineError: the logits are not finite.
    """
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs="all", adapter=adapter)
    waiting = iter(enumerate(sequences))
    jobs: list[_Job] = []
    try:
        while True:
            while len(jobs) < _IN_FLIGHT and (item := next(waiting, None)):
                jobs += _submit(llm, *item, params)
            if not jobs:
                return
            with llm.lock:  # nobody else steps between a step and the taking of its rows
                if llm.has_work:
                    llm.step()
                chunks = [chunk for job in jobs for chunk in job.take()]
            yield from chunks
            for job in jobs:
                job.generation.check()
            jobs = [job for job in jobs if not job.generation.finished]
    finally:
        for job in jobs:
            if not job.generation.finished:
                llm.abort(job.generation)


class _Job:
    """One window in the engine."""

    def __init__(self, generation: Generation, index: int, start: int, skip: int) -> None:
        self.generation = generation
        self._index = index
        self._start = start  # of the window in its text
        self._skip = skip  # rows that an earlier window has given
        self._read = 1  # the next position of the window

    def take(self) -> Iterator[Rows]:
        """The rows that came since the last call; they leave the engine."""
        new = self.generation.prompt_logprobs
        assert new is not None
        reports = [report for report in new if report is not None]
        new.clear()
        first = self._read
        self._read += len(reports)
        reports = reports[max(self._skip - (first - 1), 0) :]
        if reports:
            first = self._read - len(reports)
            yield Rows(
                self._index,
                self._start + first,
                np.stack([report.top_logprobs for report in reports]),
                np.array([report.token_id for report in reports]),
            )


def _submit(llm: LLM, index: int, ids: list[int], params: SamplingParams) -> Iterator[_Job]:
    done = 1
    windows = plan_windows(
        ids,
        context=llm.config.max_position_embeddings,
        bos=llm.config.bos_token_id,
        on_overflow="windows",
        stride=None,
    )
    for window in windows:
        generation = llm.submit(window.token_ids, params)
        yield _Job(generation, index, done - 1 - window.score_from, window.score_from)
        done += len(window.token_ids) - 1 - window.score_from
