"""Pre-training from text files to a model, on one machine: what `optlm pretrain` runs.

Prepares the data (tokenizer, packed tokens) in RUN/data unless told otherwise, trains, and resumes
by itself when RUN already holds the same configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from optlm.config import OPTConfig
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.loop.device import autocast, training_device
from optlm.train.loop.forward import Forward
from optlm.train.loop.loss import head_cross_entropy
from optlm.train.loop.optim import decay_begin
from optlm.train.loop.trainer import Loss, Trainer
from optlm.train.parallel.alone import Alone
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.pretrain.validate import Validation
from optlm.train.run.export import MODEL, export_run
from optlm.train.run.folder import RunFolder, claim, data_of
from optlm.train.tokens.packed import TOKENIZER, Mixture, TokenSet, prepare
from optlm.train.tokens.words import WordCounter

__all__ = ["PretrainConfig", "pretrain", "training_flops", "training_mixture"]


class Rows(NamedTuple):
    """Rows of one micro-batch: tokens (B, S + 1), inputs and targets overlapping by S."""

    tokens: torch.Tensor
    words: int


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    data_folder: Path | None = None,
    may_change: Collection[str] = (),
    also: Callable[[OPT], dict[str, Any]] = lambda model: {},
    peak_flops: float | None = None,
    parallel: Alone | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> OPT:
    """Train the model of `config` in the folder `out`, or go on where it stopped.

    At the end `out`/model holds the best averaged weights in float32, as they were judged.

    Args:
        data_folder: where the packed tokens are, or shall be; `out`/data if None.
        may_change: dotted names of settings that may differ from those the run was begun with.
        also: gives more figures of a model for every evaluation.
        peak_flops: of the machine, a second; progress and log then tell the share that is used.
        parallel: the processes that train together, and their devices (`optlm.train.parallel`);
            None: this one, on a GPU if there is one.
        log: told about progress, a line at a time.

    Returns:
        The averaged model after the last step (without averaging: the model); of many processes,
        each returns one that holds its pieces.

    Raises:
        ConfigError: `out` or the data folder belongs to another configuration.
        CorpusError: text that is missing, damaged or empty.
        TrainingError: another trainer is at work there, the loss is no number, the disk is full.
        KeyboardInterrupt: stopped by a signal, after saving.
    """
    parallel = parallel or Alone(training_device())
    wanted = claim("pretrain", config)
    with parallel.holding(RunFolder(out), wanted, may_change=may_change) as folder:
        packed, anew = data_of(out, data_folder)
        manifest = parallel.first(lambda: prepare(config.data, packed, anew=anew, log=log))
        folder.stand_on(_hashes(manifest))
        tokenizer_json = (packed / TOKENIZER).read_bytes()
        folder.write(TOKENIZER, tokenizer_json)
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        judge = Validation(config, tokenizer)
        mixture = training_mixture(config, packed, manifest)
        torch.manual_seed(config.seed)
        trainer = Trainer(
            OPT(config.model),
            config=config.loop,
            folder=folder,
            batches=_micro_batches(config, mixture, WordCounter(tokenizer), parallel.groups),
            loss=_loss(config),
            evaluate=lambda model: judge(model) | also(model),
            describe=lambda step: _describe(config, mixture, step),
            half=config.precision == "f16",
            flops_per_token=training_flops(config.model, max(config.sequence_lengths)),
            peak_flops=peak_flops,
            parallel=parallel,
            log=log,
        )
        trainer.run()
        if folder.writes:
            step = export_run(out, out / MODEL, dtype="f32")
            log(f"the model of step {step} is in {out / MODEL}; optlm generate --model {out}")
        return trainer.average


def training_flops(model: OPTConfig, length: int) -> float:
    """Floating-point operations for one predicted token of rows of `length`, forward and backward.

    Twice the forward pass for the backward pass; a token attends to half of the row on average.
    """
    return 3.0 * model.flops_per_token(length // 2)


def _hashes(manifest: dict[str, Any]) -> dict[str, Any]:
    parts = {name: part["sha256"] for name, part in manifest["parts"].items()}
    return {"tokenizer": manifest["tokenizer_sha256"], "parts": parts}


def training_mixture(config: PretrainConfig, folder: Path, manifest: dict[str, Any]) -> Mixture:
    """The batches of a training, from packed tokens."""
    parts = config.data.parts
    return Mixture(
        [TokenSet(folder, p.name, manifest["parts"][p.name]["tokens"]) for p in parts],
        [p.weight for p in parts],
        late_weights=[p.weight if p.decay_weight is None else p.decay_weight for p in parts],
        late_from=decay_begin(config.loop.optim, config.loop.steps),
        batch_tokens=config.batch_tokens,
        sequence_lengths=config.sequence_lengths,
        seed=config.seed,
    )


def _micro_batches(
    config: PretrainConfig, mixture: Mixture, words: WordCounter, groups: int
) -> Callable[[int], list[Rows]]:
    """Micro-batches whose number is a multiple of `groups`, the processes that read different rows.

    They are those of one process if that number is a multiple anyway, else smaller.
    """

    def micro_batches(step: int) -> list[Rows]:
        tokens = mixture.batch(step)
        together = config.micro_batch_tokens // (tokens.shape[1] - 1)
        count = -(-len(tokens) // together)
        if count % groups == 0:
            pieces = [tokens[at : at + together] for at in range(0, len(tokens), together)]
        elif (count := -(-count // groups) * groups) <= len(tokens):
            pieces = np.array_split(tokens, count)
        else:
            raise ConfigError(
                f"the {len(tokens)} rows of step {step} (batch_tokens {config.batch_tokens}) "
                f"cannot be shared out over {groups} data-parallel processes, as many "
                "micro-batches to each; take fewer, a larger batch or shorter sequences"
            )
        return [Rows(torch.from_numpy(piece), words.count(piece[:, :-1])) for piece in pieces]

    return micro_batches


def _describe(config: PretrainConfig, mixture: Mixture, step: int) -> dict[str, Any]:
    """Where the rows of a step lie: part, and the index of the drawn token in that part."""
    length, places = mixture.places(step)
    rows = [[config.data.parts[part].name, at] for part, at in places]
    return {"length": length, "rows": rows}


def _loss(config: PretrainConfig) -> Callable[[OPT, Rows], Loss]:
    forward = Forward(recompute=config.recompute_activations, compiled=config.compile)

    def loss(model: OPT, rows: Rows) -> Loss:
        targets = rows.tokens[:, 1:].reshape(-1)
        with autocast(config.precision, rows.tokens.device):
            hidden, sizes = forward(model, rows.tokens[:, :-1])
            total = head_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets)
        return Loss(total, len(targets), words=rows.words, activations=sizes)

    return loss
