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
from optlm.cli.sampling import add_sampling_options, sampling_params

if TYPE_CHECKING:
    from optlm.engine.llm import LLM
    from optlm.engine.outputs import Completion, RequestOutput, TokenLogprobs
    from optlm.engine.params import SamplingParams

USAGE = "[PROMPT] [options]"

_CHUNK = 256  # prompts in the engine at once; results of a chunk are written before the next begins


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
    add_sampling_options(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> int | None:
    prompts = _read_prompts(options.prompt, options.file or [], options.lines)
    if options.logprobs is not None and not options.json:
        raise usage_error("--logprobs needs --json")
    one_text = len(prompts) == 1 and options.n in (None, 1) and not options.json
    if options.stream and not one_text:
        raise usage_error("--stream shows one text; use it without --json, -n or several prompts")
    params = sampling_params(options)
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
