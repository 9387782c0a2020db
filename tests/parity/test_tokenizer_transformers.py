"""The published vocabulary against transformers' GPT2Tokenizer, on fuzzed Unicode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optlm.tokenizer import Tokenizer

PIECES = st.sampled_from(
    ["</s>", "<pad>", "<s>", "<unk>", "<mask>", " ", "  ", "\n", "\t", "'s", "'LL", " the", "café",
     "e\u0301", "🐈\u200d⬛", "日本語", "नमस्ते", "\u202eשלום", "\u00a0", "\u3000", "\ufeff", "\x00",
     "123", "x" * 40]
)  # fmt: skip
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
TEXTS = st.lists(PIECES | ANY, max_size=12).map("".join)
FUZZ = settings(max_examples=300, deadline=None)
Peers = tuple[Any, list[Tokenizer]]


@pytest.fixture(scope="module")
def peers(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """transformers' tokenizer; ours from its plain files; ours from what it saves."""
    from transformers import GPT2Tokenizer

    folder = shared_dir / "opt-tokenizer"
    theirs = GPT2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )
    saved = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(saved)
    return theirs, [Tokenizer.from_folder(folder), Tokenizer.from_folder(saved)]


@FUZZ
@given(text=TEXTS)
def test_same_ids_and_same_text(peers: Peers, text: str) -> None:
    theirs, ours = peers
    ids = theirs(text)["input_ids"]
    for tokenizer in ours:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)


@FUZZ
@given(ids=st.lists(st.integers(0, 50_271), max_size=40))
def test_same_text_of_any_ids(peers: Peers, ids: list[int]) -> None:
    theirs, ours = peers
    for tokenizer in ours:
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
