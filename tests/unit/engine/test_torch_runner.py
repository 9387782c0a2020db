"""What only the PyTorch backend has: half precision, devices. The rest is in test_backends.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from optlm.engine.llm import LLM
from optlm.errors import BackendError, CheckpointError, RequestError
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS[request.param]
    return write_checkpoint(tmp_path_factory.mktemp(request.param), config, make_state(config))


def load(folder: Path, **options: object) -> LLM:
    return LLM(folder, backend="torch", device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_near_f32(folder: Path, dtype: str) -> None:
    texts = [[2, 5 + i, *range(9, 9 + 4 * i)] for i in range(6)]
    exact = load(folder).score(texts)
    rounded = load(folder, dtype=dtype).score(texts)
    for one, other in zip(exact, rounded, strict=True):
        assert one.total == pytest.approx(other.total, rel=0.1, abs=1.0)


def test_auto_is_the_smallest_exact_format(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    for stored, held in (("f32", torch.float32), ("f16", torch.float32), ("bf16", torch.bfloat16)):
        folder = write_checkpoint(tmp_path / stored, config, make_state(config), dtype=stored)
        assert load(folder)._runner._model.head_weight.dtype == held  # type: ignore[attr-defined]


def test_what_torch_cannot_do_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path, config, make_state(config))
    with pytest.raises(BackendError, match="no int8"):
        load(folder, dtype="int8")
    with pytest.raises(BackendError, match="cannot use device"):
        LLM(folder, backend="torch", device="nonsense")
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "absent", backend="torch")


def test_the_cache_is_sized_in_blocks_or_bytes(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path, config, make_state(config))
    block = 16 * config.kv_bytes_per_token("f32")
    assert load(folder, kv_cache_bytes=5 * block + 1)._runner.num_blocks == 5
    assert load(folder, num_blocks=7)._runner.num_blocks == 7
    assert load(folder)._runner.num_blocks == 16 * 4
    with pytest.raises(RequestError, match="one block"):
        load(folder, kv_cache_bytes=block - 1)
