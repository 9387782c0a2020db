"""Everything that decides the bits of a pre-trained model, read strictly from JSON.

What the settings leave out is the OPT paper's (arXiv 2205.01068, section 2.2). ``"model": "125m"``
stands for all settings of that size: shape, optimizer, batch, length of the training. Keys beside
it win.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optlm.config import PUBLISHED, OPTConfig
from optlm.errors import ConfigError, did_you_mean
from optlm.train.loop.device import PRECISIONS
from optlm.train.loop.guard import SpikeConfig
from optlm.train.loop.optim import OptimConfig
from optlm.train.loop.trainer import LoopConfig
from optlm.train.run.settings import build, json_object, read_settings
from optlm.train.tokens.packed import DataConfig

__all__ = ["PretrainConfig", "changeable", "example", "expanded", "recipe", "recipe_names"]

INIT_STD = 0.006
_LENGTH = 512  # of the rows, or the context where that is shorter
WARMUP_TOKENS, WARMUP_STEPS = 375_000_000, 2000  # the smaller models; OPT-175B, and at most
_RECIPES = Path(__file__).parents[1] / "recipes"


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
    sequence_lengths: dict[int, float] = field(default_factory=lambda: {_LENGTH: 1.0})  # : share
    precision: str = "bf16"  # of the matrix products; weights and optimizer are always float32
    recompute_activations: bool = False  # less memory for a third more arithmetic
    compile: bool = False  # fuse the operators of a layer with torch.compile
    validation_bytes: int = 40_000  # of each domain, read at every evaluation
    prompts: tuple[str, ...] = ()  # continued at every evaluation, into the log
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}"
            )
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
        if self.loop.patience is not None and not self.data.validation:
            raise ConfigError(
                "loop.patience waits for a better score on held-out text: name some in "
                "data.validation, or leave patience out"
            )
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
        whole = expanded(whole)
        loop = json_object(whole.get("loop", {}), "loop")
        loop["optim"] = build(OptimConfig, _with_warmup(loop, whole), "loop.optim")
        loop["spikes"] = build(SpikeConfig, loop.get("spikes", {}), "loop.spikes")
        model = {"init_std": INIT_STD, **json_object(whole.get("model", {}), "model")}
        whole["model"] = OPTConfig.from_dict(model)
        whole["data"] = DataConfig.from_dict(whole.get("data", {}))
        whole["loop"] = build(LoopConfig, loop, "loop")
        longest = min(_LENGTH, whole["model"].max_position_embeddings)
        whole["sequence_lengths"] = _lengths(whole.get("sequence_lengths", {longest: 1.0}))
        return build(cls, whole, "the configuration")

    @classmethod
    def from_file(cls, path: Path) -> PretrainConfig:
        """Read a JSON file; relative paths in it are relative to the working directory.

        Raises:
            ConfigError: the file is missing, no JSON, or no valid configuration.
        """
        return read_settings(path, cls.from_dict)


def recipe_names() -> list[str]:
    """Sizes that have a recipe: the nine published ones, the mini family, and one to try out."""
    return [*PUBLISHED, *sorted(file.stem for file in _RECIPES.glob("mini-*.json")), "tiny"]


def recipe(name: str) -> dict[str, Any]:
    """The settings of one size, as parsed JSON; the text to train on is the user's to add.

    Raises:
        ConfigError: no such size.
    """
    known = recipe_names()
    if name not in known:
        raise ConfigError(
            f"there is no recipe for model {name!r}{did_you_mean(name, known)} "
            f"(known: {', '.join(known)})"
        )
    settings: dict[str, Any] = json.loads((_RECIPES / f"{name}.json").read_text(encoding="utf-8"))
    return settings


def expanded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the name of a size, if one stands for the model, replaced by its recipe.

    Model and tokenizer have one ``vocab_size``; it may be given for either.

    Raises:
        ConfigError: no such size.
    """
    name = settings.get("model")
    others = {key: value for key, value in settings.items() if key != "model"}
    whole = _merged(recipe(name), others) if isinstance(name, str) else dict(settings)
    model, data = whole.get("model", {}), whole.get("data", {})
    if not (isinstance(model, Mapping) and isinstance(data, Mapping)):
        return whole  # to be refused by whoever reads it
    size = data.get("vocab_size", model.get("vocab_size", DataConfig.vocab_size))
    asked = {"vocab_size": size} if isinstance(name, str) else {}
    whole["model"] = {"vocab_size": size, **model, **asked}
    whole["data"] = {"vocab_size": size, **data}
    return whole


def example(name: str) -> dict[str, Any]:
    """A complete file of settings for one size, with text files to be named by the user.

    Raises:
        ConfigError: no such size.
    """
    settings = recipe(name)
    part = {"name": "text", "file": "train.jsonl.zst", "weight": 1}
    validation = {"text": "valid.jsonl.zst"}
    settings["data"] |= {"parts": [part], "validation": validation}
    return settings


# Settings that act from the next step on; a change of any other would make it another run.
_CHANGEABLE = (
    "loop.steps",
    "loop.log_every",
    "loop.evaluate_every",
    "loop.checkpoint_every",
    "loop.keep_last",
    "loop.keep_every",
    "loop.keep_tokens",
    "loop.keep_words",
    "loop.patience",
    "loop.leave_out",
    "loop.spikes.policy",
    "loop.spikes.threshold",
    "loop.spikes.rate_factor",
    "loop.optim.learning_rate",
    "loop.optim.muon_learning_rate",
    "loop.optim.decay_share",
    "loop.optim.final_share",
    "loop.optim.clip_norm",
    "micro_batch_tokens",
    "recompute_activations",
    "compile",
    "validation_bytes",
    "prompts",
)


def changeable(names: Iterable[str]) -> frozenset[str]:
    """Settings that a run may change on resume, checked.

    Raises:
        ConfigError: a name that is none of them.
    """
    for name in names:
        if name not in _CHANGEABLE:
            raise ConfigError(
                f"{name!r} cannot change within a run{did_you_mean(name, _CHANGEABLE)} "
                f"(these can: {', '.join(_CHANGEABLE)})"
            )
    return frozenset(names)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, object by object; shares of sequence lengths are taken whole."""
    result = dict(base)
    for key, value in over.items():
        deep = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        whole = key == "sequence_lengths"
        result[key] = _merged(base[key], value) if deep and not whole else value
    return result


def _with_warmup(loop: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's settings with the paper's warm-up, at most a tenth of the training."""
    optim = json_object(loop.get("optim", {}), "loop.optim")
    steps, batch = loop.get("steps"), whole.get("batch_tokens", PretrainConfig.batch_tokens)
    if "warmup_steps" not in optim and isinstance(steps, int) and isinstance(batch, int) and batch:
        by_tokens = max(1, round(WARMUP_TOKENS / batch))
        optim["warmup_steps"] = min(WARMUP_STEPS, by_tokens, steps // 10)
    return optim


def _lengths(value: Any) -> dict[int, float]:
    try:
        given = json_object(value, "sequence_lengths")
        return {int(length): float(share) for length, share in given.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sequence_lengths must map lengths to shares: {error}") from error
