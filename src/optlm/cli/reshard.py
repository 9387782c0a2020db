"""Cut weights anew: distributed checkpoints to one file, or one file to many.

SOURCE is a distributed checkpoint (RUN/step-00000012.parts), or any checkpoint.
Without options OUT gets one model.safetensors in Hugging Face's layout. Memory
is bounded by the largest tensor, and every tensor is compared by its sha256.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from time import monotonic

from optlm.cli.common import add_json_option, say, usage_error

USAGE = "SOURCE OUT [--processes N] [--tensor-parallel T] [--weights WHICH] [--json]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of the weights")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="one file for each of N processes (one file)"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, metavar="T", help="processes that share each matrix (1)"
    )
    parser.add_argument(
        "--weights", help="average or model, of a training checkpoint (average if there is one)"
    )
    add_json_option(parser)


def run(options: Namespace) -> None:
    from optlm.checkpoint.layout import Grid
    from optlm.checkpoint.reshard import reshard

    tensor, processes = options.tensor_parallel, options.processes
    if tensor is not None and processes is None:
        raise usage_error("--tensor-parallel needs --processes, the number of files to write")
    grid = None
    if processes is not None:
        tensor = 1 if tensor is None else tensor
        if processes < 1 or tensor < 1 or processes % tensor:
            raise usage_error(
                f"--processes {processes} must be a multiple of --tensor-parallel {tensor}, "
                "and both at least 1"
            )
        grid = Grid(data=processes // tensor, tensor=tensor)
    started = monotonic()
    done = reshard(options.source, options.out, grid=grid, weights=options.weights, progress=_show)
    if options.json:
        import dataclasses
        import json

        for each in done:
            print(json.dumps(dataclasses.asdict(each)))
    say(
        f"wrote {options.out}: {len(done)} tensors in {processes or 1} "
        f"file{'s' if (processes or 1) > 1 else ''}, {monotonic() - started:.1f} s; the sha256 of "
        "each equals the source's"
    )


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\roptlm: compared {done} of {total} tensors", end=end, file=sys.stderr, flush=True)
