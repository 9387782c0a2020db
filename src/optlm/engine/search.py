"""Beam search and contrastive search: they look at several continuations before they choose.

A search runs its own forward passes, one a step of the engine, and ends its `Generation`. Searches
run one after another, beside the ordinary requests, whose blocks they may take for a while.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from optlm.engine.adapters import LoadedAdapter
from optlm.engine.branches import Branch, Branches
from optlm.engine.generation import Generation, Sample
from optlm.engine.outputs import Completion
from optlm.engine.runner import Runner
from optlm.engine.sampling import keep_top_k, log_softmax
from optlm.engine.scheduler import Scheduler
from optlm.engine.stats import Counters
from optlm.errors import RequestError

__all__ = ["BeamSearch", "ContrastiveSearch", "Job", "Search", "make_search"]

Float32 = NDArray[np.float32]


class Job(Protocol):
    """What callers wait for: a `Generation`, or a `Reading`."""

    arrival: int
    priority: int
    adapter: LoadedAdapter
    samples: Sequence[Sample]
    error: str | None

    @property
    def finished(self) -> bool: ...
    def end(self, reason: str, /) -> None: ...
    def check(self) -> None: ...
    def count(self, counters: Counters, /) -> None: ...


class HoldsBlocks(Protocol):
    @property
    def tables(self) -> list[list[int]]: ...
    def release(self) -> None: ...


class Search(Protocol):
    @property
    def generation(self) -> Job: ...
    @property
    def branches(self) -> HoldsBlocks: ...

    def step(self) -> None:
        """Run one forward pass; at the end the job is finished."""
        ...


def make_search(generation: Generation, runner: Runner, scheduler: Scheduler) -> Search | None:
    """Return the search that the generation's parameters ask for, or None.

    Raises:
        RequestError: it needs more blocks or wider batches than there are.
    """
    params = generation.params
    width = params.beam_width if params.penalty_alpha is None else params.top_k
    if width is None:
        return None
    if width > runner.max_batch_tokens:
        raise RequestError(
            f"the search runs {width} continuations at once; "
            f"the engine takes {runner.max_batch_tokens} tokens a step (max_batch_tokens)"
        )
    vocabulary = runner.config.vocab_size - len(generation.stop_ids)
    if width > vocabulary:
        raise RequestError(
            f"the search runs {width} continuations at once; "
            f"the vocabulary has {vocabulary} tokens that do not stop"
        )
    scheduler.check_fits(
        _num_blocks(generation, width, runner.block_size), f"{width} continuations"
    )
    max_blocks = len(generation.samples[0].request.block_table)
    branches = Branches(runner, scheduler, max_blocks, generation.adapter.id)
    kind = BeamSearch if params.beam_width is not None else ContrastiveSearch
    return kind(generation, branches)


def _num_blocks(generation: Generation, width: int, size: int) -> int:
    """Most blocks of `size` tokens that the search holds at a time."""
    request = generation.samples[0].request
    total = -(-request.max_total // size)
    if generation.params.beam_width is None:
        return total + width  # the candidates differ in their last token only
    # Beams may part after the prompt. Parents and children exist at the same time, but children
    # share all but the block being written.
    shared = len(request.tokens) // size
    return shared + width * (total - shared + 1)


class _Hypothesis(NamedTuple):
    score: float
    order: int  # among equal scores the earlier found is better
    tokens: list[int]
    logprob: float
    reason: str


class BeamSearch:
    """Keeps the `beam_width` (W) likeliest continuations.

    Each step ranks all one-token extensions of the live beams by total log-probability (ties:
    earlier beam, lower id). Extensions by a stop token among the first W become hypotheses; the
    first W others live on. A hypothesis's score is its total log-probability over its number of
    output tokens to the power `length_penalty`. The search ends when there are W hypotheses and no
    live beam scores better than the worst of the best W, or when no token may follow; then live
    beams count as hypotheses too.
    """

    def __init__(self, generation: Generation, branches: Branches) -> None:
        assert generation.params.beam_width is not None
        self.generation = generation
        self.branches = branches
        self._width = generation.params.beam_width
        self._hypotheses: list[_Hypothesis] = []
        self._found = 0
        request = generation.samples[0].request
        self._num_prompt = request.num_prompt
        self._max_total = request.max_total
        branches.start(list(request.tokens))

    def step(self) -> None:
        logits, _ = self.branches.forward()
        if not len(logits):
            return  # the prompt is not read to its end
        if not math.isfinite(logits.max()):
            self.generation.fail()
            return
        live = self._extend(logits)
        for branch in live if len(live[0].tokens) == self._max_total else ():
            self._add(branch.tokens, branch.logprob, "length")
        if len(live[0].tokens) == self._max_total or self._is_over(live):
            self._finish()

    def _extend(self, logits: Float32) -> list[Branch]:
        width, stops = self._width, self.generation.stop_ids
        extensions: list[tuple[float, int, int]] = []
        for index, (branch, row) in enumerate(zip(self.branches.live, logits, strict=True)):
            logprobs = log_softmax(row)
            ids = keep_top_k(logprobs, width + len(stops))
            for token in range(len(row)) if ids is None else ids.tolist():
                extensions.append((-(branch.logprob + float(logprobs[token])), index, token))
        children: list[tuple[Branch, int, float]] = []
        for rank, (cost, index, token) in enumerate(sorted(extensions)):
            parent = self.branches.live[index]
            if token not in stops:
                children.append((parent, token, -cost))
            elif rank < width:
                self._add([*parent.tokens, token], -cost, "stop")
            if len(children) == width:
                break
        return self.branches.replace(children)

    def _add(self, tokens: list[int], logprob: float, reason: str) -> None:
        self._found += 1
        score = self._score(logprob, len(tokens))
        self._hypotheses.append(_Hypothesis(score, -self._found, tokens, logprob, reason))
        self._hypotheses = sorted(self._hypotheses, reverse=True)[: self._width]

    def _score(self, logprob: float, total: int) -> float:
        length = float(total - self._num_prompt)
        return logprob / math.pow(length, self.generation.params.length_penalty)

    def _is_over(self, live: list[Branch]) -> bool:
        if len(self._hypotheses) < self._width:
            return False
        best = max(self._score(branch.logprob, len(branch.tokens)) for branch in live)
        return best <= self._hypotheses[-1].score

    def _finish(self) -> None:
        best = self._hypotheses[: self.generation.params.n]
        self.generation.complete([self._completion(i, found) for i, found in enumerate(best)])

    def _completion(self, index: int, found: _Hypothesis) -> Completion:
        params, tokenizer = self.generation.params, self.generation.tokenizer
        ids = found.tokens[self._num_prompt :]
        shown = ids[:-1] if found.reason == "stop" and not params.include_stop else ids
        by_id = found.reason == "stop" and ids[-1] in params.stop_token_ids
        return Completion(
            index=index,
            text=tokenizer.decode(shown) if tokenizer is not None else "",
            token_ids=ids,
            finish_reason=found.reason,
            stop_reason=ids[-1] if by_id else None,
            cumulative_logprob=found.logprob,
            score=found.score,
        )


class ContrastiveSearch:
    """Chooses among the `top_k` likeliest tokens one unlike what stands before.

    The score of candidate v with probability p(v) is (1 - a) p(v) - a max_j cos(h_v, h_j), where a
    is `penalty_alpha`, h_v the vector that the head would read after v, h_j those of all earlier
    tokens (Su et al. 2022, arXiv 2202.06417, equation 5). Ties: the likelier, then the lower id.
    """

    def __init__(self, generation: Generation, branches: Branches) -> None:
        assert generation.params.penalty_alpha is not None
        self.generation = generation
        self.branches = branches
        self._alpha = generation.params.penalty_alpha
        self._sample = generation.samples[0]
        self._directions: list[Float32] = []  # unit vectors (T, E) of the tokens in the cache
        self._probabilities: Float32 | None = None  # of the candidates under way
        branches.start(list(self._sample.request.tokens))

    def step(self) -> None:
        logits, hidden = self.branches.forward(hidden=True)
        assert hidden is not None
        directions = _unit(hidden)
        if self._probabilities is None:
            self._directions.append(directions)
            if len(logits):  # the prompt is read
                self._propose(logits[0])
            return
        chosen = self._choose(directions)
        self._directions.append(directions[chosen : chosen + 1])
        branch = self.branches.live[chosen]
        self.branches.keep(branch)
        self._sample.append(branch.tokens[-1])
        if self._sample.finish_reason is None:
            self._propose(logits[chosen])

    def _propose(self, row: Float32) -> None:
        """Fork into the likeliest tokens, best first."""
        if not math.isfinite(row.max()):
            self.generation.fail()
            return
        logprobs = log_softmax(row)
        ids = keep_top_k(logprobs, self.generation.params.top_k)
        ids = np.arange(len(row)) if ids is None else ids
        ids = ids[np.argsort(-logprobs[ids], kind="stable")]
        self._probabilities = np.exp(logprobs[ids])
        parent = self.branches.live[0]
        self.branches.replace([(parent, token, 0.0) for token in ids.tolist()])

    def _choose(self, directions: Float32) -> int:
        """Place of the best candidate, given their directions (k, E)."""
        earlier = np.concatenate(self._directions)
        self._directions = [earlier]
        assert self._probabilities is not None
        likeness = (earlier @ directions.T).max(axis=0)
        return int(np.argmax((1 - self._alpha) * self._probabilities - self._alpha * likeness))


def _unit(vectors: Float32) -> Float32:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions: Float32 = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return directions
