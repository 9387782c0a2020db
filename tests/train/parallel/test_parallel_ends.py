"""Many processes end together, and refuse together what cannot be spread."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import assert_same_run, free_port, workers
from tokenizers import Tokenizer

from optlm.checkpoint.layout import Grid
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.parallel import Alone, GroupConfig, join
from optlm.train.parallel.sharded import Sharded
from optlm.train.pretrain.pretrain import _micro_batches, pretrain, training_mixture
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run.folder import RunFolder
from optlm.train.tokens.words import WordCounter
from variants import VARIANTS

# ---- ending together ----------------------------------------------------------------------------


def test_a_killed_process_ends_the_others_and_the_run_resumes(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with workers(2, tmp_path, "train", place / "settings.json", run, 1, "kill 1 5") as started:
        assert started[1].ended()[0] == -9
        died = time.monotonic()
        code, told = started[0].ended()
        assert time.monotonic() - died < 20
    assert code == 3
    assert "rank 1 was killed or is stopped" in told
    assert "start again to resume from the last checkpoint" in told
    assert RunFolder(run).steps() == [2, 4, 5]
    pretrain(PretrainConfig.from_file(place / "settings.json"), run)  # alone: any number will do
    assert_same_run(run, place / "alone")


def test_an_error_of_one_process_is_that_of_all(place: Path, tmp_path: Path) -> None:
    job = ("train", place / "settings.json", tmp_path / "run", 1, "raise 1 3")
    with workers(2, tmp_path, *job) as started:
        told = [worker.ended() for worker in started]
    assert [code for code, _ in told] == [3, 3]
    assert "rank 1 failed: a planned error at step 3" in told[0][1]
    assert told[1][1].endswith("OptlmError: a planned error at step 3\n")


def test_a_stopped_process_is_named_and_the_run_ends(place: Path, tmp_path: Path) -> None:
    """The patience of the others is 3 s."""
    run = tmp_path / "run"
    with workers(2, tmp_path, "train", place / "settings.json", run, 1, "stop 1 5") as started:
        code, told = started[0].ended()
    assert code == 1
    assert "rank 1 was killed or is stopped (silent for 4 s; last: " in told
    assert "parallel_worker.py" in told  # the stack shows where this process waited


def test_a_signal_to_one_process_ends_the_step_on_all(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with workers(2, tmp_path, "train", place / "settings.json", run, 1, "term 1 6") as started:
        told = [worker.ended() for worker in started]
    assert [code for code, _ in told] == [130, 130], told
    assert RunFolder(run).steps() == [5, 6, 7]  # steps are counted from 1 when they are done


def test_garbage_sent_to_the_meeting_point_changes_nothing(place: Path, tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    with workers(2, tmp_path, "train", place / "settings.json", run, port=port) as started:
        sent = 0
        while started[0].process.exitcode is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as line:
                line.sendall(os.urandom(4096))
                sent += 1
            time.sleep(0.05)
        told = [worker.ended() for worker in started]
    assert [code for code, _ in told] == [0, 0], told
    assert sent
    assert_same_run(run, place / "alone")


# ---- what is refused ----------------------------------------------------------------------------


def test_a_single_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as parallel:
        assert type(parallel) is Alone


@pytest.mark.parametrize(
    ("world", "values", "message"),
    [
        (None, {"tensor": 2}, "1 processes cannot be divided into groups of 2"),
        ("6", {"tensor": 4}, "6 processes cannot be divided into groups of 4"),
        ("many", {}, "WORLD_SIZE is 'many'"),
        (None, {"tensor": 0}, "must be at least 1"),
        (None, {"patience": 0.1}, "patience is 0.1; it must lie between 1 and 86400"),
    ],
)
def test_groups_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, world: str | None, values: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=message), join(GroupConfig(**values)):
        pass


class _Place(Sharded):
    """A place in a group that is not there."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.groups = grid, grid.data


def tiny(**values: Any) -> OPT:
    return OPT(dataclasses.replace(VARIANTS["base"], **values))


def frozen_in_part() -> OPT:
    model = tiny()
    model.decoder.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "tensor", "method", "message"),
    [
        (tiny, 1, "muon", "'muon' needs whole matrices.*use 'adamw'"),
        (tiny, 2, "adamw", "num_attention_heads 3 is not divisible by tensor parallelism 2"),
        (lambda: tiny(ffn_dim=113), 3, "adamw", "ffn_dim 113 is not divisible"),
        (lambda: tiny(vocab_size=4, ffn_dim=114), 3, "adamw", "vocab_size 4 is too small"),
        (lambda: tiny(ffn_dim=114, attention_dropout=0.1), 3, "adamw", "attention_dropout is 0.1"),
        (lambda: tiny(layerdrop=0.2), 1, "adamw", "layerdrop is 0.2"),
        (lambda: torch.nn.Linear(2, 2), 1, "adamw", "a Linear cannot be spread"),
        (frozen_in_part, 1, "adamw", r"embed_tokens\.weight is frozen"),
    ],
)
def test_models_that_cannot_be_spread(
    model: Callable[[], OPT], tensor: int, method: str, message: str
) -> None:
    built = model()
    with pytest.raises(ConfigError, match=message):
        _Place(Grid(data=2, tensor=tensor)).place(built, built, method)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, 16])
def test_any_number_of_groups_reads_the_same_rows(place: Path, groups: int) -> None:
    config = PretrainConfig.from_file(place / "settings.json")
    data = place / "alone" / "data"
    manifest = json.loads((data / "manifest.json").read_text())
    mixture = training_mixture(config, data, manifest)
    words = WordCounter(Tokenizer.from_file(str(data / "tokenizer.json")))
    for step in range(4):
        whole = mixture.batch(step)
        if -(-4 // groups) * groups > len(whole):  # four micro-batches in one process
            with pytest.raises(ConfigError, match=f"rows of step {step} .* over {groups} data"):
                _micro_batches(config, mixture, words, groups)(step)
            continue
        batches = _micro_batches(config, mixture, words, groups)(step)
        assert len(batches) % groups == 0
        assert torch.equal(torch.cat([rows.tokens for rows in batches]), torch.from_numpy(whole))
        if groups in (1, 2, 4):  # dropout is that of one process
            alone = _micro_batches(config, mixture, words, 1)(step)
            assert [len(rows.tokens) for rows in batches] == [len(rows.tokens) for rows in alone]


def drawn(parallel: Alone) -> tuple[dict[int, float], torch.Tensor]:
    """A random number for each micro-batch of this process, and the random state after them."""
    torch.manual_seed(5)
    numbers = {batch: float(torch.rand(())) for batch in parallel.share([0, 1, 2, 3])}
    return numbers, torch.get_rng_state()


def test_each_micro_batch_has_random_numbers_of_its_own() -> None:
    whole, after = drawn(Alone())
    assert len(set(whole.values())) == 4
    shares = [drawn(_Place(Grid(data=2, tensor=2, rank=rank))) for rank in range(4)]
    assert [sorted(numbers) for numbers, _ in shares] == [[0, 2], [0, 2], [1, 3], [1, 3]]
    for numbers, state in shares:
        assert numbers == {batch: whole[batch] for batch in numbers}
        assert torch.equal(state, after)
    torch.manual_seed(5)
    torch.rand(1)
    assert drawn(Alone())[0] == whole
    again = {batch: float(torch.rand(())) for batch in Alone().share([0, 1, 2, 3])}
    assert not set(again.values()) & set(whole.values())  # the next step draws others


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 micro-batches cannot be shared out over 3"):
        drawn(_Place(Grid(data=3)))
