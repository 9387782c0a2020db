"""`Engine`: requests in, one `step` after another, finished `Generation`s out.

What `LLM` and `AsyncLLM` stand on. It reads no files and waits for nothing.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import asdict, replace

from optlm.config import OPTConfig
from optlm.engine.adapters import Adapters
from optlm.engine.batch import BatchArrays
from optlm.engine.blocks import BlockPool
from optlm.engine.generation import Generation, Prompt, Sample, TextTokenizer
from optlm.engine.jobs import RunsJobs
from optlm.engine.locking import new_lock
from optlm.engine.params import SamplingParams, check_priority
from optlm.engine.pooling import Pool, Pooling
from optlm.engine.postprocess import accept_best, accept_hidden, accept_logits
from optlm.engine.prompts import OnePrompt
from optlm.engine.reading import Measure, Reading
from optlm.engine.request import Request, admit_prompt, as_token_ids
from optlm.engine.runner import Runner
from optlm.engine.scheduler import Scheduler
from optlm.engine.search import Search, make_search
from optlm.engine.stats import Counters, EngineStats
from optlm.engine.tree import TokenTree
from optlm.engine.tree_reader import TreeReader
from optlm.engine.utf8 import KnowsBytes, Utf8Table
from optlm.engine.windows import plan_windows
from optlm.errors import ContextLengthError, RequestError

__all__ = ["Engine"]

_ONLY_READ = SamplingParams(temperature=0, max_tokens=0)
_MAX_SEQUENCES = 256
_LOGIT_ROWS = 256  # rows of V logits in memory at a time


class Engine(RunsJobs):
    """Queues of requests over one `Runner`. One thread at a time may use it."""

    def _start(self, runner: Runner, tokenizer: TextTokenizer | None, prefix_cache: bool) -> None:
        self.config: OPTConfig = runner.config
        self.tokenizer = tokenizer
        self._runner = runner
        self._prefix_cache = prefix_cache
        self._max_sequences = min(_MAX_SEQUENCES, runner.max_batch_tokens)
        context = self.config.max_position_embeddings
        self._max_blocks = -(-context // runner.block_size)
        self._arrays = BatchArrays(runner.max_batch_tokens, self._max_sequences, self._max_blocks)
        self._utf8: Utf8Table | None = None
        self._arrivals = 0
        self._counters = Counters()
        self._adapters = Adapters(runner, None)
        self.lock = new_lock()
        self._reset()

    def _reset(self) -> None:
        runner = self._runner
        self._searches = []
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks, runner.block_size),
            max_batch_tokens=runner.max_batch_tokens,
            max_sequences=self._max_sequences,
            max_logit_rows=max(_LOGIT_ROWS, self._max_sequences),
            prefix_cache=self._prefix_cache,
            counters=self._counters,
        )

    # ---- one step ------------------------------------------------------------------------------

    def submit(
        self,
        prompt: OnePrompt,
        params: SamplingParams,
        *,
        stream: bool = False,
        priority: int = 0,
    ) -> Generation:
        """Queue one prompt; `step` works on it until its `finished` is true.

        Args:
            priority: lower goes first, and has those that run with a higher number give their
                place back when there is none left; among equals the first to come.

        Raises:
            RequestError: a prompt or parameter that cannot be served.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        params.check_vocabulary(self.config.vocab_size)
        if stream and params.num_samples > params.n:
            raise RequestError("best_of chooses among finished samples, so they cannot be streamed")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        if params.utf8:
            self._make_utf8_table()
        tokens, cut = admit_prompt(prompt, self.tokenizer, params, self._config(params.adapter))
        text = prompt if isinstance(prompt, str) else None
        return self._queue(Prompt(text, tokens, cut), params, streams=stream, priority=priority)

    def submit_score(
        self,
        text: OnePrompt,
        on_overflow: str,
        stride: int | None,
        adapter: str | None = None,
        *,
        priority: int = 0,
    ) -> list[Generation]:
        """Queue one text, window by window; `join_scores` makes the result."""
        context = self.context_of(adapter)
        only_read = _only_read(adapter)
        room = context if on_overflow == "error" else None
        token_ids = as_token_ids(text, self.tokenizer, self.config, room=room)
        jobs = []  # the first is the longest: if the cache is too small, it is refused before all
        for window in plan_windows(
            token_ids,
            context=context,
            bos=self.config.bos_token_id,
            on_overflow=on_overflow,
            stride=stride,
        ):
            prompt = Prompt(None, window.token_ids, 0)
            job = self._queue(prompt, only_read, score_from=window.score_from, priority=priority)
            jobs.append(job)
        return jobs

    def submit_embed(
        self,
        text: OnePrompt,
        pooling: Pooling,
        adapter: str | None = None,
        *,
        priority: int = 0,
    ) -> Generation:
        """Queue one text; the finished job's `pool` has its vector."""
        pool = Pool(pooling)
        context = self.context_of(adapter)
        tokens = as_token_ids(text, self.tokenizer, self.config, room=context)
        if len(tokens) > context:
            raise ContextLengthError(
                f"the text has {len(tokens)} tokens; the model's context holds {context}. "
                "Shorten it, or embed its parts"
            )
        prompt = Prompt(text if isinstance(text, str) else None, tokens, 0)
        return self._queue(prompt, _only_read(adapter), pool=pool, priority=priority)

    def context_of(self, adapter: str | None) -> int:
        """Tokens that a text may have beside an adapter; its virtual tokens may take some."""
        return self.config.max_position_embeddings - self._adapters.find(adapter).text_start

    def submit_reading(
        self, tree: TokenTree, measure: Measure, adapter: str | None, *, priority: int = 0
    ) -> Reading:
        """Queue a tree, whose longest sequence fits the context; it runs as `read` runs it."""
        context = self.context_of(adapter)
        if (longest := tree.most_read) > context:
            raise ContextLengthError(
                f"a sequence has {longest} tokens to read; the context holds {context}. Shorten it"
            )
        found = self._adapters.find(adapter)
        reading = Reading(self._arrivals, tree, measure, found, priority=check_priority(priority))
        self._arrivals += 1
        if not reading.finished:
            self._queue_search(TreeReader(reading, self._runner, self._scheduler, self._max_blocks))
        return reading

    def step(self) -> None:
        """Schedule, run, sample, postprocess: one forward pass for requests, one for a search."""
        if self._searches:
            self._step_search()
        scheduled = self._scheduler.schedule()
        if scheduled:
            arrays = self._arrays.fill(scheduled)
            before = sum(len(request.tokens) for request in scheduled)
            if all(request.owner.takes_best for request in scheduled):
                accept_best(scheduled, self._runner.forward_best(*arrays))
            elif any(request.reads_hidden for request in scheduled):
                logits, hidden = self._runner.forward_hidden(*arrays)
                accept_hidden(scheduled, hidden)
                accept_logits(scheduled, logits)
            else:
                accept_logits(scheduled, self._runner.forward(*arrays))
            now = sum(len(request.tokens) for request in scheduled)
            self._counters.generated_tokens += now - before
            self._scheduler.complete(scheduled)
            self._retire(scheduled)

    def stats(self) -> EngineStats:
        """Numbers for a metrics page; any thread may ask, and waits for nothing."""
        scheduler, searches = self._scheduler, len(self._searches)
        pool = scheduler.pool
        return EngineStats(
            running=len(scheduler.running) + min(searches, 1),
            waiting=len(scheduler.waiting) + max(searches - 1, 0),
            blocks_used=pool.num_blocks - pool.num_free,
            blocks_total=pool.num_blocks,
            **asdict(self._counters),
        )

    # ---- inside --------------------------------------------------------------------------------

    def _make_utf8_table(self) -> None:
        """At the first request that wants it."""
        if not isinstance(self.tokenizer, KnowsBytes):
            raise RequestError("utf8 needs a tokenizer that tells the bytes of its tokens")
        if self._utf8 is None:
            self._utf8 = Utf8Table(self.tokenizer, self.config.vocab_size)

    def _config(self, adapter: str | None) -> OPTConfig:
        """The model's, with the context that an adapter leaves to texts."""
        context = self.context_of(adapter)
        if context == self.config.max_position_embeddings:
            return self.config
        return replace(self.config, max_position_embeddings=context)

    def _step_search(self) -> None:
        search = self._searches[0]
        search.step()
        if search.generation.finished:
            search.generation.count(self._counters)
            self._drop_search(search)

    def _queue_search(self, search: Search) -> None:
        """Behind the one that is under way, by priority."""
        insort(self._searches, search, lo=1, key=lambda s: s.generation.priority)

    def _retire(self, scheduled: list[Request]) -> None:
        """Remove finished sequences; queue the samples that waited for their prompt."""
        for request in scheduled:
            sample: Sample = request.owner
            job = sample.generation
            if job.lacks_samples and request.num_computed >= request.num_prompt and not job.error:
                for other in job.start_others():
                    self._scheduler.add(other.request)
            if sample.finish_reason is not None:
                self._scheduler.remove(request)

    def _queue(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        streams: bool = False,
        score_from: int | None = None,
        pool: Pool | None = None,
        priority: int = 0,
    ) -> Generation:
        job = Generation(
            self._arrivals,
            prompt,
            params,
            config=self._config(params.adapter),
            tokenizer=self.tokenizer,
            max_blocks=self._max_blocks,
            adapter=self._adapters.find(params.adapter),
            streams=streams,
            score_from=score_from,
            pool=pool,
            priority=check_priority(priority),
            utf8=self._utf8,
        )
        self._arrivals += 1
        if job.finished:
            return job
        search = make_search(job, self._runner, self._scheduler)
        if search is not None:
            self._queue_search(search)
        else:
            self._scheduler.add(job.samples[0].request)
        return job


def _only_read(adapter: str | None) -> SamplingParams:
    return _ONLY_READ if adapter is None else replace(_ONLY_READ, adapter=adapter)
