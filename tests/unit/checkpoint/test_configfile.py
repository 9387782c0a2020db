"""Configurations as published models carry them are accepted; their true meaning is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optlm.checkpoint.configfile import examine_config, read_config
from optlm.config import PUBLISHED, OPTConfig
from optlm.errors import ConfigError

COMMON: dict[str, Any] = {
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
OPT_125M = {**COMMON, "_remove_final_layer_norm": False, "prefix": "</s>"}
OPT_350M = {
    **COMMON,
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
    "prefix": "</s>",
}
GALACTICA = {
    **COMMON,
    "activation_function": "gelu",
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "learned_embeddings": True,
    "scale_embeddings": False,
    "vocab_size": 50000,
}
STORY_MODEL = {
    **OPT_125M,
    "_name_or_path": "opt",
    "badwordsids": [[44717], [46613]],
    "newlinemode": "s",
    "static_weights": {},
    "welcome": "hello",
    "sampler_order": [6, 0, 1, 2, 3, 4, 5],
    "rep_pen": 1.1,
    "temp": 0.6,
}
CLASSIFIER_LIKE = {
    **OPT_125M,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "problem_type": None,
    "gradient_checkpointing": False,
    "_attn_implementation_autoset": True,
    "layer_norm_eps": 1e-5,
    "quantization_config": None,
    "word_embed_proj_dim": None,
}


def written(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (OPT_125M, PUBLISHED["125m"].config),
        (OPT_350M, PUBLISHED["350m"].config),
        (STORY_MODEL, PUBLISHED["125m"].config),
        (CLASSIFIER_LIKE, PUBLISHED["125m"].config),
        (
            GALACTICA,
            OPTConfig(
                vocab_size=50000,
                activation_function="gelu",
                attention_dropout=0.1,
                bos_token_id=0,
                enable_bias=False,
                layer_norm_elementwise_affine=False,
            ),
        ),
    ],
)
def test_published_forms(values: dict[str, Any], expected: OPTConfig, tmp_path: Path) -> None:
    path = written(tmp_path, values)
    assert read_config(path) == expected
    assert examine_config(path) == (expected, [])


@pytest.mark.parametrize("eps", [1e-6, 1e-12, 0, "1e-5"])
def test_another_layer_norm_epsilon_is_another_model(eps: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer_norm_eps"):
        read_config(written(tmp_path, {**OPT_125M, "layer_norm_eps": eps}))


def test_a_thousand_keys_are_not_examined_one_by_one(tmp_path: Path) -> None:
    path = written(tmp_path, {**OPT_125M, **{f"key{i}": 0 for i in range(1000)}})
    config, faults = examine_config(path)
    assert config is None
    assert [fault.code for fault in faults] == ["config-unknown-key"]


def test_values_of_wild_kinds_are_named(tmp_path: Path) -> None:
    for key in OPT_125M:
        for value in ([], {}, [[]], {"a": 1}):
            path = written(tmp_path, {**OPT_125M, key: value})
            config, faults = examine_config(path)
            try:
                read_config(path)
            except ConfigError:
                assert config is None
                assert faults
            else:
                assert faults == []
