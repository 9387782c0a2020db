"""Fine-tuning data: plain texts, or prompts with responses, as token ids with what is predicted.

    {"text": "..."}                         every token counts, and the closing </s>
    {"prompt": "...", "response": "..."}    the response counts, and the closing </s>
    a .txt file                             one text

Files are those of `optlm data`: JSON Lines, text and Parquet, plain, ``.gz`` or ``.zst``.

OPT's start and end token are one, ``</s>``: at the start it is given, at the end it is learned, or
the model would never stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from optlm.data.inputs import find_inputs
from optlm.data.records import read_rows
from optlm.data.report import CorpusError, ReadReport
from optlm.errors import ConfigError, RequestError
from optlm.tokenizer import Tokenizer

__all__ = ["ON_LONG", "DataReport", "Example", "ExamplesError", "read_examples", "whole_example"]

ON_LONG = ("error", "truncate_prompt")
_LARGEST_TEXT = 2**23  # characters the tokenizer takes at once


class ExamplesError(RequestError):
    """Fine-tuning data that is missing, empty, masked or too long."""


@dataclass(frozen=True)
class Example:
    """Tokens of which those from index `first` on are predicted; `first` is at least 1."""

    tokens: list[int]
    first: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.first <= len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.tokens) - 1

    @property
    def predicted(self) -> int:
        return len(self.tokens) - self.first


@dataclass
class DataReport(ReadReport):
    """What became of the lines of a file."""

    texts: int = 0
    pairs: int = 0
    pieces: int = 0  # examples that texts were split into
    truncated: int = 0  # prompts that lost their beginning

    def summary(self) -> str:
        told = f"{self.texts} texts, {self.pairs} pairs"
        if self.pieces > self.texts:
            told += f"; long texts were split, {self.pieces} pieces in all"
        if self.truncated:
            told += f"; {self.truncated} prompts lost their beginning"
        if self.broken:
            told += f"; left out {self.broken} broken lines ({'; '.join(self.examples)})"
        return told


def read_examples(
    path: Path, tokenizer: Tokenizer, *, length: int, on_long: str = "error"
) -> tuple[list[Example], DataReport]:
    """Read a file of JSON Lines, text or Parquet.

    Texts of more than `length` tokens are split into pieces that share one token, so every token is
    predicted once. A response is never cut.

    Args:
        length: tokens the model may read at once.
        on_long: pairs beyond that are an "error", or "truncate_prompt": the prompt loses its
            beginning, behind the start token.

    Raises:
        ConfigError: an unknown policy, or a file whose ending tells no format.
        ExamplesError: the file is missing, damaged or without a usable line, or a pair is too
            long.
    """
    if on_long not in ON_LONG:
        raise ConfigError(f"on_long is {on_long!r}; it must be one of {', '.join(ON_LONG)}")
    report = DataReport()
    examples: list[Example] = []
    for place, record in _records(path, report):
        whole = whole_example(record, tokenizer, place)
        if "text" in record:
            pieces = _split(whole, length)
            report.texts += 1
            report.pieces += len(pieces)
            examples += pieces
        else:
            examples.append(_fitted(whole, tokenizer, length, on_long, place, report))
            report.pairs += 1
    if not examples:
        raise ExamplesError(
            f"{path} holds no usable example ({report.broken} broken lines"
            f"{': ' if report.examples else ''}{'; '.join(report.examples)}); a line is "
            '{"text": ...} or {"prompt": ..., "response": ...}'
        )
    return examples, report


# ---- reading -------------------------------------------------------------------------------------


def _records(path: Path, report: DataReport) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        (file,) = find_inputs([str(path)])
        if file.format == "text":
            report.max_broken = 0  # it is one text: without a line it would have a hole
        for place, row in read_rows([file], report):
            try:
                record = _checked(row)
            except ValueError as error:
                report.add_broken(place, str(error)[:200])
            else:
                yield place, record
    except CorpusError as error:
        raise ExamplesError(str(error)) from error


def _checked(record: object) -> dict[str, str]:
    """The record, if it is a text or a pair.

    Raises:
        ValueError: it is neither, or something in it is empty.
    """
    if not isinstance(record, dict):
        raise ValueError(f"holds a {type(record).__name__}, not an object")
    wanted = {"text"} if "text" in record else {"prompt", "response"}
    both = "text" in record and wanted | {"prompt", "response"} & record.keys() != wanted
    if both or not wanted <= record.keys():
        raise ValueError('an example has "text", or "prompt" and "response"')
    for name in wanted:
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is a {type(record[name]).__name__}, not a text")
        if not record[name] and name != "prompt":
            raise ValueError(f"the {name} is empty")
        record[name].encode("utf-8")  # lone surrogates are no text
    return record


# ---- tokens --------------------------------------------------------------------------------------


def _encode(tokenizer: Tokenizer, text: str, place: str, *, more: bool = False) -> list[int]:
    """Token ids; what looks like a special token is text. `more`: it follows another text."""
    if len(text) > _LARGEST_TEXT:
        raise ExamplesError(f"{place}: a text has {len(text)} characters; at most {_LARGEST_TEXT}")
    if more:
        return tokenizer.encode(text, add_bos=False, parse_special=False)
    return tokenizer.encode(text, parse_special=False)


def whole_example(record: Mapping[str, str], tokenizer: Tokenizer, place: str) -> Example:
    """A text, or a prompt with its response, as it is before anything is cut to a length.

    Raises:
        ExamplesError: a text that is too long for the tokenizer; `place` is named.
    """
    if "text" in record:
        return Example([*_encode(tokenizer, record["text"], place), tokenizer.eos_id])
    prompt = _encode(tokenizer, record["prompt"], place) or [tokenizer.bos_id]
    response = [*_encode(tokenizer, record["response"], place, more=True), tokenizer.eos_id]
    return Example(prompt + response, first=len(prompt))


def _split(whole: Example, length: int) -> list[Example]:
    starts = range(0, whole.length, length)
    return [Example(whole.tokens[start : start + length + 1]) for start in starts]


def _fitted(
    whole: Example,
    tokenizer: Tokenizer,
    length: int,
    on_long: str,
    place: str,
    report: DataReport,
) -> Example:
    prompt, response = whole.tokens[: whole.first], whole.tokens[whole.first :]
    excess = whole.length - length
    if excess > 0:
        kept = 1 if tokenizer.adds_bos else 0
        if on_long == "error" or excess > len(prompt) - max(1, kept):
            raise ExamplesError(
                f"{place}: prompt and response have {len(prompt)} + {len(response)} tokens; at "
                f"most {length + 1} fit and a response is never cut. Raise seq_len, "
                "shorten the line, or use truncate_prompt if the response alone fits"
            )
        prompt = prompt[:kept] + prompt[kept + excess :]
        report.truncated += 1
    return Example(prompt + response, first=len(prompt))
