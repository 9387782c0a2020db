"""The options and the report of `optlm data lint`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import add_json_option, printable
from optlm.cli.progress import byte_bar

if TYPE_CHECKING:
    from optlm.tokenizer import Tokenizer

_PROBLEMS_FOUND = 1  # exit code
_BAR = 40  # characters
_HEAD, _AROUND, _TAIL = 8, 3, 4  # tokens of an example that are shown


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="files, folders or patterns")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", help="whose tokenizer and context (the bundled model)")
    which.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a row (the context)")
    parser.add_argument(
        "--held-out", nargs="+", default=[], metavar="FILE", help="report overlap with these files"
    )
    parser.add_argument(
        "--examples", type=int, default=2, metavar="N", help="records to show by token (2)"
    )
    parser.add_argument("--format", help="jsonl, text or parquet, whatever the files end in")
    parser.add_argument(
        "--split", default="file", help="a document of a text file: file, paragraph or line (file)"
    )
    add_json_option(parser)


def run(options: Namespace) -> int | None:
    from optlm.data.inputs import find_inputs
    from optlm.train.finetune.lint import HARMLESS, lint

    tokenizer, context = _tokenizer(options)
    files = find_inputs(options.files, format=options.format)
    with byte_bar("reading", sum(file.size for file in files)) as progress:
        report = lint(
            files,
            tokenizer,
            length=context if options.length is None else options.length,
            held_out=find_inputs(options.held_out),
            shown=options.examples,
            split=options.split,
            progress=progress,
        )
    if options.json:
        print(json.dumps(report))
    else:
        _show(report)
    found = [name for name, told in report["problems"].items() if told["count"]]
    wrong = set(found) - set(HARMLESS) or report["broken"]["count"]
    overlaps = any(file["overlapping"] for file in report["held_out"])
    return _PROBLEMS_FOUND if wrong or overlaps else None


def _tokenizer(options: Namespace) -> tuple[Tokenizer, int]:
    """The tokenizer, and the context of its model."""
    from optlm.assets import bundled_model
    from optlm.checkpoint import open_checkpoint
    from optlm.tokenizer import Tokenizer

    if options.tokenizer:
        return Tokenizer.from_file(options.tokenizer), 2048
    checkpoint = open_checkpoint(options.model or bundled_model())
    tokenizer = Tokenizer.from_folder(checkpoint.folder, checkpoint.config)
    return tokenizer, checkpoint.config.max_position_embeddings


# ---- report ------------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    from optlm.train.finetune.lint import PROBLEMS

    for example in report["examples"]:
        _show_example(example)
    print(
        f"{report['texts']:,} texts, {report['pairs']:,} prompts with responses; "
        f"{report['tokens']:,} tokens, {report['predicted']:,} of them predicted; "
        f"the longest has {report['longest']:,}; "
        f"{report['over_length']:.1%} are longer than {report['length']:,}"
    )
    most = max(report["histogram"].values())
    for bound, count in report["histogram"].items():
        print(f"  up to {bound:>9,} tokens {count:>9,} {'#' * round(_BAR * count / most)}")
    told = {"lines that cannot be used": report["broken"]}
    told |= {PROBLEMS[name]: found for name, found in report["problems"].items()}
    for meaning, found in told.items():
        if found["count"]:
            print(f"{found['count']:>9,} {meaning}")
            print(f"{'':>10}{printable('; '.join(found['places']))}")
    for file in report["held_out"]:
        print(f"{file['overlapping']:>9,} of {file['checked']:,} records of {file['file']} found")
        if file["examples"]:
            print(f"{'':>10}{'; '.join(file['examples'])}")
    if not any(found["count"] for found in told.values()):
        print("nothing wrong was found")


def _show_example(example: dict[str, Any]) -> None:
    tokens = example["tokens"]
    first = next((i for i, token in enumerate(tokens) if token["label"]), len(tokens))
    places = {*range(_HEAD), *range(first - _AROUND, first + _AROUND)}
    places |= set(range(len(tokens) - _TAIL, len(tokens)))
    print(f"{example['place']}: {len(tokens)} tokens")
    last = -1
    for place in sorted(places & set(range(len(tokens)))):
        if place > last + 1:
            print(f"  {'...':>6}  {place - last - 1:,} more")
        token = tokens[place]
        shown = json.dumps(token["token"], ensure_ascii=False)
        print(f"  {place:>6} {token['id']:>6}  {'label' if token['label'] else '-':<6} {shown}")
        last = place
    print()
