"""`LLM`: what users hold. Texts in, texts or log-probabilities out, one `step` after another.

Calls from several threads wait for each other; `optlm.engine.aio` runs many callers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from optlm.engine.adapters import Adapters
from optlm.engine.engine import Engine
from optlm.engine.generation import Generation, TextTokenizer
from optlm.engine.load import load
from optlm.engine.locking import one_at_a_time
from optlm.engine.outputs import EmbedOutput, RequestOutput, ScoreOutput, StreamOutput
from optlm.engine.params import SamplingParams
from optlm.engine.pooling import Pooling
from optlm.engine.prompts import OnePrompt, Prompts, as_params, as_prompts, naming_prompt
from optlm.engine.reading import Measure, Reading, normalizers
from optlm.engine.runner import Backend, DType, KVDType, Runner, RunnerOptions
from optlm.engine.tree import TokenTree
from optlm.engine.windows import join_scores
from optlm.errors import RequestError

__all__ = ["LLM"]


@one_at_a_time(
    "generate", "score", "embed", "read", "submit", "submit_score", "submit_embed",
    "submit_reading", "abort", "step", "_abandon",
)  # fmt: skip
class LLM(Engine):
    """A model ready to generate, score and embed.

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
        kv_dtype: format of keys and values in the cache: "f32", "f16" or "int8" (half of f16's
            memory, faster with many long sequences, a little rounding); "auto" is "f32" beside
            f32 weights and "f16" otherwise. The torch backend has its weights' format only.
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
        kv_dtype: KVDType = "auto",
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
            kv_dtype=kv_dtype,
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

    # ---- adapters ------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """Names that `SamplingParams.adapter` and `score` may use."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: str | Path, *, force: bool = False) -> None:
        """Load a LoRA, prefix or prompt in peft's format, for the requests that name it.

        Requests with different adapters run in one batch, each with the numbers it has alone.

        Args:
            name: 1 to 64 letters, digits, '.', '_' and '-'.
            force: use an adapter that was made for other weights, if its shapes fit.

        Raises:
            RequestError: the name is taken or no name.
            CheckpointError: the files are broken, or made for another base.
            BackendError: what only merging can run: DoRA, changes outside the layers.
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

    def embed(
        self, prompts: Prompts, *, pooling: Pooling = "mean", adapter: str | None = None
    ) -> list[EmbedOutput]:
        """Return one vector a text; all texts run together.

        A token's vector is what the output head multiplies: the last layer's output after the final
        layer norm (where the model has one) and `project_out` (where it has one), as wide as the
        token embeddings. Every token that the model reads counts, a text's start token ``</s>``
        included. Vectors are float32, not normalised, and with the native backend the same bits
        whatever else runs. OPT was trained to predict tokens, not to compare texts; these vectors
        carry no promise of similarity.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            pooling: "mean" over the tokens' vectors, or the "last" token's.
            adapter: name of a loaded adapter.

        Raises:
            RequestError: a text that cannot be read, or no such `pooling` or `adapter`.
            ContextLengthError: a text longer than the context.
        """
        each = as_prompts(prompts)
        jobs: list[Generation] = []
        with self._together():
            for index, text in enumerate(each):
                with naming_prompt(index, len(each)):
                    jobs.append(self.submit_embed(text, pooling, adapter))
            self._run(jobs)
        return [job.embedding() for job in jobs]
