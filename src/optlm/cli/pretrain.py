"""Train a model from scratch: tokenizer, packed tokens, training, checkpoints.

Needs PyTorch: pip install 'optlm[train]'.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from optlm.cli.common import FAILURE, exit_code_of, say

USAGE = "CONFIG --out RUN [--data FOLDER]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="JSON file of the settings")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an unfinished one is resumed"
    )
    parser.add_argument("--data", type=Path, help="folder of the packed tokens (OUT/data)")


def run(options: Namespace) -> int | None:
    try:
        from optlm.train.pretrain import PretrainConfig, pretrain
    except ModuleNotFoundError as error:
        say(f"error: training needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    settings = PretrainConfig.from_file(options.config)
    try:
        pretrain(settings, options.out, data_folder=options.data, log=say)
    except KeyboardInterrupt as interrupt:
        say(f"stopped; the same command resumes from {options.out}")
        return exit_code_of(interrupt)
    return None
