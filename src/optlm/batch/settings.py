"""`BatchSettings`: what decides the output of a job beside its input, written into the journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from optlm import __version__
from optlm.batch.inputs import InputSummary
from optlm.engine.params import SamplingParams
from optlm.errors import RequestError, did_you_mean

__all__ = ["BatchSettings", "RowFormat", "describe_job", "differences", "row_seed"]

RowFormat = Literal["auto", "plain", "openai"]


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """How to read rows and what to do with them.

    Attributes:
        row_format: "plain" prompts, "openai" requests, or "auto": what the first row is.
        model_name: what requests may call the model.
        prompt_field: where a plain row that is an object has its prompt.
        keep: fields of plain rows that are copied into the output, under ``input``.
        sampling: values of `SamplingParams` for plain rows; a row's ``params`` go before them.
        chat_template: the text of a Jinja template for chats; None writes them out plainly.
        seed: from it and the number of the row comes the seed of every row that names none.

    Raises:
        RequestError: a value that makes no sense.
    """

    row_format: RowFormat = "auto"
    model_name: str = "optlm"
    prompt_field: str = "prompt"
    keep: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = get_args(RowFormat)
        if self.row_format not in known:
            raise RequestError(
                f"the row format {self.row_format!r:.80} is unknown; use one of {', '.join(known)}"
                f"{did_you_mean(self.row_format, known)}"
            )
        SamplingParams(**{**self.sampling, "seed": self.seed})  # refuses what is out of range
        if not self.prompt_field:
            raise RequestError("the name of the prompt field is empty")
        if "seed" in self.sampling:
            raise RequestError("the seed of a job is a setting of its own, not of the sampling")

    def params(self) -> SamplingParams:
        return SamplingParams(**self.sampling)

    def resolved(self, find_format: Callable[[], Literal["plain", "openai"]]) -> BatchSettings:
        """The same with a format in place of "auto".

        Raises:
            RequestError: the rows are requests, and settings for plain rows were given.
        """
        found = find_format() if self.row_format == "auto" else self.row_format
        plain = {
            "sampling": self.sampling,
            "keep": self.keep,
            "prompt_field": self.prompt_field != "prompt",
        }
        if self.chat_template is not None and found == "plain":
            raise RequestError("a chat template is for requests, and the rows are plain prompts")
        for name, given in plain.items():
            if given and found == "openai":
                raise RequestError(
                    f"the rows are requests in OpenAI's format, which say all by themselves; "
                    f"{name.replace('_', ' ')} is for plain rows"
                )
        return replace(self, row_format=found)

    @property
    def columns(self) -> tuple[str, ...]:
        """Fields of a row that are looked at; the first must be there."""
        if self.row_format == "openai":
            return ("custom_id", "method", "url", "body")
        return (self.prompt_field, "params", *self.keep)

    def to_dict(self) -> dict[str, Any]:
        """As the journal has it: with the defaults of today, so that others are noticed."""
        return {
            "row_format": self.row_format,
            "model_name": self.model_name,
            "prompt_field": self.prompt_field,
            "keep": list(self.keep),
            "chat_template": self.chat_template,
            "seed": self.seed,
            "sampling": asdict(self.params()),
        }


def row_seed(seed: int, row: int) -> int:
    """The seed of a row: 53 bits, which every reader of JSON keeps."""
    text = f"{seed} {row}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 11


def describe_job(
    settings: BatchSettings, summary: InputSummary, engine: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be equal for a job to go on."""
    return {
        "optlm": __version__,
        "input": asdict(summary),
        "settings": settings.to_dict(),
        "engine": dict(engine),
    }


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs, such as "settings.seed was 1 and is 2"."""
    old, new = dict(_leaves(was)), dict(_leaves(now))
    return [
        f"{name} was {_brief(old.get(name))} and is {_brief(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _brief(value: object) -> str:
    text = f"{value!r}"
    return text if len(text) <= 60 else text[:12] + "..."
