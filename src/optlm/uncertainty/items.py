"""Questions whose right answers are known, from JSON Lines.

| a line | what is asked |
|---|---|
| `{"good": ..., "bad": ...}` | which of two sentences is likelier (minimal pairs) |
| `{"prompt": ..., "choices": [...], "gold": 0}` | which choice follows |
| `{"prompt": ..., "answers": [...]}` | what follows, written by the model; any answer counts |

``question`` in place of ``prompt`` is put as "Question: ... Answer:" on two lines, ``context`` is a
prompt as it is. Other fields are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.data.inputs import find_inputs
from optlm.data.lines import read_lines
from optlm.errors import RequestError

__all__ = ["Item", "read_items", "read_texts"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: with `choices` and the index of the right one, or with `answers`."""

    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.choices) == bool(self.answers):
            raise RequestError("an item has either choices or answers")
        if self.choices and not (len(self.choices) > 1 and all(self.choices)):
            raise RequestError("an item needs at least 2 choices, none of them empty")
        if self.choices and not 0 <= self.gold < len(self.choices):
            raise RequestError(f"gold is {self.gold}; there are {len(self.choices)} choices")
        if self.answers and not (self.prompt and all(self.answers)):
            raise RequestError("an item with answers needs a prompt, and no answer may be empty")


def read_items(path: Path, *, limit: int | None = None) -> list[Item]:
    """Items of a file (.jsonl, also .gz and .zst), all of one kind.

    Args:
        limit: only the first so many.

    Raises:
        RequestError: a line that is no item, items of two kinds, or none.
        CorpusError: the file cannot be read.
    """
    items: list[Item] = []
    for number, line in enumerate(_lines(path), start=1):
        if limit is not None and len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line)))
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, error) from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path.name}:{number} is no item: {error}") from error
    if not items:
        raise RequestError(f"{path} holds no item, so there are no labels to compare with")
    if len({bool(item.choices) for item in items}) > 1:
        raise RequestError(f"{path} mixes items with choices and items with answers; split it")
    return items


def read_texts(path: Path, *, limit: int | None = None) -> list[str]:
    """Texts of a file: the lines of plain text, or ``text`` of JSON Lines; empty ones left out.

    Raises:
        RequestError: a line without text, or none at all.
        CorpusError: the file cannot be read.
    """
    (source,) = find_inputs([str(path)])
    texts: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        if limit is not None and len(texts) == limit:
            break
        try:
            text = line.decode("utf-8") if source.format == "text" else json.loads(line)["text"]
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, error) from None
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise RequestError(f"{path.name}:{number} holds no text: {error!r:.100}") from error
        if not isinstance(text, str):
            raise RequestError(f"{path.name}:{number}: its text is a {type(text).__name__}")
        texts += [text] if text.strip() else []
    if not texts:
        raise RequestError(f"{path} holds no text")
    return texts


def _not_utf8(path: Path, number: int, error: UnicodeDecodeError) -> RequestError:
    return RequestError(f"{path.name}:{number} is not UTF-8 (byte {error.start} of the line)")


def _lines(path: Path) -> list[bytes]:
    path.stat()  # a missing file is told as such
    (source,) = find_inputs([str(path)])
    lines = []
    for line in read_lines(source.path, source.compression):
        if isinstance(line, int):
            raise RequestError(f"{path.name} has a line of {line} bytes")
        lines.append(line)
    return lines


def _item(values: Any) -> Item:
    if not isinstance(values, dict):
        raise RequestError(f"a line holds an object, not a {type(values).__name__}")
    if "good" in values:
        return Item(prompt="", choices=(_text(values, "good"), _text(values, "bad")))
    prompt = next(
        (
            form.format(_text(values, name))
            for name, form in (
                ("prompt", "{}"),
                ("context", "{}"),
                ("question", "Question: {}\nAnswer:"),
            )
            if name in values
        ),
        None,
    )
    if prompt is None:
        raise RequestError("it needs prompt, context or question (or good and bad)")
    if "choices" in values:
        gold = values.get("gold")
        if isinstance(gold, bool) or not isinstance(gold, int):
            raise RequestError(f"its label is missing: gold is {gold!r:.80}, not a whole number")
        return Item(prompt=prompt, choices=_texts(values, "choices", prompt), gold=gold)
    if "answers" in values:
        return Item(prompt=prompt, answers=_texts(values, "answers", ""))
    raise RequestError("its labels are missing: give choices and gold, or answers")


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {value!r:.80}; it must be a text")
    return value


def _texts(values: dict[str, Any], name: str, prompt: str) -> tuple[str, ...]:
    """Texts of a list; after a prompt that does not end in a blank they begin with one."""
    given = values[name]
    if not isinstance(given, list) or not given:
        raise RequestError(f"{name} is {given!r:.80}; it must be a list of texts")
    if not all(isinstance(each, str) and each for each in given):
        raise RequestError(f"{name} must hold texts that are not empty")
    blank = " " if prompt and not prompt[-1].isspace() else ""
    return tuple(each if each[0].isspace() else blank + each for each in given)
