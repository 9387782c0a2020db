"""Weights cut anew: every bit is kept, memory stays small, broken pieces are named."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.layout import Grid, piece_of, tensor_parallel_axis
from optlm.checkpoint.pieces import PieceFile, file_name, open_pieces
from optlm.checkpoint.reshard import reshard
from optlm.config import OPTConfig
from optlm.errors import CheckpointError, ConfigError
from variants import VARIANTS, make_state, write_checkpoint

GRIDS = {"2 x 1": Grid(data=2), "1 x 2": Grid(tensor=2), "3 x 2": Grid(data=3, tensor=2)}


def even(config: OPTConfig) -> OPTConfig:
    """With a number of heads that two and four processes can share."""
    return dataclasses.replace(config, num_attention_heads=4)


@pytest.mark.parametrize("cut", GRIDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_and_joined_again_has_the_same_bytes(tmp_path: Path, variant: str, cut: str) -> None:
    config = even(VARIANTS[variant])
    source = write_checkpoint(tmp_path / "source", config, make_state(config), dtype="bf16")
    grid = GRIDS[cut]
    there = reshard(source, tmp_path / "cut", grid=grid)
    back = reshard(tmp_path / "cut", tmp_path / "joined")
    assert there == back
    assert {each.name for each in back} == set(config.parameter_shapes())
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert files == [file_name(rank) for rank in range(grid.data * grid.tensor)]
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "joined")
    assert after.config == config
    for name, tensor in before.tensors.items():
        assert after.tensors[name].raw().tobytes() == tensor.raw().tobytes()
    tokenizers = [(tmp_path / f / "tokenizer.json").read_bytes() for f in ("source", "joined")]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number_lies_with_exactly_one_process(variant: str) -> None:
    grids = [Grid(data=3, tensor=2, rank=rank) for rank in range(6)]
    for name, shape in even(VARIANTS[variant]).parameter_shapes().items():
        owners = np.zeros(shape, int)
        for grid in grids:
            piece = piece_of(name, shape, grid)
            owners[piece.slices] += piece.first
            assert (piece.copies == 1) == (tensor_parallel_axis(name) is not None)
        assert (owners == 1).all(), name


def test_more_processes_than_rows() -> None:
    pieces = [piece_of("x.bias", (5,), Grid(data=8, rank=rank)) for rank in range(8)]
    assert [piece.sizes for piece in pieces] == [(1,)] * 5 + [(0,)] * 3
    assert [piece.empty for piece in pieces] == [False] * 5 + [True] * 3


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """The tied embedding is an eighth of the model; the rest may not add up."""
    config = dataclasses.replace(
        VARIANTS["base"], vocab_size=4096, hidden_size=256, ffn_dim=1024, num_attention_heads=4,
        num_hidden_layers=10, word_embed_proj_dim=256,
    )  # fmt: skip
    shapes = config.parameter_shapes()
    largest = 4 * max(map(math.prod, shapes.values()))
    total = 4 * config.parameter_count()
    assert total > 8 * largest
    source = write_checkpoint(tmp_path / "source", config, make_state(config))
    for given, name, grid in (
        (source, "cut", Grid(data=2, tensor=2)),
        (tmp_path / "cut", "joined", None),
    ):
        tracemalloc.start()
        reshard(given, tmp_path / name, grid=grid)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.25 * largest + 2**20


def test_pytorch_reads_the_pieces(tmp_path: Path) -> None:
    """`torch.distributed.checkpoint` joins them to the same tensors."""
    import torch
    from torch.distributed import checkpoint as dcp

    config = even(VARIANTS["350m"])
    state = make_state(config)
    source = write_checkpoint(tmp_path / "source", config, state)
    reshard(source, tmp_path / "cut", grid=Grid(data=3, tensor=2))
    loaded = {name: torch.zeros(value.shape) for name, value in state.items()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "cut")))
    for name, value in state.items():
        assert np.array_equal(loaded[name].numpy(), value)


def test_any_box_can_be_read(tmp_path: Path) -> None:
    numbers = np.arange(77, dtype=np.float32).reshape(7, 11)
    for rank in range(6):
        grid = Grid(data=3, tensor=2, rank=rank)
        piece = piece_of("fc2.weight", (7, 11), grid)
        file = PieceFile()
        file.add("fc2.weight", "F32", piece, lambda piece=piece: numbers[piece.slices])
        with (tmp_path / file_name(rank)).open("wb") as stream:
            file.write(stream)
    found = open_pieces(tmp_path)["fc2.weight"]
    assert found.shape == (7, 11)
    random = np.random.default_rng(0)
    for _ in range(50):
        low = random.integers(0, (7, 11))
        high = [random.integers(a, b + 1) for a, b in zip(low, (7, 11), strict=True)]
        sizes = tuple(int(b - a) for a, b in zip(low, high, strict=True))
        box = found.read((int(low[0]), int(low[1])), sizes)
        assert np.array_equal(box, numbers[low[0] : high[0], low[1] : high[1]])


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    config = even(VARIANTS["base"])
    source = write_checkpoint(tmp_path / "source", config, make_state(config))
    reshard(source, tmp_path / "cut", grid=Grid(data=2, tensor=2))
    return tmp_path / "cut"


def test_a_missing_file_is_a_gap(cut: Path) -> None:
    (cut / file_name(2)).unlink()
    with pytest.raises(CheckpointError, match=r"embed_tokens.*leaves a gap|3 pieces; 4 would fill"):
        reshard(cut, cut.parent / "joined")
    assert not (cut.parent / "joined").exists()


def test_a_file_twice_is_an_overlap(cut: Path) -> None:
    (cut / file_name(4)).write_bytes((cut / file_name(1)).read_bytes())
    with pytest.raises(CheckpointError, match=r"5 pieces; 4 would fill"):
        reshard(cut, cut.parent / "joined")


def test_a_truncated_file_is_named(cut: Path) -> None:
    data = (cut / file_name(1)).read_bytes()
    (cut / file_name(1)).write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match="shard-00002"):
        reshard(cut, cut.parent / "joined")


def test_pieces_that_do_not_say_where_they_belong(cut: Path) -> None:
    data = (cut / file_name(1)).read_bytes()
    (cut / file_name(1)).write_bytes(data.replace(b"DCP_SHARDING_INFO", b"DCP_SHARDING_WHAT"))
    with pytest.raises(CheckpointError, match="does not say where its pieces belong"):
        reshard(cut, cut.parent / "joined")


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    source = write_checkpoint(tmp_path / "source", config, make_state(config))
    with pytest.raises(ConfigError, match=r"num_attention_heads 3 is not divisible by .* 2"):
        reshard(source, tmp_path / "cut", grid=Grid(tensor=2))
    assert not (tmp_path / "cut").exists()


def test_another_model_is_refused(cut: Path) -> None:
    values = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        reshard(cut, cut.parent / "joined")


def test_choice_of_weights_needs_a_training_checkpoint(cut: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of training"):
        reshard(cut, cut.parent / "joined", weights="average")


# ---- the command --------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "optlm", "reshard", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def test_command(cut: Path) -> None:
    done = command(cut, cut.parent / "joined", "--json")
    assert done.returncode == 0, done.stderr
    assert "in 1 file" in done.stderr
    assert "the sha256 of each equals the source's" in done.stderr
    listed = {each["name"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert set(listed) == set(open_checkpoint(cut.parent / "joined").tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-parallel", 2), "needs --processes"),
        (("--processes", 3, "--tensor-parallel", 2), "must be a multiple"),
        (("--processes", 0), "at least 1"),
        (("--weights", "best"), "no checkpoint of training"),
    ],
)
def test_command_refuses(cut: Path, options: tuple[object, ...], message: str) -> None:
    done = command(cut, cut.parent / "joined", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
