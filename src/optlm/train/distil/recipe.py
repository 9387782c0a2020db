"""Everything that decides the bits of a distilled model, read strictly from JSON.

The settings are those of `optlm pretrain` and four keys more: ``teacher``, ``student``, ``losses``
and, if the student shall write its own texts, ``on_policy``. What ``model`` leaves out is the
teacher's, and the vocabulary always is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.config import OPTConfig
from optlm.errors import ConfigError, did_you_mean
from optlm.train.distil.divergence import DIVERGENCES, TermConfig
from optlm.train.distil.teacher import BUNDLED, open_teacher
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run.settings import build, json_object, read_settings

__all__ = ["DistilConfig", "HiddenConfig", "OnPolicyConfig", "StudentConfig"]

_INITS = ("teacher", "random")
_BASES = ("activations", "weights")
_EMBEDDINGS = ("own", "shared", "frozen")
_PROJECTIONS = ("learned", "none", "basis")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """Where the student's first weights come from.

    Raises:
        ConfigError: unknown choices, or choices that contradict each other.
    """

    init: str = "teacher"  # "teacher": cut from it; "random": drawn afresh
    layers: tuple[int, ...] = ()  # the teacher's layers that are kept; empty: evenly spread
    basis: str = "activations"  # what a narrower width keeps the most of; or "weights"
    embedding: str = "own"  # "shared": the teacher's to begin with; "frozen": and to the end

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name, allowed in (("init", _INITS), ("basis", _BASES), ("embedding", _EMBEDDINGS)):
            _check_choice(f"student.{name}", getattr(self, name), allowed)
        if self.init == "random" and self.layers:
            raise ConfigError("student.layers says what to keep of the teacher, but init is random")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in self.layers):
            raise ConfigError(f"student.layers must be whole numbers, not {list(self.layers)}")


@dataclass(frozen=True, kw_only=True)
class HiddenConfig:
    """Mean squared distance of states between layers (FitNets, arXiv 1412.6550, section 2.2).

    Raises:
        ConfigError: a bad weight, pair or projection.
    """

    weight: float
    pairs: tuple[tuple[int, int], ...]  # what leaves layer i of the student, and j of the teacher
    projection: str = "learned"  # of the student's states (a matrix, trained and thrown away)

    def __post_init__(self) -> None:
        pairs = tuple(tuple(pair) if isinstance(pair, list | tuple) else () for pair in self.pairs)
        object.__setattr__(self, "pairs", pairs)
        if not 0 < self.weight <= 1e6:
            raise ConfigError(f"losses.hidden: weight is {self.weight}; it must be above 0")
        _check_choice("losses.hidden.projection", self.projection, _PROJECTIONS)
        if not pairs or not all(
            len(pair) == 2 and all(type(i) is int and i >= 0 for i in pair) for pair in pairs
        ):
            raise ConfigError(
                "losses.hidden: pairs must list [layer of the student, layer of the teacher]"
            )


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """Steps on text that the student writes itself (GKD, arXiv 2306.13649, algorithm 1).

    Raises:
        ConfigError: values out of range.
    """

    share: float  # of the steps; lambda in the paper
    prompt_tokens: int = 16  # of every row, from the corpus; the student writes the rest
    temperature: float = 1.0  # of its sampling

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"on_policy: share is {self.share}; it must lie in (0, 1]")
        if self.prompt_tokens < 1:
            raise ConfigError(f"on_policy: prompt_tokens is {self.prompt_tokens}; give at least 1")
        if not 0.01 <= self.temperature <= 100:
            raise ConfigError(
                f"on_policy: temperature is {self.temperature}; it must lie between 0.01 and 100"
            )


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """A teacher, a student, what pulls them together, and the student's training.

    Raises:
        ConfigError: values out of range, of the wrong type, or in contradiction with each other.
    """

    teacher: str
    student: StudentConfig
    terms: TermConfig
    hidden: HiddenConfig | None
    on_policy: OnPolicyConfig | None
    training: PretrainConfig

    def __post_init__(self) -> None:
        if self.on_policy and self.on_policy.prompt_tokens >= min(self.training.sequence_lengths):
            raise ConfigError(
                f"on_policy: prompt_tokens is {self.on_policy.prompt_tokens}; it must be below "
                f"the shortest sequence length {min(self.training.sequence_lengths)}"
            )
        if self.on_policy and not self.terms.divergences:
            raise ConfigError(
                "on_policy: the student's own text has no right answers; it needs a weight above 0 "
                f"for one of {', '.join(DIVERGENCES)}"
            )
        if self.hidden and self.training.model.layerdrop:
            raise ConfigError("losses.hidden needs every layer's states: set layerdrop to 0")
        if self.hidden and (self.training.recompute_activations or self.training.compile):
            raise ConfigError(
                "losses.hidden needs the states between the layers, which recompute_activations "
                "and compile do not keep: set both to false"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistilConfig:
        """Build from parsed JSON; an unknown key is refused and the nearest valid one named.

        Raises:
            CheckpointError: the teacher's files are missing or damaged.
            ConfigError: unknown or missing keys, values out of range, another vocabulary than the
                teacher's.
        """
        whole = json_object(values, "the configuration")
        own: dict[str, Any] = {"teacher": BUNDLED, "student": {}, "losses": {}, "on_policy": None}
        given = {key: whole.pop(key, default) for key, default in own.items()}
        if not isinstance(given["teacher"], str):
            raise ConfigError(f"teacher must be a folder or hub name, not {given['teacher']!r}")
        _check_names(whole, own)
        student = build(StudentConfig, given["student"], "student")
        losses = json_object(given["losses"], "losses")
        hidden = losses.pop("hidden", None)
        terms = build(TermConfig, losses, "losses")
        if not terms.divergences and hidden is None:
            raise ConfigError(
                "losses: nothing is learnt from the teacher; give a weight above 0 to one of "
                f"{', '.join(DIVERGENCES)} or hidden"
            )
        teacher = open_teacher(given["teacher"]).config
        return cls(
            teacher=given["teacher"],
            student=student,
            terms=terms,
            hidden=None if hidden is None else build(HiddenConfig, hidden, "losses.hidden"),
            on_policy=None
            if given["on_policy"] is None
            else build(OnPolicyConfig, given["on_policy"], "on_policy"),
            training=_training(whole, teacher, student),
        )

    @classmethod
    def from_file(cls, path: Path) -> DistilConfig:
        """Read a JSON file; relative paths in it are relative to the working directory.

        Raises:
            ConfigError: the file is missing, no JSON, or no valid configuration.
        """
        return read_settings(path, cls.from_dict)

    @property
    def control(self) -> DistilConfig:
        """The same student on the same batches, which learns from the labels alone."""
        return dataclasses.replace(self, terms=TermConfig(labels=1.0), hidden=None, on_policy=None)


def _training(whole: dict[str, Any], teacher: OPTConfig, student: StudentConfig) -> PretrainConfig:
    model = json_object(whole.get("model", {}), "model")
    data = json_object(whole.get("data", {}), "data")
    for where, group in (("model", model), ("data", data)):
        if group.setdefault("vocab_size", teacher.vocab_size) != teacher.vocab_size:
            raise ConfigError(
                f"{where}: vocab_size is {group['vocab_size']!r}, but the teacher's is "
                f"{teacher.vocab_size}; distillation compares token by token, so the student has "
                "the teacher's vocabulary (leave vocab_size out)"
            )
    inherited = {**teacher.to_dict(), "dropout": 0.0, "attention_dropout": 0.0}
    narrower = "hidden_size" in model and "word_embed_proj_dim" not in model
    if narrower and student.embedding == "own" and not teacher.has_projections:
        inherited["word_embed_proj_dim"] = None
    config = PretrainConfig.from_dict({**whole, "model": {**inherited, **model}, "data": data})
    longest = max(config.sequence_lengths)
    if longest > teacher.max_position_embeddings:
        raise ConfigError(
            f"sequence length {longest} does not fit the teacher's context of "
            f"{teacher.max_position_embeddings}"
        )
    return config


def _check_names(whole: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    known = {*own, *(field.name for field in dataclasses.fields(PretrainConfig))}
    for key in whole:
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in the configuration{did_you_mean(key, known)}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} is {value!r}; it must be one of {', '.join(allowed)}"
            f"{did_you_mean(str(value), allowed)}"
        )
