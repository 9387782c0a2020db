"""Find the temperature under which confidences mean what they say, and store it.

Of text (plain, or JSON Lines with "text") it calibrates the next token; of items with choices (JSON
Lines: prompt, choices, gold; or good, bad) the choice. One half of the data finds it, the other
tells what it is worth: negative log-likelihood, and the expected calibration error with its
bootstrap interval. The file keeps digests of model and data; another model refuses it.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    load_model,
    say,
)
from optlm.cli.progress import count_bar

if TYPE_CHECKING:
    from optlm.uncertainty.calibrating import Calibrated
    from optlm.uncertainty.stored import StoredTemperature

USAGE = "FILE [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="texts or items, also .gz and .zst")
    parser.add_argument(
        "--of", choices=("tokens", "choices"), default="tokens", help="what to calibrate (tokens)"
    )
    parser.add_argument(
        "--scoring", choices=("total", "token", "byte"), default="total",
        help="log-likelihood of a choice: as it is, a token, or a byte (total)",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N texts or items")
    parser.add_argument("--bins", type=int, default=15, metavar="N", help="of confidence (15)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of halves and resamples")
    parser.add_argument("--save", action="store_true", help="store it beside the model or adapter")
    parser.add_argument("--out", type=Path, metavar="FILE", help="store it here")
    parser.add_argument("--picture", type=Path, metavar="OUT", help="reliability diagram, SVG")
    add_json_option(parser)
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.uncertainty.stored import default_path, save

    out = options.out
    if options.save and out is None:
        out = default_path(options.of, options.model, options.adapter)
    found = _calibrate(options)
    stored = _stored(options, found)
    if out is not None:
        save(stored, out)
        say(f"wrote {out}")
    if options.picture is not None:
        from optlm.uncertainty.pictures import reliability_svg

        panels = {"before": found.before, f"after, T = {found.temperature:.3f}": found.after}
        options.picture.write_text(reliability_svg(panels), encoding="utf-8")
        say(f"wrote {options.picture}")
    _show(options, found, stored)


def _calibrate(options: Namespace) -> Calibrated:
    from optlm.uncertainty.calibrating import calibrate_choices, calibrate_tokens
    from optlm.uncertainty.items import read_items, read_texts

    if options.of == "tokens":
        texts = read_texts(options.file, limit=options.limit)
        llm = load_model(options)
        with count_bar("passes", 8) as progress:
            return calibrate_tokens(
                llm, texts, bins=options.bins, seed=options.seed, progress=progress
            )
    items = read_items(options.file, limit=options.limit)
    llm = load_model(options)
    with count_bar("choices", sum(len(item.choices) for item in items)) as progress:
        return calibrate_choices(
            llm, items, scoring=options.scoring, bins=options.bins, seed=options.seed,
            progress=progress,
        )  # fmt: skip


def _stored(options: Namespace, found: Calibrated) -> StoredTemperature:
    from optlm.uncertainty.stored import DataMark, StoredTemperature, model_mark

    before, after = found.figures()
    of = "texts" if options.of == "tokens" else "items"
    return StoredTemperature(
        kind=options.of,
        temperature=found.temperature,
        scoring="next token" if options.of == "tokens" else options.scoring,
        model=model_mark(options.model, options.adapter),
        data=DataMark.of_file(options.file, items=found.fitted_on, of=of),
        before=before,
        after=after,
    )


def _show(options: Namespace, found: Calibrated, stored: StoredTemperature) -> None:
    if options.json:
        record = {
            "kind": stored.kind,
            "temperature": found.temperature,
            "fitted_on": found.fitted_on,
            "held_out": found.held_out,
            "before": {"nll": found.nll_before, **found.before.to_dict()},
            "after": {"nll": found.nll_after, **found.after.to_dict()},
            "data_sha256": stored.data.sha256,
        }
        print(json.dumps(record))
        return
    print(f"temperature {found.temperature:.4f}, found on {found.fitted_on} {stored.data.of}")
    print(f"on the other {found.held_out} ({found.before.items} answers):")
    for name, nll, each in (
        ("before", found.nll_before, found.before),
        ("after", found.nll_after, found.after),
    ):
        interval = f"(95 %: {each.low:.4f} to {each.high:.4f})"
        print(f"  {name:6} nll {nll:.4f}  ECE {each.ece:.4f} {interval}")
