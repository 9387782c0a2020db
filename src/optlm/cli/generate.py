"""Continue a text with an OPT model.

Without a prompt the model begins a text of its own. Prompts are echoed on a
terminal only; otherwise standard output holds the generated text alone.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    exit_code_of,
    load_model,
    printable,
    read_text,
    say,
    text_argument,
    tokenizer_of,
    usage_error,
)

if TYPE_CHECKING:
    from optlm.engine.llm import LLM
    from optlm.engine.outputs import Completion, RequestOutput, TokenLogprobs
    from optlm.engine.params import SamplingParams

USAGE = "[PROMPT] [options]"

_CHUNK = 256  # prompts in the engine at once; results of a chunk are written before the next begins

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
    ("--logprobs", "logprobs", int, "with --json: log-probabilities of this many top tokens"),
    ("--on-overflow", "on_overflow", str, "long prompts: error or truncate_left (error)"),
)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        type=text_argument,
        metavar="PROMPT",
        help="text to continue; - reads standard input",
    )
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        metavar="FILE",
        help="read a prompt from a file; may be repeated",
    )
    parser.add_argument(
        "--lines", action="store_true", help="every line of the input is a prompt of its own"
    )
    add_json_option(parser)
    parser.add_argument(
        "--stream", action=BooleanOptionalAction, help="write as tokens come (on a terminal)"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="tell counts and speed on stderr"
    )
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
    for flag, told in (
        ("--include-stop", "show the stop string"),
        ("--ignore-eos", "go on after the end token"),
    ):
        group.add_argument(flag, action="store_const", const=True, help=told)
    add_engine_options(parser)
    add_adapter_options(parser)


_METAVARS = {int: "N", float: "X", str: "POLICY"}


def run(options: Namespace) -> int | None:
    prompts = _read_prompts(options.prompt, options.file or [], options.lines)
    if options.logprobs is not None and not options.json:
        raise usage_error("--logprobs needs --json")
    one_text = len(prompts) == 1 and options.n in (None, 1) and not options.json
    if options.stream and not one_text:
        raise usage_error("--stream shows one text; use it without --json, -n or several prompts")
    params = _sampling_params(options)
    llm = load_model(options)
    if not one_text:
        _write_many(llm, prompts, params, as_json=options.json, verbose=options.verbose)
        return None
    chosen_when_finished = options.beam_width or options.best_of or options.penalty_alpha
    if chosen_when_finished and options.stream is None:
        sys.stdout.write(printable(llm.generate(prompts[0], params)[0].text) + "\n")
        return None
    live = sys.stdout.isatty() if options.stream is None else options.stream
    return _write_one(llm, prompts[0], params, live=live, verbose=options.verbose)


# ---- what was asked -----------------------------------------------------------------------------


def _read_prompts(prompt: str | None, files: Sequence[str], lines: bool) -> list[str]:
    if prompt is not None and files:
        raise usage_error("give a prompt or --file, not both")
    if prompt is not None and prompt != "-":
        if lines:
            raise usage_error("--lines reads --file or -, not the argument")
        return [prompt]
    sources = ["-"] if prompt == "-" else list(files)
    texts = [read_text(source) for source in sources]
    if lines:
        texts = [line for text in texts for line in text.split("\n")]
    return texts or [""]


def _sampling_params(options: Namespace) -> SamplingParams:
    """Only what was given: every default is declared in `SamplingParams`."""
    from optlm.engine.params import SamplingParams

    fields = [field for _, field, _, _ in _SAMPLING] + ["stop", "include_stop", "ignore_eos"]
    given = {field: getattr(options, field) for field in fields}
    if options.logit_bias:
        given["logit_bias"] = _biases(options.logit_bias)
    searches = options.beam_width is not None or options.penalty_alpha is not None
    if searches and options.temperature is None:
        given["temperature"] = 0.0
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


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


# ---- one text -----------------------------------------------------------------------------------


def _write_one(
    llm: LLM, prompt: str, params: SamplingParams, *, live: bool, verbose: bool
) -> int | None:
    """Write one text, piece by piece if `live`; Ctrl-C keeps what was generated."""
    if sys.stdout.isatty():
        sys.stdout.write(printable(prompt))
    clock = _Clock()
    held: list[str] = []
    result, code = None, None
    try:
        for piece in llm.stream(prompt, params):
            clock.tick(len(piece.token_ids))
            result = piece.result or result
            held.append(printable(piece.text))
            if live:
                sys.stdout.write(held.pop())
                sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        code = exit_code_of(interrupt)
    sys.stdout.write("".join(held) + "\n")
    if verbose:
        say(clock.summary(result.finish_reason if result else "interrupted"))
    return code


class _Clock:
    """Time to the first token, and tokens a second after it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self._tokens = 0

    def tick(self, tokens: int) -> None:
        self._last = time.perf_counter()
        if not self._tokens:
            self._first = self._last
        self._tokens += tokens

    def summary(self, reason: str) -> str:
        first = 1e3 * (self._first - self._start)
        rest = self._last - self._first
        speed = (
            f", then {(self._tokens - 1) / rest:.0f} tokens/s" if self._tokens > 1 and rest else ""
        )
        return f"{self._tokens} tokens ({reason}), first after {first:.0f} ms{speed}"


# ---- several texts, or JSON ---------------------------------------------------------------------


def _write_many(
    llm: LLM, prompts: Sequence[str], params: SamplingParams, *, as_json: bool, verbose: bool
) -> None:
    clock = _Clock()
    for number, output in enumerate(_outputs(llm, prompts, params), 1):
        for completion in output.outputs:
            clock.tick(len(completion.token_ids))
            if as_json:
                print(json.dumps(_record(llm, output, completion), ensure_ascii=not _utf8()))
            else:
                print(
                    f"==> {_title(number, completion, output)} <==\n{printable(completion.text)}\n"
                )
        sys.stdout.flush()
    if verbose:
        say(clock.summary(f"{len(prompts)} prompts"))


def _outputs(llm: LLM, prompts: Sequence[str], params: SamplingParams) -> Iterator[RequestOutput]:
    for start in range(0, len(prompts), _CHUNK):
        yield from llm.generate(list(prompts[start : start + _CHUNK]), params)


def _title(number: int, completion: Completion, output: RequestOutput) -> str:
    sample = f", text {completion.index + 1}" if len(output.outputs) > 1 else ""
    return f"prompt {number}{sample}"


def _record(llm: LLM, output: RequestOutput, completion: Completion) -> dict[str, Any]:
    prompt_tokens, new_tokens = len(output.prompt_token_ids), len(completion.token_ids)
    record: dict[str, Any] = {
        "prompt": output.prompt,
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    if output.seed is not None:
        record["seed"] = output.seed
    if completion.logprobs is not None:
        record["logprobs"] = [_position(llm, entry) for entry in completion.logprobs]
    return record


def _position(llm: LLM, entry: TokenLogprobs) -> dict[str, Any]:
    return {
        **_token(llm, entry.token_id, entry.logprob),
        "top": [_token(llm, token, value) for token, value in entry.top().items()],
    }


def _token(llm: LLM, token_id: int, logprob: float) -> dict[str, Any]:
    text = tokenizer_of(llm).token_text(token_id)
    return {"id": token_id, "token": text, "logprob": round(logprob, 6)}


def _utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
