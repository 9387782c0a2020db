"""The model that ships with the package: whole, small, described, and fluent enough."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from optlm import LLM, bundled_model, open_checkpoint
from optlm.checkpoint import diagnose

STORY = (
    "One day, a little girl named Lily went to the park with her mom. She saw a big dog and wanted "
    "to play with it. The dog was very happy and ran to her. Lily laughed and said, "
    '"You are my new friend!"'
)

GERMAN = "Es war einmal eine alte Frau, die hatte zwei Söhne und lebte mit ihnen im Wald."
GERMAN_ADAPTER = Path(__file__).parents[2] / "models" / "mini-8m-german"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(threads=1)


def test_files_are_sound_and_small() -> None:
    assert diagnose(bundled_model()) == []
    checkpoint = open_checkpoint(bundled_model())
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.config.max_position_embeddings == 1024
    assert 6e6 < checkpoint.config.parameter_count() < 10e6
    assert sum(path.stat().st_size for path in bundled_model().iterdir()) < 25e6


def test_card_tells_what_one_must_know() -> None:
    (card,) = bundled_model().glob("*.md")
    text = card.read_text(encoding="utf-8").lower()
    for word in ("data", "tokens", "bits per byte", "gzip", "5-gram", "limit"):
        assert word in text, word


def test_english_is_likelier_than_its_words_in_disorder(llm: LLM) -> None:
    words = STORY.split()
    random.Random(1).shuffle(words)
    story, shuffled = llm.score([STORY, " ".join(words)])
    assert story.bits_per_byte < 1.2
    assert shuffled.bits_per_byte > story.bits_per_byte + 1


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_every_format_gives_nearly_the_same_score(llm: LLM, dtype: str) -> None:
    exact = llm.score(STORY)[0].bits_per_byte
    other = LLM(dtype=dtype, threads=1).score(STORY)[0].bits_per_byte  # type: ignore[arg-type]
    assert other == pytest.approx(exact, rel=0.01)


def test_the_german_adapter_knows_german_better_and_english_worse(llm: LLM) -> None:
    llm.load_adapter("german", GERMAN_ADAPTER)
    base = llm.score([GERMAN, STORY])
    german = llm.score([GERMAN, STORY], adapter="german")
    llm.unload_adapter("german")
    assert german[0].bits_per_byte < base[0].bits_per_byte - 0.2
    assert german[1].bits_per_byte > base[1].bits_per_byte + 0.5
