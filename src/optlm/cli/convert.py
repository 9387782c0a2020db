"""Rewrite a checkpoint of any layout in Hugging Face's, with its tokenizer.

With --packed the weights are written as the engine runs them: such a folder
loads in milliseconds, in that format only.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optlm.cli.common import say, usage_error
from optlm.errors import BackendError

if TYPE_CHECKING:
    from optlm.checkpoint import Checkpoint

USAGE = "SOURCE OUT [--dtype DTYPE] [--packed]"
_PACKED_DTYPES = ("f32", "f16", "bf16", "int8")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder or hub name")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", help="f32, f16 or bf16 (default: as stored); with --packed also int8"
    )
    parser.add_argument("--packed", action="store_true", help="write the form the engine maps")


def run(options: Namespace) -> None:
    from optlm.checkpoint import open_checkpoint, save_checkpoint
    from optlm.checkpoint.packed import check_packed_target
    from optlm.checkpoint.staging import check_target

    if options.packed and options.dtype not in _PACKED_DTYPES:
        raise usage_error(f"--packed needs --dtype with one of {', '.join(_PACKED_DTYPES)}")
    (check_packed_target if options.packed else check_target)(options.out)
    checkpoint = open_checkpoint(options.source)
    if options.packed:
        _pack(checkpoint, options.out, options.dtype)
    else:
        save_checkpoint(
            options.out,
            checkpoint.config,
            checkpoint.tensors,
            dtype=options.dtype,
            tokenizer_from=checkpoint.folder,
        )
    say(f"wrote {options.out}")


def _pack(checkpoint: Checkpoint, out: Path, dtype: str) -> None:
    try:
        from optlm.engine.native_runner import pack
    except ImportError:
        raise BackendError(
            "packing needs optlm's compiled core; reinstall optlm with a C++20 compiler"
        ) from None
    pack(checkpoint, out, dtype)
