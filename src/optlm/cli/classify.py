"""Choose a label for each text by its likelihood after a prompt, with shots or without.

FILE holds a text a line, or JSON Lines with "text" (and "label", where it is
known). --report tells how far the prompt's accuracy hangs on the order, draw
and template of its shots.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    printable,
    read_text,
    text_argument,
    usage_error,
)

if TYPE_CHECKING:
    from optlm.evaluate.labels import Example, Template

USAGE = "FILE|- --labels A,B[,C] [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="texts; - reads standard input")
    parser.add_argument("-t", "--text", type=text_argument, help="classify this text")
    parser.add_argument("--labels", required=True, type=text_argument, metavar="A,B[,C]")
    parser.add_argument("--shots", metavar="FILE", help='JSON Lines with "text" and "label"')
    parser.add_argument(
        "--template",
        action="append",
        type=text_argument,
        help=r"with {text}; \n is a line break; several are averaged",
    )
    parser.add_argument("--method", default="plain", help="plain, mean, calibrated or pmi (plain)")
    parser.add_argument("--orders", type=int, default=1, help="orders of the shots (1)")
    parser.add_argument("--seed", type=int, default=0, help="of orders and draws (0)")
    parser.add_argument("--terminator", type=text_argument, default="", help="after each label")
    parser.add_argument(
        "--report", type=int, metavar="K", help="measure prompts of K shots on labelled texts"
    )
    add_json_option(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.evaluate.labels import Template

    if (options.file is None) == (options.text is None):
        raise usage_error("give a FILE, - for standard input, or --text")
    labels = [label.strip() for label in options.labels.split(",")]
    templates = [Template(prompt=_unescaped(text)) for text in options.template or ()]
    shots = _examples(options.shots, labelled=True) if options.shots else []
    items = _examples(options.file) if options.text is None else [_example(options.text)]
    if options.report is not None:
        _report(options, labels, templates, items, shots)
        return
    from optlm.evaluate.classify import classify

    found = classify(
        [item.text for item in items],
        labels,
        llm=load_model(options),
        templates=templates or Template(),
        shots=shots,
        method=options.method,
        orders=options.orders,
        seed=options.seed,
        terminator=_unescaped(options.terminator),
    )
    for answer in found:
        if options.json:
            told = {"text": answer.text, "label": answer.label, "agreement": answer.agreement}
            told |= {"probabilities": answer.probabilities, "shots": answer.num_shots}
            print(json.dumps(told, ensure_ascii=False))
        else:
            share = answer.probabilities[answer.label]
            print(f"{answer.label}\t{share:.3f}\t{printable(answer.text)}")


def _report(
    options: Namespace,
    labels: list[str],
    templates: list[Template],
    items: list[Example],
    pool: list[Example],
) -> None:
    from optlm.evaluate.labels import Template
    from optlm.evaluate.prompt_report import prompt_report

    if not pool:
        raise usage_error("--report draws shots from a file; give --shots FILE")
    found = prompt_report(
        load_model(options),
        labels,
        items,
        pool=pool,
        num_shots=options.report,
        templates=templates or Template(),
        orders=max(options.orders, 6),
        method=options.method,
        seed=options.seed,
        terminator=_unescaped(options.terminator),
    )
    print(json.dumps(found.told(), ensure_ascii=False) if options.json else found)


def _examples(source: str, *, labelled: bool = False) -> list[Example]:
    lines = [line for line in read_text(source).split("\n") if line.strip()]
    if not lines:
        raise usage_error(f"{source} has no texts")
    examples = []
    for number, line in enumerate(lines, start=1):
        example = _example(line)
        if labelled and not example.label:
            raise usage_error(f'{source}, line {number}: a shot is {{"text": ..., "label": ...}}')
        examples.append(example)
    return examples


def _example(line: str) -> Example:
    """A JSON object with "text" and maybe "label", or a plain text."""
    from optlm.evaluate.labels import Example

    try:
        read = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        read = None
    if isinstance(read, dict) and isinstance(read.get("text"), str):
        return Example(text=read["text"], label=str(read.get("label", "")))
    return Example(text=line, label="")


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
