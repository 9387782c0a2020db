"""Settings read strictly from JSON: every key known, every value of its kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from optlm.errors import ConfigError, did_you_mean

__all__ = ["build", "json_list", "json_object", "read_settings"]

T = TypeVar("T")


def read_settings(path: Path, make: Callable[[Any], T]) -> T:
    """What `make` builds of a JSON file; relative paths in it are those of the working directory.

    Raises:
        ConfigError: the file is missing, no JSON, or refused by `make`; `path` is named.
    """
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # ConfigError is a ValueError
        raise ConfigError(f"{path}: {error}") from error


def json_object(value: Any, where: str) -> dict[str, Any]:
    """`value`, if it is a JSON object; else ConfigError, naming `where` it stands."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a JSON object, not {value!r}")
    return dict(value)


def json_list(value: Any, where: str) -> list[Any]:
    """`value`, if it is a JSON list; else ConfigError, naming `where` it stands."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be a JSON list, not {value!r}")
    return list(value)


# Kinds of JSON values by annotation; others are checked by the class itself.
_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": (str,),
    "tuple[str, ...]": (list, tuple),
    "tuple[int, ...]": (list, tuple),
    "dict[str, str]": (dict,),
}


def build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a JSON object, with every key and the kind of every value checked."""
    given = json_object(values, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"unknown key {key!r} in {where}{did_you_mean(key, fields)}")
        kinds = _KINDS.get(str(fields[key].type))
        is_bool = isinstance(value, bool)
        if kinds and (is_bool != (kinds == (bool,)) or not isinstance(value, kinds)):
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
