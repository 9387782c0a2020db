"""Reading ``config.json``, strictly for loading and exhaustively for the doctor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from optlm.checkpoint.files import read_small
from optlm.checkpoint.jsonfile import RepeatedKeyError, parse_object, read_object
from optlm.config import OPTConfig
from optlm.errors import CheckpointError, ConfigError, Fault

CONFIG_LIMIT = 2**20  # bytes; real ones have about 700
KEY_LIMIT = 1000  # real ones have about 30

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(OPTConfig)}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "num_attention_heads",
    "max_position_embeddings",
)


def read_config(path: Path) -> OPTConfig:
    """The configuration in a file.

    Raises:
        ConfigError: no regular file of at most 1 MiB, no JSON object, or not the description of an
            OPT.
    """
    try:
        values = read_object(path, CONFIG_LIMIT, "config-json")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    try:
        return OPTConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def examine_config(path: Path) -> tuple[OPTConfig | None, list[Fault]]:
    """The configuration if it is usable, and everything that is wrong with the file."""
    try:
        values = parse_object(read_small(path, CONFIG_LIMIT))
    except CheckpointError as error:
        code = "config-missing" if error.faults[0].code == "missing-file" else error.faults[0].code
        return None, [_fault(code, "", error.faults[0].message)]
    except RepeatedKeyError as error:
        return None, [_fault("config-duplicate-key", "", str(error))]
    except ValueError as error:
        return None, [_fault("config-json", "", f"is not a JSON object: {error}")]
    if len(values) > KEY_LIMIT:
        return None, [
            _fault("config-unknown-key", "", f"has {len(values)} keys, more than any OPT")
        ]
    faults = _each_key(values) + _lacking(values)
    if not faults:
        faults = _contradictions(values)
    if faults:
        return None, faults
    try:
        return OPTConfig.from_dict(values), []
    except ConfigError as error:
        return None, [_fault("config", "", str(error))]


def _fault(code: str, key: str, message: str) -> Fault:
    return Fault(code=code, where=f"config.json: {key}" if key else "config.json", message=message)


def _each_key(values: dict[str, Any]) -> list[Fault]:
    """Judge every key alone, in a configuration that is sound and cannot contradict it."""
    sound = OPTConfig(
        vocab_size=2**24, num_attention_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    faults = []
    for key, value in values.items():
        probe = {**sound.to_dict(), key: value}
        if key == "num_attention_heads":
            probe["hidden_size"] = value
        try:
            OPTConfig.from_dict(probe)
        except ConfigError as error:
            faults.append(_fault(_code(key, value, str(error)), key, str(error)))
        except TypeError:
            faults.append(_fault("config-type", key, f"has a value of a wrong kind: {value!r:.80}"))
    return faults


def _code(key: str, value: object, message: str) -> str:
    if key == "activation_function":
        return "config-activation"
    if key in _TOKEN_IDS:
        return "config-special-token"
    if key not in _DEFAULTS:
        return "config-unknown-key" if message.startswith("unknown key") else "config-architecture"
    default = _DEFAULTS[key]
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default), int)
    wrong_type = not isinstance(value, wanted) or isinstance(value, bool) != isinstance(
        default, bool
    )
    return "config-type" if wrong_type else "config-range"


def _lacking(values: dict[str, Any]) -> list[Fault]:
    return [
        _fault("config-lacks-key", key, "is missing, and has no default that fits every model")
        for key in _REQUIRED
        if values.get(key) is None
    ]


def _contradictions(values: dict[str, Any]) -> list[Fault]:
    faults = []
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        message = f"{heads} heads do not divide hidden_size {width}"
        faults.append(_fault("config-heads", "num_attention_heads", message))
    for key in _TOKEN_IDS:
        token = values.get(key)
        if token is not None and token >= values["vocab_size"]:
            message = f"is {token}; the vocabulary ends at {values['vocab_size'] - 1}"
            faults.append(_fault("config-special-token", key, message))
    return faults
