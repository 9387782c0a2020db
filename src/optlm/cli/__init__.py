"""The command line: one thin module per command, imported when it is called.

Exit codes: 0 done, 1 failed while running, 2 bad usage or input, 130 interrupted, 143 or 129 ended
by SIGTERM or SIGHUP, 141 the reader of stdout went away. `optlm doctor` gives 1 for warnings and 2
for faults.

argparse and not typer: typer imports pydantic and inspects every option, which takes 190 ms of
processor time in each start; argparse takes 15.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

from optlm import __version__
from optlm.cli.common import FAILURE, end_politely, run_guarded, say, visible
from optlm.errors import did_you_mean

__all__ = ["main", "run"]

COMMANDS = {
    "generate": "continue a text",
    "score": "tell how likely a text is",
    "classify": "choose a label for each text by prompts",
    "eval": "measure a model on tasks, zero- to many-shot",
    "serve": "serve a model over HTTP, with OpenAI's API",
    "languages": "measure a model language by language",
    "uncertainty": "tell how sure a model is, and how far to believe it",
    "batch": "run a file of prompts, whatever crashes",
    "inspect": "look inside a model while it reads a text",
    "info": "show what a model is and what it needs",
    "doctor": "list every fault of a checkpoint",
    "convert": "rewrite a checkpoint in Hugging Face's layout",
    "data": "clean, pack and inspect text for training",
    "reshard": "cut weights anew: many files to one, or one to many",
    "pretrain": "train a model from scratch",
    "babylm": "train on 10 or 100 million words, test minimal pairs",
    "finetune": "adapt a model to your own text",
    "teacher-cache": "write a teacher's predictions to disk, for distil",
    "distil": "train a small model to predict as a large one does",
    "merge": "merge an adapter into its base",
    "bench": "measure how fast a model runs here",
}


class _HelpFormatter(RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def main() -> None:
    """Entry point of the `optlm` command."""
    if sys.stdout is None:  # started with it closed: the result would be lost without a word
        say("error: standard output is closed")
        sys.exit(FAILURE)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal may lack letters that a model has
        sys.stdout.reconfigure(errors="backslashreplace")
    end_politely()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Raises:
        SystemExit: bad usage (2), or help and version shown (0).
    """
    place = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    parser = _main_parser()
    options = parser.parse_args(arguments[:place])
    if place is None:
        parser.print_help()
        return 0
    if options.debug:
        os.environ["OPTLM_DEBUG"] = "1"
    name = arguments[place]
    if name not in COMMANDS:
        parser.error(f"there is no command {name!r}{did_you_mean(name, COMMANDS)}")
    return run_guarded(lambda: _run_command(name, arguments[place + 1 :]))


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible(message[:500]))  # it quotes arguments that may be anything


def _main_parser() -> ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {told}" for name, told in COMMANDS.items())
    parser = _Parser(
        prog="optlm",
        usage="optlm [--version] [--debug] COMMAND ...",
        description="Run, score, inspect and train OPT language models.",
        epilog=f"commands:\n{listing}\n\n`optlm COMMAND --help` shows the options of a command.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"optlm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _run_command(name: str, arguments: Sequence[str]) -> int | None:
    command = import_module(f"optlm.cli.{name.replace('-', '_')}")
    parser = _Parser(
        prog=f"optlm {name}",
        usage=f"optlm {name} {command.USAGE}",
        description=command.__doc__,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    command.add_options(parser)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unknown(unknown, parser.format_help()))
    code: int | None = command.run(options)
    return code


def _unknown(words: Sequence[str], help_text: str) -> str:
    if words[0].startswith("-"):
        flag = words[0].partition("=")[0]
        return f"unknown option {flag}{did_you_mean(flag, re.findall('--[a-z-]+', help_text))}"
    return f"{' '.join(words)!r} is one argument too many; put a text of several words in quotes"
