"""Look inside a model while it reads a text.

Shows the tokens tinted by how likely the model found them, what each layer
would say next (the logit lens), how many feed-forward units are active, and
what the attention heads do. Needs PyTorch: pip install 'optlm[interpret]'.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from optlm.cli.common import add_json_option, read_text, say, text_argument, usage_error

USAGE = "TEXT|- [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "text", nargs="?", type=text_argument, metavar="TEXT", help="- reads standard input"
    )
    parser.add_argument("-f", "--file", help="read the text from a file")
    parser.add_argument("-m", "--model", help="folder or hub name (default: the bundled model)")
    parser.add_argument(
        "--position", type=int, default=-1, metavar="N", help="token whose lens is shown (the last)"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="tokens of each row (5)")
    parser.add_argument("--html", metavar="OUT", help="write one self-contained page instead")
    add_json_option(parser)


def run(options: Namespace) -> None:
    if (options.text is None) == (options.file is None):
        raise usage_error("give a TEXT, - for standard input, or --file")
    if options.html and options.json:
        raise usage_error("--html and --json do not go together")
    source = options.file if options.text is None else options.text
    text = source if source == options.text and source != "-" else read_text(source)
    from optlm.interpret.subject import open_subject

    subject = open_subject(options.model)
    if options.html:
        from optlm.interpret.page.assemble import inspect_page

        written = inspect_page(subject, text).write(Path(options.html))
        say(f"wrote {written}")
        return
    from optlm.interpret.view import as_json, as_text, study

    found = study(subject, text, position=options.position, top=options.top)
    if options.json:
        print(json.dumps(as_json(found)))
    else:
        print(as_text(found, colour=_colour(), width=_width()))


def _colour() -> bool:
    """Whether stdout shows colours; https://no-color.org is respected."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _width() -> int:
    return os.get_terminal_size().columns if sys.stdout.isatty() else 100
