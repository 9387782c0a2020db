"""`LLM`: what users hold. Texts in, texts or log-probabilities out, one `step` after another.

Calls from several threads wait for each other; `optlm.engine.aio` runs many callers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from optlm.config import OPTConfig
from optlm.engine.adapters import Adapters
from optlm.engine.batch import BatchArrays
from optlm.engine.blocks import BlockPool
from optlm.engine.generation import Generation, Prompt, Sample, TextTokenizer
from optlm.engine.jobs import RunsJobs
from optlm.engine.load import load
from optlm.engine.locking import new_lock, one_at_a_time
from optlm.engine.outputs import RequestOutput, ScoreOutput, StreamOutput
from optlm.engine.params import SamplingParams
from optlm.engine.postprocess import accept_best, accept_logits
from optlm.engine.prompts import OnePrompt, Prompts, as_params, as_prompts, naming_prompt
from optlm.engine.reading import Measure, Reading, normalizers
from optlm.engine.request import Request, admit_prompt, as_token_ids
from optlm.engine.runner import Backend, DType, Runner, RunnerOptions
from optlm.engine.scheduler import Scheduler
from optlm.engine.search import make_search
from optlm.engine.tree import TokenTree
from optlm.engine.tree_reader import TreeReader
from optlm.engine.windows import join_scores, plan_windows
from optlm.errors import RequestError

__all__ = ["LLM"]

_ONLY_READ = SamplingParams(temperature=0, max_tokens=0)
_MAX_SEQUENCES = 256
_LOGIT_ROWS = 256  # rows of V logits in memory at a time


@one_at_a_time(
    "generate", "score", "read", "submit", "submit_score", "submit_reading", "abort", "step",
    "_abandon",
)  # fmt: skip
class LLM(RunsJobs):
    """A model ready to generate and score.

    Args:
        model: a folder, a name on the hub, or None for the bundled model.
        dtype: format of the weights in memory; "auto" is the smallest that holds the stored ones
            exactly.
        threads: CPU threads; None lets the backend choose.
        backend: "native", "torch", or "auto" for the first of them that is installed.
        device: for PyTorch, such as "cuda"; None takes a GPU if there is one.
        max_batch_tokens: most tokens of one forward pass; longer prompts are read in chunks.
        num_blocks, kv_cache_bytes: size of the KV cache, in blocks of 16 tokens or in bytes
            (default: 16 full contexts, at most 1 GiB).
        prefix_cache: reuse the computed beginnings of earlier prompts.
        tokenizer: "auto" takes the one beside the weights; a folder; a tokenizer; None for token
            ids only.
        adapter: folder of a LoRA, prefix or prompt in peft's format, applied to every request.
        force: use an adapter that was made for other weights, if its shapes fit.

    Raises:
        CheckpointError, ConfigError, TokenizerError: the files cannot be used.
        BackendError: no backend here can run this.
        RequestError: an argument out of range.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: DType = "auto",
        threads: int | None = None,
        backend: Backend = "auto",
        device: str | None = None,
        max_batch_tokens: int = 512,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        prefix_cache: bool = True,
        tokenizer: TextTokenizer | Path | str | None = "auto",
        adapter: str | Path | None = None,
        force: bool = False,
    ) -> None:
        options = RunnerOptions(
            dtype=dtype,
            threads=threads,
            backend=backend,
            device=device,
            max_batch_tokens=max_batch_tokens,
            num_blocks=num_blocks,
            kv_cache_bytes=kv_cache_bytes,
        )
        found, runner, base = load(model, options, tokenizer, adapter, force=force)
        self._start(runner, found, prefix_cache)
        self._adapters = Adapters(runner, base)

    @classmethod
    def from_runner(
        cls, runner: Runner, tokenizer: TextTokenizer | None = None, *, prefix_cache: bool = True
    ) -> LLM:
        """Build on a runner made elsewhere."""
        llm = cls.__new__(cls)
        llm._start(runner, tokenizer, prefix_cache)
        return llm

    def _start(self, runner: Runner, tokenizer: TextTokenizer | None, prefix_cache: bool) -> None:
        self.config: OPTConfig = runner.config
        self.tokenizer = tokenizer
        self._runner = runner
        self._prefix_cache = prefix_cache
        self._max_sequences = min(_MAX_SEQUENCES, runner.max_batch_tokens)
        context = self.config.max_position_embeddings
        self._max_blocks = -(-context // runner.block_size)
        self._arrays = BatchArrays(runner.max_batch_tokens, self._max_sequences, self._max_blocks)
        self._arrivals = 0
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
        )

    # ---- adapters ------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names that `SamplingParams.adapter` and `score` may use."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: str | Path, *, force: bool = False) -> None:
        """Load a LoRA in peft's format beside the weights, for the requests that name it.

        Requests with different adapters run in one batch, each with the numbers it has alone.

        Args:
            name: 1 to 64 letters, digits, '.', '_' and '-'.
            force: use an adapter that was made for other weights, if its shapes fit.

        Raises:
            RequestError: the name is taken or no name.
            CheckpointError: the files are broken, or made for another base.
            BackendError: what only merging can run: DoRA, changes outside the layers, prefixes.
        """
        self._adapters.load(name, folder, force=force)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            RequestError: there is none of that name, or a request that runs uses it.
        """
        adapter = self._adapters.find(name)
        if any(job.adapter is adapter for job in self._jobs()):
            raise RequestError(f"adapter {name!r} is in use by requests that have not finished")
        self._adapters.unload(name)

    # ---- whole jobs ----------------------------------------------------------------------------

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue each prompt; all run together, results come in the order given.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            params: for all prompts, or one for each.

        Raises:
            RequestError: a prompt or parameter that cannot be served; nothing has run then.
        """
        each = as_prompts(prompts)
        options = as_params(params, len(each))
        jobs: list[Generation] = []
        with self._together():
            for index, (prompt, wanted) in enumerate(zip(each, options, strict=True)):
                with naming_prompt(index, len(each)):
                    jobs.append(self.submit(prompt, wanted))
            self._run(jobs)
        return [job.output() for job in jobs]

    def stream(
        self, prompt: OnePrompt, params: SamplingParams | None = None
    ) -> Iterator[StreamOutput]:
        """Continue one prompt and yield text as it becomes certain.

        The texts of an output join to its final text: no half characters, nothing of a stop
        string. Closing the iterator early aborts the request.

        Raises:
            RequestError: at once, not at the first item.
        """
        return self._stream(self.submit(prompt, params or SamplingParams(), stream=True))

    def _stream(self, job: Generation) -> Iterator[StreamOutput]:
        try:
            while True:
                finished = job.finished  # other calls may step the engine between two items
                with self.lock:
                    pieces = list(job.take())
                yield from pieces
                job.check()
                if finished:
                    return
                self._advance(job)
        finally:
            if not job.finished:
                self._abandon(range(job.arrival, job.arrival + 1))

    def score(
        self,
        texts: Prompts,
        *,
        on_overflow: Literal["error", "windows"] = "error",
        stride: int | None = None,
        adapter: str | None = None,
    ) -> list[ScoreOutput]:
        """Return the log-probability of every token given those before it; all texts run together.

        Args:
            texts: a text, a list of token ids, or a list of either.
            on_overflow: a text longer than the context is an "error", or scored in overlapping
                "windows".
            stride: tokens that each window after the first scores; default half the context.
            adapter: name of a loaded adapter.

        Raises:
            RequestError: a text that cannot be scored.
        """
        each = as_prompts(texts)
        parts: list[list[Generation]] = []
        with self._together():
            for index, text in enumerate(each):
                with naming_prompt(index, len(each)):
                    parts.append(self.submit_score(text, on_overflow, stride, adapter))
            self._run([job for part in parts for job in part])
        return [join_scores(text, part) for text, part in zip(each, parts, strict=True)]

    def read(
        self, tree: TokenTree, measure: Measure = normalizers, *, adapter: str | None = None
    ) -> Reading:
        """Read token sequences, what they share once, and measure the logits that are wanted."""
        with self._together():
            reading = self.submit_reading(tree, measure, adapter)
            self._run([reading])
        return reading

    # ---- one step ------------------------------------------------------------------------------

    def submit(
        self, prompt: OnePrompt, params: SamplingParams, *, stream: bool = False
    ) -> Generation:
        """Queue one prompt; `step` works on it until its `finished` is true."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        params.check_vocabulary(self.config.vocab_size)
        if stream and params.num_samples > params.n:
            raise RequestError("best_of chooses among finished samples, so they cannot be streamed")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        tokens, cut = admit_prompt(prompt, self.tokenizer, params, self.config)
        text = prompt if isinstance(prompt, str) else None
        return self._queue(Prompt(text, tokens, cut), params, streams=stream)

    def submit_score(
        self, text: OnePrompt, on_overflow: str, stride: int | None, adapter: str | None = None
    ) -> list[Generation]:
        """Queue one text, window by window; `join_scores` makes the result."""
        context = self.config.max_position_embeddings
        only_read = replace(_ONLY_READ, adapter=adapter) if adapter is not None else _ONLY_READ
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
            jobs.append(self._queue(prompt, only_read, score_from=window.score_from))
        return jobs

    def submit_reading(self, tree: TokenTree, measure: Measure, adapter: str | None) -> Reading:
        """Queue a tree, whose longest sequence fits the context; it runs as `read` runs it."""
        reading = Reading(self._arrivals, tree, measure, self._adapters.find(adapter))
        self._arrivals += 1
        blocks, rows = self._max_blocks, self._scheduler.max_logit_rows
        if not reading.finished:
            reader = TreeReader(reading, self._runner, self._scheduler, blocks, rows)
            self._searches.append(reader)
        return reading

    def step(self) -> None:
        """Schedule, run, sample, postprocess: one forward pass for requests, one for a search."""
        if self._searches:
            self._step_search()
        scheduled = self._scheduler.schedule()
        if scheduled:
            arrays = self._arrays.fill(scheduled)
            if all(request.owner.takes_best for request in scheduled):
                accept_best(scheduled, self._runner.forward_best(*arrays))
            else:
                accept_logits(scheduled, self._runner.forward(*arrays))
            self._scheduler.complete(scheduled)
            self._retire(scheduled)

    # ---- inside --------------------------------------------------------------------------------

    def _step_search(self) -> None:
        search = self._searches[0]
        search.step()
        if search.generation.finished:
            self._drop_search(search)

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
    ) -> Generation:
        job = Generation(
            self._arrivals,
            prompt,
            params,
            config=self.config,
            tokenizer=self.tokenizer,
            max_blocks=self._max_blocks,
            adapter=self._adapters.find(params.adapter),
            streams=streams,
            score_from=score_from,
        )
        self._arrivals += 1
        if job.finished:
            return job
        search = make_search(job, self._runner, self._scheduler)
        if search is not None:
            self._searches.append(search)
        else:
            self._scheduler.add(job.samples[0].request)
        return job
