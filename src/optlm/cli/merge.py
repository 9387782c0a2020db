"""Merge an adapter into its base for good, and prove that nothing changed by it.

Logits of canary texts are compared: the base with the adapter beside it, against
the files that were written. If they drift, nothing is written.

Needs PyTorch and peft: pip install 'optlm[train]'.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from optlm.cli.common import FAILURE, add_json_option, say

USAGE = "--adapter DIR --out OUT [--model M] [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="folder or hub name (default: the bundled model)")
    parser.add_argument("--adapter", metavar="DIR", required=True, help="LoRA, DoRA or rsLoRA")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", help="of the file: f32, f16 or bf16 (that of the base)")
    parser.add_argument(
        "--max-drift",
        type=float,
        metavar="X",
        help="largest change of a logit, in standard deviations (f32 0.001, f16 0.01, bf16 0.05)",
    )
    parser.add_argument(
        "--force", action="store_true", help="merge an adapter that was made for another base"
    )
    add_json_option(parser)


def run(options: Namespace) -> int | None:
    try:
        from optlm.train.finetune.merging import merge
    except ModuleNotFoundError as error:
        say(f"error: merging needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    report = merge(
        options.model,
        options.adapter,
        options.out,
        dtype=options.dtype,
        max_drift=options.max_drift,
        force=options.force,
        log=say,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    say(
        f"wrote {options.out} ({report.dtype}): the canaries' logits moved by {report.drift:.2g} "
        f"of their standard deviation (bound {report.max_drift:.2g})"
    )
    return None
