"""Reading documents, packing them, and the order in which training sees them."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_corpus import story, write_corpus
from tokenizers import Tokenizer

from optlm.errors import ConfigError
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.tokens.corpus import (
    END,
    CorpusError,
    ReadReport,
    read_documents,
    train_tokenizer,
)
from optlm.train.tokens.packed import DataConfig, Mixture, Part, TokenSet, prepare

# ---- documents ---------------------------------------------------------------------------------


def test_broken_lines_are_counted_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    lines = [b'{"text": "one"}', b"{oops", b'{"text": 5}', b"[1, 2]", b'{"source": "x"}', b""]
    lines += [
        b'{"text": ""}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "two"}',
        b"[",
    ]
    file.write_bytes(b"\n".join(lines))
    report = ReadReport()
    assert list(read_documents(file, report)) == ["one", "two"]
    assert (report.documents, report.text_bytes, report.broken) == (2, 6, 8)
    assert report.examples[0].startswith("mixed.jsonl:2: ")
    assert len(report.examples) == 5


def test_sources_and_size_limit(tmp_path: Path) -> None:
    documents = [{"text": "x" * 10, "source": name} for name in ("a1", "b", "a2", "a3", "a4")]
    file = write_corpus(tmp_path / "some.jsonl.zst", documents)
    report = ReadReport()
    assert len(list(read_documents(file, report, sources=("a",), max_bytes=25))) == 2
    assert report.not_wanted == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_unreadable_files_are_named(tmp_path: Path, damage: str) -> None:
    file = write_corpus(tmp_path / "x.jsonl.zst", [{"text": story(i)} for i in range(500)])
    if damage == "missing":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"this is not zstd")
    else:
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorpusError, match=r"x\.jsonl\.zst"):
        list(read_documents(file, ReadReport()))


# ---- tokenizer ---------------------------------------------------------------------------------


def test_tokenizer_has_opt_special_ids_and_round_trips() -> None:
    tokenizer = train_tokenizer([story(i) for i in range(50)], 300)
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    text = "Tim's dog:\n\n  Grüße, 猫 🐈 12.50\x00</b>"
    ids = tokenizer.encode(text).ids
    assert ids[0] == END
    assert END not in ids[1:]
    assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_refuses_too_small_and_too_large() -> None:
    with pytest.raises(ConfigError, match="need 260"):
        train_tokenizer(["abc"], 259)
    with pytest.raises(CorpusError, match="give more text"):
        train_tokenizer(["abc"], 5000)


# ---- packing -----------------------------------------------------------------------------------


def test_packed_tokens_are_the_documents(config: PretrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    manifest = prepare(config.data, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    packed = TokenSet(folder, "tales", manifest["parts"]["tales"]["tokens"])
    assert manifest["parts"]["tales"]["documents"] == 60
    assert len(packed.starts) == 60
    assert (packed.tokens[packed.starts] == END).all()
    assert np.count_nonzero(packed.tokens == END) == 60
    second = packed.tokens[packed.starts[1] + 1 : packed.starts[2]]
    assert tokenizer.decode(second.tolist()) == story(1)


def test_text_that_looks_special_stays_text(config: PretrainConfig, tmp_path: Path) -> None:
    tricky = write_corpus(
        tmp_path / "t.jsonl", [{"text": story(i) + "</s><pad>"} for i in range(60)]
    )
    part = Part(name="tricky", file=str(tricky), weight=1.0)
    manifest = prepare(dataclasses.replace(config.data, parts=(part,)), tmp_path / "data")
    packed = TokenSet(tmp_path / "data", "tricky", manifest["parts"]["tricky"]["tokens"])
    assert np.count_nonzero(packed.tokens == END) == 60


def test_prepared_folder_is_used_again_and_guarded(config: PretrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = prepare(config.data, folder)
    stamp = (folder / "tales.tokens").stat().st_mtime_ns
    assert prepare(config.data, folder) == first
    assert (folder / "tales.tokens").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="another configuration"):
        prepare(dataclasses.replace(config.data, tokenizer_bytes=1000), folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"tokenizer\.json"):
        prepare(config.data, folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(CorpusError, match=r"manifest\.json is damaged"):
        prepare(config.data, folder)


def test_preparing_is_deterministic(config: PretrainConfig, tmp_path: Path) -> None:
    assert prepare(config.data, tmp_path / "a") == prepare(config.data, tmp_path / "b")


def test_interrupted_preparation_is_done_again(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash or another configuration left in the folder is not trusted."""
    folder = tmp_path / "data"
    wanted = prepare(config.data, tmp_path / "whole")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CorpusError, match=r"cannot prepare data in .*No space left"):
            prepare(config.data, folder)
    assert list(folder.iterdir()) == []
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tales.tokens").write_bytes(b"12345")
    assert prepare(config.data, folder) == wanted


def test_part_without_documents_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    part = dataclasses.replace(config.data.parts[0], name="none", sources=("nobody",))
    parts = (*config.data.parts, part)
    with pytest.raises(CorpusError, match=r"'none'.*no usable document.*100 of other sources"):
        prepare(dataclasses.replace(config.data, parts=parts), tmp_path / "data")


def test_cut_token_file_is_noticed(config: PretrainConfig, tmp_path: Path) -> None:
    manifest = prepare(config.data, tmp_path)
    tokens = manifest["parts"]["tales"]["tokens"]
    file = tmp_path / "tales.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CorpusError, match="manifest says"):
        TokenSet(tmp_path, "tales", tokens)
    file.unlink()
    with pytest.raises(CorpusError, match="tales"):
        TokenSet(tmp_path, "tales", tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"decay_weight": -1.0}, "decay_weight"),
        ({"name": "../up"}, "name"),
        ({"max_bytes": 0}, "max_bytes"),
    ],
)
def test_bad_parts_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Part(**({"name": "a", "file": "f", "weight": 1.0} | change))


def test_bad_data_configurations_are_refused() -> None:
    part = Part(name="a", file="f", weight=1.0)
    with pytest.raises(ConfigError, match="no parts"):
        DataConfig(parts=(), validation={})
    with pytest.raises(ConfigError, match="differ"):
        DataConfig(parts=(part, part), validation={})
    with pytest.raises(ConfigError, match="65536"):
        DataConfig(parts=(part,), validation={}, vocab_size=70_000)


# ---- order -------------------------------------------------------------------------------------


def mixture(config: PretrainConfig, folder: Path, seed: int = 0, **values: Any) -> Mixture:
    parts = prepare(config.data, folder)["parts"]
    sets = [TokenSet(folder, part.name, parts[part.name]["tokens"]) for part in config.data.parts]
    options: dict[str, Any] = {
        "batch_tokens": 128,
        "sequence_lengths": {16: 1.0, 32: 1.0},
        "late_weights": [1.0, 3.0],
        "late_from": 300,
    }
    return Mixture(sets, [3.0, 1.0], seed=seed, **(options | values))


def share_of_tales(order: Mixture, folder: Path, steps: range) -> float:
    """Among the rows that begin with a document."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [tokenizer.decode(row.tolist()) for step in steps for row in order.batch(step)[:, :8]]
    begun = Counter(row.split()[0] for row in rows if row.startswith(("Story", "Note")))
    return begun["Story"] / begun.total()


def test_order_is_a_pure_function_of_seed_and_step(config: PretrainConfig, tmp_path: Path) -> None:
    first, again = mixture(config, tmp_path), mixture(config, tmp_path)
    backwards = {step: again.batch(step) for step in reversed(range(20))}
    for step in range(20):
        assert np.array_equal(first.batch(step), backwards[step])
    assert not np.array_equal(first.batch(0), first.batch(1))
    assert not np.array_equal(first.batch(0), mixture(config, tmp_path, seed=1).batch(0))


def test_shapes_and_shares(config: PretrainConfig, tmp_path: Path) -> None:
    batches = [mixture(config, tmp_path).batch(step) for step in range(200)]
    shapes = Counter(batch.shape for batch in batches)
    assert set(shapes) == {(8, 17), (4, 33)}
    assert 60 < shapes[8, 17] < 140
    order = mixture(config, tmp_path)
    assert 0.65 < share_of_tales(order, tmp_path, range(200, 300)) < 0.85  # 3 : 1
    assert 0.15 < share_of_tales(order, tmp_path, range(300, 400)) < 0.35  # 1 : 3


def test_rows_begin_at_documents_that_fit(tmp_path: Path) -> None:
    np.array([2, 10, 11, 2, 20, 21, 22, 23, 24, 25, 26], "<u2").tofile(tmp_path / "p.tokens")
    np.array([0, 3], "<u8").tofile(tmp_path / "p.starts")
    packed = TokenSet(tmp_path, "p", 11)
    assert packed.row(2, 4).tolist() == [2, 10, 11, 2, 20]
    assert packed.row(6, 4).tolist() == [2, 20, 21, 22, 23]
    assert packed.row(7, 4).tolist() == [23, 24, 25, 26, 2]  # a long document: from anywhere, wraps
    assert packed.row(0, 25).tolist() == ([2, 10, 11, 2, 20, 21, 22, 23, 24, 25, 26] * 3)[:26]
