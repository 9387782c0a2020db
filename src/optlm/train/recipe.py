"""Everything that decides the bits of a pre-trained model, read strictly from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optlm.config import OPTConfig
from optlm.errors import ConfigError
from optlm.train.data import DataConfig
from optlm.train.loop import LoopConfig
from optlm.train.optim import OptimConfig
from optlm.train.settings import build, json_object

__all__ = ["PretrainConfig"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A model, its text and its schedule.

    Raises:
        ConfigError: values out of range, of the wrong type, or in contradiction with each other.
    """

    model: OPTConfig
    data: DataConfig
    loop: LoopConfig
    batch_tokens: int = 4096  # predicted tokens a step
    micro_batch_tokens: int = 4096  # of them at once in memory
    sequence_lengths: dict[int, float] = field(default_factory=lambda: {512: 1.0})  # length: share
    precision: str = "bf16"  # of the matrix products; weights and optimizer are always float32
    validation_bytes: int = 40_000  # of each domain, read at every evaluation
    prompts: tuple[str, ...] = ()  # continued at every evaluation, into the log
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.precision not in ("f32", "bf16"):
            raise ConfigError(f"precision is {self.precision!r}; use 'f32' or 'bf16'")
        if self.model.vocab_size != self.data.vocab_size:
            raise ConfigError(
                f"the model's vocab_size {self.model.vocab_size} is not "
                f"the tokenizer's {self.data.vocab_size}"
            )
        for name in ("batch_tokens", "micro_batch_tokens", "validation_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must lie between 0 and 2^63 - 1")
        if not self.sequence_lengths:
            raise ConfigError("sequence_lengths is empty; give at least one length and its share")
        for length, share in self.sequence_lengths.items():
            self._check_length(length, share)

    def _check_length(self, length: int, share: float) -> None:
        context = self.model.max_position_embeddings
        if not 1 <= length <= context:
            raise ConfigError(f"sequence length {length} does not fit the context of {context}")
        if not 0 < share < float("inf"):
            raise ConfigError(f"the share of length {length} is {share}; it must be above 0")
        for name in ("batch_tokens", "micro_batch_tokens"):
            tokens = getattr(self, name)
            if tokens % length:
                raise ConfigError(f"{name} {tokens} is no multiple of sequence length {length}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PretrainConfig:
        """Build from parsed JSON; an unknown key is refused and the nearest valid one named.

        Raises:
            ConfigError: unknown or missing keys, or values out of range.
        """
        whole = json_object(values, "the configuration")
        loop = json_object(whole.get("loop", {}), "loop")
        loop["optim"] = build(OptimConfig, loop.get("optim", {}), "loop.optim")
        whole["model"] = OPTConfig.from_dict(json_object(whole.get("model", {}), "model"))
        whole["data"] = DataConfig.from_dict(whole.get("data", {}))
        whole["loop"] = build(LoopConfig, loop, "loop")
        if "sequence_lengths" in whole:
            whole["sequence_lengths"] = _lengths(whole["sequence_lengths"])
        return build(cls, whole, "the configuration")

    @classmethod
    def from_file(cls, path: Path) -> PretrainConfig:
        """Read a JSON file; relative paths in it are relative to the working directory.

        Raises:
            ConfigError: the file is missing, no JSON, or no valid configuration.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:  # ConfigError is a ValueError
            raise ConfigError(f"{path}: {error}") from error


def _lengths(value: Any) -> dict[int, float]:
    try:
        given = json_object(value, "sequence_lengths")
        return {int(length): float(share) for length, share in given.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sequence_lengths must map lengths to shares: {error}") from error
