"""The first phase of a distillation: the teacher reads every batch once, into its cache."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from optlm.train.distil.data import open_data
from optlm.train.distil.distil import cache_claim
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.teacher import open_teacher, teacher_digest
from optlm.train.distil.teacher_cache import CacheFormat, write_cache
from optlm.train.distil.teacher_engine import EngineTeacher
from optlm.train.loop.device import training_device
from optlm.train.run.folder import TrainingError, data_of

__all__ = ["DistilConfig", "EngineOptions", "cache_teacher"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine runs the teacher; see `optlm.LLM`."""

    dtype: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    device: str = "auto"  # or cpu, or cuda, which PyTorch's backend has


def cache_teacher(
    config: DistilConfig,
    out: Path,
    *,
    data_folder: Path | None = None,
    top_k: int = 64,
    precision: str = "f32",
    engine: EngineOptions | None = None,
    dry_run: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> CacheFormat:
    """Write the teacher's predictions for the whole training of `config`, or what is missing of it.

    Args:
        data_folder: where the packed tokens are, or shall be; `out`/data if None.
        top_k: tokens listed of each prediction; the others are one mass.
        dry_run: tell the size and write nothing but the packed tokens.

    Raises:
        CheckpointError: the teacher's files are missing or damaged.
        ConfigError: values out of range; the folder holds another cache; no such device.
        TrainingError: not enough room on the disk, or another process at work there.
    """
    engine = engine or EngineOptions()
    training_device(engine.device)  # refused before anything is read
    checkpoint = open_teacher(config.teacher)
    form = CacheFormat(
        top_k=top_k,
        precision=precision,
        vocab_size=checkpoint.config.vocab_size,
        steps=config.training.loop.steps,
        batch_tokens=config.training.batch_tokens,
    )
    free = _free_bytes(out)
    log(
        f"{form.steps * form.batch_tokens:,} predictions with the {top_k} likeliest tokens of each "
        f"in {precision}: {form.total_bytes / 1e6:,.1f} MB in {form.shards} shards; "
        f"{free / 1e6:,.0f} MB are free"
    )
    if dry_run:
        return form
    packed, anew = data_of(out, data_folder)
    data = open_data(config, checkpoint, packed, anew=anew, log=log)
    written = sum(file.stat().st_size for file in out.glob("shard-*.topk"))
    if free < form.total_bytes - written:
        raise TrainingError(
            f"the cache needs {form.total_bytes - written:,} more bytes, {out} has {free:,} free; "
            "make room, or take a smaller --top-k or --precision f16"
        )
    claim = cache_claim(config, teacher_digest(checkpoint), data)
    teacher = EngineTeacher(
        checkpoint,
        temperature=config.terms.temperature,
        dtype=engine.dtype,
        backend=engine.backend,
        threads=engine.threads,
        device=None if engine.device == "auto" else engine.device,
    )
    numbers = {"dtype": engine.dtype, "backend": engine.backend}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("teacher reads", total=form.steps)
        write_cache(
            out,
            {**claim, "format": asdict(form), "engine": numbers},
            form,
            batch=data.batch,
            teacher=teacher,
            progress=lambda steps: bar.update(task, completed=steps),
            log=log,
        )
    log(f"the cache in {out} is whole")
    return form


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
