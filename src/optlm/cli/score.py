"""Tell how likely a text is, token by token and as a whole.

The text follows the start token, and its end is not scored. Beyond the
context it is read in overlapping windows, and every token is scored once.
Logarithms are natural, in nats.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    read_text,
    text_argument,
    tokenizer_of,
    usage_error,
)

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

USAGE = "FILE|- [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="text; - reads standard input")
    parser.add_argument("-t", "--text", type=text_argument, help="score this text")
    parser.add_argument("--lines", action="store_true", help="score every line by itself")
    parser.add_argument(
        "--tokens", action=BooleanOptionalAction, help="list every token (not with --json)"
    )
    add_json_option(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    if (options.file is None) == (options.text is None):
        raise usage_error("give a FILE, - for standard input, or --text")
    whole = read_text(options.file) if options.text is None else options.text
    texts = whole.split("\n") if options.lines else [whole]
    llm = load_model(options)
    listed = not options.json if options.tokens is None else options.tokens
    total = _Score(ids=[], logprobs=[], num_bytes=0)
    for text in texts:
        scored = _score(llm, text)
        total.add(scored)
        if options.json:
            record = scored.totals() | ({"text": text} if options.lines else {})
            if listed:
                record["token_logprobs"] = scored.table(llm)
            print(json.dumps(record))
        else:
            _show(llm, scored, listed=listed)
        sys.stdout.flush()
    if len(texts) > 1 and not options.json:
        print(f"all {len(texts)} lines")
        _show(llm, total, listed=False)


@dataclass
class _Score:
    ids: list[int]  # scored tokens
    logprobs: list[float]  # theirs, nats
    num_bytes: int

    def add(self, other: _Score) -> None:
        self.ids += other.ids
        self.logprobs += other.logprobs
        self.num_bytes += other.num_bytes

    def totals(self) -> dict[str, Any]:
        """JSON form; figures without meaning (of an empty text) are null."""
        nll = -math.fsum(self.logprobs)
        mean = nll / len(self.ids) if self.ids else math.nan
        perplexity = math.exp(mean) if mean < 700 else math.nan
        bits = nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan
        values = {"bits_per_byte": bits, "perplexity": perplexity}
        return {
            "nll": nll,
            "tokens": len(self.ids),
            "bytes": self.num_bytes,
            **{name: None if math.isnan(value) else value for name, value in values.items()},
        }

    def table(self, llm: LLM) -> list[dict[str, Any]]:
        return [
            {"id": token, "token": tokenizer_of(llm).token_text(token), "logprob": logprob}
            for token, logprob in zip(self.ids, self.logprobs, strict=True)
        ]


def _score(llm: LLM, text: str) -> _Score:
    ids = tokenizer_of(llm).encode(text)
    scored = llm.score([ids], on_overflow="windows")[0]
    logprobs = [value for value in scored.logprobs if value is not None]
    return _Score(ids=ids[1:], logprobs=logprobs, num_bytes=len(text.encode()))


def _show(llm: LLM, scored: _Score, *, listed: bool) -> None:
    if listed:
        for entry in scored.table(llm):
            print(f"{entry['logprob']:10.4f}  {json.dumps(entry['token'], ensure_ascii=False)}")
    totals = scored.totals()
    print(
        f"log-probability {-totals['nll']:.4f} nats, {totals['tokens']} tokens, "
        f"{totals['bytes']} bytes, perplexity {_number(totals['perplexity'])}, "
        f"bits per byte {_number(totals['bits_per_byte'])}"
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
