"""List every fault of a checkpoint.

Exit code: 0 sound, 1 only warnings, 2 faults. Nothing in the files is executed.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optlm.cli.common import add_json_option

if TYPE_CHECKING:
    from optlm.errors import Fault

USAGE = "PATH [--json]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder or hub name")
    add_json_option(parser)


def run(options: Namespace) -> int:
    from optlm.checkpoint import diagnose, exit_code

    faults = diagnose(options.path)
    for fault in faults:
        print(json.dumps(dataclasses.asdict(fault)) if options.json else _line(fault))
    if not options.json:
        print(f"{options.path}: {_count(faults)}")
    return int(exit_code(faults))


def _line(fault: Fault) -> str:
    return f"{fault.severity}: {fault}"


def _count(faults: Sequence[Fault]) -> str:
    counts = [
        f"{number} {kind}{'s' if number > 1 else ''}"
        for kind in ("error", "warning")
        if (number := sum(fault.severity == kind for fault in faults))
    ]
    return ", ".join(counts) or "sound"
