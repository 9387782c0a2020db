"""Saved checkpoints are Hugging Face's layout, bit for bit, and never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from optlm.checkpoint import open_checkpoint, save_checkpoint
from optlm.checkpoint.save import atomic_file
from optlm.errors import CheckpointError
from variants import VARIANTS, make_state, to_bf16_bits, write_checkpoint


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, dtype: str | None, tmp_path: Path) -> None:
    config, state = VARIANTS[variant], make_state(VARIANTS[variant])
    folder = save_checkpoint(tmp_path / "a" / "b", config, state, dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == config
    for name, value in state.items():
        found = checkpoint.tensors[name]
        if dtype == "bf16":
            np.testing.assert_array_equal(found.raw(), to_bf16_bits(value))
        else:
            wanted = value.astype(np.float16 if dtype == "f16" else np.float32)
            np.testing.assert_array_equal(found.raw(), wanted)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_it_with_identical_logits(variant: str, tmp_path: Path) -> None:
    """Through our reader and writer and back, transformers computes the same bits."""
    config, state = VARIANTS[variant], make_state(VARIANTS[variant])
    first = write_checkpoint(tmp_path / "first", config, state)
    second = save_checkpoint(tmp_path / "second", config, open_checkpoint(first).tensors)
    ids = torch.tensor([[2, 17, 5, 99, 4, 4, 250]])
    logits = []
    for folder in (first, second):
        model, report = transformers.OPTForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            logits.append(model.eval()(ids).logits)
    assert torch.equal(logits[0], logits[1])


def test_library_reads_the_file_and_data_is_aligned(tmp_path: Path) -> None:
    config, state = VARIANTS["350m"], make_state(VARIANTS["350m"])
    mixed = {n: v.astype(np.float16) if v.ndim == 1 else v for n, v in state.items()}
    path = save_checkpoint(tmp_path, config, mixed) / "model.safetensors"
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(mixed)
        assert file.metadata() == {"format": "pt"}
        for name, value in mixed.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
    raw = path.read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    config, state = VARIANTS["base"], make_state(VARIANTS["base"])
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    save_checkpoint(tmp_path, config, state)
    assert "lm_head.weight" not in open_checkpoint(tmp_path).tensors
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="tied-head"):
        save_checkpoint(tmp_path, config, state)


def test_config_says_the_stored_dtype(tmp_path: Path) -> None:
    config, state = VARIANTS["base"], make_state(VARIANTS["base"])
    save_checkpoint(tmp_path, config, state, dtype="bf16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    config, state = VARIANTS["base"], make_state(VARIANTS["base"])
    source = write_checkpoint(tmp_path / "source", config, state)
    target = save_checkpoint(tmp_path / "target", config, state, tokenizer_from=source)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    save_checkpoint(source, config, open_checkpoint(source).tensors, tokenizer_from=source)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.decoder.layers.0.fc1.bias"), "missing-tensor"),
        (lambda s: s.update(x=np.ones(3, np.float32)), "extra-tensor"),
        (lambda s: s.update({n: v[:-1] for n, v in s.items() if "fc1.bias" in n}), "shape"),
        (lambda s: s.update({n: v.astype(np.int8) for n, v in s.items()}), "array of int8"),
        (lambda s: s["model.decoder.layers.0.fc1.bias"].fill(np.nan), "non-finite"),
        (lambda s: s["model.decoder.layers.0.fc1.bias"].fill(7e4), "too large for F16"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_old_file(
    change: object, message: str, tmp_path: Path
) -> None:
    config, state = VARIANTS["base"], make_state(VARIANTS["base"])
    save_checkpoint(tmp_path, config, state)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert callable(change)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, config, state, dtype="f16")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_unknown_dtype_names_the_nearest(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    with pytest.raises(CheckpointError, match="did you mean 'bf16'"):
        save_checkpoint(tmp_path, config, make_state(config), dtype="bf61")


def test_a_writer_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_saving_over_the_file_that_is_mapped(tmp_path: Path) -> None:
    config, state = VARIANTS["base"], make_state(VARIANTS["base"])
    save_checkpoint(tmp_path, config, state)
    opened = open_checkpoint(tmp_path)
    save_checkpoint(tmp_path, config, opened.tensors, dtype="bf16")
    for name, value in state.items():
        np.testing.assert_array_equal(opened.tensors[name].numpy(), value)
