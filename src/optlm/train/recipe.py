"""Everything that decides the bits of a pre-trained model, read strictly from JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from optlm.config import OPTConfig
from optlm.errors import ConfigError, did_you_mean
from optlm.train.data import DataConfig, Part
from optlm.train.loop import LoopConfig
from optlm.train.optim import OptimConfig

__all__ = ["PretrainConfig"]

T = TypeVar("T")


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
        whole = _object(values, "the configuration")
        data = _object(whole.get("data", {}), "data")
        loop = _object(whole.get("loop", {}), "loop")
        data["parts"] = tuple(
            _build(Part, part, f"data.parts[{index}]")
            for index, part in enumerate(_list(data.get("parts", []), "data.parts"))
        )
        loop["optim"] = _build(OptimConfig, loop.get("optim", {}), "loop.optim")
        whole["model"] = OPTConfig.from_dict(_object(whole.get("model", {}), "model"))
        whole["data"] = _build(DataConfig, data, "data")
        whole["loop"] = _build(LoopConfig, loop, "loop")
        if "sequence_lengths" in whole:
            whole["sequence_lengths"] = _lengths(whole["sequence_lengths"])
        return _build(cls, whole, "the configuration")

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


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a JSON object, not {value!r}")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be a JSON list, not {value!r}")
    return list(value)


def _lengths(value: Any) -> dict[int, float]:
    try:
        return {int(length): float(s) for length, s in _object(value, "sequence_lengths").items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sequence_lengths must map lengths to shares: {error}") from error


# Kinds of JSON values by annotation; others are checked by the class itself.
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": (str,),
    "tuple[str, ...]": (list, tuple),
    "dict[str, str]": (dict,),
}


def _build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a JSON object, with every key and the kind of every value checked."""
    given = _object(values, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"unknown key {key!r} in {where}{did_you_mean(key, fields)}")
        kinds = _KINDS.get(str(fields[key].type))
        if kinds and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ConfigError(f"{key} in {where} must be {fields[key].type}, not {value!r}")
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in given]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return cls(**given)
