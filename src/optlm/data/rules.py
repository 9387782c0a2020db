"""Filters in the manner of Gopher and C4: each rule one measure with one limit.

Sources: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training
Gopher", appendix A.1.1; Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer", section 2.2. Both were made for English web pages.

C4's removal of repeated three-sentence spans and its language detection are not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isfinite

from optlm.data.repetition import duplicate_ngrams, duplicates, top_ngram
from optlm.data.words import Words, words_of
from optlm.errors import ConfigError, did_you_mean

__all__ = ["GROUPS", "RULES", "Document", "Rule", "blocklist_rule", "choose_rules"]

_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_LETTER = re.compile(r"[^\W\d_]")
_BULLET = re.compile(r"\s*[•‣▪●◦*\-–]\s")  # noqa: RUF001 - the dash is one of the bullets
_ELLIPSIS = ("...", "…")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")  # noqa: RUF001 - quotation marks


class Document:
    """A text, and what several rules need of it, computed when first asked for."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def tokens(self) -> list[str]:
        """Runs between blanks, which Gopher and C4 call words."""
        return self.text.split()

    @cached_property
    def bare_words(self) -> set[str]:
        """The same in lower case, without punctuation around them."""
        return {token.strip(".,;:!?\"'()[]“”‘’*_-") for token in self.text.lower().split()}  # noqa: RUF001

    @cached_property
    def lines(self) -> list[str]:
        """Lines that hold something, without the blanks around them."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        pieces = re.split(r"\n\s*\n", self.text)
        return [piece.strip() for piece in pieces if piece.strip()]

    @cached_property
    def words(self) -> Words:
        """For repetition, overlap and duplicates."""
        return words_of(self.text)

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        return duplicates(self.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        return duplicates(self.paragraphs)

    def share_of_lines(self, wanted: Callable[[str], object]) -> float:
        return sum(1 for line in self.lines if wanted(line)) / max(1, len(self.lines))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A document stays if its measure is at least (or at most) the limit."""

    name: str
    measure: Callable[[Document], float]
    limit: float
    at_least: bool = False

    def value_if_broken(self, document: Document) -> float | None:
        """The measure of a document that must go, None for one that stays."""
        value = self.measure(document)
        stays = value >= self.limit if self.at_least else value <= self.limit
        return None if stays else value


def _mean_length(document: Document) -> float:
    return sum(map(len, document.tokens)) / max(1, len(document.tokens))


def _symbols(document: Document) -> float:
    """The larger of hash signs and ellipses, to the words."""
    ellipses = sum(map(document.text.count, _ELLIPSIS))
    return max(document.text.count("#"), ellipses) / max(1, len(document.tokens))


def _alphabetic(document: Document) -> float:
    with_letter = sum(1 for token in document.tokens if _LETTER.search(token))
    return with_letter / max(1, len(document.tokens))


def _ngram_rules() -> Iterable[Rule]:
    for n, limit in {2: 0.20, 3: 0.18, 4: 0.16}.items():
        yield Rule(
            name=f"gopher-top-{n}-gram",
            measure=lambda document, n=n: top_ngram(document.words, n),  # type: ignore[misc]
            limit=limit,
        )
    for n, limit in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items():
        yield Rule(
            name=f"gopher-duplicate-{n}-grams",
            measure=lambda document, n=n: duplicate_ngrams(document.words, n),  # type: ignore[misc]
            limit=limit,
        )


_GOPHER = (
    Rule(name="gopher-words-min", measure=lambda d: len(d.tokens), limit=50, at_least=True),
    Rule(name="gopher-words-max", measure=lambda d: len(d.tokens), limit=100_000),
    Rule(name="gopher-word-length-min", measure=_mean_length, limit=3, at_least=True),
    Rule(name="gopher-word-length-max", measure=_mean_length, limit=10),
    Rule(name="gopher-symbols", measure=_symbols, limit=0.1),
    Rule(
        name="gopher-bullets",
        measure=lambda d: d.share_of_lines(_BULLET.match),
        limit=0.9,
    ),
    Rule(
        name="gopher-ellipses",
        measure=lambda d: d.share_of_lines(lambda line: line.endswith(_ELLIPSIS)),
        limit=0.3,
    ),
    Rule(name="gopher-alphabetic", measure=_alphabetic, limit=0.8, at_least=True),
    Rule(
        name="gopher-stop-words",
        measure=lambda d: len(_STOP_WORDS & d.bare_words),
        limit=2,
        at_least=True,
    ),
    Rule(name="gopher-duplicate-lines", measure=lambda d: d.duplicate_lines[0], limit=0.3),
    Rule(
        name="gopher-duplicate-paragraphs", measure=lambda d: d.duplicate_paragraphs[0], limit=0.3
    ),
    Rule(name="gopher-duplicate-line-chars", measure=lambda d: d.duplicate_lines[1], limit=0.2),
    Rule(
        name="gopher-duplicate-paragraph-chars",
        measure=lambda d: d.duplicate_paragraphs[1],
        limit=0.2,
    ),
    *_ngram_rules(),
)
_C4 = (
    Rule(
        name="c4-sentences",
        measure=lambda d: len(_SENTENCE_END.findall(d.text)),
        limit=3,
        at_least=True,
    ),
    Rule(name="c4-curly-brackets", measure=lambda d: d.text.count("{"), limit=0),
    Rule(name="c4-lorem-ipsum", measure=lambda d: d.text.lower().count("lorem ipsum"), limit=0),
)
RULES = {rule.name: rule for rule in (*_GOPHER, *_C4)}
GROUPS = {
    "gopher": tuple(rule.name for rule in _GOPHER),
    "c4": tuple(rule.name for rule in _C4),
    "none": (),
}


def choose_rules(
    wanted: Iterable[str], *, without: Iterable[str] = (), limits: Mapping[str, float] | None = None
) -> tuple[Rule, ...]:
    """The rules of the given names and groups in their fixed order, some with other limits.

    Raises:
        ConfigError: a name is unknown, a limit is for a rule that was not chosen, or no number.
    """
    names = {member for name in wanted for member in GROUPS.get(name, (name,))}
    limits = limits or {}
    without = set(without)
    _check_names(names | without | limits.keys(), [*RULES, *GROUPS])
    for name, limit in limits.items():
        if name not in names - without:
            raise ConfigError(f"there is a limit for {name}, which is not among the chosen rules")
        if not isfinite(limit):
            raise ConfigError(f"the limit of {name} is {limit}; it must be a number")
    return tuple(
        replace(rule, limit=limits.get(rule.name, rule.limit))
        for rule in RULES.values()
        if rule.name in names - without
    )


def _check_names(names: Collection[str], known: list[str]) -> None:
    for name in sorted(names):
        if name not in known:
            raise ConfigError(
                f"there is no rule {name!r}{did_you_mean(name, known)}; all: {', '.join(known)}"
            )


def blocklist_rule(entries: Iterable[str]) -> Rule:
    """C4's removal of pages with a word of a list, which the user brings: no hit is allowed."""
    cleaned = {entry.strip().lower() for entry in entries} - {""}
    if not cleaned:
        raise ConfigError("the blocklist holds no entry; it takes one word or phrase a line")
    words = frozenset(entry for entry in cleaned if len(entry.split()) == 1)
    return Rule(
        name="c4-blocklist", measure=partial(_hits, words, sorted(cleaned - words)), limit=0
    )


def _hits(words: frozenset[str], phrases: list[str], document: Document) -> float:
    text = " ".join(document.text.lower().split()) if phrases else ""
    found = sum(1 for p in phrases if re.search(rf"(?<!\w){re.escape(p)}(?!\w)", text))
    return len(words & document.bare_words) + found
