"""Tokenizer files with anything wrong in them: a tokenizer or a TokenizerError, nothing else."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from optlm.errors import RequestError, TokenizerError
from optlm.tokenizer import Tokenizer
from variants import tiny_tokenizer

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["BPE", "ByteLevel", "Sequence", "</s>", 2, 299, "(a+)+$", [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FUZZ = settings(max_examples=150, deadline=None)


@functools.cache
def sound() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(tiny_tokenizer(270).to_str())
    return values


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value; of long containers the first few."""
    found = [path] if path else []
    items = list(values.items()) if isinstance(values, dict) else []
    items = list(enumerate(values)) if isinstance(values, list) else items
    for key, value in items[:12]:
        found += places(value, (*path, key))
    return found


PLACES = places(sound())


def load(files: dict[str, bytes]) -> None:
    """Load, and use what loaded."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = Tokenizer.from_folder(folder)
            ids = tokenizer.encode("the cat </s> é")
            assert all(0 <= token < tokenizer.vocab_size for token in ids)
            tokenizer.decode(ids)
            tokenizer.decode(range(20))
        except (TokenizerError, RequestError):
            pass


@FUZZ
@given(place=st.sampled_from(PLACES), junk=JUNK, drop=st.booleans())
def test_one_value_replaced_or_dropped(place: tuple[Any, ...], junk: Any, drop: bool) -> None:
    values = copy.deepcopy(sound())
    holder = values
    for key in place[:-1]:
        holder = holder[key]
    if drop:
        del holder[place[-1]]
    else:
        holder[place[-1]] = junk
    load({"tokenizer.json": json.dumps(values).encode()})


@FUZZ
@given(start=st.integers(0, 6000), length=st.integers(0, 40), junk=st.binary(max_size=20))
def test_bytes_replaced(start: int, length: int, junk: bytes) -> None:
    whole = json.dumps(sound()).encode()
    load({"tokenizer.json": whole[:start] + junk + whole[start + length :]})


@FUZZ
@given(settings_junk=JUNK, added_junk=JUNK, key=st.sampled_from(
    ["bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder", "add_bos_token",
     "add_prefix_space", "tokenizer_class"]
))  # fmt: skip
def test_settings_of_any_kind(settings_junk: Any, added_junk: Any, key: str) -> None:
    model = sound()["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    load(
        {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": merges.encode(),
            "tokenizer_config.json": json.dumps({key: settings_junk}).encode(),
            "special_tokens_map.json": json.dumps({"pad_token": "<pad>"}).encode(),
            "added_tokens.json": json.dumps({"<new>": added_junk}).encode(),
        }
    )


@FUZZ
@given(text=st.text(max_size=60), cut=st.integers(0, 400))
def test_merges_of_any_kind(text: str, cut: int) -> None:
    model = sound()["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    content = (merges[:cut] + text + merges[cut:]).encode("utf-8", "surrogatepass")
    load({"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": content})
