"""The options of sampling, as `optlm generate` and `optlm batch` have them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optlm.cli.common import text_argument, usage_error

if TYPE_CHECKING:
    from optlm.engine.params import SamplingParams

# Flags, field of SamplingParams, how to read it, what it does (its default, declared there).
_SAMPLING = (
    ("--max-tokens", "max_tokens", int, "most tokens to generate (128)"),
    ("--min-tokens", "min_tokens", int, "fewest tokens to generate (0)"),
    ("--temperature", "temperature", float, "0 is greedy (1.0)"),
    ("--top-p", "top_p", float, "keep the likeliest tokens up to this probability (1.0)"),
    ("--top-k", "top_k", int, "keep this many tokens, 0 keeps all (0)"),
    ("--min-p", "min_p", float, "keep tokens this fraction as likely as the best (0.0)"),
    ("--seed", "seed", int, "the same seed gives the same text"),
    ("-n --n", "n", int, "texts for each prompt (1)"),
    ("--best-of", "best_of", int, "draw this many, keep the n likeliest"),
    ("--repetition-penalty", "repetition_penalty", float, "above 1, tokens seen get rarer (1.0)"),
    ("--presence-penalty", "presence_penalty", float, "subtracted from tokens generated (0.0)"),
    ("--frequency-penalty", "frequency_penalty", float, "the same for every occurrence (0.0)"),
    ("--beam", "beam_width", int, "beam search of this width"),
    ("--length-penalty", "length_penalty", float, "of beams; above 1 prefers long texts (1.0)"),
    ("--contrastive", "penalty_alpha", float, "contrastive search with this alpha, among --top-k"),
    ("--logprobs", "logprobs", int, "in JSON: log-probabilities of this many top tokens"),
    ("--on-overflow", "on_overflow", str, "long prompts: error or truncate_left (error)"),
)
_SWITCHES = {
    "include_stop": "show the stop string",
    "ignore_eos": "go on after the end token",
    "utf8": "whole characters only: tokens that would break one are left out",
}
_METAVARS = {int: "N", float: "X", str: "POLICY"}


def add_sampling_options(parser: ArgumentParser) -> None:
    """One option for every field of `SamplingParams` that a command line can hold."""
    group = parser.add_argument_group("sampling (defaults in parentheses)")
    for flags, field, kind, told in _SAMPLING:
        group.add_argument(
            *flags.split(), dest=field, type=kind, metavar=_METAVARS[kind], help=told
        )
    group.add_argument(
        "--stop",
        action="append",
        type=_unescape,
        metavar="TEXT",
        help=r"end before this string; \n and \t are understood; may be repeated",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID=VALUE",
        help="added to the token's logit; may be repeated",
    )
    for field, told in _SWITCHES.items():
        flag = f"--{field.replace('_', '-')}"
        group.add_argument(flag, action="store_const", const=True, help=told)


def sampling_params(options: Namespace) -> SamplingParams:
    """What was given, checked."""
    from optlm.engine.params import SamplingParams

    return SamplingParams(**sampling_values(options))


def sampling_values(options: Namespace) -> dict[str, Any]:
    """Only what was given: every default is declared in `SamplingParams`."""
    fields = [field for _, field, _, _ in _SAMPLING] + ["stop", *_SWITCHES]
    given = {field: getattr(options, field) for field in fields}
    if options.logit_bias:
        given["logit_bias"] = _biases(options.logit_bias)
    searches = options.beam_width is not None or options.penalty_alpha is not None
    if searches and options.temperature is None:
        given["temperature"] = 0.0
    return {name: value for name, value in given.items() if value is not None}


def _unescape(text: str) -> str:
    return text_argument(text).replace("\\n", "\n").replace("\\t", "\t")


def _biases(pairs: Sequence[str]) -> dict[int, float]:
    biases = {}
    for pair in pairs:
        token, _, value = str(pair).partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError:
            raise usage_error(
                f"--logit-bias {pair!r:.80} is not ID=VALUE, such as 50=-2.5"
            ) from None
    return biases
