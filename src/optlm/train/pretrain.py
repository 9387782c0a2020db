"""Pre-training from text files to a model, on one machine.

    python -m optlm.train.pretrain CONFIG.json --out RUN

prepares the data (tokenizer, packed tokens) in RUN/data unless told otherwise, trains, and resumes
by itself when RUN already holds the same configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from optlm.errors import OptlmError
from optlm.model import OPT
from optlm.train.data import TOKENIZER, Mixture, TokenSet, prepare
from optlm.train.loop import Loss, Trainer
from optlm.train.loss import head_cross_entropy
from optlm.train.optim import decay_begin
from optlm.train.recipe import PretrainConfig
from optlm.train.run_folder import RunFolder, claim
from optlm.train.validate import Validation

__all__ = ["PretrainConfig", "pretrain"]


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    data_folder: Path | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> OPT:
    """Train the model of `config` in the folder `out`, or go on where it stopped.

    Args:
        data_folder: where the packed tokens are, or shall be; `out`/data if None.
        log: told about progress, a line at a time.

    Returns:
        The averaged model after the last step (without averaging: the model).

    Raises:
        ConfigError: `out` or the data folder belongs to another configuration.
        CorpusError: text that is missing, damaged or empty.
        TrainingError: another trainer is at work there, the loss is no number, the disk is full.
        KeyboardInterrupt: stopped by a signal, after saving.
    """
    folder = RunFolder(out)
    with folder.locked(claim("pretrain", config)):
        data_folder = data_folder or out / "data"
        manifest = prepare(config.data, data_folder, log=log)
        tokenizer_json = (data_folder / TOKENIZER).read_bytes()
        folder.write(TOKENIZER, tokenizer_json)
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        torch.manual_seed(config.seed)
        trainer = Trainer(
            OPT(config.model),
            config=config.loop,
            folder=folder,
            batches=_micro_batches(config, data_folder, manifest),
            loss=lambda model, tokens: _loss(config.precision, model, tokens),
            evaluate=Validation(config, tokenizer),
            log=log,
        )
        trainer.run()
        return trainer.average


def _micro_batches(
    config: PretrainConfig, folder: Path, manifest: dict[str, Any]
) -> Callable[[int], list[torch.Tensor]]:
    parts = config.data.parts
    mixture = Mixture(
        [TokenSet(folder, p.name, manifest["parts"][p.name]["tokens"]) for p in parts],
        [p.weight for p in parts],
        late_weights=[p.weight if p.decay_weight is None else p.decay_weight for p in parts],
        late_from=decay_begin(config.loop.optim, config.loop.steps),
        batch_tokens=config.batch_tokens,
        sequence_lengths=config.sequence_lengths,
        seed=config.seed,
    )

    def micro_batches(step: int) -> list[torch.Tensor]:
        tokens = torch.from_numpy(mixture.batch(step))
        rows = config.micro_batch_tokens // (tokens.shape[1] - 1)
        return list(torch.split(tokens, rows))

    return micro_batches


def _loss(precision: str, model: OPT, tokens: torch.Tensor) -> Loss:
    """tokens (B, S + 1): inputs and targets, overlapping by S."""
    targets = tokens[:, 1:].reshape(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        return Loss(head_cross_entropy(hidden, model.head_weight, targets), len(targets))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m optlm.train.pretrain", description="Train a model from scratch."
    )
    parser.add_argument("config", type=Path, help="JSON file of the run's settings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", type=Path, help="folder of the packed tokens (OUT/data)")
    options = parser.parse_args(arguments)

    def say(message: str) -> None:
        print(message, file=sys.stderr)

    try:
        config = PretrainConfig.from_file(options.config)
        pretrain(config, options.out, data_folder=options.data, log=say)
    except OptlmError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"stopped; the same command resumes from {options.out}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
