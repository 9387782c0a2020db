"""Measure a model language by language: bits a byte, tokens, room in the context.

FILES are JSON Lines (plain, .gz, .zst) whose records have "text" and "lang", or
text files with --lang. With --generate the model also goes on from the
beginnings of texts, and what it writes is identified: how much is in another
language, beside the error of the identifier on the true texts.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    say,
)
from optlm.cli.progress import count_bar

USAGE = "FILES [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders or patterns")
    parser.add_argument("--lang", metavar="CODE", help="language of records that do not say it")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N texts of a language")
    parser.add_argument("--reference", default="en", metavar="CODE", help="of the tax (en)")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="continue N texts a language (0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the continuations (0)")
    add_json_option(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.evaluate.corpora import texts_by_language
    from optlm.evaluate.languages import language_report, languages_table

    texts, left_out = texts_by_language(options.files, lang=options.lang, limit=options.limit)
    if left_out:
        say(f"{left_out} records have no text or no language and are left out")
    llm = load_model(options)
    with count_bar("languages", sum(map(len, texts.values()))) as progress:
        report = language_report(
            llm,
            texts,
            reference=options.reference,
            generate=options.generate,
            seed=options.seed,
            progress=progress,
        )
    print(json.dumps(report.told()) if options.json else languages_table(report))
