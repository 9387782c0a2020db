"""`Scorer`: texts in, exact log-probabilities out, under one convention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from optlm.engine.llm import LLM
from optlm.engine.prompts import OnePrompt, Prompts, as_prompts, naming_prompt
from optlm.engine.reading import Reading, normalizers
from optlm.engine.request import as_token_ids
from optlm.engine.tree import TokenTree
from optlm.errors import RequestError
from optlm.score.continuations import Request, encode_pair
from optlm.score.convention import Convention, as_convention
from optlm.score.measures import WORD_START, ByteMeasure, TextMeasure, word_start_ids
from optlm.score.ranking import Normalize, Ranking, check_endings, make_ranking
from optlm.score.results import ContinuationScore, PairScore, ScoredText, WindowScore
from optlm.score.spans import place_tokens
from optlm.score.windows import Window, cut
from optlm.tokenizer import Tokenizer

__all__ = ["Scorer"]

_TREE_TOKENS = 1 << 16  # of one tree, more or less
T = TypeVar("T")
Progress = Callable[[int], None]  # is told how many more tokens (or continuations) are scored


class Scorer:
    """Scores with one model under one convention.

    Args:
        convention: a name of `CONVENTIONS`, or one of your own.
        window, stride, corrects_words: change the convention's.
        adapter: name of an adapter that `llm` has loaded.

    Attributes:
        convention: with window and stride for this model.
        num_forward_tokens: tokens that went through the model so far.

    Raises:
        RequestError: no such convention or adapter, or a number out of range.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        convention: str | Convention = "optlm",
        window: int | None = None,
        stride: int | None = None,
        corrects_words: bool | None = None,
        adapter: str | None = None,
    ) -> None:
        if adapter is not None and adapter not in llm.adapters:
            raise RequestError(
                f"no adapter {adapter!r} is loaded; there are {', '.join(llm.adapters) or 'none'}"
            )
        chosen = as_convention(
            convention, window=window, stride=stride, corrects_words=corrects_words
        )
        self.llm = llm
        self._context = llm.context_of(adapter)
        self.convention = chosen.resolved(self._context)
        self.num_forward_tokens = 0
        self._adapter = adapter
        self._starts: np.ndarray[tuple[int], np.dtype[np.intp]] | None = None
        self._bytes: ByteMeasure | None = None

    # ---- whole texts ---------------------------------------------------------------------------

    def tokens(
        self,
        texts: Prompts,
        *,
        words: bool = False,
        by_byte: bool = False,
        progress: Progress | None = None,
    ) -> list[ScoredText]:
        """Score every token of each text given those before it.

        Args:
            texts: a text, a list of token ids, or a list of either.
            words: also measure where words begin, which `optlm.score.words` needs to correct.
            by_byte: also split the tokens into bytes.

        Raises:
            RequestError: a text that is empty, or cannot be encoded.
            ContextLengthError: the convention reads texts whole and one does not fit.
        """
        each = as_prompts(texts)
        planned: list[tuple[list[int], list[Window]]] = []
        for index, text in enumerate(each):
            with naming_prompt(index, len(each)):
                ids = self._ids(text)
                bos = self.llm.config.bos_token_id
                planned.append((ids, cut(ids, self.convention, bos=bos, name="the text")))
        collected = [_Collected(ids, words, by_byte) for ids, _ in planned]
        jobs = [(place, window) for place, (_, windows) in enumerate(planned) for window in windows]
        for chunk in _chunks(jobs, lambda job: len(job[1].token_ids)):
            reading = self._read_windows([window for _, window in chunk], words, by_byte)
            for number, (place, window) in enumerate(chunk):
                collected[place].take(window, reading, number, self._bytes if by_byte else None)
            if progress:
                progress(sum(window.num_scored for _, window in chunk))
        return [self._result(text, found) for text, found in zip(each, collected, strict=True)]

    def pairs(
        self, pairs: Sequence[tuple[str, str]], *, progress: Progress | None = None
    ) -> list[PairScore]:
        """Score minimal pairs (good, bad); what two sentences begin with is read once.

        Two equal sentences are a tie, which is not right (BLiMP has such a pair).
        """
        flat = [sentence for pair in pairs for sentence in pair]
        scored = self.tokens(flat, progress=progress)
        return [
            PairScore(good=good, bad=bad)
            for good, bad in zip(scored[::2], scored[1::2], strict=True)
        ]

    # ---- continuations -------------------------------------------------------------------------

    def continuations(
        self, context: str, endings: Sequence[str], *, reference: str | None = None
    ) -> list[ContinuationScore]:
        """Score each ending after the same context, which is read once.

        Args:
            reference: also score the endings after this context, such as "Answer:", for
                `ContinuationScore.information`; "" is the start token alone.
        """
        return self.conditional([(context, e) for e in endings], reference=reference)

    def conditional(
        self,
        requests: Iterable[tuple[str, str]],
        *,
        reference: str | None = None,
        progress: Progress | None = None,
    ) -> list[ContinuationScore]:
        """Score (context, continuation) pairs; whatever any of them begin with is read once.

        Context and continuation are encoded together. Where a token stands across the border, it
        is scored with the continuation. An empty context is the start token alone.

        Raises:
            RequestError: a continuation that is empty or gives no token.
            ContextLengthError: it does not fit, and the convention does not truncate.
        """
        asked = list(requests)
        encoded: list[Request] = []
        for index, (context, continuation) in enumerate(asked):
            with naming_prompt(index, len(asked)):
                encoded.append(self._encode(context, continuation))
                if reference is not None:
                    encoded.append(self._encode(reference, continuation))
        step = 1 if reference is None else 2
        scored: list[tuple[list[float], list[bool]]] = []
        for chunk in _chunks(encoded, lambda request: len(request.token_ids)):
            scored += self._read_requests(chunk)
            if progress:
                progress(len(chunk) // step)
        return [
            ContinuationScore(
                context=context,
                continuation=continuation,
                token_ids=encoded[place].continuation_ids,
                logprobs=scored[place][0],
                greedy=scored[place][1],
                unconditional=None if reference is None else math.fsum(scored[place + 1][0]),
            )
            for place, (context, continuation) in zip(
                range(0, len(encoded), step), asked, strict=True
            )
        ]

    def rank(
        self,
        context: str,
        endings: Sequence[str],
        *,
        normalize: Normalize = "sum",
        reference: str = "",
    ) -> Ranking:
        """Rank the endings of one context; see `rank_all`."""
        return self.rank_all([(context, endings)], normalize=normalize, reference=reference)[0]

    def rank_all(
        self,
        questions: Sequence[tuple[str, Sequence[str]]],
        *,
        normalize: Normalize = "sum",
        reference: str = "",
    ) -> list[Ranking]:
        """Rank the endings of each context.

        Args:
            normalize: what is compared; see `Ranking`.
            reference: the context that "information" compares with; "" is the start token alone.

        Raises:
            RequestError: endings whose ranking would mean nothing; see `check_endings`.
        """
        for index, (_, endings) in enumerate(questions):
            with naming_prompt(index, len(questions)):
                check_endings(endings, normalize)
        flat = [(context, ending) for context, endings in questions for ending in endings]
        compares = reference if normalize == "information" else None
        scored = iter(self.conditional(flat, reference=compares))
        return [
            make_ranking([next(scored) for _ in endings], normalize) for _, endings in questions
        ]

    # ---- inside --------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            RequestError: it has none, so only lists of token ids can be scored.
        """
        if not isinstance(self.llm.tokenizer, Tokenizer):
            raise RequestError("this model has no tokenizer; score lists of token ids instead")
        return self.llm.tokenizer

    def _ids(self, text: OnePrompt) -> list[int]:
        if len(text) == 0:
            raise RequestError("the text is empty; there is nothing to score")
        ids = as_token_ids(text, self.llm.tokenizer, self.llm.config)
        bos = self.llm.config.bos_token_id
        doubled = isinstance(text, str) and self.convention.one_start and ids[:2] == [bos, bos]
        return ids[1:] if doubled else ids

    def _encode(self, context: str, continuation: str) -> Request:
        return encode_pair(
            context,
            continuation,
            self.tokenizer,
            self.convention,
            limit=self._context,
        )

    def _read_windows(self, windows: list[Window], words: bool, by_byte: bool) -> Reading:
        tree = TokenTree()
        for window in windows:
            fits = len(window.token_ids) <= self._context
            tree.add(window.token_ids, window.first - 1, after_last=words and fits)
        if not (words or by_byte):
            return self._read(tree, normalizers)
        vocab_size = self.llm.config.vocab_size
        if words and self._starts is None:
            self._starts = word_start_ids(self.tokenizer, vocab_size, self.convention)
        if by_byte:
            self._bytes = self._bytes or ByteMeasure(self.tokenizer, vocab_size)
            self._bytes.begin(tree)
        starts = self._starts if words else None
        return self._read(tree, TextMeasure(starts, self._bytes if by_byte else None))

    def _read_requests(self, requests: list[Request]) -> list[tuple[list[float], list[bool]]]:
        tree = TokenTree()
        for request in requests:
            tree.add(request.token_ids, request.first - 1)
        reading = self._read(tree, normalizers)
        scores = (reading.scores(number) for number in range(len(requests)))
        return [(logprobs.tolist(), greedy.tolist()) for logprobs, greedy in scores]

    def _read(self, tree: TokenTree, measure: Callable[..., np.ndarray]) -> Reading:
        reading = self.llm.read(tree, measure, adapter=self._adapter)
        self.num_forward_tokens += reading.num_forward_tokens
        return reading

    def _result(self, text: OnePrompt, found: _Collected) -> ScoredText:
        tokenizer = self.llm.tokenizer
        known = tokenizer if isinstance(tokenizer, Tokenizer) else None
        return ScoredText(
            text=text if isinstance(text, str) else None,
            tokens=place_tokens(found.ids, known),
            logprobs=found.logprobs,
            greedy=found.greedy,
            windows=found.windows,
            convention=self.convention,
            word_starts=found.word_starts,
            byte_logprobs=found.byte_logprobs,
        )


class _Collected:
    """What the windows of one text give, token by token."""

    def __init__(self, ids: list[int], words: bool, by_byte: bool) -> None:
        self.ids = ids
        self.logprobs: list[float | None] = [None] * len(ids)
        self.greedy: list[bool | None] = [None] * len(ids)
        self.word_starts: list[float | None] | None = [None] * (len(ids) + 1) if words else None
        self.byte_logprobs: list[list[float] | None] | None = [None] * len(ids) if by_byte else None
        self.windows: list[WindowScore] = []
        self._end = 0  # where the last window ended

    def take(
        self, window: Window, reading: Reading, number: int, by_byte: ByteMeasure | None
    ) -> None:
        logprobs, greedy = reading.scores(number)
        begin, end = window.at, window.at + window.num_scored
        self.logprobs[begin:end] = logprobs.tolist()
        self.greedy[begin:end] = greedy.tolist()
        if self.word_starts is not None:
            measured = reading.measured(number)[:, WORD_START]
            self.word_starts[begin : begin + len(measured)] = measured.tolist()
        if self.byte_logprobs is not None and by_byte is not None:
            nodes = reading.tree.paths[number][window.first :]
            self.byte_logprobs[begin:end] = [by_byte.logprobs[node] for node in nodes]
        total = math.fsum(logprobs)
        self.windows.append(WindowScore(window.num_scored, total, end - self._end - 1))
        self._end = end


def _chunks(items: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut into lists of about `_TREE_TOKENS`, which bound the memory of what is under way."""
    chunk: list[T] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= _TREE_TOKENS:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
