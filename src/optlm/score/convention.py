"""`Convention`: every choice that turns a text into a log-probability, under one name.

Tools disagree by whole units of perplexity without a word: whether each window begins with the
start token, how far windows overlap, what is averaged, where a word begins. A convention names all
of it, is printed with every result, and reproduces one tool each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from optlm.errors import RequestError, did_you_mean

__all__ = ["CONVENTIONS", "Average", "Convention", "Plan", "as_convention"]

Plan = Literal["overlap", "sliding", "rolling", "disjoint", "single"]
Average = Literal["tokens", "windows", "sliding"]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How texts are cut, what is scored, and what is averaged.

    Attributes:
        name: shown with results.
        plan: how a text is cut into windows; `optlm.score.windows` has the functions.
        window: most tokens the model reads at once; None is its context.
        stride: new tokens of each window after the first; None is half the window for "overlap",
            512 for "sliding"; the other plans have none.
        average: what a text's perplexity is the exponential of: the mean over "tokens", the mean
            of the means of "windows", or the "sliding" mean of the transformers documentation,
            which counts one token too few in each window.
        one_start: whether a text that itself begins with the start token gets no second one.
        separator: put between a context and its continuation.
        border: the scored tokens of a continuation are those after the tokens that the context
            alone has in "common" with the whole; those after as many tokens as the context has
            ("length"); or the same after the tokens of the context itself, once the "spaces" at
            its end were given to the continuation.
        truncates: whether a context too long for the model loses its oldest tokens; else an error.
        corrects_words: whether the log-probability of a word is conditioned on the word before
            having ended (Pimentel & Meister 2024, arXiv 2406.14561, theorem 2; Oh & Schuler 2024,
            arXiv 2406.10851).
        word_marks: tokens that begin a new word begin with any "whitespace", or with a "space".
        end_ends_words: whether the end token, too, ends a word.
    """

    name: str
    plan: Plan
    window: int | None = None
    stride: int | None = None
    average: Average = "tokens"
    one_start: bool = True
    separator: str = ""
    border: Literal["common", "length", "spaces"] = "common"
    truncates: bool = False
    corrects_words: bool = True
    word_marks: Literal["whitespace", "space"] = "whitespace"
    end_ends_words: bool = True

    def __post_init__(self) -> None:
        if self.plan not in get_args(Plan):
            raise RequestError(f"plan is {self.plan!r}; use one of {', '.join(get_args(Plan))}")
        for name, least in (("window", 2), ("stride", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RequestError(f"{name} is {value!r}; it must be a whole number from {least}")
        if self.stride is not None and self.plan not in ("overlap", "sliding"):
            raise RequestError(
                f"convention {self.name!r} has no stride; leave it out, or use the convention "
                "optlm or transformers"
            )

    def resolved(self, context: int) -> Convention:
        """The same with window and stride as numbers, for a model of this context.

        Raises:
            RequestError: a window beyond the context, or a stride that leaves tokens out.
        """
        window = context if self.window is None else self.window
        if window > context:
            raise RequestError(f"window is {window}; the model's context holds {context} tokens")
        stride = self.stride
        if stride is None and self.plan == "overlap":
            stride = max(window // 2, 1)
        if stride is None and self.plan == "sliding":
            stride = min(512, window)
        most = window - 1 if self.plan == "overlap" else window
        if stride is not None and stride > most:
            raise RequestError(
                f"stride is {stride}; with a window of {window} tokens at most {most} leaves no "
                "token out"
            )
        return replace(self, window=window, stride=stride)

    def told(self) -> dict[str, Any]:
        """What is printed with every result."""
        return {
            "convention": self.name,
            "windows": _PLANS[self.plan],
            "window": self.window,
            "stride": self.stride,
            "perplexity": _AVERAGES[self.average],
            "words": (
                f"conditioned on the end of the word before (tokens that begin with {self._marks})"
                if self.corrects_words
                else "sums over their tokens, not corrected"
            ),
            "logarithm": "natural (nats)",
        }

    @property
    def _marks(self) -> str:
        return self.word_marks + (", or the end token" if self.end_ends_words else "")


_PLANS = {
    "overlap": "start token first in every window and never scored; every other token is scored "
    "once; the end token is not added",
    "sliding": "start token first in the first window only and never scored; windows advance by "
    "the stride; the end token is not added",
    "rolling": "a start token before the text, and the one that the tokenizer adds is scored; "
    "windows meet and do not overlap, but the last is full; the end token is not added",
    "disjoint": "start token first in the first window only; windows do not overlap, the first "
    "token of each is not scored, an incomplete last window is dropped",
    "single": "start token first and never scored; one window, longer texts are refused; the end "
    "token is not added",
}
_AVERAGES = {
    "tokens": "exp of the mean over scored tokens",
    "windows": "exp of the mean of the windows' means",
    "sliding": "exp of the mean of the windows' means, weighted by scored tokens - 1",
}

CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(name="optlm", plan="overlap"),
        Convention(
            name="lm-eval", plan="rolling", truncates=True, border="spaces", corrects_words=False
        ),
        Convention(
            name="transformers",
            plan="sliding",
            average="sliding",
            one_start=False,
            border="length",
            corrects_words=False,
        ),
        Convention(
            name="minicons",
            plan="single",
            one_start=False,
            separator=" ",
            border="length",
            corrects_words=False,
            word_marks="space",
            end_ends_words=False,
        ),
        Convention(
            name="gptq",
            plan="disjoint",
            average="windows",
            one_start=False,
            border="length",
            corrects_words=False,
        ),
    )
}


def as_convention(
    convention: str | Convention,
    *,
    window: int | None = None,
    stride: int | None = None,
    corrects_words: bool | None = None,
) -> Convention:
    """A convention by name or as it is, with what was given changed.

    Raises:
        RequestError: no such name, or a change that it has no room for.
    """
    if isinstance(convention, str):
        if convention not in CONVENTIONS:
            raise RequestError(
                f"there is no convention {convention!r}; use one of {', '.join(CONVENTIONS)}"
                f"{did_you_mean(convention, CONVENTIONS)}"
            )
        convention = CONVENTIONS[convention]
    changes: dict[str, Any] = {"window": window, "stride": stride, "corrects_words": corrects_words}
    return replace(convention, **{k: v for k, v in changes.items() if v is not None})
