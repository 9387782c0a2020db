"""What a model makes of each language: bits, tokens, room in the context, switches to others.

A vocabulary learnt on English spends several tokens on a letter of other scripts, so the same
context holds a fraction of the text (the "context tax"), and perplexities a token cannot be
compared; bits a byte of UTF-8 can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import RequestError
from optlm.evaluate.identify import Identifier, pieces_of
from optlm.score import Scorer

__all__ = ["LanguageReport", "LanguageRow", "language_report", "languages_table"]

_PROMPT = 200  # characters of a text that a generation goes on from

Progress = Callable[[int], None]  # told how many more texts are done


@dataclass(frozen=True, kw_only=True)
class LanguageRow:
    """One language.

    Attributes:
        bits_per_byte, bits_per_character: of all its texts.
        context_characters: of this language that a full context holds, on average.
        tax: how many times more of the reference language it holds; None without a reference.
        pieces: sentences generated.
        switched: share of their characters identified as another language; None if none was
            generated, or the identifier does not know the language.
        mistaken: the same share for the true texts: the error of the identifier itself.
    """

    language: str
    texts: int
    characters: int
    bytes: int
    tokens: int
    bits_per_byte: float
    context_characters: float
    tax: float | None = None
    pieces: int = 0
    switched: float | None = None
    mistaken: float | None = None

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def bits_per_character(self) -> float:
        return self.bits_per_byte * self.bytes / self.characters


@dataclass(frozen=True, kw_only=True)
class LanguageReport:
    """All languages, in the order of bits a byte, and what was counted."""

    rows: tuple[LanguageRow, ...]
    context: int
    reference: str | None
    convention: dict[str, Any]

    def told(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def language_report(
    llm: LLM,
    texts: Mapping[str, Sequence[str]],
    *,
    reference: str = "en",
    generate: int = 0,
    max_tokens: int = 96,
    temperature: float = 0.8,
    seed: int = 0,
    progress: Progress | None = None,
) -> LanguageReport:
    """Measure a model on texts of several languages.

    Args:
        texts: by language code, such as "en" or "pt-BR".
        reference: the language that the context tax is relative to.
        generate: continue the beginnings of so many texts a language, and identify the language of
            what comes out.
        max_tokens, temperature, seed: of those continuations.

    Raises:
        RequestError: no texts, an empty text, or numbers out of range.
    """
    if not texts:
        raise RequestError("there are no texts; give at least one of one language")
    if generate < 0:
        raise RequestError(f"generate is {generate}; it must be at least 0")
    for language, given in texts.items():
        if not given or not all(text.strip() for text in given):
            raise RequestError(f"language {language!r} has no text, or an empty one")
    scorer = Scorer(llm)
    context = llm.config.max_position_embeddings
    identifier = Identifier() if generate else None
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    rows = []
    for language, given in texts.items():
        scored = scorer.tokens(list(given))
        characters = sum(map(len, given))
        tokens = sum(each.num_scored for each in scored)
        num_bytes = sum(each.num_bytes for each in scored)
        nats = -math.fsum(each.total for each in scored)
        switches = _switches(llm, identifier, language, given[:generate], params)
        rows.append(
            LanguageRow(
                language=language,
                texts=len(given),
                characters=characters,
                bytes=num_bytes,
                tokens=tokens,
                bits_per_byte=nats / math.log(2) / num_bytes,
                context_characters=context * characters / tokens,
                **switches,
            )
        )
        if progress:
            progress(len(given))
    return LanguageReport(
        rows=tuple(sorted(_taxed(rows, reference), key=lambda row: row.bits_per_byte)),
        context=context,
        reference=reference if reference in texts else None,
        convention=scorer.convention.told(),
    )


def _taxed(rows: Sequence[LanguageRow], reference: str) -> list[LanguageRow]:
    room = {row.language: row.context_characters for row in rows}
    if reference not in room:
        return list(rows)
    return [
        LanguageRow(**(asdict(row) | {"tax": room[reference] / row.context_characters}))
        for row in rows
    ]


def _switches(
    llm: LLM,
    identifier: Identifier | None,
    language: str,
    texts: Sequence[str],
    params: SamplingParams,
) -> dict[str, Any]:
    if identifier is None or not texts or not identifier.knows(language):
        return {}
    outputs = llm.generate([text[:_PROMPT] for text in texts], params)
    written = [piece for output in outputs for piece in pieces_of(output.text)]
    truth = [piece for text in texts for piece in pieces_of(text)]
    return {
        "pieces": len(written),
        "switched": identifier.share_of_others(language, written),
        "mistaken": identifier.share_of_others(language, truth),
    }


_HEAD = (
    "language", "texts", "bits/byte", "bits/char", "tokens/char", "chars/context", "tax", "pieces",
    "switched", "mistaken",
)  # fmt: skip


def languages_table(report: LanguageReport) -> str:
    """The report for people."""
    rows = [_HEAD, *(_cells(row) for row in report.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.append(
        f"context {report.context} tokens; tax relative to {report.reference or 'nothing'}"
    )
    return "\n".join(lines)


def _cells(row: LanguageRow) -> tuple[str, ...]:
    return (
        row.language,
        str(row.texts),
        f"{row.bits_per_byte:.4f}",
        f"{row.bits_per_character:.4f}",
        f"{row.tokens_per_character:.4f}",
        f"{row.context_characters:.0f}",
        "" if row.tax is None else f"{row.tax:.2f}",
        str(row.pieces or ""),
        "" if row.switched is None else f"{row.switched:.3f}",
        "" if row.mistaken is None else f"{row.mistaken:.3f}",
    )
