"""Prepare text for training, and look at what a model will see of it.

Files are JSON Lines, plain text or Parquet, each also as .gz or .zst; folders and patterns stand
for the files in them. Needs the training extra: pip install 'optlm[train]'.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optlm.cli import data_clean, data_lint
from optlm.cli.common import BAD_INPUT, FAILURE, INTERRUPTED, add_json_option, say
from optlm.cli.progress import byte_bar

USAGE = "clean|lint|pack|verify ..."


def add_options(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add(actions, "clean", "filter, deduplicate and decontaminate text", _clean)
    _add(actions, "lint", "show what a model will see of text, and what is wrong", _lint)
    _add(actions, "pack", "train a tokenizer, pack tokens, write a data card", _pack)
    _add(actions, "verify", "compare packed data with its manifest", _verify)


def _add(actions: Any, name: str, told: str, add: Callable[[ArgumentParser], None]) -> None:
    parser = actions.add_parser(
        name, prog=f"optlm data {name}", help=told, description=told, allow_abbrev=False
    )
    add(parser)


def run(options: Namespace) -> int | None:
    try:
        code: int | None = options.do(options)
    except ModuleNotFoundError as error:
        say(f"error: this needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    except KeyboardInterrupt:
        say("stopped; nothing half-written was left")
        return INTERRUPTED
    return code


def _clean(parser: ArgumentParser) -> None:
    data_clean.add_options(parser)
    parser.set_defaults(do=data_clean.run)


def _lint(parser: ArgumentParser) -> None:
    data_lint.add_options(parser)
    parser.set_defaults(do=data_lint.run)


# ---- pack --------------------------------------------------------------------------------------


def _pack(parser: ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        type=Path,
        help="JSON: settings of a run, or its `data` alone",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    data_clean.add_broken_options(parser)
    parser.set_defaults(do=_run_pack)


def _run_pack(options: Namespace) -> None:
    from optlm.data.inputs import find_inputs
    from optlm.errors import ConfigError
    from optlm.train.tokens.packed import DataConfig, prepare

    try:
        values = json.loads(options.config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{options.config} is no JSON: {error}") from error
    whole_run = isinstance(values, dict) and "data" in values
    config = DataConfig.from_dict(values["data"] if whole_run else values)
    total = sum(file.size for part in config.parts for file in find_inputs([part.file]))
    with byte_bar("packing", total) as progress:
        prepare(
            config,
            options.out,
            log=say,
            max_broken=data_clean.max_broken(options),
            progress=progress,
        )
    say(f"packed data and its card are in {options.out}")


# ---- verify ------------------------------------------------------------------------------------


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="packed data")
    parser.add_argument(
        "--sources", action="store_true", help="also compare the files it was packed from"
    )
    add_json_option(parser)
    parser.set_defaults(do=_run_verify)


def _run_verify(options: Namespace) -> int | None:
    from optlm.data.packed import verify

    faults = verify(options.folder, sources=options.sources)
    if options.json:
        print(json.dumps({"folder": str(options.folder), "faults": faults}))
    else:
        for fault in faults:
            print(fault)
        say(f"{options.folder}: {f'{len(faults)} faults' if faults else 'all as packed'}")
    return BAD_INPUT if faults else None
