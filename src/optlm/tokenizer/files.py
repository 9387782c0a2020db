"""Vocabulary files to a `tokenizers.Tokenizer`, checked before the library sees them.

The library takes duplicate ids and missing merges without a word and panics on some broken files,
so what it must not see is refused here.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "added_token",
    "byte_of_character",
    "load_backend",
    "load_tokenizer_json",
    "read_settings",
]

MAX_FILE_BYTES = 2**28  # a 50k vocabulary takes 1.5 MB
MAX_ID = 2**24 - 1  # as OPTConfig's largest vocabulary
MAX_ADDED_TOKENS = 2**16  # each is searched for in every text
MAX_TOKEN = 2**14  # characters

_PAIRS = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_backend(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Load the tokenizer of `folder`; `settings` name the tokens beside a plain vocabulary."""
    if os.path.lexists(folder / "tokenizer.json"):
        return load_tokenizer_json(folder / "tokenizer.json")
    for vocab, merges in _PAIRS:
        if os.path.lexists(folder / vocab):
            if not os.path.lexists(folder / merges):
                raise TokenizerError(f"{folder} has {vocab} but no {merges}; both are needed")
            return _load_pair(folder / vocab, folder / merges, settings)
    raise TokenizerError(
        f"{folder} has no tokenizer; looked for tokenizer.json, and vocab.json with merges.txt"
    )


def load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Load and check one ``tokenizer.json``."""
    from tokenizers import Tokenizer

    values = _read_json(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise TokenizerError(f"{path} has no model; it is no tokenizer.json")
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise TokenizerError(f"{path}: added_tokens must be a list of objects")
    _check_added({str(token.get("content")): token.get("id") for token in added}, len(added), path)
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        _check_vocabulary(vocab, path)
        by_id = {token_id: token for token, token_id in vocab.items()}
        for token in added:
            if by_id.get(token.get("id"), token.get("content")) != token.get("content"):
                raise TokenizerError(
                    f"{path}: id {token['id']} is both {by_id[token['id']]!r} and the added token "
                    f"{token.get('content')!r}"
                )
        if model.get("type") == "BPE" and not model.get("ignore_merges"):
            merges = model.get("merges") or []
            if not isinstance(merges, list):
                raise TokenizerError(f"{path}: merges must be a list")
            pairs = (_split(pair) for pair in merges)
            _check_merges(vocab, pairs, len(added), path)
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:
        raise _as_tokenizer_error(error, path) from error


def _load_pair(
    vocab_path: Path, merges_path: Path, settings: dict[str, Any]
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = _read_json(vocab_path)
    _check_vocabulary(vocab, vocab_path)
    lines = _read_text(merges_path).split("\n")
    merges = [_split(line) for line in lines if line.strip() and not line.startswith("#version")]
    added = settings.get("added_tokens", {})
    _check_added({name: token["id"] for name, token in added.items()}, len(added), vocab_path)
    _check_merges(vocab, merges, len(added), merges_path)
    try:
        backend = Tokenizer(models.BPE(vocab, merges))
    except BaseException as error:
        raise _as_tokenizer_error(error, merges_path) from error
    space = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, added, vocab_path)
    return backend


def _add_tokens(
    backend: tokenizers.Tokenizer, added: dict[str, dict[str, Any]], origin: Path
) -> None:
    for name, token in sorted(added.items(), key=lambda item: int(item[1]["id"])):
        backend.add_tokens([added_token(token)])
        if (got := backend.token_to_id(name)) != token["id"]:
            raise TokenizerError(
                f"{origin.parent}: the added token {name!r} wants id {token['id']}, but its place "
                f"in the vocabulary is {got}"
            )


def added_token(values: dict[str, Any]) -> tokenizers.AddedToken:
    """Build the library's token from its JSON form."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(
        values["content"], **{name: bool(values[name]) for name in flags if name in values}
    )


# ---- settings beside the vocabulary ------------------------------------------------------------


def read_settings(folder: Path) -> dict[str, Any]:
    """Return ``tokenizer_config.json`` over ``special_tokens_map.json``; absent files are empty.

    Special tokens come as plain strings. ``framing_tokens`` are those with a role, and those listed
    as additional. ``added_tokens`` maps the content of every added token of
    either form (``added_tokens_decoder``, ``added_tokens.json``) to its JSON form with ``id``.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if os.path.lexists(folder / name):
            settings |= {k: v for k, v in _read_json(folder / name).items() if v is not None}
    for role in _ROLES:
        if isinstance(settings.get(role), dict):
            settings[role] = settings[role].get("content")
        if not isinstance(settings.get(role, ""), str):
            raise TokenizerError(f"{folder}: {role} is {settings[role]!r}; it must be a string")
    settings["framing_tokens"] = _framing_tokens(folder, settings)
    described = settings.pop("added_tokens_decoder", {})
    settings["added_tokens"] = _added_tokens(folder, described)
    return settings


def _framing_tokens(folder: Path, settings: dict[str, Any]) -> set[str]:
    names = {settings[role] for role in _ROLES if role in settings}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key, [])
        if not isinstance(listed, (list, dict)):
            raise TokenizerError(f"{folder}: {key} must be a list of tokens")
        for token in listed.values() if isinstance(listed, dict) else listed:
            name = token.get("content") if isinstance(token, dict) else token
            if not isinstance(name, str):
                raise TokenizerError(f"{folder}: {key} has {name!r:.60}; it must be a string")
            names.add(name)
    return names


def _added_tokens(folder: Path, described: Any) -> dict[str, dict[str, Any]]:
    added: dict[str, dict[str, Any]] = {}
    if os.path.lexists(folder / "added_tokens.json"):
        for name, token_id in _read_json(folder / "added_tokens.json").items():
            added[name] = {"content": name, "id": token_id, "normalized": True}
    try:
        for token_id, token in described.items():
            added[token["content"]] = {**token, "id": int(token_id)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder}: added_tokens_decoder is malformed: {error!r}") from error
    return added


# ---- checks -------------------------------------------------------------------------------------


def _check_vocabulary(vocab: dict[str, Any], path: Path) -> None:
    if not vocab:
        raise TokenizerError(f"{path}: the vocabulary is empty")
    ids: set[int] = set()
    for token, token_id in vocab.items():
        _check_entry(token, token_id, path)
        if token_id in ids:
            first, second, *_ = (name for name, other in vocab.items() if other == token_id)
            raise TokenizerError(f"{path}: id {token_id} is given to both {first!r} and {second!r}")
        ids.add(token_id)


def _check_entry(token: str, token_id: object, path: Path) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MAX_ID:
        raise TokenizerError(
            f"{path}: the id of {token[:40]!r} is {token_id!r}; it must lie between 0 and {MAX_ID}"
        )
    if not 0 < len(token) <= MAX_TOKEN:
        raise TokenizerError(
            f"{path}: token {token_id} has {len(token)} characters; 1 to {MAX_TOKEN} are allowed"
        )


def _check_added(ids: dict[str, Any], count: int, path: Path) -> None:
    if count > MAX_ADDED_TOKENS:
        raise TokenizerError(f"{path} adds {count} tokens; the limit is {MAX_ADDED_TOKENS}")
    if ids:
        _check_vocabulary(ids, path)


def _check_merges(
    vocab: dict[str, int], merges: Iterable[tuple[str, str]], added: int, path: Path
) -> None:
    """Refuse merges that leave a tenth of the vocabulary out of reach: cut off or foreign."""
    made = {left + right for left, right in merges}
    lost = sum(1 for token in vocab if len(token) > 1 and token not in made)
    tolerated = 8 + (len(vocab) // 10 if made else 0)  # special tokens that no file declares
    if lost - added > tolerated:
        raise TokenizerError(
            f"{path} makes {len(made)} tokens; {lost} of the vocabulary's {len(vocab)} are out of "
            f"reach: the merges are missing, cut off, or of another vocabulary"
        )


def _split(pair: Any) -> tuple[str, str]:
    parts = pair.rstrip("\r").split(" ") if isinstance(pair, str) else pair
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
        raise TokenizerError(f"a merge must be two tokens, not {str(pair)[:60]!r}")
    return parts[0], parts[1]


def _as_tokenizer_error(error: BaseException, path: Path) -> BaseException:
    """The library raises bare Exceptions and, when Rust panics, a BaseException."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return TokenizerError(f"{path}: {error}")
    return error


# ---- reading ------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to must not wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise TokenizerError(f"{path} is a FIFO or device, not a regular file")
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise TokenizerError(f"{path} is too large; the limit is {MAX_FILE_BYTES} bytes")
        return raw.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path), object_pairs_hook=_no_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} appears twice")
    return values


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins: the byte that each character of a byte-level token means."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + rank): byte for rank, byte in enumerate(others)}
