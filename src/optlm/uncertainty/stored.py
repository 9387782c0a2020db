"""Temperatures and rules on disk: beside the model they were made for, with the hash of their data.

They are small JSON files. Loading one for another model, or another adapter, is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.fingerprint import fingerprint
from optlm.checkpoint.jsonfile import read_object
from optlm.errors import RequestError
from optlm.uncertainty.selective import Rule

__all__ = [
    "DataMark", "Kind", "StoredRule", "StoredTemperature", "default_path", "load_rule",
    "load_temperature", "model_mark", "save",
]  # fmt: skip

Kind = Literal["tokens", "choices"]
_LIMIT = 2**20  # bytes of such a file, and of a piece that is hashed
_FORMATS = {"temperature": "optlm-temperature-1", "rule": "optlm-rule-1"}


@dataclass(frozen=True, kw_only=True)
class DataMark:
    """The file that something was learned on."""

    name: str
    sha256: str
    items: int  # that were used for it
    of: str  # what an item is, such as "documents"

    @classmethod
    def of_file(cls, path: Path, *, items: int, of: str) -> DataMark:
        """Hash a file."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_LIMIT):
                digest.update(piece)
        return cls(name=path.name, sha256=digest.hexdigest(), items=items, of=of)


@dataclass(frozen=True, kw_only=True)
class StoredTemperature:
    """A temperature with all that says where it holds.

    Attributes:
        kind: of the next "tokens" of text, or of the "choices" of items.
        scoring: how the scores were made that it divides, such as "total log-likelihood".
        model: what `model_mark` gives.
        before, after: figures on data that were held out: nll, ece, ece_low, ece_high.
    """

    kind: Kind
    temperature: float
    scoring: str
    model: dict[str, str | None]
    data: DataMark
    before: dict[str, float]
    after: dict[str, float]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError(f"kind is {self.kind!r}; it must be one of {get_args(Kind)}")
        if not (isinstance(self.temperature, float) and 0.01 <= self.temperature <= 100):
            raise RequestError(f"temperature is {self.temperature!r}; it must be 0.01 to 100")


@dataclass(frozen=True, kw_only=True)
class StoredRule:
    """A rule with all that says where it holds."""

    estimator: str  # whose uncertainty it reads
    task: str  # kind of the items: "choices" or "answers"
    settings: str  # how the figures were made; the rule holds for figures made alike
    rule: Rule
    model: dict[str, str | None]
    data: DataMark

    @property
    def basis(self) -> str:
        """In a sentence, what a decision by this rule rests on."""
        rule = self.rule
        if rule.threshold is None:
            return (
                f"{self.estimator}: no threshold kept the error rate within {rule.risk:g} on "
                f"{self.data.items} items of {self.data.name}, so nothing is answered"
            )
        return (
            f"{self.estimator} against a threshold of {rule.threshold:.4g}, learned on "
            f"{self.data.items} items of {self.data.name} (sha256 {self.data.sha256[:12]}): below "
            f"it at most {rule.risk:g} of the answers are wrong, with probability "
            f"{1 - rule.delta:g}, for items like those and with {self.settings}"
        )


def model_mark(source: str | Path | None, adapter: str | Path | None = None) -> dict[str, Any]:
    """Digests of a model and of its adapter: ``config``, ``weights``, ``adapter``.

    Raises:
        ConfigError, CheckpointError: the files cannot be used.
    """
    if source is None:
        from optlm.assets import bundled_model

        source = bundled_model()
    checkpoint = open_checkpoint(source)
    if checkpoint.packed is not None:
        text = json.dumps(checkpoint.config.to_dict(), sort_keys=True)
        mark = {
            "config": hashlib.sha256(text.encode()).hexdigest(),
            "weights": checkpoint.packed.sha256,
        }
    else:
        mark = fingerprint(checkpoint.config, checkpoint.tensors)
    return {**mark, "adapter": None if adapter is None else _adapter_digest(Path(adapter))}


def _adapter_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("adapter_*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def default_path(kind: Kind, model: str | Path | None, adapter: str | Path | None) -> Path:
    """The file beside the adapter, or else beside the model's weights.

    Raises:
        RequestError: the model is bundled or a name on the hub, whose folders are not the user's.
    """
    place = model if adapter is None else adapter
    if place is None or not Path(place).is_dir():
        raise RequestError(
            "only a model or adapter in a folder of yours has a place for it; name a file"
        )
    return Path(place) / f"optlm_temperature_{kind}.json"


def save(stored: StoredTemperature | StoredRule, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    from optlm.checkpoint.save import atomic_file

    kind = "temperature" if isinstance(stored, StoredTemperature) else "rule"
    values = {"format": _FORMATS[kind], **asdict(stored)}
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


def load_temperature(path: Path, *, kind: Kind, model: dict[str, Any]) -> StoredTemperature:
    """Read a temperature that was made for this model.

    Raises:
        CheckpointError: no such file, damaged, of another kind, or made for another model.
    """
    values = _read(path, "temperature", model)
    stored: StoredTemperature = _built(path, StoredTemperature, values)
    if stored.kind != kind:
        raise fault_error("other-kind", path, f"is a temperature for {stored.kind}, not for {kind}")
    return stored


def load_rule(path: Path, *, task: str, model: dict[str, Any]) -> StoredRule:
    """Read a rule that was made for this model and kind of task.

    Raises:
        CheckpointError: no such file, damaged, or made for another model or task.
    """
    values = _read(path, "rule", model)
    values["rule"] = _built(path, Rule, values.get("rule"))
    stored: StoredRule = _built(path, StoredRule, values)
    if stored.task != task:
        raise fault_error("other-task", path, f"was learned on {stored.task}, not on {task}")
    return stored


def _read(path: Path, kind: str, model: dict[str, Any]) -> dict[str, Any]:
    values = read_object(path, _LIMIT, f"bad-{kind}")
    if values.pop("format", None) != _FORMATS[kind]:
        raise fault_error(f"bad-{kind}", path, f"is no {kind} file of optlm ({_FORMATS[kind]})")
    made_for = values.get("model")
    if made_for != model:
        marks = made_for if isinstance(made_for, dict) else {}
        names = [name for name, value in model.items() if marks.get(name) != value]
        raise fault_error(
            "other-model",
            path,
            f"was made for another model (its {' and '.join(names)} differ); calibrate this one "
            "with `optlm uncertainty calibrate`",
        )
    values["data"] = _built(path, DataMark, values.get("data"))
    return values


def _built(path: Path, what: Any, values: Any) -> Any:
    """An instance of a dataclass; its fields and their kinds must fit."""
    known = {field.name: str(field.type) for field in fields(what)}
    if not isinstance(values, dict) or set(values) != set(known):
        raise fault_error("bad-file", path, f"needs exactly the fields {', '.join(known)}")
    for name, kind in known.items():
        numeric = {"float": (int, float), "int": (int,), "str": (str,)}.get(kind)
        value = values[name]
        bad = numeric is not None and (isinstance(value, bool) or not isinstance(value, numeric))
        if bad or (isinstance(value, float) and not math.isfinite(value)):
            raise fault_error("bad-file", path, f"{name} is {value!r:.80}, no {kind}")
    try:
        return what(**values)
    except RequestError as error:
        raise fault_error("bad-file", path, str(error)) from error
