"""Let the model answer, and tell how sure it is of the answer as a whole.

Samples are drawn and grouped by meaning, as the model itself sees it: answers of one meaning make
each other likelier. Nothing here knows what is true. A flag compares one statistic with a
threshold, and says where that comes from: --rule takes one that `optlm uncertainty evaluate
--save-rule` learned on labelled items, --flag one of yours.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    printable,
    text_argument,
)

if TYPE_CHECKING:
    from optlm.uncertainty.asking import Answered
    from optlm.uncertainty.flags import Flag

USAGE = "PROMPT [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", type=text_argument)
    parser.add_argument("-n", "--samples", type=int, default=10, metavar="N", help="to draw (10)")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="of an answer (32)")
    parser.add_argument(
        "--stop", type=text_argument, default="\n", help="where an answer ends (a line's end)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (0)")
    parser.add_argument(
        "--rule", type=Path, action="append", default=[], metavar="FILE", help="a learned threshold"
    )
    parser.add_argument(
        "--flag", type=_threshold, action="append", default=[], metavar="NAME>NUMBER",
        help="a threshold of yours, such as 'entropy>2.5'",
    )  # fmt: skip
    add_json_option(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def _threshold(word: str) -> tuple[str, float]:
    name, _, number = word.partition(">")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise ArgumentTypeError("is not of the form NAME>NUMBER, in quotes") from None


def run(options: Namespace) -> None:
    from optlm.uncertainty.asking import ask
    from optlm.uncertainty.flags import flags
    from optlm.uncertainty.stored import load_rule, model_mark

    mark = model_mark(options.model, options.adapter) if options.rule else {}
    rules = [load_rule(path, task="answers", model=mark) for path in options.rule]
    llm = load_model(options)
    (answered,) = ask(
        llm, [options.prompt], samples=options.samples, max_tokens=options.max_tokens,
        stop=options.stop, seed=options.seed,
    )  # fmt: skip
    raised = flags(answered.figures, rules=rules, thresholds=dict(options.flag))
    if options.json:
        print(json.dumps(_record(answered, raised)))
        return
    samples, meanings = answered.samples, answered.meanings
    print(f"answer  {printable(answered.text.strip())}")
    print(f"{meanings.count} meanings among {len(samples.texts)} samples")
    for text, group in zip(samples.texts, meanings.groups, strict=True):
        print(f"  {group + 1:3}  {printable(text)}")
    for name, value in answered.figures.items():
        print(f"{value:10.4f}  {name}")
    for flag in raised:
        print(f"{'FLAG' if flag.raised else 'ok':4}  {flag.basis}")
    if not raised:
        print("no flags: none of these figures was compared with a threshold (--rule, --flag)")


def _record(answered: Answered, raised: list[Flag]) -> dict[str, Any]:
    samples, meanings = answered.samples, answered.meanings
    return {
        "answer": answered.text,
        "figures": answered.figures,
        "samples": [
            {"text": text, "logprob": logprob, "meaning": group}
            for text, logprob, group in zip(
                samples.texts, samples.logprobs, meanings.groups, strict=True
            )
        ],
        "flags": [vars(flag) for flag in raised],
    }
