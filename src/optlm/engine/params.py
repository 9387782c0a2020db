"""`SamplingParams`: everything a request may ask of the generator, checked once on construction."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from optlm.engine.adapters import check_adapter_name
from optlm.errors import RequestError, did_you_mean

__all__ = ["ALL_LOGPROBS", "SamplingParams", "check_priority"]

ALL_LOGPROBS = -1  # `logprobs` and `prompt_logprobs`: the whole vocabulary

_MAX_SAMPLES = 1024
_MAX_TOKENS = 2**31 - 1
_MAX_STOPS = 1024
_MAX_STOP_CHARACTERS = 4096
_MAX_BIASES = 65536
_OVERFLOW = ("error", "truncate_left")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    The log-probabilities of a step are made from the model's logits in this order
    (`optlm.engine.sampling`):

    1. `logit_bias` is added;
    2. while there are fewer than `min_tokens` tokens, those that would stop are removed;
    3. `repetition_penalty`;
    4. `frequency_penalty` and `presence_penalty`, then `utf8`;
    5. with temperature 0 the largest logit wins (ties: lowest id); else division by `temperature`;
    6. `min_p`, 7. `top_k`, 8. `top_p`, each on the renormalised rest;
    9. one draw.

    Attributes:
        temperature: 0 is greedy; at least 1e-2 otherwise.
        top_k: keep this many tokens (ties: lowest ids); 0 keeps all. In contrastive search: the
            candidates.
        top_p: keep the smallest set of most likely tokens (ties: lowest ids) with at least this
            probability.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: positive logits of tokens in prompt or output are divided by it, others
            multiplied (CTRL, arXiv 1909.05858, section 4.1).
        presence_penalty: subtracted from the logit of every token in the output.
        frequency_penalty: subtracted once for every time the token is in the output.
        logit_bias: added to the logits, by token id.
        stop: strings that end the text; they are not part of it unless `include_stop`.
        stop_token_ids: tokens that end the text. They stay in `token_ids`; their text shows with
            `include_stop`.
        include_stop: leave the stop string, or the text of the stop token, in the text.
        min_tokens: neither `</s>` nor stop ids nor stop strings end the text before this many
            tokens.
        max_tokens: most tokens to generate; 0 only reads the prompt (for `prompt_logprobs`).
        ignore_eos: `</s>` does not end the text.
        utf8: never break a character nor stop inside one: tokens whose bytes are no UTF-8 behind
            those before them are removed, and those that open a character which the tokens left
            cannot close. The output is whole characters, whatever the prompt ends with.
        n: number of outputs.
        best_of: samples to draw, of which the `n` with the highest mean log-probability a token are
            returned.
        seed: key of the random numbers; drawn and recorded in the output when None. The numbers
            depend on seed, sample index and position only, never on what else runs.
        logprobs: report this many top tokens a position with the chosen one; -1 or "all" for the
            vocabulary. They are the model's own log-probabilities, before every step above.
        prompt_logprobs: the same for the tokens of the prompt.
        beam_width: beam search with this many beams; needs temperature 0.
        length_penalty: beam scores are the sum of log-probabilities over length to this power.
        penalty_alpha: contrastive search (Su et al. 2022, arXiv 2202.06417) with `top_k`
            candidates; needs temperature 0.
        adapter: name of a loaded adapter (`LLM.load_adapter`); None for the model as it is.
        on_overflow: a prompt beyond the context is an "error", or loses its oldest tokens
            ("truncate_left").

    Raises:
        RequestError: a value of the wrong type, out of range, or in contradiction with another.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    min_tokens: int = 0
    max_tokens: int = 128
    ignore_eos: bool = False
    utf8: bool = False
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    logprobs: int | Literal["all"] | None = None
    prompt_logprobs: int | Literal["all"] | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    penalty_alpha: float | None = None
    adapter: str | None = None
    on_overflow: Literal["error", "truncate_left"] = "error"

    def __new__(cls, **values: Any) -> SamplingParams:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(
                    f"unknown sampling parameter {name!r}{did_you_mean(name, known)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, low, high in _FLOATS:
            self._set(name, _real(name, getattr(self, name), low, high))
        for name, low, high in _INTS:
            self._set(name, _whole(name, getattr(self, name), low, high))
        for name in ("ignore_eos", "include_stop", "utf8"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"{name} must be True or False, not {_brief(getattr(self, name))}"
                )
        if 0 < self.temperature < 0.01:
            raise RequestError(
                f"temperature is {self.temperature}; use 0 (greedy) or at least 0.01"
            )
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be above 0")
        if not isinstance(self.on_overflow, str) or self.on_overflow not in _OVERFLOW:
            raise RequestError(
                f"on_overflow is {_brief(self.on_overflow)}; "
                f"it must be one of {', '.join(_OVERFLOW)}"
            )
        self._set("stop", _stops(self.stop))
        self._set("stop_token_ids", _ids(self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        self._set("logprobs", _count("logprobs", self.logprobs))
        self._set("prompt_logprobs", _count("prompt_logprobs", self.prompt_logprobs))
        self._check_optional()
        self._check_together()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_optional(self) -> None:
        if self.adapter is not None:
            check_adapter_name(self.adapter)
        if self.best_of is not None:
            self._set("best_of", _whole("best_of", self.best_of, 1, _MAX_SAMPLES))
        if self.seed is not None:
            self._set("seed", _whole("seed", self.seed, 0, 2**64 - 1))
        if self.beam_width is not None:
            self._set("beam_width", _whole("beam_width", self.beam_width, 1, 256))
        if self.penalty_alpha is not None:
            self._set("penalty_alpha", _real("penalty_alpha", self.penalty_alpha, 0.0, 1.0))

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of is {self.best_of}, less than n, which is {self.n}")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}"
            )
        if self.beam_width is not None and self.penalty_alpha is not None:
            raise RequestError("beam_width and penalty_alpha are two kinds of search; give one")
        if self.beam_width is not None:
            self._check_search("beam search (beam_width)", _PLAIN_FOR_BEAM)
            if self.n > self.beam_width:
                raise RequestError(
                    f"n is {self.n}, more than beam_width, which is {self.beam_width}"
                )
        if self.penalty_alpha is not None:
            self._check_search("contrastive search (penalty_alpha)", _PLAIN_FOR_CONTRASTIVE)
            if self.top_k < 2:
                raise RequestError(
                    f"contrastive search chooses among top_k candidates; top_k is {self.top_k}, "
                    "it must be at least 2 (4 to 8 is usual)"
                )

    def _check_search(self, what: str, plain: tuple[str, ...]) -> None:
        if self.temperature != 0:
            raise RequestError(
                f"{what} is not random; set temperature to 0 (it is {self.temperature})"
            )
        for field in dataclasses.fields(self):
            if field.name in plain and getattr(self, field.name) != field.default:
                raise RequestError(f"{what} does not combine with {field.name}")

    @property
    def num_samples(self) -> int:
        """Sequences to draw for one prompt."""
        return self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether any of steps 1 to 4 of the class's list does something."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.utf8
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids and counts that the model's vocabulary does not have."""
        biased = self.logit_bias or {}
        for name, ids in (("logit_bias", biased), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name} names token {token}; the vocabulary has ids 0 to {vocab_size - 1}"
                    )
        if self.min_tokens and len(set(self.stop_token_ids)) >= vocab_size - 1:
            raise RequestError(
                f"stop_token_ids leave no token to continue with, but min_tokens is "
                f"{self.min_tokens}"
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > vocab_size:
                raise RequestError(
                    f"{name} is {count}; the vocabulary has {vocab_size} tokens "
                    f'(use -1 or "all" for all of them)'
                )


_NOT_REAL = (bool, np.bool_, str, bytes)
# name, lowest, highest
_FLOATS = (
    ("temperature", 0.0, 1e4),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 1e4),
    ("presence_penalty", -1e4, 1e4),
    ("frequency_penalty", -1e4, 1e4),
    ("length_penalty", -1e3, 1e3),
)
_INTS = (
    ("top_k", 0, 2**24),
    ("min_tokens", 0, _MAX_TOKENS),
    ("max_tokens", 0, _MAX_TOKENS),
    ("n", 1, _MAX_SAMPLES),
)
_PLAIN_FOR_CONTRASTIVE = (
    "n", "best_of", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "min_tokens", "logprobs", "prompt_logprobs", "length_penalty", "utf8",
)  # fmt: skip
_PLAIN_FOR_BEAM = (
    "best_of", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "min_tokens", "logprobs", "prompt_logprobs", "stop",
    "utf8",
)  # fmt: skip


def check_priority(value: object) -> int:
    """Raises: RequestError: no whole number from -2**31 to 2**31 - 1."""
    return _whole("priority", value, -(2**31), 2**31 - 1)


def _brief(value: object) -> str:
    """The value for a message; Python refuses to spell numbers of thousands of digits."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return f"a huge {type(value).__name__}"


def _whole(name: str, value: object, low: int, high: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise RequestError(f"{name} must be a whole number, not {_brief(value)}")
    if not low <= number <= high:
        raise RequestError(f"{name} is {_brief(number)}; it must lie between {low} and {high}")
    return number


def _real(name: str, value: object, low: float, high: float) -> float:
    try:
        number = None if isinstance(value, _NOT_REAL) else float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise RequestError(f"{name} must be a number, not {_brief(value)}")
    if not (math.isfinite(number) and low <= number <= high):
        raise RequestError(f"{name} is {number}; it must lie between {low:g} and {high:g}")
    return number


def _count(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value == "all":
        return ALL_LOGPROBS
    return _whole(name, value, ALL_LOGPROBS, 2**24)


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) for s in stops):
        raise RequestError(f"stop must be a text or a list of texts, not {_brief(value)}")
    if len(stops) > _MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts; at most {_MAX_STOPS} are allowed")
    for text in stops:
        if not 0 < len(text) <= _MAX_STOP_CHARACTERS:
            raise RequestError(
                f"a stop text has {len(text)} characters; it needs 1 to {_MAX_STOP_CHARACTERS}"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(
                f"the stop text {text!r:.80} has a lone surrogate, which no text of a model has"
            )
    return tuple(dict.fromkeys(stops))


def _ids(value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise RequestError(f"stop_token_ids must be a list of token ids, not {_brief(value)}")
    if len(value) > _MAX_STOPS:
        raise RequestError(f"stop_token_ids has {len(value)} ids; at most {_MAX_STOPS} are allowed")
    return tuple(_whole("stop_token_ids", token, 0, 2**24) for token in value)


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, not {_brief(value)}")
    if len(value) > _MAX_BIASES:
        raise RequestError(
            f"logit_bias has {len(value)} entries; at most {_MAX_BIASES} are allowed"
        )
    return {
        _whole("a token id of logit_bias", token, 0, 2**24): _real("logit_bias", bias, -1e4, 1e4)
        for token, bias in value.items()
    } or None
