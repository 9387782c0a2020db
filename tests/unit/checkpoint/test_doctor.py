"""The doctor names every fault by its code, finds nothing in sound folders, and never raises."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from checkpoint_faults import BREAKS, CONFIG, edit_json, edit_weights
from optlm.checkpoint import diagnose, exit_code, open_checkpoint, save_packed
from optlm.errors import CheckpointError, ConfigError
from variants import VARIANTS, make_state, write_checkpoint

WARNINGS = {
    "constant-matrix", "dtype-config", "dtype-mix", "generation-config", "large-values",
    "pad-disagrees", "repeated-layer", "several-weights", "subnormal", "tokenizer-missing",
    "tokenizer-regex", "tokenizer-size", "zero-matrix",
}  # fmt: skip
# Found by reading numbers or tokenizer files, which opening a checkpoint does not do.
NOT_ON_OPENING = WARNINGS | {"nan", "infinite", "zero-norm"}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIG, make_state(CONFIG))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_checkpoints_have_no_fault(variant: str, dtype: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    write_checkpoint(tmp_path, config, make_state(config), dtype=dtype)
    faults = diagnose(tmp_path)
    assert faults == []
    assert exit_code(faults) == 0


@pytest.mark.parametrize(
    ("code", "name", "change"), BREAKS, ids=[f"{code}:{name}" for code, name, _ in BREAKS]
)
def test_every_fault_is_named(code: str, name: str, change: object, sound: Path) -> None:
    assert callable(change)
    change(sound)
    faults = diagnose(sound)
    codes = {fault.code for fault in faults}
    assert code in codes, f"{name} gave {[str(fault) for fault in faults]}"
    assert all(fault.where and fault.message for fault in faults)
    assert exit_code(faults) == (1 if codes <= WARNINGS else 2)
    assert (code in WARNINGS) == (exit_code([f for f in faults if f.code == code]) == 1)
    assert not (sound / "executed").exists()


@pytest.mark.parametrize(
    ("code", "name", "change"), BREAKS, ids=[f"{code}:{name}" for code, name, _ in BREAKS]
)
def test_opening_refuses_what_the_doctor_calls_a_fault(
    code: str, name: str, change: object, sound: Path
) -> None:
    assert callable(change)
    change(sound)
    about_tokenizer = code.startswith(("tokenizer", "special", "bos", "eos"))
    if about_tokenizer or code in NOT_ON_OPENING:
        open_checkpoint(sound)
        return
    with pytest.raises((CheckpointError, ConfigError)):
        open_checkpoint(sound)


def test_there_are_at_least_thirty_kinds() -> None:
    assert len({code for code, _, _ in BREAKS}) >= 30


def test_the_page_lists_the_codes_that_exist() -> None:
    root = Path(__file__).resolve().parents[3]
    rows = (root / "docs" / "checkpoints.md").read_text(encoding="utf-8").split("## `optlm doctor`")
    cells = [line.split("|")[1] for line in rows[1].splitlines() if line.startswith("| `")]
    listed = {code for cell in cells for code in re.findall("`([a-z-]+)`", cell)}
    sources = (root / "src" / "optlm" / "checkpoint").glob("*.py")
    quoted = {code for path in sources for code in re.findall(r'"([a-z-]+)"', path.read_text())}
    assert {code for code, _, _ in BREAKS} <= listed
    assert listed - quoted <= {f"{name}-disagrees" for name in ("bos", "eos", "pad")}


def test_packed_folders(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", CONFIG, make_state(CONFIG))
    data = np.arange(10_000, dtype=np.uint32).view(np.uint8)
    folder = save_packed(
        tmp_path / "packed",
        CONFIG,
        data,
        dtype="int8",
        positions_dtype="F32",
        tokenizer_from=source,
    )
    assert diagnose(folder) == []
    path = folder / "weights.optlm"
    raw = path.read_bytes()
    for broken, code in (
        (raw[:-1] + b"\x55", "packed-hash"),
        (raw[:-4], "truncated"),
        (b"x" + raw[1:], "packed-header"),
        (raw.replace(b'"version": 1', b'"version": 0'), "packed-version"),
        (raw.replace(b'"hidden_size": 48', b'"hidden_size": 96'), "packed-config"),
    ):
        path.write_bytes(broken)
        assert [fault.code for fault in diagnose(folder)] == [code]


def test_all_faults_are_collected(sound: Path) -> None:
    def change(tensors: dict[str, object]) -> None:
        for layer in range(2):
            del tensors[f"model.decoder.layers.{layer}.fc1.bias"]
            tensors[f"extra.{layer}"] = tensors["model.decoder.layers.0.fc2.bias"]

    edit_weights(sound, change)
    (sound / "tokenizer.json").write_text("{}")
    codes = [fault.code for fault in diagnose(sound)]
    assert codes.count("missing-tensor") == 2
    assert codes.count("extra-tensor") == 2
    assert "tokenizer-type" in codes or "tokenizer-vocab" in codes


def test_several_config_faults_are_all_named(sound: Path) -> None:
    edit_json(sound / "config.json", hidden_size="x", ffn_dim=-3, activation_function="silu", foo=1)
    found = {(fault.code, fault.where) for fault in diagnose(sound)}
    assert found >= {
        ("config-type", "config.json: hidden_size"),
        ("config-range", "config.json: ffn_dim"),
        ("config-activation", "config.json: activation_function"),
        ("config-unknown-key", "config.json: foo"),
    }


def test_errors_show_ten_faults_and_count_the_rest(sound: Path) -> None:
    def change(tensors: dict[str, object]) -> None:
        for name in [name for name in tensors if ".bias" in name]:
            del tensors[name]

    edit_weights(sound, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sound)
    faults = caught.value.faults
    assert len(faults) == 17
    assert str(caught.value).startswith("17 faults:\n")
    assert str(caught.value).count("\n  - ") == 10
    assert "... and 7 more" in str(caught.value)


@pytest.mark.parametrize("source", ["no/such/folder", "nowhere", "\0", "/dev/null", "x" * 5000])
def test_sources_that_are_nothing(source: str) -> None:
    faults = diagnose(source)
    assert exit_code(faults) == 2
