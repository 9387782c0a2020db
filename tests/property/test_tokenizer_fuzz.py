"""Streams of any ids decode to the same text as the whole, and any text survives the round trip."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from optlm.tokenizer import Tokenizer
from variants import tiny_tokenizer

VOCABULARY = 300
IDS = st.lists(st.integers(0, VOCABULARY + 5), max_size=80)
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(VOCABULARY))


@settings(max_examples=300, deadline=None)
@given(ids=IDS, skip_special=st.booleans())
def test_stream_equals_whole(ids: list[int], skip_special: bool) -> None:
    decoder = tokenizer().decoder(skip_special)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer().decode(ids, skip_special)


@settings(max_examples=300, deadline=None)
@given(ids=IDS)
def test_stream_shows_only_what_the_future_cannot_change(ids: list[int]) -> None:
    decoder = tokenizer().decoder()
    shown = ""
    for count, token_id in enumerate(ids, 1):
        shown += decoder.push(token_id)
        for tail in ([], [40], [200, 201]):
            assert tokenizer().decode([*ids[:count], *tail]).startswith(shown)


@settings(max_examples=300, deadline=None)
@given(ids=IDS)
def test_decode_equals_the_library(ids: list[int]) -> None:
    backend = tiny_tokenizer(VOCABULARY)
    assert tokenizer().decode(ids) == backend.decode(ids, skip_special_tokens=True)
    assert tokenizer().decode(ids, False) == backend.decode(ids, skip_special_tokens=False)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_text_survives(text: str) -> None:
    ids = tokenizer().encode(text, parse_special=False)
    assert tokenizer().decode(ids[1:], skip_special=False) == text
    assert b"".join(map(tokenizer().token_bytes, ids[1:])) == text.encode()


@settings(max_examples=200, deadline=None)
@given(text=TEXTS | st.lists(st.sampled_from([" the cat", "</s>", "the ", "  "])).map("".join))
def test_a_text_has_no_fewer_tokens_than_its_bound(text: str) -> None:
    assert tokenizer().fewest_tokens(text) <= len(tokenizer().encode(text, add_bos=False))
