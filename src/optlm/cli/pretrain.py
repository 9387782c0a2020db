"""Train a model from scratch: tokenizer, packed tokens, training, checkpoints.

CONFIG is a JSON file of settings; "model": "125m" in it stands for all settings of that size.
With many processes: torchrun --nproc-per-node N -m optlm pretrain CONFIG --out RUN
--plan works out what a size takes on many GPUs; nothing is trained or measured.

Needs PyTorch: pip install 'optlm[train]'.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import FAILURE, add_device_option, exit_code_of, say
from optlm.errors import ConfigError

if TYPE_CHECKING:
    from optlm.train.parallel import GroupConfig
    from optlm.train.pretrain.recipe import PretrainConfig

USAGE = "CONFIG --out RUN [--data FOLDER] [--tensor-parallel T] | --show SIZE | --plan SIZE"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="JSON file of the settings"
    )
    parser.add_argument("--out", type=Path, help="folder of the run; an unfinished one is resumed")
    parser.add_argument("--data", type=Path, help="folder of the packed tokens (OUT/data)")
    parser.add_argument(
        "--show", metavar="SIZE", help="print the settings of a size (125m ... 175b, mini-8m, tiny)"
    )
    parser.add_argument(
        "--allow-change",
        metavar="NAME",
        nargs="+",
        default=[],
        help="settings that may differ from those the run was begun with, such as loop.steps",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="of the machine, for MFU (measured on a terminal; otherwise MFU is left out)",
    )
    add_device_option(parser)
    group = parser.add_argument_group("many processes")
    group.add_argument(
        "--tensor-parallel", type=int, metavar="T", help="processes that share each matrix (1)"
    )
    group.add_argument(
        "--patience", type=float, metavar="SECONDS", help="give up a process that is silent (60)"
    )
    group.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up one that does not come (1800)"
    )
    planning = parser.add_argument_group("planning (also --tensor-parallel)")
    planning.add_argument("--plan", metavar="SIZE", help="125m ... 175b")
    planning.add_argument("--gpus", type=int, metavar="N", help="(992)")
    planning.add_argument("--tflops", type=float, metavar="X", help="a GPU reaches (147)")
    planning.add_argument("--tokens", type=float, metavar="N", help="to train on (300e9)")
    planning.add_argument("--memory-gb", type=float, metavar="X", help="of a GPU (80)")
    planning.add_argument("--sequences", type=int, metavar="N", help="at once (what fits)")
    planning.add_argument("--scheme", help="what is kept of a weight: optlm or paper (optlm)")
    planning.add_argument("--no-recompute", action="store_true", help="keep all activations")
    planning.add_argument("--json", action="store_true", help="write the plan as JSON")


def run(options: Namespace) -> int | None:
    if options.plan is not None:
        _plan(options)
        return None
    try:
        from optlm.train.parallel import join
        from optlm.train.pretrain.pretrain import pretrain
        from optlm.train.pretrain.recipe import PretrainConfig, changeable, example
    except ModuleNotFoundError as error:
        say(f"error: training needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    if options.show:
        print(json.dumps(example(options.show), indent=2))
        return None
    if options.config is None or options.out is None:
        raise ConfigError("give a file of settings and --out RUN, or --show SIZE for an example")
    settings = PretrainConfig.from_file(options.config)
    try:
        with join(_group(options)) as parallel:
            first = parallel.rank == 0
            pretrain(
                settings,
                options.out,
                data_folder=options.data,
                may_change=changeable(options.allow_change),
                peak_flops=_peak(options, settings, parallel.device) if first else None,
                parallel=parallel,
                log=say if first else lambda message: None,
            )
    except KeyboardInterrupt as interrupt:
        say(f"stopped; the same command resumes from {options.out}")
        return exit_code_of(interrupt)
    return None


def _peak(options: Namespace, settings: PretrainConfig, device: Any) -> float | None:
    """Operations a second of a `torch.device`; measured only for someone who looks on."""
    if options.peak_tflops is not None:
        return float(options.peak_tflops) * 1e12
    if not sys.stderr.isatty():
        return None
    from optlm.train.loop.progress import measured_peak

    peak = measured_peak(settings.precision, device)
    say(f"matrix products in {settings.precision} reach {peak / 1e12:.3g} TFLOP/s on this machine")
    return peak


def _plan(options: Namespace) -> None:
    from dataclasses import asdict

    from optlm.train.pretrain.planner import plan, render, request_for

    names = ("gpus", "tflops", "tokens", "memory_gb", "sequences", "scheme")
    given = {name: getattr(options, name) for name in names} | {"tensor": options.tensor_parallel}
    values = {"gpus": 992, "tflops": 147.0, "tokens": 300e9, "recompute": not options.no_recompute}
    values |= {name: value for name, value in given.items() if value is not None}
    request = request_for(options.plan, **values)
    result = plan(request)
    print(json.dumps(asdict(result)) if options.json else render(request, result))


def _group(options: Namespace) -> GroupConfig:
    from optlm.train.parallel import GroupConfig

    given = {
        "device": options.device,
        "tensor": options.tensor_parallel,
        "patience": options.patience,
        "timeout": options.timeout,
    }
    return GroupConfig(**{name: value for name, value in given.items() if value is not None})
