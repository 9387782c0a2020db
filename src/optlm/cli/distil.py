"""Train a small model to predict as a large one does.

The settings are those of pretrain with teacher, student and losses; see
docs/distillation.md. Needs PyTorch: pip install 'optlm[train]'.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optlm.cli.common import FAILURE, add_device_option, exit_code_of, say

if TYPE_CHECKING:
    from optlm.train.distil.distil import DistilConfig

USAGE = "CONFIG --out RUN [options]"
CONTROL = "control"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="JSON file of the settings")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an unfinished one is resumed"
    )
    parser.add_argument("--data", type=Path, help="folder of the packed tokens (OUT/data)")
    parser.add_argument(
        "--cache", type=Path, help="read the teacher here (made by optlm teacher-cache)"
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="then train the same student without the teacher (in OUT/control)",
    )
    parser.add_argument(
        "--no-report", action="store_true", help="leave out the comparison, which loads the teacher"
    )
    add_device_option(parser)


def run(options: Namespace) -> int | None:
    try:
        from optlm.train.distil.distil import DistilConfig
    except ModuleNotFoundError as error:
        say(f"error: training needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    settings = DistilConfig.from_file(options.config)
    try:
        _work(settings, options)
    except KeyboardInterrupt as interrupt:
        say(f"stopped; the same command resumes from {options.out}")
        return exit_code_of(interrupt)
    return None


def _work(settings: DistilConfig, options: Namespace) -> None:
    from optlm.train.distil.distil import distil
    from optlm.train.distil.report import write_report

    shared = {"data_folder": options.data or options.out / "data", "device": options.device}
    models = {
        "student": distil(settings, options.out, cache_folder=options.cache, **shared, log=say)
    }
    if options.control:
        say("now the same student without the teacher")
        models["student without teacher"] = distil(
            settings.control, options.out / CONTROL, **shared, log=say
        )
    if not settings.training.data.validation:
        say("no report: data.validation names no held-out text")
    elif not options.no_report:
        print(write_report(settings, options.out, models, device=options.device, log=say))
    say(f"the student is in {models['student']}")
