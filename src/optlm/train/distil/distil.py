"""Distillation: a student learns a teacher's predictions, from the teacher itself or its cache.

The loop, the data and the settings are those of pre-training; here are the student's first weights,
the loss, and the finished student's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optlm.checkpoint import Checkpoint
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.distil.data import DistilData, open_data
from optlm.train.distil.divergence import CachedRows, TeacherRows, head_divergence
from optlm.train.distil.hints import HintedOPT, Hints
from optlm.train.distil.narrow import Stream, activation_moments, weight_moments
from optlm.train.distil.on_policy import write_rows
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.student import cut_stream, cut_student, why_no_cut
from optlm.train.distil.teacher import LiveTeacher, open_teacher, states_between, teacher_digest
from optlm.train.distil.teacher_cache import TeacherCache
from optlm.train.distil.weights_of import weights_of
from optlm.train.loop.device import autocast, to_device, training_device
from optlm.train.loop.forward import Forward
from optlm.train.loop.trainer import Loss, Trainer
from optlm.train.parallel.alone import Alone
from optlm.train.pretrain.pretrain import training_flops
from optlm.train.pretrain.validate import Validation
from optlm.train.run.export import MODEL, export_run
from optlm.train.run.folder import RunFolder, claim, data_of
from optlm.train.tokens.packed import TOKENIZER
from optlm.train.tokens.words import WordCounter

__all__ = ["DistilConfig", "cache_claim", "distil", "first_student"]

_CALIBRATION_STEPS = 4  # batches whose activations choose the basis of a narrower student
_EMBEDDING = "model.decoder.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: tokens (B, S + 1), and what goes with them."""

    tokens: Tensor
    cached: CachedRows | None  # the teacher's predictions after each of the B S inputs
    seed: int | None  # of the sampling, if the student shall write these rows itself
    words: int  # that begin in the inputs


def distil(
    config: DistilConfig,
    out: Path,
    *,
    data_folder: Path | None = None,
    cache_folder: Path | None = None,
    device: str = "auto",
    log: Callable[[str], None] = lambda message: None,
) -> Path:
    """Train the student of `config` in the folder `out`, or go on where it stopped.

    Args:
        data_folder: where the packed tokens are, or shall be; `out`/data if None.
        cache_folder: read the teacher's predictions there, and keep no teacher in memory.
        device: of student and teacher: auto, cpu or cuda; see `training_device`.
        log: told about progress, a line at a time.

    Returns:
        The folder of the student with the best validation score, `out`/model.

    Raises:
        CacheError: the cache was made for something else, or is not finished.
        CheckpointError: the teacher's files are missing or damaged.
        ConfigError: `out` or the data folder belongs to another configuration; a student that
            cannot be made; a cache for what needs the teacher itself; no such device.
        CorpusError: text that is missing, damaged or empty.
        TrainingError: another trainer is at work there, the loss is no number, the disk is full.
        KeyboardInterrupt: stopped by a signal, after saving.
    """
    parallel = Alone(training_device(device))
    checkpoint = open_teacher(config.teacher)
    packed, anew = data_of(out, data_folder)
    data = open_data(config, checkpoint, packed, anew=anew, log=log)
    digest = teacher_digest(checkpoint)
    cache = _open_cache(config, cache_folder, digest, data)
    folder = RunFolder(out)
    with folder.locked(_claim(config, digest, data, cache)):
        folder.stand_on(data.order)
        folder.write(TOKENIZER, data.tokenizer.to_str(pretty=True).encode())
        _tell_sizes(config, checkpoint, log)
        student, stream = first_student(config, checkpoint, data)
        trainer = Trainer(
            student,
            config=config.training.loop,
            folder=folder,
            batches=_micro_batches(config, data, cache),
            loss=_loss(config, checkpoint, stream, live=cache is None, device=parallel.device),
            evaluate=Validation(config.training, data.tokenizer),
            half=config.training.precision == "f16",
            flops_per_token=training_flops(
                config.training.model, max(config.training.sequence_lengths)
            ),
            parallel=parallel,
            log=log,
        )
        trainer.run()
        stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
        export_run(
            out,
            out / MODEL,
            dtype="f32" if stored == {"F32"} else "bf16",  # as the teacher's files have it
            untrained=student.state_dict(),
            tokenizer_from=checkpoint.folder,
        )
        return out / MODEL


def cache_claim(config: DistilConfig, digest: str, data: DistilData) -> dict[str, Any]:
    """What a teacher cache must have been made for to serve this distillation."""
    return {
        "technique": "teacher-cache",
        "teacher": digest,
        "data_order": data.order,
        "temperature": config.terms.temperature,
    }


def _open_cache(
    config: DistilConfig, folder: Path | None, digest: str, data: DistilData
) -> TeacherCache | None:
    if folder is None or not config.terms.divergences:
        return None
    if config.hidden:
        raise ConfigError("a teacher cache holds predictions, no states; losses.hidden needs none")
    if config.on_policy:
        raise ConfigError(
            "a teacher cache knows the corpus only; on_policy needs the teacher itself"
        )
    return TeacherCache(folder, cache_claim(config, digest, data))


def _claim(
    config: DistilConfig, digest: str, data: DistilData, cache: TeacherCache | None
) -> dict[str, Any]:
    return claim(
        "distil",
        config.training,
        teacher=digest,
        tokenizer=data.order["tokenizer"],
        student=dataclasses.asdict(config.student),
        losses=dataclasses.asdict(config.terms),
        hidden=config.hidden and dataclasses.asdict(config.hidden),
        on_policy=config.on_policy and dataclasses.asdict(config.on_policy),
        cache=cache and cache.digest,
    )


def _tell_sizes(config: DistilConfig, checkpoint: Checkpoint, log: Callable[[str], None]) -> None:
    students = config.training.model.parameter_count()
    teachers = checkpoint.config.parameter_count()
    larger = "; the student is the larger one" if students > teachers else ""
    log(f"student of {students:,} parameters, teacher of {teachers:,}{larger}")


# ---- the student's first weights ----------------------------------------------------------------


def first_student(
    config: DistilConfig, checkpoint: Checkpoint, data: DistilData
) -> tuple[OPT, Stream | None]:
    """The student before its training, and how its stream stands for the teacher's if it was cut.

    Raises:
        ConfigError: its shape cannot be cut from the teacher's, or cannot share its embedding.
    """
    shape, teacher = config.training.model, checkpoint.config
    weights = weights_of(checkpoint)
    torch.manual_seed(config.training.seed)
    learned = config.hidden is not None and config.hidden.projection == "learned"
    student = (
        HintedOPT(shape, teacher.hidden_size, len(config.hidden.pairs))
        if config.hidden and learned
        else OPT(shape)
    )
    stream = None
    if config.student.init == "teacher":
        if why_no_cut(teacher, shape, config.student.layers) is None:
            stream = cut_stream(teacher, shape, _moments(config, checkpoint, data))
        else:
            stream = Stream(basis=None, folded=False)  # `cut_student` says why not
        state = cut_student(teacher, shape, weights, stream=stream, layers=config.student.layers)
        student.load_state_dict(state, strict=not learned)
    if config.student.embedding != "own":
        if shape.embed_dim != teacher.embed_dim:
            raise ConfigError(
                f"student.embedding is {config.student.embedding!r}: word_embed_proj_dim must be "
                f"the teacher's {teacher.embed_dim}, not {shape.embed_dim}"
            )
        with torch.no_grad():
            student.decoder.embed_tokens.weight.copy_(weights(_EMBEDDING))
        frozen = config.student.embedding == "frozen"
        student.decoder.embed_tokens.weight.requires_grad_(not frozen)
    return student, stream


def _moments(config: DistilConfig, checkpoint: Checkpoint, data: DistilData) -> Tensor | None:
    """What the basis of a narrower stream shall keep; None where the width stays."""
    if config.training.model.hidden_size == checkpoint.config.hidden_size:
        return None
    if config.student.basis == "weights":
        return weight_moments(checkpoint.config, weights_of(checkpoint))
    steps = range(min(_CALIBRATION_STEPS, config.training.loop.steps))
    rows: Iterable[Tensor] = (torch.from_numpy(data.batch(step)[:, :-1]) for step in steps)
    return activation_moments(_in_memory(checkpoint), rows)


def _in_memory(checkpoint: Checkpoint) -> OPT:
    with torch.device("meta"):
        model = OPT(checkpoint.config)
    weights = weights_of(checkpoint)
    model.load_state_dict({name: weights(name) for name in checkpoint.tensors}, assign=True)
    return model.eval()


# ---- batches and loss ---------------------------------------------------------------------------


def _micro_batches(
    config: DistilConfig, data: DistilData, cache: TeacherCache | None
) -> Callable[[int], list[Batch]]:
    training, on_policy = config.training, config.on_policy
    words = WordCounter(data.tokenizer)

    def micro_batches(step: int) -> list[Batch]:
        rows = data.batch(step)
        cached = cache.step(step, rows) if cache else None
        length = rows.shape[1] - 1
        together = training.micro_batch_tokens // length
        draw = np.random.Generator(
            np.random.Philox(key=np.array([training.seed, step], dtype=np.uint64), counter=1 << 64)
        )
        own = on_policy is not None and draw.random() < on_policy.share
        return [
            Batch(
                tokens=torch.from_numpy(rows[at : at + together]),
                cached=cached and _part(cached, slice(at * length, (at + together) * length)),
                seed=int(draw.integers(2**63)) if own else None,
                words=words.count(rows[at : at + together, :-1]),
            )
            for at in range(0, len(rows), together)
        ]

    return micro_batches


def _part(rows: CachedRows, part: slice) -> CachedRows:
    return CachedRows(ids=rows.ids[part], logs=rows.logs[part], rest=rows.rest[part])


def _loss(
    config: DistilConfig,
    checkpoint: Checkpoint,
    stream: Stream | None,
    *,
    live: bool,
    device: torch.device,
) -> Callable[[OPT, Batch], Loss]:
    stream = to_device(stream, device)
    hints = config.hidden and Hints(config.hidden, config.training.model, checkpoint.config, stream)
    wants_teacher = hints is not None or (live and bool(config.terms.divergences))
    teacher = LiveTeacher(_in_memory(checkpoint).to(device)) if wants_teacher else None

    def loss(model: OPT, batch: Batch) -> Loss:
        with autocast(config.training.precision, batch.tokens.device):
            return _batch_loss(config, model, teacher, hints or None, batch)

    return loss


def _batch_loss(
    config: DistilConfig,
    model: OPT,
    teacher: LiveTeacher | None,
    hints: Hints | None,
    batch: Batch,
) -> Loss:
    tokens, terms, counted = batch.tokens, config.terms, None
    if batch.seed is not None and config.on_policy:
        prompt = config.on_policy.prompt_tokens
        tokens = write_rows(
            model,
            tokens[:, :prompt],
            tokens.shape[1],
            temperature=config.on_policy.temperature,
            seed=batch.seed,
        )
        terms = dataclasses.replace(terms, labels=0.0)  # what it wrote is no right answer
        counted = slice(prompt - 1, None)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    training = config.training
    forward = Forward(recompute=training.recompute_activations, compiled=training.compile)
    with states_between(model, hints.student_layers if hints else ()) as states:
        hidden, sizes = forward(model, inputs)
    rows: TeacherRows | None = batch.cached
    teachers: dict[int, Tensor] = {}
    if teacher is not None:
        rows, teachers = teacher.read(
            inputs, terms.temperature, hints.teacher_layers if hints else (), counted
        )
    if counted is not None:
        hidden, targets = hidden[:, counted], targets[:, counted]
    targets = targets.reshape(-1)
    total = head_divergence(
        hidden.flatten(0, 1), model.head_weight, targets, teacher=rows, terms=terms
    )
    if hints is not None:
        total = total + hints.distance(model, states, teachers)
    return Loss(total, len(targets), words=batch.words, activations=sizes)
