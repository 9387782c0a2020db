"""A context and its continuation as tokens, and the ranking of continuations."""

from __future__ import annotations

from typing import NamedTuple

from optlm.errors import ContextLengthError, RequestError
from optlm.score.convention import Convention
from optlm.tokenizer import Tokenizer

__all__ = ["Request", "encode_pair", "fit_pair"]


class Request(NamedTuple):
    """Token ids, of which those from place `first` on are scored."""

    token_ids: list[int]
    first: int

    @property
    def continuation_ids(self) -> list[int]:
        return self.token_ids[self.first :]


def encode_pair(
    context: str, continuation: str, tokenizer: Tokenizer, convention: Convention, *, limit: int
) -> Request:
    """Encode a context and its continuation together, and tell where the continuation begins.

    Raises:
        RequestError: the continuation is empty or gives no token.
        ContextLengthError: more than `limit` tokens before the last, and no truncation.
    """
    if not isinstance(context, str) or not isinstance(continuation, str):
        wrong = context if not isinstance(context, str) else continuation
        raise RequestError(f"context and continuation are texts, not {type(wrong).__name__}")
    if not continuation:
        raise RequestError("the continuation is empty; there is nothing to score")
    ids, first = _encode(context, continuation, tokenizer, convention)
    if first >= len(ids):
        raise RequestError(
            f"the continuation {continuation!r:.80} gives no token of its own after its context"
        )
    return fit_pair(ids, first, convention, limit=limit)


def fit_pair(ids: list[int], first: int, convention: Convention, *, limit: int) -> Request:
    """A pair that fits the model, of which the tokens from place `first` on are scored.

    Raises:
        ContextLengthError: more than `limit` tokens before the last, and no truncation.
    """
    excess = len(ids) - 1 - limit
    if excess > 0:
        most = f"{limit + 1} tokens, the last of which is not read, fit the model"
        if not convention.truncates:
            raise ContextLengthError(
                f"context and continuation have {len(ids)} tokens; {most}. Shorten the context, or "
                "use the convention lm-eval, which drops its oldest tokens"
            )
        if excess >= first:
            raise ContextLengthError(f"the continuation has {len(ids) - first} tokens; {most}")
        ids, first = ids[excess:], first - excess
    return Request(ids, first)


def _encode(
    context: str, continuation: str, tokenizer: Tokenizer, convention: Convention
) -> tuple[list[int], int]:
    """All token ids, and the place of the first that is scored."""
    start = [tokenizer.bos_id if tokenizer.adds_bos else tokenizer.eos_id]
    if not context:
        ids = tokenizer.encode(continuation, add_bos=False)
        # One start token is enough; a text that writes it out is scored after it.
        return (ids, 1) if ids[:1] == start else (start + ids, 1)
    whole = tokenizer.encode(context + convention.separator + continuation)
    before = tokenizer.encode(context.rstrip() if convention.border == "spaces" else context)
    if convention.one_start and whole[:2] == before[:2] == start * 2:
        whole, before = whole[1:], before[1:]
    if convention.border == "common":
        return whole, max(_common(before, whole), 1)
    if convention.border == "spaces":  # so lm-eval joins them, even where they do not fit
        return before + whole[len(before) :], len(before)
    return whole, len(before)


def _common(left: list[int], right: list[int]) -> int:
    """How many tokens two lists begin alike with."""
    return next(
        (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
