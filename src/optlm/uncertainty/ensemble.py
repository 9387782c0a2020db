"""Several models, or one with several adapters, read the same text: where they differ, more data
would help; where all are unsure, it would not (Malinin and Gales 2021, arXiv 2002.07650).

Letters: M members, N tokens, R rows, V vocabulary. Logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optlm.engine.prompts import OnePrompt
from optlm.errors import RequestError
from optlm.uncertainty.reading import Float32, Float64, Ints, as_ids, read_rows

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = ["Disagreement", "Member", "check_members", "combine", "disagree", "joined"]

_ROWS = 64  # distributions of each member in memory at a time
_CANARY = "The quick brown fox jumped over 12 lazy dogs' backs; naïve café — 日本語\n\tend"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model, and the name of an adapter loaded in it."""

    llm: LLM
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Disagreement:
    """Figures of the tokens of a text after its first, each (N,).

    Attributes:
        logprob: of the token under the mean of the members' distributions.
        entropy: of that mean.
        expected_entropy: the mean of the members' entropies: what stays unsure whoever is asked.
        mutual_information: the difference: how far the members disagree; 0 if all are alike.
    """

    token_ids: Ints
    logprob: Float64
    entropy: Float64
    expected_entropy: Float64
    mutual_information: Float64

    def last(self, count: int) -> Disagreement:
        """The last `count` tokens alone."""
        return Disagreement(**{name: value[-count:] for name, value in vars(self).items()})


def check_members(members: Sequence[Member]) -> None:
    """Refuse members whose tokens do not mean the same.

    Raises:
        RequestError: fewer than 2, or vocabularies that differ.
    """
    if len(members) < 2:
        raise RequestError(f"an ensemble has at least 2 members, not {len(members)}")
    first = members[0].llm
    for number, member in enumerate(members[1:], start=2):
        other = member.llm
        if other is first:
            continue
        if other.config.vocab_size != first.config.vocab_size:
            raise RequestError(
                f"member {number} has a vocabulary of {other.config.vocab_size} tokens, the first "
                f"one of {first.config.vocab_size}; an ensemble needs one vocabulary"
            )
        if difference := _difference(first, other):
            raise RequestError(f"member {number} has another tokenizer: {difference}")


def _difference(first: LLM, other: LLM) -> str | None:
    """What tells two tokenizers apart, or None."""
    from optlm.tokenizer import Tokenizer

    a, b = first.tokenizer, other.tokenizer
    if a is b:
        return None
    if not (isinstance(a, Tokenizer) and isinstance(b, Tokenizer)):
        return "its tokens have no text to compare"
    for token in range(first.config.vocab_size):
        if a.token_bytes(token) != b.token_bytes(token):
            return f"token {token} is {b.token_text(token)!r}, not {a.token_text(token)!r}"
    return None if a.encode(_CANARY) == b.encode(_CANARY) else "it splits texts in another way"


def disagree(members: Sequence[Member], texts: Sequence[OnePrompt]) -> list[Disagreement]:
    """Read texts with every member and compare their distributions, token by token.

    Raises:
        RequestError: fewer than 2 members, vocabularies that differ, or an empty text.
    """
    check_members(members)
    return [_disagree(members, as_ids(members[0].llm, text)) for text in texts]


def _disagree(members: Sequence[Member], ids: list[int]) -> Disagreement:
    streams = [_pieces(member, ids) for member in members]
    parts = [combine(list(rows), np.array(targets)) for *rows, targets in zip(
        *streams, _slices(ids[1:]), strict=True
    )]  # fmt: skip
    return joined(parts)


def _slices(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(ids), _ROWS):
        yield ids[at : at + _ROWS]


def _pieces(member: Member, ids: list[int]) -> Iterator[Float32]:
    """All rows of a text, `_ROWS` at a time, however the engine cuts them."""
    parts: list[Float32] = []
    size = 0
    for rows in read_rows(member.llm, [ids], adapter=member.adapter):
        parts.append(rows.logprobs)
        size += len(rows.logprobs)
        while size >= _ROWS:
            whole = np.concatenate(parts)
            yield whole[:_ROWS]
            parts, size = [whole[_ROWS:]], size - _ROWS
    if size:
        yield np.concatenate(parts)


def combine(rows: Sequence[Float32], targets: Ints) -> Disagreement:
    """Compare the distributions (R, V) that M members give for the same tokens (R,)."""
    probs = np.exp(np.stack(rows), dtype=np.float64)  # (M, R, V)
    probs /= probs.sum(axis=2, keepdims=True)
    mean = probs.mean(axis=0)
    expected = _entropies(probs).mean(axis=0)
    total = _entropies(mean)
    each = np.arange(len(targets))
    return Disagreement(
        token_ids=targets,
        logprob=np.log(mean[each, targets]),
        entropy=total,
        expected_entropy=expected,
        mutual_information=np.maximum(total - expected, 0.0),
    )


def _entropies(probs: Float64) -> Float64:
    logs = np.log(probs, out=np.zeros_like(probs), where=probs > 0)
    result: Float64 = -(probs * logs).sum(axis=-1)
    return result


def joined(parts: Sequence[Disagreement]) -> Disagreement:
    """Parts of one text in order, as one."""
    return Disagreement(
        **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    )
