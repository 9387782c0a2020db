"""How a text longer than the context is scored: overlapping windows that score each token once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from optlm.engine.generation import Generation
from optlm.engine.outputs import ScoreOutput
from optlm.engine.prompts import OnePrompt
from optlm.errors import ContextLengthError, RequestError

__all__ = ["Window", "join_scores", "plan_windows"]


class Window(NamedTuple):
    """Token ids to read, and the position whose logits give the first log-probability wanted."""

    token_ids: list[int]
    score_from: int


def plan_windows(
    token_ids: list[int], *, context: int, bos: int, on_overflow: str, stride: int | None
) -> Iterator[Window]:
    """Cut `token_ids` into windows that together score every token but the first, in order.

    The first window is the first `context` tokens. Each further one scores the next `stride` tokens
    (default: half the context) after as many earlier ones as fit; if the text begins with the start
    token `bos`, so does every window, as the model saw in training.

    Raises:
        ContextLengthError: the text is longer than the context and `on_overflow` is "error".
        RequestError: `on_overflow` or `stride` makes no sense.
    """
    if on_overflow not in ("error", "windows"):
        raise RequestError(f"on_overflow is {on_overflow!r}; it must be one of error, windows")
    if stride is None:
        stride = max(context // 2, 1)
    if isinstance(stride, bool) or not isinstance(stride, int) or not 0 < stride < context:
        raise RequestError(
            f"stride is {stride!r}; it must be a whole number from 1 to {context - 1}"
        )
    total = len(token_ids)
    if total > context and on_overflow == "error":
        raise ContextLengthError(
            f"the text has {total} tokens; the model's context holds {context}. "
            "Shorten it, or set on_overflow='windows'"
        )
    return _windows(token_ids, context, token_ids[:1] if token_ids[0] == bos else [], stride)


def _windows(token_ids: list[int], context: int, start: list[int], stride: int) -> Iterator[Window]:
    total = len(token_ids)
    yield Window(token_ids[:context], 0)
    done = context
    while done < total:
        end = min(done + stride, total)
        window = start + token_ids[end - context + len(start) : end]
        yield Window(window, context - (end - done) - 1)
        done = end


def join_scores(text: OnePrompt, windows: Sequence[Generation]) -> ScoreOutput:
    """Make one result of the finished jobs of `LLM.submit_score`."""
    token_ids: list[int] = []
    logprobs: list[float | None] = [None]
    for window in windows:
        new = window.prompt_scores
        ids = window.prompt.token_ids
        token_ids += ids[len(ids) - len(new) :] if token_ids else ids
        logprobs += new
    return ScoreOutput(
        text=text if isinstance(text, str) else None, token_ids=token_ids, logprobs=logprobs
    )
