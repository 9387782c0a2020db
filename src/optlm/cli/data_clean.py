"""The options and the report of `optlm data clean`."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from optlm.cli.common import add_json_option, printable, usage_error
from optlm.cli.progress import byte_bar

_C4_LINES = "c4-lines"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="IN", help="files, folders or patterns")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="ends in .jsonl, .jsonl.gz or .zst"
    )
    rules = parser.add_argument_group("rules")
    rules.add_argument(
        "--rules",
        default="gopher",
        metavar="LIST",
        help="names of rules and groups (gopher, c4, none), with commas between (gopher)",
    )
    rules.add_argument("--without", default="", metavar="LIST", help="rules to leave out of them")
    rules.add_argument(
        "--limit", action="append", default=[], metavar="RULE=N", help="another limit for a rule"
    )
    rules.add_argument("--blocklist", type=Path, help="drop what holds a word of this file")
    others = parser.add_argument_group("duplicates and evaluation files")
    others.add_argument(
        "--near", type=float, default=0.8, metavar="S", help="similarity of near duplicates (0.8)"
    )
    others.add_argument("--no-near", action="store_true", help="drop exact duplicates only")
    others.add_argument("--no-dedup", action="store_true", help="keep all duplicates")
    others.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="drop what resembles these files"
    )
    others.add_argument(
        "--held-out", nargs="+", default=[], metavar="FILE", help="drop what overlaps with these"
    )
    others.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="13-grams it may share with them (0)"
    )
    others.add_argument(
        "--memory", type=int, default=256, metavar="MB", help="for finding duplicates (256)"
    )
    add_reading_options(parser)
    add_json_option(parser)


def add_reading_options(parser: ArgumentParser) -> None:
    """--format, --split and those of `add_broken_options`."""
    group = parser.add_argument_group("reading")
    group.add_argument("--format", help="jsonl, text or parquet, whatever the files end in")
    group.add_argument(
        "--split", default="file", help="a document of a text file: file, paragraph or line (file)"
    )
    add_broken_options(parser)


def add_broken_options(parser: ArgumentParser) -> None:
    """--on-broken and --max-broken."""
    parser.add_argument(
        "--on-broken",
        choices=("skip", "error"),
        default="skip",
        help="lines that cannot be used: leave them out and count them, or stop (skip)",
    )
    parser.add_argument(
        "--max-broken", type=int, default=1000, metavar="N", help="most lines left out (1000)"
    )


def max_broken(options: Namespace) -> int:
    """The number of broken lines that the options allow."""
    if options.max_broken < 0:
        raise usage_error(f"--max-broken is {options.max_broken}; use 0 or more")
    return 0 if options.on_broken == "error" else int(options.max_broken)


def run(options: Namespace) -> None:
    from optlm.data.clean import clean
    from optlm.data.inputs import find_inputs

    config = _config(options)
    files = find_inputs(options.files, format=options.format)
    reference = find_inputs(options.against)
    total = 2 * sum(file.size for file in files) + sum(file.size for file in reference)
    with byte_bar("cleaning", total) as progress:
        report = clean(
            files,
            options.out,
            config,
            held_out=find_inputs(options.held_out),
            reference=reference,
            progress=progress,
        )
    if options.json:
        print(json.dumps(report))
    else:
        _show(report)


def _config(options: Namespace) -> Any:
    from optlm.data.clean import CleanConfig
    from optlm.data.rules import blocklist_rule, choose_rules

    wanted = [name for name in options.rules.split(",") if name]
    without = [name for name in options.without.split(",") if name]
    lines = (_C4_LINES in wanted or "c4" in wanted) and _C4_LINES not in without
    rules = choose_rules(
        [name for name in wanted if name != _C4_LINES],
        without=[name for name in without if name != _C4_LINES],
        limits=dict(_limit(text) for text in options.limit),
    )
    if options.blocklist:
        rules += (blocklist_rule(options.blocklist.read_text(encoding="utf-8").splitlines()),)
    return CleanConfig(
        rules=rules,
        c4_lines=lines,
        exact=not options.no_dedup,
        near=None if options.no_near or options.no_dedup else options.near,
        overlap=options.overlap,
        split=options.split,
        max_broken=max_broken(options),
        memory=options.memory * 2**20,
    )


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise usage_error(
            f"--limit {text!r} is not RULE=NUMBER, such as gopher-words-min=20"
        ) from None


# ---- report ------------------------------------------------------------------------------------


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['kept']:,} of {report['read']:,} documents kept, {report['kept_bytes']:,} of "
        f"{report['read_bytes']:,} bytes"
    )
    if report["broken"]:
        print(f"{report['broken']:,} broken lines left out: {'; '.join(report['broken_examples'])}")
    for reason, count in report["lines_dropped"].items():
        print(f"{count:,} lines dropped: {reason}")
    print(f"\n{'rule':<34}{'limit':<28}{'dropped':>9}")
    for rule in report["rules"]:
        print(f"{rule['name']:<34}{rule['limit']:<28}{rule['dropped']:>9,}")
    _show_examples(report["rules"])
    for file in report["held_out"]:
        print(
            f"\n{file['file']}: {file['overlapping']:,} of {file['checked']:,} records of 8 words "
            f"or more also stand in {file['documents']:,} documents"
        )
        for example in file["examples"]:
            print(f"  {example}")


def _show_examples(rules: list[dict[str, Any]]) -> None:
    """The first document that each rule dropped; the report file has more."""
    if any(rule["examples"] for rule in rules):
        print("\nexamples")
    for rule in rules:
        for example in rule["examples"][:1]:
            print(
                f"  {rule['name']} {example['value']:g}: {_line(example['place'], example['text'])}"
            )
            if "of_place" in example:
                print(f"    like {_line(example['of_place'], example['of_text'])}")


def _line(place: str, text: str) -> str:
    return f"{place}: {printable(' '.join(text.split())[:90])}"
