"""`Generation`: one prompt on its way to a `RequestOutput`, and `Sample`: one of its sequences.

A generation with several samples starts the first alone; the others follow when its prompt is in
the KV cache and find it there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optlm.config import OPTConfig
from optlm.engine.adapters import NO_ADAPTER, LoadedAdapter
from optlm.engine.outputs import Completion, EmbedOutput, RequestOutput, StreamOutput, TokenLogprobs
from optlm.engine.params import SamplingParams
from optlm.engine.pooling import Pool
from optlm.engine.request import Request
from optlm.engine.runner import NOT_FINITE
from optlm.engine.sampling import Chooser, chosen_logprobs, log_normalizer, token_logprobs
from optlm.engine.stats import Counters
from optlm.engine.text import TextStream
from optlm.engine.utf8 import Utf8State, Utf8Table
from optlm.errors import EngineError

__all__ = ["Decoder", "Generation", "Prompt", "Sample", "TextTokenizer"]


class Decoder(Protocol):
    def push(self, token_id: int, /) -> str: ...
    def finish(self) -> str: ...


class TextTokenizer(Protocol):
    """What the engine needs of `optlm.tokenizer.Tokenizer`."""

    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, ids: Iterable[int], /) -> str: ...
    def decoder(self) -> Decoder: ...


class Prompt:
    """An admitted prompt: its text if it was one, its token ids, and how many were cut off."""

    __slots__ = ("num_truncated", "text", "token_ids")

    def __init__(self, text: str | None, token_ids: list[int], num_truncated: int) -> None:
        self.text = text
        self.token_ids = token_ids
        self.num_truncated = num_truncated


class Sample:
    """One sequence of a generation, with all that turns logits into its tokens and text."""

    def __init__(self, generation: Generation, index: int, request: Request) -> None:
        params = generation.params
        self.generation = generation
        self.index = index
        self.request = request
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        request.owner = self
        self._params = params
        self._num_prompt = len(generation.prompt.token_ids)
        self._num_streamed = 0
        self._told = False  # the end was streamed
        self._stop_ids = generation.stop_ids
        self._chooser = Chooser(
            params,
            generation.prompt.token_ids,
            stop_ids=sorted(generation.stop_ids),
            seed=generation.seed or 0,
            sample=index,
            utf8=generation.utf8_state(request.max_total),
        )
        # Whether the likeliest token is all that this sequence wants of its logits.
        self.takes_best = self._chooser.is_plain_greedy and generation.only_chooses
        self._text: TextStream | None = None
        self._decoder: Decoder | None = None
        if generation.tokenizer is not None and (generation.streams or params.stop):
            self._text = TextStream(params.stop, params.include_stop)
            self._decoder = generation.tokenizer.decoder()

    @property
    def token_ids(self) -> list[int]:
        return self.request.tokens[self._num_prompt :]

    def accept(self, row: NDArray[np.float32]) -> None:
        """Choose the next token from its logits (V,)."""
        self.accept_token(self._choose(row) if math.isfinite(row.max()) else NOT_FINITE)

    def accept_hidden(self, vectors: NDArray[np.float32]) -> None:
        """Take the hidden vectors (N, E) of the next tokens whose vectors are wanted."""
        pool = self.generation.pool
        assert pool is not None
        if len(vectors) and not pool.add(vectors):
            self.generation.fail()

    def accept_token(self, token: int) -> None:
        """Take the next token, or `NOT_FINITE`."""
        if token == NOT_FINITE:
            self.generation.fail()
        else:
            self.append(token)

    def append(self, token: int) -> None:
        """Take a chosen token and see whether the sequence ends with it."""
        tokens = self.request.tokens
        tokens.append(token)
        if token in self._stop_ids:
            self._end_by_token(token)
        elif self._text is not None and self._push_text(token):
            self.end("stop")
        elif len(tokens) >= self.request.max_total:
            self.end("length")

    def end(self, reason: str) -> None:
        """Finish; text that waited for more bytes is completed unless a stop string cut it."""
        self.finish_reason = reason
        if self._text is not None and self._decoder is not None and not self._text.stopped_by:
            self._text.push(self._decoder.finish(), may_stop=False)

    def completion(self, index: int) -> Completion:
        return Completion(
            index=index,
            text=self._whole_text(),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            logprobs=self.logprobs,
            cumulative_logprob=self.cumulative_logprob if self.generation.tracks_logprobs else None,
        )

    def take(self) -> StreamOutput | None:
        """Return what is new since the last call, if anything."""
        if self._told:
            return None
        last = self._told = self.finish_reason is not None
        new_ids = self.request.tokens[self._num_prompt + self._num_streamed :]
        text = self._text.take(last=last) if self._text is not None else ""
        if not (new_ids or text or last):
            return None
        logprobs = None if self.logprobs is None else self.logprobs[self._num_streamed :]
        self._num_streamed += len(new_ids)
        return StreamOutput(
            index=self.index,
            text=text,
            token_ids=new_ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _choose(self, row: NDArray[np.float32]) -> int:
        model = row.copy() if self.generation.tracks_logprobs else None
        token = self._chooser.choose(row, len(self.request.tokens))
        if model is not None:
            normalizer = log_normalizer(model)
            self.cumulative_logprob += float(model[token]) - normalizer
            if self.logprobs is not None:
                count = self._params.logprobs
                assert isinstance(count, int)
                self.logprobs.append(token_logprobs(model, normalizer, token, count))
        return token

    def _push_text(self, token: int) -> bool:
        assert self._text is not None
        assert self._decoder is not None
        may_stop = len(self.request.tokens) - self._num_prompt >= self._params.min_tokens
        if self._text.push(self._decoder.push(token), may_stop=may_stop):
            self.stop_reason = self._text.stopped_by
            return True
        return False

    def _end_by_token(self, token: int) -> None:
        if token in self._params.stop_token_ids:
            self.stop_reason = token
        if self._text is not None and self._params.include_stop:
            self._push_text(token)
        self.end("stop")

    def _whole_text(self) -> str:
        if self._text is not None:
            return self._text.text
        tokenizer = self.generation.tokenizer
        if tokenizer is None:
            return ""
        ids = self.token_ids
        if self.finish_reason == "stop" and not self._params.include_stop:
            ids = ids[:-1]  # without stop strings only a token can have stopped it
        return tokenizer.decode(ids)


class Generation:
    """One prompt with its samples. `finished` is true when all of them are."""

    def __init__(
        self,
        arrival: int,
        prompt: Prompt,
        params: SamplingParams,
        *,
        config: OPTConfig,
        tokenizer: TextTokenizer | None,
        max_blocks: int,
        adapter: LoadedAdapter = NO_ADAPTER,
        streams: bool = False,
        score_from: int | None = None,
        pool: Pool | None = None,
        priority: int = 0,
        utf8: Utf8Table | None = None,
    ) -> None:
        self.arrival = arrival
        self.priority = priority
        self.pool = pool
        self._utf8 = utf8
        self.prompt = prompt
        self.params = params
        self.tokenizer = tokenizer
        self.streams = streams
        self.error: str | None = None
        self._completions: list[Completion] | None = None
        self._told = False  # those were streamed
        self.seed = params.seed
        if self.seed is None and not params.is_greedy:
            self.seed = int.from_bytes(os.urandom(8), "little")
        self.stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self.stop_ids |= {config.eos_token_id}
        self.tracks_logprobs = params.logprobs is not None or params.num_samples > params.n
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.prompt_scores: list[float] = []  # log-probabilities of the tokens after `score_from`
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
            score_from = 0
        self._first_row = len(prompt.token_ids) - 1 if score_from is None else score_from
        if pool is not None:
            self._first_row = pool.first_row(len(prompt.token_ids))
        self.only_chooses = score_from is None and pool is None and not self.tracks_logprobs
        self._context = config.max_position_embeddings
        self._max_blocks = max_blocks
        self.adapter = adapter
        self.samples: Sequence[Sample] = [self._sample(0)]
        only_reads = params.max_tokens == 0 and pool is None
        if only_reads and self._first_row == len(prompt.token_ids) - 1:
            self.start_others()

    def utf8_state(self, max_total: int) -> Utf8State | None:
        """Where a sequence of at most `max_total` tokens begins; None when all tokens are legal."""
        if self._utf8 is None or not self.params.utf8:
            return None
        return Utf8State(self._utf8.masks(self.stop_ids), max_total)

    @property
    def lacks_samples(self) -> bool:
        return len(self.samples) < self.params.num_samples

    def start_others(self) -> list[Sample]:
        """Make the samples after the first, once; return those that are then to be queued."""
        others = [
            self._sample(index) for index in range(len(self.samples), self.params.num_samples)
        ]
        self.samples = [*self.samples, *others]
        if self.params.max_tokens == 0:  # the first has read the prompt, and nothing follows
            self.end("length")
            return []
        return others

    def complete(self, completions: list[Completion]) -> None:
        """Finish with outputs that a search made whole."""
        self._completions = completions
        self.end("stop")

    def fail(self) -> None:
        """Finish because the model gave NaN or infinity."""
        self.error = "the model's logits are not finite; the checkpoint is damaged"
        self.end("abort")

    def count(self, counters: Counters) -> None:
        """Add what a search read and chose to an engine's totals."""
        counters.prompt_tokens += len(self.prompt.token_ids)
        outputs = self._completions or self.samples
        counters.generated_tokens += sum(len(output.token_ids) for output in outputs)

    def check(self) -> None:
        """Raise the error that ended the generation, if one did."""
        if self.error is not None:
            raise EngineError(self.error)

    def take(self) -> list[StreamOutput]:
        """Return what is new in all samples since the last call."""
        if self._completions is not None:
            return self._take_completions(self._completions)
        new = [piece for sample in self.samples if (piece := sample.take()) is not None]
        if new and self.finished:
            new[-1] = replace(new[-1], result=self.output())
        return new

    def accept_prompt_rows(self, rows: NDArray[np.float32], position: int) -> None:
        """Record the prompt tokens after `position` and on from their logits (R, V)."""
        targets = self.prompt.token_ids[position + 1 : position + 1 + len(rows)]
        if self.prompt_logprobs is None:
            scores = chosen_logprobs(rows, targets)
            self.prompt_scores += scores
        else:
            count = self.params.prompt_logprobs
            assert isinstance(count, int)
            reports = [
                token_logprobs(row, log_normalizer(row), target, count)
                for row, target in zip(rows, targets, strict=True)
            ]
            self.prompt_logprobs += reports
            scores = [report.logprob for report in reports]
        if any(math.isnan(score) for score in scores):
            self.fail()

    def end(self, reason: str) -> None:
        """Finish every sample that has not."""
        for sample in self.samples:
            if sample.finish_reason is None:
                sample.end(reason)

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    def output(self) -> RequestOutput:
        """Return the result: all samples, or the best `n` of `best_of`."""
        samples = self.samples
        if len(samples) > self.params.n:
            samples = sorted(samples, key=_rank, reverse=True)[: self.params.n]
        first = self.samples[0].request
        return RequestOutput(
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=self._completions
            or [sample.completion(index) for index, sample in enumerate(samples)],
            prompt_logprobs=self.prompt_logprobs,
            seed=self.seed,
            num_cached_tokens=max(first.num_cached, 0),
            num_truncated_tokens=self.prompt.num_truncated,
        )

    def embedding(self) -> EmbedOutput:
        """Return the result of a generation that was made to pool."""
        assert self.pool is not None
        return EmbedOutput(
            text=self.prompt.text, token_ids=self.prompt.token_ids, vector=self.pool.vector
        )

    def _take_completions(self, completions: list[Completion]) -> list[StreamOutput]:
        """Each output of a search in one piece, the first time only."""
        if self._told:
            return []
        self._told = True
        return [
            StreamOutput(
                index=done.index,
                text=done.text,
                token_ids=done.token_ids,
                finish_reason=done.finish_reason,
                stop_reason=done.stop_reason,
                result=self.output() if done is completions[-1] else None,
            )
            for done in completions
        ]

    def _sample(self, index: int) -> Sample:
        tokens = list(self.prompt.token_ids)
        max_total = min(self._context, len(tokens) + self.params.max_tokens)
        if self.params.max_tokens == 0 and self.pool is None:
            tokens.pop()  # nothing follows the last token, so nothing needs its keys and values
            max_total = len(tokens)
        request = Request(
            (self.priority, self.arrival, index),
            tokens,
            max_total=max_total,
            max_blocks=self._max_blocks,
            next_row=len(self.prompt.token_ids) - 1 if index else self._first_row,
            reads_hidden=self.pool is not None,
            adapter=self.adapter,
        )
        return Sample(self, index, request)


def _rank(sample: Sample) -> tuple[bool, float]:
    """Finished samples before aborted ones, then by mean log-probability a token."""
    mean = sample.cumulative_logprob / max(len(sample.token_ids), 1)
    return sample.finish_reason != "abort", mean
