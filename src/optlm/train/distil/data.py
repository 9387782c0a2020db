"""What a distillation reads: the batches of a pre-training on the teacher's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from optlm.checkpoint import Checkpoint
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.teacher import teacher_tokenizer
from optlm.train.loop.optim import decay_begin
from optlm.train.pretrain.pretrain import training_mixture
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.tokens.packed import prepare

__all__ = ["DistilData", "open_data"]


@dataclass(frozen=True, kw_only=True)
class DistilData:
    """Packed text, and the order in which training sees it.

    Attributes:
        batch: the rows (B, S + 1) of a 0-based step.
        order: all that decides the batches, as JSON values.
    """

    tokenizer: Tokenizer
    batch: Callable[[int], NDArray[np.int64]]
    order: dict[str, Any]


def open_data(
    config: DistilConfig,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    anew: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> DistilData:
    """Pack the text with the teacher's tokenizer in `folder`, or use what is there.

    Args:
        anew: replace data of another configuration or tokenizer, which nothing stands on.

    Raises:
        ConfigError: the folder holds data of another configuration or tokenizer.
        CorpusError: text that is missing, damaged or empty.
        TokenizerError: the teacher's vocabulary files are missing or damaged.
    """
    training = config.training
    tokenizer = teacher_tokenizer(checkpoint)
    manifest = prepare(training.data, folder, tokenizer=tokenizer, anew=anew, log=log)
    mixture = training_mixture(training, folder, manifest)
    return DistilData(tokenizer=tokenizer, batch=mixture.batch, order=_order(training, manifest))


def _order(training: PretrainConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    parts = [
        [p.name, p.weight, p.decay_weight, manifest["parts"][p.name]["sha256"]]
        for p in training.data.parts
    ]
    return {
        "tokenizer": manifest["tokenizer_sha256"],
        "parts": parts,
        "steps": training.loop.steps,
        "late_from": decay_begin(training.loop.optim, training.loop.steps),
        "batch_tokens": training.batch_tokens,
        "sequence_lengths": {str(k): v for k, v in training.sequence_lengths.items()},
        "seed": training.seed,
    }
