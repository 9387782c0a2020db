"""What a model will really see of text files: tokens, labels, and what is wrong with them.

A text becomes the start token, its tokens and the end token, all predicted but the first; one that
is longer than the length goes on in the next piece. A prompt with its response becomes one row of
which the response and the end token are predicted; if it is too long, the prompt loses its
beginning. What looks like a special token in a text is text. The tokens and labels come from the
function that fine-tuning itself uses, so that the two cannot disagree.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optlm.data.dedup import DuplicateIndex
from optlm.data.inputs import InputFile
from optlm.data.lines import Progress
from optlm.data.overlap import HeldOut
from optlm.data.records import PAIR, Record, read_records
from optlm.data.report import CorpusError, ReadReport
from optlm.data.words import words_of
from optlm.errors import ConfigError
from optlm.tokenizer import Tokenizer
from optlm.train.finetune.examples import Example, whole_example

__all__ = ["PROBLEMS", "lint"]

_NEAR = 0.8
_KEPT_PLACES = 5

# What `lint` counts with places, and what it means.
PROBLEMS = {
    "split": "texts longer than the length, read in pieces",
    "truncated": "prompts that lose their beginning, to fit with their response",
    "too_long": "responses that do not fit alone; training refuses them",
    "both": "records of a text and a prompt or response; fine-tuning leaves them out",
    "masked": "rows without a response: nothing but the end token is learned",
    "prompt_fills": "prompts that fill the length alone; a trainer that cuts at the end masks all",
    "start_missing": "rows that do not begin with the start token",
    "doubled": "rows with an end token inside",
    "written": "texts that spell out a special token, which is read as letters",
    "exact_duplicates": "texts that equal an earlier one",
    "near_duplicates": f"texts that share {_NEAR:.0%} of their 5-grams with an earlier one",
}
HARMLESS = ("split",)


def lint(
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    *,
    length: int,
    held_out: Sequence[InputFile] = (),
    shown: int = 2,
    split: str = "file",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read `files` as training would, and report.

    Args:
        length: tokens of a row that the model reads at once.
        held_out: evaluation files, with which no overlap is wanted.
        shown: how many of the first records appear in the report token by token.

    Returns:
        ``texts``, ``pairs``, ``broken``, ``tokens``, ``predicted``, ``longest``, ``over_length``
        (share of records), ``histogram`` (tokens up to -> records), ``problems`` (name -> count and
        places), ``held_out``, ``examples``.

    Raises:
        ConfigError: `length` is below 1.
        CorpusError: a file is missing or damaged, or holds nothing usable.
    """
    if length < 1:
        raise ConfigError(f"the length is {length}; it must be at least 1")
    checks = HeldOut(held_out) if held_out else None
    seen = _Seen(tokenizer, length, shown)
    read = ReadReport()
    with (
        tempfile.TemporaryDirectory(prefix="optlm-lint-") as folder,
        DuplicateIndex(Path(folder), threshold=_NEAR) as index,
    ):
        for record in read_records(files, read, split=split, progress=progress):
            words = words_of(record.text)
            index.add(record.text, words)
            if checks is not None:
                checks.count(words, record.place)
            seen.take(record)
        for found in index.find():
            kind = "exact_duplicates" if found.exact else "near_duplicates"
            seen.note(kind, f"record {found.document + 1} like {found.of + 1}")
    if not seen.texts + seen.pairs:
        names = ", ".join(str(file.path) for file in files)
        raise CorpusError(
            f"{names}: no usable record ({read.broken} broken: {'; '.join(read.examples)})"
        )
    overlaps = checks.report() if checks else []
    return {
        **seen.report(),
        "broken": {"count": read.broken, "places": read.examples},
        "held_out": overlaps,
    }


class _Seen:
    """Counts of what was seen."""

    def __init__(self, tokenizer: Tokenizer, length: int, shown: int) -> None:
        self._tokenizer, self._length, self._shown = tokenizer, length, shown
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        self._spelled = {tokenizer.token_text(i) for i in ids} - {""}
        self.texts = self.pairs = 0
        self._tokens = self._predicted = self._longest = self._over = 0
        self._histogram: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        self._places: dict[str, list[str]] = {name: [] for name in PROBLEMS}
        self._examples: list[dict[str, Any]] = []

    def note(self, problem: str, place: str) -> None:
        self._counts[problem] += 1
        if len(self._places[problem]) < _KEPT_PLACES:
            self._places[problem].append(place)

    def take(self, record: Record) -> None:
        row = whole_example(record.fields, self._tokenizer, record.place)
        self.pairs += record.is_pair
        self.texts += not record.is_pair
        self._tokens += len(row.tokens)
        self._predicted += row.predicted
        self._longest = max(self._longest, len(row.tokens))
        self._histogram[1 << (len(row.tokens) - 1).bit_length()] += 1
        for problem in self._problems(record, row):
            self.note(problem, record.place)
        if len(self._examples) < self._shown:
            self._examples.append({"place": record.place, "tokens": self._table(row)})

    def _problems(self, record: Record, row: Example) -> list[str]:
        end = self._tokenizer.eos_id
        over = row.length > self._length
        self._over += over
        response = row.predicted  # with the end token
        fits = response <= self._length
        inside = row.tokens[1:-1]
        found = {
            "split": over and not record.is_pair,
            "truncated": over and record.is_pair and fits,
            "too_long": over and record.is_pair and not fits,
            "both": not record.is_pair and any(name in record.fields for name in PAIR),
            "masked": record.is_pair and response == 1,
            "prompt_fills": record.is_pair and row.first > self._length,
            "start_missing": row.tokens[0] != self._tokenizer.bos_id,
            "doubled": end in inside,
            "written": any(spelled in record.text for spelled in self._spelled),
        }
        return [name for name, is_so in found.items() if is_so]

    def _table(self, row: Example) -> list[dict[str, Any]]:
        return [
            {"id": token, "token": self._tokenizer.token_text(token), "label": place >= row.first}
            for place, token in enumerate(row.tokens)
        ]

    def report(self) -> dict[str, Any]:
        return {
            "texts": self.texts,
            "pairs": self.pairs,
            "length": self._length,
            "tokens": self._tokens,
            "predicted": self._predicted,
            "longest": self._longest,
            "over_length": self._over / (self.texts + self.pairs),
            "histogram": dict(sorted(self._histogram.items())),
            "problems": {
                name: {"count": self._counts[name], "places": self._places[name]}
                for name in PROBLEMS
            },
            "examples": self._examples,
        }
