"""Merging an adapter into its base for good, with a proof.

Letters: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from optlm.assets import bundled_model
from optlm.checkpoint import open_checkpoint, save_checkpoint
from optlm.checkpoint.adapter import open_adapter
from optlm.checkpoint.merge import merge_adapter
from optlm.checkpoint.save import SAVED_DTYPES
from optlm.checkpoint.staging import staged_folder
from optlm.config import OPTConfig
from optlm.errors import CheckpointError, ConfigError, did_you_mean
from optlm.model import OPT
from optlm.train.finetune.adapters import Adapted, attach_saved
from optlm.train.finetune.examples import Example
from optlm.train.finetune.finetune import stored_dtype
from optlm.train.finetune.packing import Rows, make_rows

__all__ = ["MAX_DRIFT", "MergeReport", "merge"]

# Most that a logit may move, in standard deviations of the logits: float32 differs in the order of
# sums, the others round every merged weight once (bundled model, bf16: 0.004).
MAX_DRIFT = {"f32": 1e-3, "f16": 0.01, "bf16": 0.05}
_CANARIES, _LENGTH = 8, 24


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, and how far the logits of the canaries moved by it."""

    dtype: str
    drift: float  # largest change of a logit over the standard deviation of the logits
    max_drift: float
    untied: bool  # the head got a matrix of its own


def merge(
    model: str | Path | None,
    adapter: str | Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_drift: float | None = None,
    force: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> MergeReport:
    """Write `model` with `adapter` merged as a checkpoint in `out`.

    Canary texts run through the base with the unmerged adapter, and through the files that were
    written; if their logits differ too much, `out` stays as it was.

    Args:
        model: a folder, a hub name, or None for the bundled model.
        dtype: of the file, "f32", "f16" or "bf16"; None keeps the base's.
        max_drift: see `MergeReport.drift`; None takes the bound of the format in MAX_DRIFT.
        force: merge an adapter that was made for another base, if the shapes fit.

    Raises:
        CheckpointError: files that cannot be used or written, or logits that drift.
        ConfigError: an unknown format or a bound that is none.
    """
    if dtype is not None and dtype not in SAVED_DTYPES:
        raise ConfigError(
            f"dtype is {dtype!r}; it must be one of {', '.join(SAVED_DTYPES)}"
            f"{did_you_mean(dtype, SAVED_DTYPES)}"
        )
    if max_drift is not None and not 0 < max_drift < float("inf"):
        raise ConfigError(f"max_drift is {max_drift}; it must be above 0")
    base = open_checkpoint(bundled_model() if model is None else model)
    if out.resolve() == base.folder.resolve():
        raise CheckpointError(f"{out} is the base itself; choose another folder")
    opened = open_adapter(adapter, base, force=force)
    merged = merge_adapter(base, opened)
    dtype = dtype or stored_dtype(base)
    bound = MAX_DRIFT[dtype] if max_drift is None else max_drift
    canaries = _canaries(base.config)
    before = _logits(attach_saved(OPT.from_checkpoint(base.folder), opened), canaries)
    with staged_folder(out) as stage:
        save_checkpoint(
            stage, merged.config, merged.tensors, dtype=dtype, tokenizer_from=base.folder
        )
        after = _logits(Adapted(OPT.from_checkpoint(stage), method="full"), canaries)
        drift = float((after - before).abs().max() / before.std())
        if not drift <= bound:
            raise CheckpointError(
                f"merging {adapter} changes what the model says: logits of the canaries move by "
                f"{drift:.3g} of their standard deviation, the bound for {dtype} is {bound:.3g}. "
                + _advice(dtype)
            )
    untied = merged.config.tie_word_embeddings != base.config.tie_word_embeddings
    if untied:
        log('the head has a matrix of its own now: "tie_word_embeddings" is false in config.json')
    return MergeReport(dtype=dtype, drift=drift, max_drift=bound, untied=untied)


def _advice(dtype: str) -> str:
    if dtype == "f32":
        return "Nothing was written; use the adapter unmerged and report this"
    return "Nothing was written; use dtype f32, or raise max_drift if this rounding is acceptable"


def _canaries(config: OPTConfig) -> Rows:
    """Random tokens behind the start token, always the same."""
    random = np.random.Generator(np.random.Philox(key=np.array([0, 0], dtype=np.uint64)))
    length = min(_LENGTH, config.max_position_embeddings)
    tokens = random.integers(0, config.vocab_size, (_CANARIES, length + 1))
    tokens[:, 0] = config.bos_token_id
    return make_rows([[Example(row)] for row in tokens.tolist()], config.pad_token_id)


@torch.no_grad()
def _logits(model: Adapted, rows: Rows) -> Tensor:
    """(B, T, V)."""
    return model.logits(model.eval().hidden(rows)).float()
