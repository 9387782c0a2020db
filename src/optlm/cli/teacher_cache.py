"""Write a teacher's predictions for the batches of a distillation to disk.

`optlm distil CONFIG --cache FOLDER` then needs no teacher in memory. The
same command goes on where it was stopped. Needs PyTorch: pip install
'optlm[train]'.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from optlm.cli.common import FAILURE, add_device_option, exit_code_of, say

USAGE = "CONFIG --out CACHE [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=Path, help="settings of the distillation")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--data", type=Path, help="folder of the packed tokens (OUT/data)")
    parser.add_argument(
        "--top-k", type=int, default=64, help="likeliest tokens kept of each prediction (64)"
    )
    parser.add_argument(
        "--precision", default="f32", help="of the kept log-probabilities: f32 or f16 (f32)"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell the size on disk and stop")
    group = parser.add_argument_group("teacher")
    group.add_argument("--dtype", default="auto", help="its weights: auto, f32, f16, bf16 or int8")
    group.add_argument("--backend", default="auto", help="auto, native or torch (auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (all cores)")
    add_device_option(group)


def run(options: Namespace) -> int | None:
    try:
        from optlm.train.distil.fill_cache import DistilConfig, EngineOptions, cache_teacher
    except ModuleNotFoundError as error:
        say(f"error: training needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    settings = DistilConfig.from_file(options.config)
    engine = EngineOptions(
        dtype=options.dtype,
        backend=options.backend,
        threads=options.threads,
        device=options.device,
    )
    try:
        cache_teacher(
            settings,
            options.out,
            data_folder=options.data,
            top_k=options.top_k,
            precision=options.precision,
            engine=engine,
            dry_run=options.dry_run,
            log=say,
        )
    except KeyboardInterrupt as interrupt:
        say(f"stopped; the same command goes on in {options.out}")
        return exit_code_of(interrupt)
    return None
