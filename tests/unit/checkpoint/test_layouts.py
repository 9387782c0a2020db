"""Every layout of every variant loads to the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_layouts import (
    LAYOUTS,
    as_torch,
    expected,
    metaseq_names,
    split_parts,
    write_config,
    write_parts,
)
from optlm.checkpoint import diagnose, open_checkpoint
from optlm.errors import CheckpointError, ConfigError
from variants import VARIANTS, make_state

RAW_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layout_loads_bit_equal(variant: str, layout: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    if layout == "with_tied_head" and not config.tie_word_embeddings:
        pytest.skip("the head is stored in every layout of an untied model")
    if layout.startswith("metaseq") and config.vocab_size % 4:
        config = VARIANTS["base"].__class__(**{**config.__dict__, "vocab_size": 308})
    tensors = as_torch(make_state(config), "f32")
    LAYOUTS[layout](tmp_path, config, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert list(checkpoint.tensors) == list(config.parameter_shapes())
    for name, value in expected(tensors).items():
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), value)
    checkpoint.check_finite()
    assert [fault for fault in diagnose(tmp_path) if fault.code != "tokenizer-missing"] == []


@pytest.mark.parametrize("layout", ["safetensors", "torch_file", "metaseq_fused_parts"])
@pytest.mark.parametrize("dtype", RAW_DTYPES)
def test_dtypes_are_kept(layout: str, dtype: str, tmp_path: Path) -> None:
    config = VARIANTS["foreign"]
    tensors = as_torch(make_state(config), dtype)
    LAYOUTS[layout](tmp_path, config, tensors)
    for name, tensor in open_checkpoint(tmp_path).tensors.items():
        raw = tensor.raw()
        assert raw.dtype == RAW_DTYPES[dtype]
        assert raw.flags.c_contiguous
        assert not raw.flags.writeable
        np.testing.assert_array_equal(tensor.numpy(), tensors[name].float().numpy())


def test_files_are_mapped_not_copied(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    LAYOUTS["safetensors"](tmp_path, config, as_torch(make_state(config), "f32"))
    tensor = open_checkpoint(tmp_path).tensors["model.decoder.embed_tokens.weight"]
    assert np.shares_memory(tensor.raw(), tensor.raw())
    assert not tensor.raw().flags.owndata


def test_values_that_are_not_finite_are_all_named(tmp_path: Path) -> None:
    config, state = VARIANTS["base"], make_state(VARIANTS["base"])
    bad = ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.1.fc2.bias"]
    state[bad[0]][3, 4] = np.inf
    state[bad[1]][5] = np.nan
    LAYOUTS["safetensors"](tmp_path, config, as_torch(state, "bf16"))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="2 faults") as caught:
        checkpoint.check_finite()
    assert [fault.where for fault in caught.value.faults] == bad


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
def test_metaseq_settings_replace_a_missing_config(
    variant: str, fused: bool, tmp_path: Path
) -> None:
    config = VARIANTS[variant]
    if config.vocab_size % 2 or config.remove_final_layer_norm:
        pytest.skip("metaseq has no such model")
    write_parts(tmp_path, config, as_torch(make_state(config), "f16"), fused=fused, count=2)
    found = open_checkpoint(tmp_path).config
    assert found.parameter_shapes() == config.parameter_shapes()
    assert found.num_attention_heads == config.num_attention_heads
    assert found.activation_function == config.activation_function
    assert found.do_layer_norm_before == config.do_layer_norm_before


def test_whole_head_in_every_part(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    tensors = as_torch(make_state(config), "f32")
    named = metaseq_names(config, tensors, fused=True)
    head = named["decoder.output_projection.weight"]
    write_config(tmp_path, config)
    for part, model in enumerate(split_parts(named, 2)):
        model["decoder.output_projection.weight"] = head
        torch.save({"model": model}, tmp_path / f"reshard-model_part-{part}.pt")
    assert open_checkpoint(tmp_path).layout.startswith("metaseq in 2 parts")


def _parts(tmp_path: Path) -> list[Path]:
    config = VARIANTS["base"]
    write_config(tmp_path, config)
    return write_parts(tmp_path, config, as_torch(make_state(config), "f32"), fused=True, count=2)


def _edit(path: Path, name: str, value: object) -> None:
    model = dict(torch.load(path, weights_only=False)["model"])
    if value is None:
        del model[name]
    else:
        model[name] = value
    torch.save({"model": model}, path)


def _rewrite_without_settings(paths: list[Path]) -> None:
    config = VARIANTS["base"]
    named = metaseq_names(config, as_torch(make_state(config), "f32"), fused=True)
    for path, model in zip(paths, split_parts(named, 2), strict=True):
        torch.save({"model": model}, path)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("decoder.layer_norm.weight", torch.ones(48), "part-drift"),
        ("decoder.layers.1.fc2.bias", torch.ones(47), "part-shape"),
        ("decoder.layers.1.fc1.weight", torch.ones(56, 47), "part-shape"),
        ("decoder.layers.0.self_attn.qkv_proj.weight", torch.ones(72, 47), "part-shape"),
        ("decoder.layers.0.self_attn.qkv_proj.bias", None, "part-names"),
        ("decoder.pooler.weight", torch.ones(3), "part-names"),
    ],
)
def test_parts_that_disagree_are_named(
    name: str, value: torch.Tensor | None, code: str, tmp_path: Path
) -> None:
    paths = _parts(tmp_path)
    _rewrite_without_settings(paths)
    _edit(paths[1], name, value)
    with pytest.raises(CheckpointError, match=code) as caught:
        open_checkpoint(tmp_path)
    assert any(name in fault.where or "qkv" in name for fault in caught.value.faults)


def test_missing_part(tmp_path: Path) -> None:
    _parts(tmp_path)[0].unlink()
    with pytest.raises(CheckpointError, match="missing-part"):
        open_checkpoint(tmp_path)


def test_flat_parameters_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write_config(tmp_path, VARIANTS["base"])
    torch.save({"model": {"decoder.flat_param_0": torch.ones(9)}}, tmp_path / "reshard.pt")
    with pytest.raises(CheckpointError, match="reshard_fsdp"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", RAW_DTYPES)
def test_biases_and_norms_without_effect(dtype: str, tmp_path: Path) -> None:
    """Galactica's first form: a plain OPT whose biases are zero and whose norms are one."""
    config = VARIANTS["galactica"]
    full = dataclasses.replace(config, enable_bias=True, layer_norm_elementwise_affine=True)
    values = {
        name: np.ones(shape, np.float32) if "norm.weight" in name else np.zeros(shape, np.float32)
        for name, shape in full.parameter_shapes().items()
    }
    tensors = as_torch(values | make_state(config), dtype)
    LAYOUTS["torch_file"](tmp_path, config, tensors)
    assert list(open_checkpoint(tmp_path).tensors) == list(config.parameter_shapes())
    tensors["model.decoder.layers.1.fc1.bias"][3] = 1e-3
    tensors["model.decoder.layers.0.final_layer_norm.weight"][3] = 1.5
    LAYOUTS["torch_file"](tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match="2 faults") as caught:
        open_checkpoint(tmp_path)
    assert {fault.code for fault in caught.value.faults} == {"extra-tensor"}


def test_no_config_beside_plain_weights(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    LAYOUTS["safetensors"](tmp_path, config, as_torch(make_state(config), "f32"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)
