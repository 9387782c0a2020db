"""The teacher's predictions on disk: whole, the right ones, or refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distil_settings import settings

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.save import atomic_file
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.distil import fill_cache as distil_cache
from optlm.train.distil import teacher_cache
from optlm.train.distil.data import open_data
from optlm.train.distil.distil import cache_claim, distil
from optlm.train.distil.fill_cache import EngineOptions, cache_teacher
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.teacher import open_teacher, teacher_digest
from optlm.train.distil.teacher_cache import CacheError, CacheFormat, TeacherCache, write_cache
from optlm.train.distil.teacher_engine import EngineTeacher
from optlm.train.run.folder import TrainingError
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture
def values(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return settings(recipe, tmp_path / "teacher")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_SHARD_BYTES", 1)  # a step a shard


def made(values: dict[str, Any], tmp_path: Path, **options: Any) -> Path:
    cache = tmp_path / "cache"
    config = DistilConfig.from_dict(values)
    cache_teacher(config, cache, data_folder=tmp_path / "data", **options)
    return cache


def train(values: dict[str, Any], tmp_path: Path, cache: Path | None = None) -> Path:
    config = DistilConfig.from_dict(values)
    return distil(config, tmp_path / "run", data_folder=tmp_path / "data", cache_folder=cache)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_engine_reads_as_the_reference_does(variant: str, backend: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    folder = write_checkpoint(tmp_path, config, make_state(config))
    rows = np.random.default_rng(0).integers(4, 290, (3, 40))
    teacher = EngineTeacher(
        open_checkpoint(folder), temperature=2.0, dtype="f32", backend=backend, threads=1
    )
    ours = torch.cat(list(teacher(rows)))
    with torch.no_grad():
        logits = OPT.from_checkpoint(folder)(torch.from_numpy(rows)).logits.flatten(0, 1)
    torch.testing.assert_close(ours, (logits / 2.0).log_softmax(1), rtol=1e-3, atol=1e-3)


def test_cache_holds_the_likeliest_tokens(values: dict[str, Any], tmp_path: Path) -> None:
    told: list[str] = []
    engine = EngineOptions(dtype="f32", backend="torch", threads=1)
    made(values, tmp_path, top_k=5, engine=engine, log=told.append)
    assert "512 predictions with the 5 likeliest tokens" in told[0]
    config = DistilConfig.from_dict(values)
    checkpoint = open_teacher(config.teacher)
    data = open_data(config, checkpoint, tmp_path / "data")
    cache = TeacherCache(tmp_path / "cache", cache_claim(config, teacher_digest(checkpoint), data))
    size = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.topk"))
    assert size == cache.form.total_bytes
    for step in (3, 0):
        rows = data.batch(step)
        found = cache.step(step, rows)
        with torch.no_grad():
            model = OPT.from_checkpoint(checkpoint.folder)
            log_p = model(torch.from_numpy(rows[:, :-1])).logits.flatten(0, 1).log_softmax(1)
        logs, ids = log_p.topk(5)
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.logs, logs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.rest, 1 - logs.exp().sum(1), rtol=1e-3, atol=1e-4)
    with pytest.raises(CacheError, match="batch of step 1 is not the one"):
        cache.step(1, data.batch(2))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return OPT.from_checkpoint(folder).state_dict()


@pytest.mark.parametrize("variant", ["base", "350m", "untied"])
def test_training_from_a_whole_cache_equals_training_from_the_teacher(
    recipe: dict[str, Any], tmp_path: Path, variant: str
) -> None:
    values = settings(recipe, tmp_path / "teacher", variant)
    values["losses"] = {"forward_kl": 1.0, "jsd": 1.0, "temperature": 2.0}
    online = weights(train(values, tmp_path / "a"))
    engine = EngineOptions(dtype="f32", threads=1)
    vocabulary = VARIANTS[variant].vocab_size
    cache = made(values, tmp_path / "b", top_k=vocabulary, engine=engine)
    cached = weights(train(values, tmp_path / "b", cache))
    for name, value in online.items():
        if "k_proj.bias" not in name:  # without a gradient; Adam makes steps of its rounding
            torch.testing.assert_close(cached[name], value, rtol=1e-3, atol=2e-4)


def test_teacher_is_not_in_memory_when_a_cache_is_read(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(values, tmp_path, top_k=8, precision="f16")
    monkeypatch.setattr("optlm.train.distil.distil._in_memory", None)
    train(values, tmp_path, cache)


def stopping(after: int) -> Any:
    """An `EngineTeacher` that is killed after so many pieces."""
    read, seen = EngineTeacher._read, []

    def piece(self: EngineTeacher, tokens: Any, begin: int) -> torch.Tensor:
        seen.append(1)
        if len(seen) > after:
            raise MemoryError
        return read(self, tokens, begin)

    return piece


@pytest.mark.usefixtures("small_shards")
def test_killed_writer_goes_on(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(values, tmp_path / "whole", top_k=4)
    with monkeypatch.context() as patch:
        patch.setattr(EngineTeacher, "_read", stopping(20))  # 8 rows a step
        with pytest.raises(MemoryError):
            made(values, tmp_path / "cut", top_k=4)
    cache = tmp_path / "cut" / "cache"
    assert len(list(cache.glob("*.topk"))) == 2
    with pytest.raises(CacheError, match=r"not finished \(2 of 4 shards are missing\)"):
        train(values, tmp_path / "cut", cache)
    told: list[str] = []
    made(values, tmp_path / "cut", top_k=4, log=told.append)
    assert "going on after 2 of 4 finished shards" in told
    for shard in range(4):
        name = f"shard-{shard:05d}.topk"
        assert (cache / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(ConfigError, match=r"another configuration.*format\.top_k"):
        made(values, tmp_path / "cut", top_k=5)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["cut short", "one bit", "gone", "listing"])
def test_damaged_cache_is_refused_and_mended(
    values: dict[str, Any], tmp_path: Path, damage: str
) -> None:
    cache = made(values, tmp_path, top_k=4)
    file = cache / "shard-00002.topk"
    data = bytearray(file.read_bytes())
    if damage == "cut short":
        file.write_bytes(data[:-9])
    elif damage == "one bit":
        data[100] ^= 1
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
    else:
        (cache / "shards.json").write_text("{")
    with pytest.raises(CacheError, match=r"shard-00002|shards\.json is damaged"):
        train(values, tmp_path, cache)
    if damage != "listing":
        made(values, tmp_path, top_k=4)
        train(values, tmp_path, cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "another data order.*seed"),
        ({"batch_tokens": 64}, "another data order.*batch_tokens"),
        ({"losses": {"forward_kl": 1.0, "temperature": 3.0}}, "another temperature"),
        ({"teacher": "other"}, "another teacher"),
    ],
)
def test_cache_of_something_else_is_refused(
    values: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    cache = made(values, tmp_path, top_k=4)
    if "teacher" in change:
        config = VARIANTS["base"]
        folder = write_checkpoint(tmp_path / "other", config, make_state(config, seed=1))
        change = {"teacher": str(folder)}
    with pytest.raises(CacheError, match=message):
        train(values | change, tmp_path, cache)


def test_cache_for_another_tokenizer_or_text_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    cache = made(values, tmp_path, top_k=4)
    file = tmp_path / "teacher" / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    entries = vocabulary["model"]["vocab"]
    entries["a"], entries["b"] = entries["b"], entries["a"]
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(ConfigError, match="data of another tokenizer"):
        train(values, tmp_path, cache)
    config = DistilConfig.from_dict(values)
    with pytest.raises(CacheError, match=r"another data order.*(parts|tokenizer)"):
        distil(config, tmp_path / "r", data_folder=tmp_path / "new", cache_folder=cache)


def test_folders_that_are_no_cache(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="is no teacher cache"):
        train(values, tmp_path, tmp_path)
    train(values, tmp_path)
    with pytest.raises(CacheError, match="folder of another run"):
        train(values, tmp_path, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"hidden": {"weight": 1.0, "pairs": [[0, 1]]}, "jsd": 1.0}}, "no states"),
        ({"on_policy": {"share": 0.5, "prompt_tokens": 4}}, "knows the corpus only"),
    ],
)
def test_what_a_cache_cannot_serve(
    values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(values | changes, tmp_path, tmp_path / "cache")


FORM = CacheFormat(top_k=3, precision="f32", vocab_size=9, steps=2, batch_tokens=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 10}, "top_k is 10; it must lie between 1 and the vocabulary's 9"),
        ({"top_k": 0}, "top_k is 0"),
        ({"precision": "int8"}, "use f32 or f16"),
        ({"vocab_size": 70_000}, "at most 65536"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FORM, **changes)


def rows_of(step: int) -> Any:
    return np.full((2, 3), step)


def write(folder: Path, log_probs: torch.Tensor) -> None:
    def teacher(tokens: Any) -> Iterator[torch.Tensor]:
        yield log_probs

    write_cache(folder, {"x": 1}, FORM, batch=rows_of, teacher=teacher)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_teacher_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    log_probs = torch.zeros(4, 9).log_softmax(1)
    log_probs[2, 5] = value
    with pytest.raises(TrainingError, match="step 0: the teacher's logits are no numbers"):
        write(tmp_path, log_probs)
    assert not list(tmp_path.glob("*.topk"))


def test_full_disk(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        if path.suffix == ".topk":
            raise OSError(28, os.strerror(28))
        return atomic_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "atomic_file", full)
        with pytest.raises(TrainingError, match=r"No space left.*finished shards are unharmed"):
            write(tmp_path / "x", torch.zeros(4, 9).log_softmax(1))
    monkeypatch.setattr(distil_cache, "_free_bytes", lambda folder: 1000)
    with pytest.raises(TrainingError, match=r"more bytes, .* has 1,000 free"):
        made(values, tmp_path, top_k=4)


def test_dry_run_writes_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    assert made(values, tmp_path, top_k=4, dry_run=True)
    assert not (tmp_path / "cache").exists()
