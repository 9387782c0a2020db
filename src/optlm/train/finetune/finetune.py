"""Fine-tuning: all weights, low-rank changes, or virtual tokens, on one machine.

The folder of a run holds the best result where every command finds it, and the last:

    OUT/adapter_model.safetensors ...   with "full": OUT/model.safetensors, a whole checkpoint
    OUT/last/                           the same of the last step
    OUT/run.json, step-*.pt, log.jsonl  what resumes the run
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optlm.assets import bundled_model
from optlm.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from optlm.checkpoint.fingerprint import fingerprint
from optlm.checkpoint.save import SAVED_DTYPES
from optlm.config import OPTConfig
from optlm.errors import CheckpointError, ConfigError, did_you_mean
from optlm.model import OPT
from optlm.tokenizer import Tokenizer
from optlm.train.finetune.adapters import METHODS, Adapted, AdapterConfig, attach, save_adapter
from optlm.train.finetune.examples import Example, read_examples
from optlm.train.finetune.forgetting import ForgettingMeter, own_texts
from optlm.train.finetune.packing import PackedBatches, Rows, make_rows
from optlm.train.loop.device import autocast, to_device, training_device
from optlm.train.loop.optim import OptimConfig
from optlm.train.loop.state import load_trained_state
from optlm.train.loop.trainer import LoopConfig, Loss, Trainer
from optlm.train.parallel.alone import Alone
from optlm.train.run.export import writing
from optlm.train.run.folder import RunFolder, claim

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune", "stored_dtype"]

LEARNING_RATES = {"full": 1e-5, "lora": 2e-4, "prefix": 2e-3, "prompt": 5e-3}
_HELD_OUT_LIMIT = 64  # examples held out when no file is given


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that decides the bits of a fine-tuned model, but for the model and the data.

    Raises:
        ConfigError: values out of range or in contradiction with each other.
    """

    method: str = "lora"
    adapter: AdapterConfig | None = None  # None: the method's defaults; none with "full"
    max_steps: int = 200
    learning_rate: float | None = None  # None: that of the method in LEARNING_RATES
    warmup_steps: int | None = None  # None: a twentieth of the steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batch_tokens: int = 2048  # inputs of a step, padding included
    micro_batch_tokens: int = 2048  # of them at once in memory
    seq_len: int | None = None  # inputs of a row; None: 512 or the context
    on_long: str = "error"  # pairs longer than that; or "truncate_prompt"
    held_out_share: float = 0.05  # of the examples, when no held-out file is given
    evaluate_every: int | None = None  # None: a tenth of the steps
    patience: int | None = 5  # evaluations without a better held-out loss until the run stops
    precision: str = "f32"  # of the matrix products; or "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        methods = ("full", *METHODS)
        if self.method not in methods:
            raise ConfigError(
                f"method is {self.method!r}; it must be one of {', '.join(methods)}"
                f"{did_you_mean(str(self.method), methods)}"
            )
        if self.method == "full" and self.adapter is not None:
            raise ConfigError("method 'full' trains all weights and takes no settings of adapters")
        if self.method != "full":
            adapter = self.adapter or AdapterConfig(method=self.method)
            if adapter.method != self.method:
                raise ConfigError(f"method {self.method!r} has the settings of {adapter.method!r}")
            object.__setattr__(self, "adapter", adapter)
        if self.precision not in ("f32", "bf16"):
            raise ConfigError(f"precision is {self.precision!r}; use 'f32' or 'bf16'")
        if not 0.0 < self.held_out_share < 1.0:
            raise ConfigError(f"held_out_share is {self.held_out_share}; it must lie in (0, 1)")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must lie between 0 and 2^63 - 1")
        for name in ("batch_tokens", "micro_batch_tokens", "seq_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        self.loop()

    def loop(self) -> LoopConfig:
        """The schedule: warm-up, then a line to a tenth of the rate."""
        steps = self.max_steps
        rate = LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
        every = self.evaluate_every
        every = max(1, steps // 10) if every is None and isinstance(steps, int) else every
        warmup = self.warmup_steps
        return LoopConfig(
            steps=steps,
            log_every=1,
            evaluate_every=1 if every is None else every,
            checkpoint_every=1 if every is None else every,
            average_decay=0.0,
            patience=self.patience,
            optim=OptimConfig(
                learning_rate=rate,
                warmup_steps=steps // 20 if warmup is None else warmup,
                beta2=0.999,
                weight_decay=self.weight_decay,
                clip_norm=self.clip_norm,
            ),
        )

    def row_tokens(self, config: OPTConfig) -> int:
        """Inputs of a row on a model.

        Raises:
            ConfigError: rows beyond the context, or a batch below one row.
        """
        context = config.max_position_embeddings
        length = min(512, context) if self.seq_len is None else self.seq_len
        if length > context:
            raise ConfigError(f"seq_len is {length}; the context of the model is {context}")
        for name in ("batch_tokens", "micro_batch_tokens"):
            if getattr(self, name) < length:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must hold a row of seq_len {length}"
                )
        return length


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """How a run ended. Losses are nats a predicted token of the held-out examples."""

    step: int  # the last
    best_step: int
    best_loss: float
    base_loss: float
    kl_to_base: float  # of the best, on neutral text


def finetune(
    model: str | Path | None,
    data: Path,
    out: Path,
    config: FinetuneConfig,
    *,
    valid: Path | None = None,
    neutral: Path | None = None,
    device: str = "auto",
    log: Callable[[str], None] = lambda message: None,
) -> FinetuneResult:
    """Fine-tune `model` on the file `data` into the folder `out`, or go on where it stopped.

    Args:
        model: a folder, a hub name, or None for the bundled model.
        valid: held-out examples; None holds out a share of `data`.
        neutral: text on which forgetting is measured; None lets the base write some.
        device: auto, cpu or cuda; see `training_device`.
        log: told about progress, a line at a time.

    Raises:
        ExamplesError: data that is missing, broken, masked or too long.
        ConfigError: settings that do not fit the model; `out` belongs to another run; no such
            device.
        CheckpointError: the model cannot be used.
        TrainingError: another trainer is at work there, the loss is no number, the disk is full.
        KeyboardInterrupt: stopped by a signal, after saving.
    """
    parallel = Alone(training_device(device))
    checkpoint = open_checkpoint(bundled_model() if model is None else model)
    if checkpoint.packed is not None:
        raise CheckpointError(
            f"{checkpoint.folder} holds packed weights; fine-tune the checkpoint they came from"
        )
    name = None if model is None else str(model)
    job = _Job(checkpoint, config, name=name, parallel=parallel, log=log)
    train, held_out = job.examples(data, valid)
    texts = None if neutral is None else job.read(neutral)
    base = fingerprint(checkpoint.config, checkpoint.tensors)
    folder = RunFolder(out)
    with folder.locked(claim("finetune", config, base=base, data=_digest(train, held_out, texts))):
        return job.run(folder, base, train, held_out, texts)


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: FinetuneConfig,
        *,
        name: str | None,
        parallel: Alone,
        log: Callable[[str], None],
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.name = name
        self.parallel = parallel
        self.log = log
        self.length = config.row_tokens(checkpoint.config)
        self.tokenizer = Tokenizer.from_folder(checkpoint.folder, checkpoint.config)
        if config.adapter is not None:
            config.adapter.check_base(checkpoint.config)

    # ---- data ----------------------------------------------------------------------------------

    def read(self, path: Path) -> list[Example]:
        examples, report = read_examples(
            path, self.tokenizer, length=self.length, on_long=self.config.on_long
        )
        self.log(f"{path.name}: {report.summary()}")
        return examples

    def examples(self, data: Path, valid: Path | None) -> tuple[list[Example], list[Example]]:
        """Examples to train on, and held-out ones."""
        examples = self.read(data)
        if valid is not None:
            return examples, self.read(valid)
        if len(examples) < 2:
            self.log("a single example: the held-out loss is that of the training data")
            return examples, examples
        share = round(len(examples) * self.config.held_out_share)
        count = min(max(1, share), _HELD_OUT_LIMIT)
        key = np.array([self.config.seed, 2**63], dtype=np.uint64)  # of no epoch
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(examples))
        held = set(order[:count].tolist())
        self.log(f"held out {count} of {len(examples)} examples")
        return (
            [e for i, e in enumerate(examples) if i not in held],
            [e for i, e in enumerate(examples) if i in held],
        )

    # ---- training ------------------------------------------------------------------------------

    def run(
        self,
        folder: RunFolder,
        base: dict[str, str],
        train: list[Example],
        held_out: list[Example],
        texts: list[Example] | None,
    ) -> FinetuneResult:
        config = self.config
        batches = self._batches(train)
        model = OPT.from_checkpoint(self.checkpoint.folder).to(self.parallel.device)
        untouched = Adapted(model, method="full")
        meter = ForgettingMeter(untouched, texts or own_texts(model, seed=config.seed))
        held_rows = self._rows(held_out)
        base_loss = _mean_loss(untouched, held_rows)
        self.log(f"held-out loss of the base: {base_loss:.4f} nats a token")
        torch.manual_seed(config.seed)

        def evaluate(adapted: Adapted) -> dict[str, Any]:
            loss = _mean_loss(adapted, held_rows)
            return {"score": loss, "base_score": base_loss, "kl_to_base": meter(adapted)}

        trainer = Trainer(
            self._adapted(model, train),
            config=config.loop(),
            folder=folder,
            batches=batches.batch,
            loss=self._loss,
            evaluate=evaluate,
            parallel=self.parallel,
            log=self.log,
        )
        trainer.run()
        self._export(folder.path / "last", trainer.model, base)
        load_trained_state(trainer.model, folder.load(trainer.best[1])["model"])
        self._export(folder.path, trainer.model, base)
        return self._result(trainer.step, trainer.best, base_loss, meter(trainer.model))

    def _batches(self, train: list[Example]) -> PackedBatches:
        return PackedBatches(
            train,
            row_tokens=self.length,
            batch_rows=self.config.batch_tokens // self.length,
            micro_rows=self.config.micro_batch_tokens // self.length,
            pad=self.checkpoint.config.pad_token_id,
            seed=self.config.seed,
        )

    def _rows(self, examples: list[Example]) -> list[Rows]:
        """Micro-batches of one example a row, those of a length together."""
        ordered = sorted(examples, key=lambda example: example.length)
        size = max(1, self.config.micro_batch_tokens // self.length)
        pad = self.checkpoint.config.pad_token_id
        return [
            make_rows([[example] for example in ordered[at : at + size]], pad)
            for at in range(0, len(ordered), size)
        ]

    def _adapted(self, model: OPT, train: list[Example]) -> Adapted:
        adapter = self.config.adapter
        if adapter is None:
            return Adapted(model.requires_grad_(True), method="full")
        text = [token for example in train for token in example.tokens[1:]]
        text = (text * -(-adapter.virtual_tokens // len(text)))[: adapter.virtual_tokens]
        return attach(model, adapter, torch.tensor(text, device=self.parallel.device))

    def _loss(self, adapted: Adapted, rows: Rows) -> Loss:
        with autocast(self.config.precision, rows.tokens.device):
            return adapted.loss(rows)

    # ---- results -------------------------------------------------------------------------------

    def _export(self, folder: Path, adapted: Adapted, base: dict[str, str]) -> None:
        with writing(folder):
            if self.config.adapter is not None:
                save_adapter(
                    folder,
                    adapted,
                    self.config.adapter,
                    base_fingerprint=base,
                    base_name=self.name,
                )
                return
            save_checkpoint(
                folder,
                self.checkpoint.config,
                {name: weight.cpu().numpy() for name, weight in adapted.base.state_dict().items()},
                dtype=stored_dtype(self.checkpoint),
                tokenizer_from=self.checkpoint.folder,
            )

    def _result(
        self, step: int, best: tuple[float, int], base_loss: float, kl: float
    ) -> FinetuneResult:
        if not best[0] < base_loss:
            self.log(
                f"warning: no step was better than the base (held-out loss {best[0]:.4f} against "
                f"{base_loss:.4f}); look at the data, or try another learning rate"
            )
        return FinetuneResult(
            step=step, best_step=best[1], best_loss=best[0], base_loss=base_loss, kl_to_base=kl
        )


@torch.no_grad()
def _mean_loss(adapted: Adapted, batches: Sequence[Rows]) -> float:
    """Nats a predicted token."""
    losses = [adapted.loss(to_device(rows, adapted.device)) for rows in batches]
    return math.fsum(float(loss.total) for loss in losses) / max(1, sum(n.count for n in losses))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The one format of the base's weights, or float32."""
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    names = {dtype: name for name, dtype in SAVED_DTYPES.items()}
    return names[stored.pop()] if len(stored) == 1 else "f32"


def _digest(*groups: Sequence[Example] | None) -> str:
    digest = hashlib.sha256()
    for group in groups:
        values = None if group is None else [[e.first, e.tokens] for e in group]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()
