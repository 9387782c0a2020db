"""`Request`: one sequence being generated, and the checks a prompt passes before.

The context limit lives here: `admit_prompt` applies the user's policy once, and `Request.max_total`
ends the generation when the context is full.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from optlm.config import OPTConfig
from optlm.engine.adapters import NO_ADAPTER, LoadedAdapter
from optlm.engine.blocks import block_digest
from optlm.engine.params import SamplingParams
from optlm.errors import ContextLengthError, RequestError

__all__ = ["Request", "SupportsEncode", "admit_prompt", "as_token_ids", "check_token_ids"]


class SupportsEncode(Protocol):
    def encode(self, text: str, /) -> list[int]: ...


@runtime_checkable
class SupportsFewest(Protocol):
    """A tokenizer that knows a lower bound of a text's tokens without encoding it."""

    def fewest_tokens(self, text: str, /) -> int: ...


class Request:
    """One sequence: its tokens, how many are in the KV cache, and the blocks that hold them.

    Owned by the scheduler while it runs. Invariant: `num_computed < len(tokens)` until it finishes.
    """

    __slots__ = (
        "adapter",
        "block_table",
        "blocks",
        "digests",
        "key",
        "max_total",
        "next_row",
        "num_cached",
        "num_computed",
        "num_named",
        "num_prompt",
        "num_scheduled",
        "owner",
        "reads_hidden",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        key: tuple[int, ...],
        tokens: list[int],
        *,
        max_total: int,
        max_blocks: int,
        next_row: int,
        reads_hidden: bool = False,
        adapter: LoadedAdapter = NO_ADAPTER,
        owner: Any = None,
    ) -> None:
        # (priority, arrival, sample): smaller is served first and preempted last
        self.key = key
        self.tokens = tokens  # prompt, then output
        self.adapter = adapter
        self.num_prompt = len(tokens)
        self.max_total = max_total  # the sequence ends at this many tokens
        # First position whose logits (or hidden vectors) are still wanted; those after it are too.
        self.next_row = next_row
        self.reads_hidden = reads_hidden  # wants hidden vectors in place of logits
        self.num_computed = 0  # tokens[:num_computed] have keys and values in the cache
        self.num_scheduled = 0  # tokens of this step
        self.num_cached = -1  # tokens found in the prefix cache on first admission; -1 before it
        self.blocks: list[int] = []
        self.block_table: NDArray[np.int32] = np.zeros(
            max_blocks, np.int32
        )  # blocks, then any number
        self.digests: list[bytes] = []  # names of the full blocks of `tokens`
        self.num_named = 0  # blocks[:num_named] can be found by their digests
        self.owner = owner  # whose sequence it is; the scheduler never looks

    @property
    def priority(self) -> int:
        """Lower goes first."""
        return self.key[0]

    def name_blocks(self, block_size: int) -> list[bytes]:
        """Return the digests of all full blocks of the tokens so far."""
        digests = self.digests
        for end in range((len(digests) + 1) * block_size, len(self.tokens) + 1, block_size):
            before = digests[-1] if digests else self.adapter.salt
            digests.append(block_digest(before, self.tokens[end - block_size : end]))
        return digests


def check_token_ids(ids: Sequence[object], vocab_size: int) -> list[int]:
    """Return the ids as plain integers.

    Raises:
        RequestError: an empty list, something that is no whole number, or an id outside the
            vocabulary.
    """
    if not len(ids):
        raise RequestError("the prompt has no tokens; give at least one id, such as 2 for </s>")
    checked = []
    for place, token in enumerate(ids):
        if isinstance(token, (bool, np.bool_)) or not hasattr(token, "__index__"):
            raise RequestError(f"token {place} of the prompt is {token!r:.80}, not a whole number")
        value = operator.index(token)
        if not 0 <= value < vocab_size:
            raise RequestError(
                f"token {place} of the prompt is {value}; "
                f"the vocabulary has ids 0 to {vocab_size - 1}"
            )
        checked.append(value)
    return checked


def as_token_ids(
    prompt: str | Sequence[int],
    tokenizer: SupportsEncode | None,
    config: OPTConfig,
    *,
    room: int | None = None,
) -> list[int]:
    """Return the token ids of a prompt.

    A text gets the tokenizer's start token (``</s>``); ids are taken as they are. A text that
    cannot have as few tokens as `room` is refused before time is spent on encoding it.

    Raises:
        RequestError: the prompt is neither a text nor a list of token ids of the vocabulary.
        ContextLengthError: a text far beyond `room`.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "this model has no tokenizer; give the prompt as a list of token ids"
            )
        if room is not None and isinstance(tokenizer, SupportsFewest):
            _refuse_far_too_long(tokenizer.fewest_tokens(prompt), room)
        # Galactica has no start token; there an empty text begins a document, after </s>.
        prompt = tokenizer.encode(prompt) or [config.eos_token_id]
    elif isinstance(prompt, (bytes, bytearray, Mapping)) or not _is_flat(prompt):
        raise RequestError(
            f"a prompt is a text or a list of token ids, not {type(prompt).__name__}"
        )
    return check_token_ids(prompt, config.vocab_size)


def _is_flat(prompt: object) -> bool:
    """Whether it has elements to look at one by one; arrays of 0 or 2 dimensions have none."""
    return hasattr(prompt, "__getitem__") and getattr(prompt, "ndim", 1) == 1


def _refuse_far_too_long(fewest: int, room: int) -> None:
    if fewest > room:
        raise ContextLengthError(
            f"the text has {fewest} tokens or more; {room} fit the model's context. Shorten it, or "
            "choose another on_overflow"
        )


def admit_prompt(
    prompt: str | Sequence[int],
    tokenizer: SupportsEncode | None,
    params: SamplingParams,
    config: OPTConfig,
) -> tuple[list[int], int]:
    """Turn a prompt into token ids that fit the context; return them and how many were cut off.

    A text gets the tokenizer's start token (``</s>``); ids are taken as they are. Under
    "truncate_left" a prompt that does not leave room for `max_tokens` loses its oldest tokens after
    a leading start token, but never more than it takes to reach half the context.

    Raises:
        RequestError: the prompt is neither a text nor a list of token ids of the vocabulary.
        ContextLengthError: the prompt does not fit and the policy is "error".
    """
    context = config.max_position_embeddings
    room = context if params.max_tokens == 0 else context - 1
    limit = room if params.on_overflow == "error" else None
    tokens = as_token_ids(prompt, tokenizer, config, room=limit)
    if params.on_overflow == "truncate_left":
        keep = max(context - params.max_tokens, min(room, -(-context // 2)))
        return _truncate_left(tokens, keep, config.bos_token_id)
    if len(tokens) > room:
        raise ContextLengthError(
            f"the prompt has {len(tokens)} tokens; the model's context holds {context} and "
            f"{room} leave room for what was asked. Shorten it, or set on_overflow='truncate_left'"
        )
    return tokens, 0


def _truncate_left(tokens: list[int], keep: int, bos: int) -> tuple[list[int], int]:
    cut = len(tokens) - keep
    if cut <= 0:
        return tokens, 0
    start = tokens[:1] if tokens[0] == bos and keep > 1 else []
    return start + tokens[len(tokens) - keep + len(start) :], cut
