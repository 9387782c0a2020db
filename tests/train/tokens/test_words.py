"""Counting words from tokens, against splitting the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import story

from optlm.train.tokens.corpus import train_tokenizer
from optlm.train.tokens.words import WordCounter

TOKENIZER = train_tokenizer([story(i) for i in range(40)], 300)
COUNTER = WordCounter(TOKENIZER)
BLANKS = " \t\n\r\v\f"


def tokens(text: str) -> list[int]:
    TOKENIZER.encode_special_tokens = True
    return [2, *TOKENIZER.encode(text, add_special_tokens=False).ids]


def words(text: str) -> int:
    for blank in BLANKS:
        text = text.replace(blank, " ")
    return sum(bool(word) for word in text.split(" "))


@given(st.text(alphabet=st.sampled_from(BLANKS + "abéx漢 .,'t"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_words_of_a_document(text: str) -> None:
    assert COUNTER.count(np.array([tokens(text)])) == words(text)


def test_documents_back_to_back_and_in_rows() -> None:
    texts = [story(i) for i in range(6)]
    ids = [token for text in texts for token in tokens(text)]
    whole = sum(map(words, texts))
    assert COUNTER.count(np.array([ids])) == whole
    rows = np.array(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
    assert 0 <= COUNTER.count(rows) - COUNTER.count(rows.reshape(1, -1)) <= len(rows)


@pytest.mark.parametrize("token", ["<s>", "<pad>"])
def test_special_tokens_are_no_words(token: str) -> None:
    index = TOKENIZER.token_to_id(token)
    assert COUNTER.count(np.array([[2, index, index]])) == 0
