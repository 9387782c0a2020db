"""What can be wrong with a checkpoint's tokenizer files, seen without building a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optlm.checkpoint.files import present, read_small
from optlm.checkpoint.jsonfile import RepeatedKeyError, parse_object
from optlm.config import OPTConfig
from optlm.errors import CheckpointError, Fault

FILE_LIMIT = 32 * 2**20  # bytes; OPT's own tokenizer.json has 2 MB
ADDED_LIMIT = 100_000
_REPEATED_GROUP = re.compile(r"\([^()]*\)[+*{]")
_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(kw_only=True)
class _Vocabulary:
    """Tokens by id from whichever files there are."""

    ids: dict[str, Any]
    merges: list[Any] | None
    added: dict[str, Any] = field(default_factory=dict)
    source: str


def examine_tokenizer(folder: Path, config: OPTConfig | None) -> list[Fault]:
    """All faults of the tokenizer files, and their disagreements with the model's configuration."""
    faults: list[Fault] = []
    vocabulary = _read_vocabulary(folder, faults)
    if vocabulary is None:
        return faults
    for name in ("special_tokens_map.json", "added_tokens.json"):
        _read(folder / name, faults, missing_ok=True)
    faults += _id_faults(vocabulary)
    faults += _merge_faults(vocabulary)
    if config is not None and not any(fault.code == "tokenizer-id" for fault in faults):
        everything = {**vocabulary.ids, **vocabulary.added}
        faults += _range_faults(everything, config, vocabulary.source)
        faults += _special_faults(folder, everything, config, faults)
        faults += _generation_faults(folder, config, faults)
    return faults


def _fault(code: str, where: str, message: str) -> Fault:
    return Fault(code=code, where=where, message=message)


def _warning(code: str, where: str, message: str) -> Fault:
    return Fault(code=code, severity="warning", where=where, message=message)


def _read_vocabulary(folder: Path, faults: list[Fault]) -> _Vocabulary | None:
    if present(folder / "tokenizer.json"):
        values = _read(folder / "tokenizer.json", faults)
        return None if values is None else _from_tokenizer_json(values, faults)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not present(vocab) and not present(merges):
        message = "holds neither tokenizer.json nor vocab.json and merges.txt"
        faults.append(_warning("tokenizer-missing", str(folder), message))
        return None
    if not present(vocab):
        faults.append(_fault("tokenizer-vocab", "vocab.json", "is missing beside merges.txt"))
        return None
    ids = _read(vocab, faults)
    if ids is None:
        return None
    if not present(merges):
        faults.append(_fault("tokenizer-merges", "merges.txt", "is missing beside vocab.json"))
    lines = _merge_lines(merges, faults) if present(merges) else None
    return _Vocabulary(ids=ids, merges=lines, source="vocab.json")


def _read(path: Path, faults: list[Fault], missing_ok: bool = False) -> dict[str, Any] | None:
    if missing_ok and not present(path):
        return None
    try:
        return parse_object(read_small(path, FILE_LIMIT))
    except RepeatedKeyError as error:
        faults.append(_fault("tokenizer-duplicate-token", path.name, str(error)))
    except ValueError as error:
        faults.append(_fault("tokenizer-json", path.name, f"is not a JSON object: {error}"))
    except CheckpointError as error:
        faults.append(_fault("tokenizer-json", path.name, error.faults[0].message))
    return None


def _merge_lines(path: Path, faults: list[Fault]) -> list[Any] | None:
    try:
        lines = read_small(path, FILE_LIMIT).decode("utf-8").split("\n")
    except (CheckpointError, UnicodeDecodeError) as error:
        faults.append(_fault("tokenizer-merges", path.name, f"cannot be read: {error}"))
        return None
    return [line for line in lines if line and not line.startswith("#version")]


def _from_tokenizer_json(values: dict[str, Any], faults: list[Fault]) -> _Vocabulary | None:
    source = "tokenizer.json"
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        faults.append(_fault("tokenizer-type", source, "its model is not BPE, as OPT's is"))
        return None
    if not isinstance(model.get("vocab"), dict):
        faults.append(_fault("tokenizer-vocab", source, "its model has no vocabulary"))
        return None
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        faults.append(_fault("tokenizer-merges", source, "its model has no merges"))
        merges = None
    faults += _regex_faults(values, source)
    added = _added_tokens(values.get("added_tokens"), source, faults)
    return _Vocabulary(ids=model["vocab"], merges=merges, added=added, source=source)


def _regex_faults(values: Mapping[str, Any], source: str) -> list[Fault]:
    steps = repr([values.get("normalizer"), values.get("pre_tokenizer")])
    groups = _REPEATED_GROUP.findall(steps) if "'Regex'" in steps else []
    if not any("+" in group[:-1] or "*" in group[:-1] for group in groups):
        return []
    message = "a regular expression repeats a repetition, such as (a+)+; it may take for ever"
    return [_warning("tokenizer-regex", source, message)]


def _added_tokens(entries: object, source: str, faults: list[Fault]) -> dict[str, Any]:
    if entries is None:
        return {}
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        faults.append(_fault("tokenizer-added", source, "added_tokens is not a list of objects"))
        return {}
    if len(entries) > ADDED_LIMIT:
        message = f"has {len(entries)} added tokens; the limit is {ADDED_LIMIT}"
        faults.append(_fault("tokenizer-added", source, message))
        return {}
    return {str(entry.get("content")): entry.get("id") for entry in entries}


def _id_faults(vocabulary: _Vocabulary) -> list[Fault]:
    owner: dict[int, str] = {}
    wrong, repeated = [], []
    for token, number in [*vocabulary.ids.items(), *vocabulary.added.items()]:
        if type(number) is not int or number < 0:
            wrong.append(f"{token!r:.40}: {number!r:.20}")
        elif owner.setdefault(number, token) != token:
            repeated.append(f"{number} for {owner[number]!r:.40} and {token!r:.40}")
    faults = []
    if wrong:
        message = f"{len(wrong)} ids are not whole numbers from 0 up, such as {wrong[0]}"
        faults.append(_fault("tokenizer-id", vocabulary.source, message))
    if repeated:
        message = f"{len(repeated)} ids name two tokens, such as {repeated[0]}"
        faults.append(_fault("tokenizer-duplicate-id", vocabulary.source, message))
    return faults


def _merge_faults(vocabulary: _Vocabulary) -> list[Fault]:
    """Every merge must join two tokens of the vocabulary to a third."""
    bad = []
    for merge in vocabulary.merges or ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part in vocabulary.ids for part in parts)
            or "".join(parts) not in vocabulary.ids
        ):
            bad.append(repr(merge)[:60])
    if not bad:
        return []
    message = f"{len(bad)} merges use tokens that the vocabulary lacks, such as {bad[0]}"
    return [_fault("tokenizer-merge-unknown", vocabulary.source, message)]


def _range_faults(ids: Mapping[str, int], config: OPTConfig, source: str) -> list[Fault]:
    faults = []
    beyond = [token for token, number in ids.items() if number >= config.vocab_size]
    if beyond:
        message = (
            f"{len(beyond)} tokens ({beyond[0]!r:.40}, ...) have ids from {config.vocab_size} on, "
            "for which the model has no embedding"
        )
        faults.append(_fault("tokenizer-id-range", source, message))
    unused = config.vocab_size - len(set(ids.values()))
    if unused > config.vocab_size // 2:
        message = f"{unused} of {config.vocab_size} embedding rows have no token; another model's?"
        faults.append(_warning("tokenizer-size", source, message))
    return faults


def _special_faults(
    folder: Path, ids: Mapping[str, int], config: OPTConfig, faults: list[Fault]
) -> list[Fault]:
    settings = _read(folder / "tokenizer_config.json", faults, missing_ok=True) or {}
    used = set(ids.values())
    found = []
    for name in _SPECIAL:
        expected = getattr(config, name + "_id")
        token = _token_text(settings.get(name))
        if settings.get(name) is not None and token is None:
            message = f"tokenizer_config.json gives {settings[name]!r:.40}, which is no token"
            found.append(_fault("special-token-unknown", name, message))
        elif expected not in used:
            message = f"the model's {name}_id {expected} is no token of the tokenizer"
            found.append(_fault("special-token-missing", name, message))
        elif token is not None and token not in ids:
            message = f"tokenizer_config.json names {token!r:.40}, which is not in the vocabulary"
            found.append(_fault("special-token-unknown", name, message))
        elif token is not None and ids[token] != expected:
            message = f"is {token!r:.40} (id {ids[token]}), but config.json says id {expected}"
            found.append(_disagreement(name, message))
    return found


def _disagreement(name: str, message: str) -> Fault:
    """A wrong start or end changes every result, a wrong pad only where padding is used."""
    build = _warning if name == "pad_token" else _fault
    return build(f"{name.removesuffix('_token')}-disagrees", name, message)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _generation_faults(folder: Path, config: OPTConfig, faults: list[Fault]) -> list[Fault]:
    settings = _read(folder / "generation_config.json", faults, missing_ok=True) or {}
    return [
        _warning(
            "generation-config",
            f"generation_config.json: {name}",
            f"is {settings[name]!r:.40}, but config.json says {getattr(config, name)}",
        )
        for name in (token + "_id" for token in _SPECIAL)
        if settings.get(name) is not None and settings[name] != getattr(config, name)
    ]
