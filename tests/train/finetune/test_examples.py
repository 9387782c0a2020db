"""From a file of texts or pairs to packed rows: which tokens count, and which files are refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from optlm.errors import ConfigError
from optlm.model import IGNORE
from optlm.tokenizer import Tokenizer
from optlm.train.finetune.examples import Example, ExamplesError, read_examples
from optlm.train.finetune.packing import PackedBatches, make_rows
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = VARIANTS["base"]
    state = {name: 0.5 * value for name, value in make_state(config).items()}
    return write_checkpoint(tmp_path / "base", config, state)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- reading -------------------------------------------------------------------------------------


def test_exactly_these_tokens_count(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(base)
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "the cat", "response": " sat</s>"},
        {"text": "the mat"},
    )
    (pair, text), report = read_examples(path, tokenizer, length=32)
    prompt = tokenizer.encode("the cat")
    response = tokenizer.encode(" sat</s>", add_bos=False, parse_special=False)
    assert 2 not in response  # written out, it is text
    assert pair == Example([*prompt, *response, 2], first=len(prompt))
    assert text == Example([*tokenizer.encode("the mat"), 2], first=1)
    rows = make_rows([[pair]], pad=1)
    labels = rows.targets[0]
    assert labels[labels != IGNORE].tolist() == [*response, 2]  # the stop signal is learned
    assert (report.texts, report.pairs) == (1, 1)


def test_long_texts_are_split_without_losing_a_token(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(base)
    path = tmp_path / "d.txt"
    path.write_text("the cat sat on the mat " * 20)
    pieces, report = read_examples(path, tokenizer, length=16)
    predicted = [token for piece in pieces for token in piece.tokens[1:]]
    assert [2, *predicted] == [*tokenizer.encode(path.read_text()), 2]
    assert max(piece.length for piece in pieces) == 16
    assert f"{len(pieces)} pieces" in report.summary()


def test_long_pairs_are_refused_or_lose_the_beginning_of_the_prompt(
    base: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_folder(base)
    path = write(tmp_path / "d.jsonl", {"prompt": "the cat sat " * 9, "response": " on the mat"})
    with pytest.raises(ExamplesError, match=r"d\.jsonl:1: .* a response is never cut"):
        read_examples(path, tokenizer, length=12)
    (example,), report = read_examples(path, tokenizer, length=12, on_long="truncate_prompt")
    prompt = tokenizer.encode("the cat sat " * 9)
    response = [*tokenizer.encode(" on the mat", add_bos=False), 2]
    assert example.length == 12
    assert example.tokens[0] == 2
    assert example.tokens[example.first :] == response
    kept = example.first - 1
    assert example.tokens[1 : example.first] == prompt[-kept:]
    assert report.truncated == 1
    with pytest.raises(ExamplesError, match="never cut"):
        read_examples(path, tokenizer, length=3, on_long="truncate_prompt")
    with pytest.raises(ConfigError, match="on_long is 'cut'"):
        read_examples(path, tokenizer, length=3, on_long="cut")


def test_broken_lines_are_counted_and_named(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [
        '{"text": "the cat"}', "{", "[1]", '{"text": 3}', '{"text": ""}', '{"prompt": "x"}',
        '{"prompt": "x", "response": ""}', '{"text": "a", "prompt": "b"}', '{"text": "\\ud800"}',
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    examples, report = read_examples(path, Tokenizer.from_folder(base), length=32)
    assert len(examples) == 1
    assert report.broken == 8
    assert "d.jsonl:2" in report.summary()
    for content in ("", "\n\n", "{}\n"):
        path.write_text(content)
        with pytest.raises(ExamplesError, match="no usable example"):
            read_examples(path, Tokenizer.from_folder(base), length=32)
    with pytest.raises(ExamplesError, match="cannot read"):
        read_examples(tmp_path / "none.jsonl", Tokenizer.from_folder(base), length=32)


@pytest.mark.parametrize("ending", [".jsonl.zst", ".jsonl.gz", ".parquet", ".txt.zst"])
def test_every_format_of_optlm_data_gives_the_same_examples(
    base: Path, tmp_path: Path, ending: str
) -> None:
    tokenizer = Tokenizer.from_folder(base)
    texts = ["the cat sat"] if ending == ".txt.zst" else ["the cat sat", "the mat"]
    path = tmp_path / f"d{ending}"
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif ending == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    else:
        raw = texts[0].encode() if ending == ".txt.zst" else lines
        path.write_bytes(zstandard.ZstdCompressor().compress(raw))
    found, report = read_examples(path, tokenizer, length=32)
    assert found == [Example([*tokenizer.encode(text), 2]) for text in texts]
    assert report.broken == 0


def test_files_that_cannot_be_examples_are_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(base)
    damaged = tmp_path / "d.jsonl.zst"
    damaged.write_bytes(b'{"text": "not compressed"}')
    with pytest.raises(ExamplesError, match="cannot read"):
        read_examples(damaged, tokenizer, length=32)
    strange = tmp_path / "d.tar"
    strange.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"d\.tar"):
        read_examples(strange, tokenizer, length=32)
    latin = tmp_path / "d.txt"
    latin.write_bytes("one good line\ncaf\xe9".encode("latin-1"))
    with pytest.raises(ExamplesError, match="not UTF-8"):
        read_examples(latin, tokenizer, length=32)


def test_masked_labels_are_an_error() -> None:
    options: dict[str, Any] = {
        "row_tokens": 8, "batch_rows": 1, "micro_rows": 1, "pad": 1, "seed": 0,
    }  # fmt: skip
    with pytest.raises(ExamplesError, match="labels of all 2 examples are masked"):
        PackedBatches([Example([2, 5, 6], first=3), Example([2, 7], first=2)], **options)
    with pytest.raises(ExamplesError, match="empty"):
        PackedBatches([], **options)
