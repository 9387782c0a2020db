"""Files of adapters: what is read as peft reads it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import (
    EXACT,
    hf,
    hf_logits,
    logits,
    made,
    merged_logits,
)
from peft import LoraConfig, get_peft_model

from optlm.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from optlm.checkpoint.adapter import SIDECAR, WEIGHTS, open_adapter
from optlm.checkpoint.fingerprint import fingerprint
from optlm.checkpoint.merge import merge_adapter
from optlm.errors import CheckpointError, ConfigError
from optlm.model import OPT
from optlm.train.finetune.adapters import AdapterConfig, attach_saved
from variants import VARIANTS, make_state, write_checkpoint

pytestmark = pytest.mark.filterwarnings(  # peft calls transformers in ways that will go
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*past_key_values. is deprecated.*:FutureWarning",
)


@pytest.fixture
def base_and_adapter(tmp_path: Path) -> tuple[Checkpoint, Path]:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path / "base", config, make_state(config))
    _, base = made(folder, tmp_path / "adapter", AdapterConfig(rank=2))
    return base, tmp_path / "adapter"


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 10**6}, "r is 1000000; it must be a whole number in 1..16384"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "magnitude"),
        ({"use_dora": "yes"}, "not true or false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"something_new": 1}, "something_new is 1"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "plain names"),
    ],
)
def test_settings(base_and_adapter: Any, values: dict[str, Any], message: str) -> None:
    base, folder = base_and_adapter
    change(folder, **values)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        open_adapter(folder, base)


def test_patterns_of_alpha_and_rank_as_peft_reads_them(tmp_path: Path) -> None:
    config = VARIANTS["350m"]
    folder = write_checkpoint(tmp_path / "m", config, make_state(config))
    torch.manual_seed(1)
    settings = LoraConfig(
        r=4,
        target_modules=["q_proj", "fc2"],
        init_lora_weights=False,
        rank_pattern={"layers.1.fc2": 2},
        alpha_pattern={"layers.1.fc2": 3, "q_proj": 5},
        use_rslora=True,
    )
    theirs = get_peft_model(hf(folder), settings).eval()
    theirs.save_pretrained(tmp_path / "a")
    base = open_checkpoint(folder)
    adapter = open_adapter(tmp_path / "a", base)
    wanted = hf_logits(theirs)
    torch.testing.assert_close(merged_logits(merge_adapter(base, adapter)), wanted, **EXACT)
    again = attach_saved(OPT.from_checkpoint(folder), adapter)
    torch.testing.assert_close(logits(again), wanted, **EXACT)


def test_another_base(base_and_adapter: Any, tmp_path: Path) -> None:
    base, folder = base_and_adapter
    other = make_state(base.config, seed=9)
    moved = open_checkpoint(write_checkpoint(tmp_path / "other", base.config, other))
    with pytest.raises(CheckpointError, match=r"another base .*: the weights differ.*--force"):
        open_adapter(folder, moved)
    assert open_adapter(folder, moved, force=True).matrices
    wider = VARIANTS["mini"]
    third = open_checkpoint(write_checkpoint(tmp_path / "third", wider, make_state(wider)))
    with pytest.raises(CheckpointError, match="config and the weights differ"):
        open_adapter(folder, third)
    with pytest.raises(CheckpointError, match="has shape"):
        open_adapter(folder, third, force=True)


def test_the_fingerprint_is_of_numbers_and_not_of_files(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    half = write_checkpoint(tmp_path / "half", config, make_state(config), dtype="f16")
    a = open_checkpoint(half)
    b = open_checkpoint(save_checkpoint(tmp_path / "single", config, a.tensors, dtype="f32"))
    assert fingerprint(a.config, a.tensors) == fingerprint(b.config, b.tensors)
    other = dataclasses.replace(config, activation_function="gelu")
    assert fingerprint(other, a.tensors)["config"] != fingerprint(config, a.tensors)["config"]
    dropped = dataclasses.replace(config, dropout=0.3)
    assert fingerprint(dropped, a.tensors) == fingerprint(config, a.tensors)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS)
    (folder / SIDECAR).unlink()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)


def test_half_written(base_and_adapter: Any) -> None:
    base, folder = base_and_adapter
    tensors = stored(folder)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_adapter(folder, base)
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="half-written"):
        open_adapter(folder, base)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor"):
        open_adapter(folder, base)
    first = next(iter(tensors))
    rewrite(folder, {name: t for name, t in tensors.items() if name != first})
    with pytest.raises(CheckpointError, match="has the parts"):
        open_adapter(folder, base)
    rewrite_without = {n: t for n, t in tensors.items() if "layers.1." not in n}
    (folder / SIDECAR).write_text("{}")
    rewrite(folder, rewrite_without)
    with pytest.raises(CheckpointError, match="is it incomplete"):
        open_adapter(folder, base)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="folder of an adapter"):
        open_adapter(folder, base)


def test_names_that_collide_and_numbers_that_are_none(base_and_adapter: Any) -> None:
    base, folder = base_and_adapter
    tensors = stored(folder)
    name = next(iter(tensors))
    rewrite(folder, tensors | {name.removeprefix("base_model.model."): tensors[name].clone()})
    with pytest.raises(CheckpointError, match="adapter-collision"):
        open_adapter(folder, base)
    (folder / SIDECAR).touch()
    rewrite(folder, tensors | {name: tensors[name] * float("nan")})
    with pytest.raises(CheckpointError, match="NaN"):
        open_adapter(folder, base)


def test_bin_files_are_read_and_never_executed(base_and_adapter: Any) -> None:
    base, folder = base_and_adapter
    wanted = open_adapter(folder, base).matrices
    torch.save(stored(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    found = open_adapter(folder, base).matrices
    assert found.keys() == wanted.keys()
    for module, change_ in found.items():
        np.testing.assert_array_equal(change_.a.numpy(), wanted[module].a.numpy())
    torch.save({"x": warnings.warn}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="unsafe-pickle"):
        open_adapter(folder, base)


def test_virtual_tokens_that_fit_nothing(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path / "m", config, make_state(config))
    _, base = made(folder, tmp_path / "a", AdapterConfig(method="prefix", virtual_tokens=3))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        merge_adapter(base, open_adapter(tmp_path / "a", base))
    change(tmp_path / "a", num_attention_heads=4)
    with pytest.raises(CheckpointError, match="4 attention heads"):
        open_adapter(tmp_path / "a", base)
    change(tmp_path / "a", num_attention_heads=3, num_virtual_tokens=2)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 192\]"):
        open_adapter(tmp_path / "a", base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 10**6}, "rank is 1000000; q_proj has no more than 48"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": ("q_porj",)}, "did you mean 'q_proj'"),
        ({"target_modules": ("project_in",)}, "has no project_in"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"method": "prefix", "virtual_tokens": 64}, "below the context, 64"),
        ({"method": "pre"}, "method is 'pre'"),
    ],
)
def test_training_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**values).check_base(VARIANTS["base"])


def test_packed_weights_take_no_adapter(base_and_adapter: Any, tmp_path: Path) -> None:
    from optlm.engine.native_runner import pack

    base, folder = base_and_adapter
    packed = open_checkpoint(pack(base, tmp_path / "packed", "f32"))
    with pytest.raises(CheckpointError, match="packed weights"):
        open_adapter(folder, packed)
    shutil.rmtree(tmp_path / "packed")
