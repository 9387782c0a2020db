"""Measure every token of a text after its first: log-probability, entropy, margin, self-certainty.

On a terminal the tokens are coloured; otherwise they come as a table. --html writes a page that
opens without a network. Texts beyond the context are read in overlapping windows.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    read_text,
    say,
    text_argument,
    tokenizer_of,
    usage_error,
    visible,
)

if TYPE_CHECKING:
    from optlm.engine.llm import LLM
    from optlm.uncertainty.measures import TokenMeasures

USAGE = "FILE|- [options]"

_BY = ("logprob", "entropy", "margin", "self-certainty")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="text; - reads standard input")
    parser.add_argument("-t", "--text", type=text_argument, help="measure this text")
    parser.add_argument("--lines", action="store_true", help="measure every line by itself")
    parser.add_argument("--by", choices=_BY, default="logprob", help="what colours show (logprob)")
    parser.add_argument(
        "--colour", choices=("auto", "always", "never"), default="auto", help="(auto: a terminal)"
    )
    parser.add_argument(
        "--temperature", metavar="FILE|auto", help="from calibrate; auto: the one beside the model"
    )
    parser.add_argument("--html", type=Path, metavar="OUT", help="write a page")
    add_json_option(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.checkpoint.staging import check_target
    from optlm.uncertainty.measures import measure

    if (options.file is None) == (options.text is None):
        raise usage_error("give a FILE, - for standard input, or --text")
    if options.html is not None:
        check_target(options.html.parent)
    whole = read_text(options.file) if options.text is None else options.text
    texts = [line for line in whole.split("\n") if line] if options.lines else [whole]
    if not texts:
        raise usage_error("every line is empty; there is nothing to measure")
    temperature = _temperature(options)
    llm = load_model(options)
    sequences = [_ids(llm, text) for text in texts]
    measured = measure(llm, sequences, temperature=temperature)
    for text, measures in zip(texts, measured, strict=True):
        _show(llm, options, text, measures)
    if options.html is not None:
        _write_page(llm, options, sequences, measured, temperature)
        say(f"wrote {options.html}")


def _temperature(options: Namespace) -> float:
    if options.temperature is None:
        return 1.0
    from optlm.uncertainty.stored import default_path, load_temperature, model_mark

    if options.temperature == "auto":
        path = default_path("tokens", options.model, options.adapter)
    else:
        path = Path(options.temperature)
    mark = model_mark(options.model, options.adapter)
    return load_temperature(path, kind="tokens", model=mark).temperature


def _ids(llm: LLM, text: str) -> list[int]:
    from optlm.uncertainty.reading import as_ids

    return as_ids(llm, text)


def _show(llm: LLM, options: Namespace, text: str, measures: TokenMeasures) -> None:
    from optlm.uncertainty.showing import coloured, doubt, token_table

    texts = [tokenizer_of(llm).token_text(token) for token in measures.token_ids.tolist()]
    summary = measures.summary()
    if options.json:
        print(json.dumps({"text": text, **summary, "by_token": token_table(texts, measures)}))
    elif _wants_colour(options):
        doubts = doubt(measures, options.by, llm.config.vocab_size)
        print(coloured([visible(text) for text in texts], doubts))
    else:
        print(f"{'logprob':>10}{'entropy':>10}{'margin':>10}{'self-cert':>10}  token")
        for row in token_table(texts, measures):
            values = (row[key] for key in ("logprob", "entropy", "margin", "self_certainty"))
            token = json.dumps(row["token"], ensure_ascii=False)
            print("".join(f"{value:10.4f}" for value in values), token, sep="  ")
    if not options.json:
        print(
            f"log-likelihood {summary['log_likelihood']:.4f} nats, {summary['tokens']} tokens, "
            f"{summary['log_likelihood_per_token']:.4f} a token; mean entropy "
            f"{summary['mean_entropy']:.4f}, margin {summary['mean_margin']:.4f}, "
            f"self-certainty {summary['mean_self_certainty']:.4f}"
        )
    sys.stdout.flush()


def _wants_colour(options: Namespace) -> bool:
    if options.colour == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return bool(options.colour == "always")


def _write_page(
    llm: LLM,
    options: Namespace,
    sequences: list[list[int]],
    measured: list[TokenMeasures],
    temperature: float,
) -> None:
    from optlm.uncertainty.showing import html_page

    name = options.model or "the bundled model"
    page = html_page(
        [_for_page(llm, ids, each) for ids, each in zip(sequences, measured, strict=True)],
        title=f"How sure is {Path(name).name}?",
        note="Every figure comes from the whole distribution of the next token. Log-probability "
        f"and entropy in nats. The logits were divided by a temperature of {temperature:g}.",
    )
    options.html.write_text(page, encoding="utf-8")


def _for_page(llm: LLM, ids: list[int], measures: TokenMeasures) -> dict[str, Any]:
    from optlm.uncertainty.showing import doubt, token_table

    tokenizer = tokenizer_of(llm)
    texts = [tokenizer.token_text(token) for token in measures.token_ids.tolist()]
    doubts = {by: doubt(measures, by, llm.config.vocab_size).round(4).tolist() for by in _BY}
    rows = [
        {
            **{key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()},
            "top": tokenizer.token_text(row["top_id"]),
            "doubt": {by: values[i] for by, values in doubts.items()},
        }
        for i, row in enumerate(token_table(texts, measures))
    ]
    first = "" if tokenizer.is_special(ids[0]) else tokenizer.token_text(ids[0])
    return {"first": first, "tokens": rows, "summary": measures.summary()}
