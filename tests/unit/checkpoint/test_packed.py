"""The packed form: the same numbers as the checkpoint it was made from, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from optlm.checkpoint import diagnose, exit_code, open_checkpoint
from optlm.errors import BackendError, CheckpointError
from variants import VARIANTS, make_state, write_checkpoint

pytest.importorskip("optlm._core", reason="the compiled core is not built")

from optlm.engine.native_runner import NativeRunner, pack

PAGE = 4096


def runner(folder: Path, dtype: str) -> NativeRunner:
    return NativeRunner(open_checkpoint(folder), dtype=dtype, num_blocks=4, max_batch_tokens=32)


def logits(native: NativeRunner) -> bytes:
    ramp = np.arange(20, dtype=np.int32)
    starts, table = np.array([0, 20], np.int32), np.arange(4, dtype=np.int32)[None]
    return native.forward(ramp, ramp, starts, table, ramp).tobytes()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    config = VARIANTS["base"]
    source = write_checkpoint(tmp_path / "source", config, make_state(config))
    return pack(open_checkpoint(source), tmp_path / "packed", "int8")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
def test_same_bits_as_the_source(tmp_path: Path, variant: str, dtype: str, stored: str) -> None:
    config = VARIANTS[variant]
    source = write_checkpoint(tmp_path / "source", config, make_state(config), dtype=stored)
    folder = pack(open_checkpoint(source), tmp_path / "packed", dtype)
    opened = open_checkpoint(folder)
    assert opened.config == config
    assert opened.packed is not None
    assert opened.packed.is_intact()
    assert logits(runner(folder, dtype)) == logits(runner(source, dtype))


def test_another_dtype_is_refused(packed: Path) -> None:
    with pytest.raises(BackendError, match="packed as int8, not f32"):
        runner(packed, "f32")


def test_tensors_are_refused(packed: Path) -> None:
    checkpoint = open_checkpoint(packed)
    for use in (len, list, lambda tensors: tensors["lm_head.weight"]):
        with pytest.raises(CheckpointError, match="packed weights"):
            use(checkpoint.tensors)


def test_weights_of_another_form_are_not_hidden(packed: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tmp_path / "source")
    with pytest.raises(CheckpointError, match="pack into another folder"):
        pack(checkpoint, tmp_path / "source", "int8")


def test_packed_weights_cannot_be_written_over(packed: Path) -> None:
    native = runner(packed, "int8")
    name = "model.decoder.layers.0.fc1.bias"
    with pytest.raises(ValueError, match="cannot be loaded over packed weights"):
        native.core.load(name, np.zeros(4, np.uint8), "F32", 1, 1)


def damage(path: Path, **changes: object) -> None:
    raw = path.read_bytes()
    header = json.loads(raw[:PAGE]) | changes
    path.write_bytes(json.dumps(header).encode().ljust(PAGE) + raw[PAGE:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "packed version 2"),
        ({"format": "other"}, "does not begin with"),
        ({"extra": 1}, "does not begin with"),
        ({"bytes": 5}, "claims 5 bytes"),
        ({"dtype": "int9"}, "formats that do not exist"),
        ({"dtype": ["f32"]}, "formats that do not exist"),
        ({"positions_dtype": "f32"}, "formats that do not exist"),
        ({"config": {}}, "another config.json"),
    ],
)
def test_damaged_headers_are_named(packed: Path, changes: dict[str, object], message: str) -> None:
    damage(packed / "weights.optlm", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(packed)


def test_a_header_that_lies_about_the_format(packed: Path) -> None:
    damage(packed / "weights.optlm", dtype="f32")
    with pytest.raises(BackendError, match="this model needs"):
        runner(packed, "f32")


def test_truncated_files_are_named(packed: Path) -> None:
    path = packed / "weights.optlm"
    raw = path.read_bytes()
    for keep in [100, PAGE, len(raw) - 1, *(len(raw) * part // 64 for part in range(64))]:
        path.write_bytes(raw[:keep])
        with pytest.raises(CheckpointError, match="bytes"):
            open_checkpoint(packed)
        assert [fault.code for fault in diagnose(packed)] == ["truncated"]


def test_a_flipped_bit_anywhere_in_the_header_is_found(packed: Path) -> None:
    path = packed / "weights.optlm"
    raw = path.read_bytes()
    for place in range(len(raw[:PAGE].rstrip())):
        broken = bytearray(raw)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        assert exit_code(diagnose(packed)) == 2, (place, bytes(broken[:PAGE]).rstrip())


def test_a_changed_byte_is_found_by_the_hash(packed: Path) -> None:
    path = packed / "weights.optlm"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    opened = open_checkpoint(packed).packed
    assert opened is not None
    assert not opened.is_intact()
