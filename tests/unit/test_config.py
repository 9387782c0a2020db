"""`OPTConfig`: counts against transformers, strict reading, and refusal of nonsense."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optlm.config import PUBLISHED, OPTConfig
from optlm.errors import ConfigError
from variants import VARIANTS, make_state

BASE: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def transformers_parameters(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers would create, without taking memory."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.OPTConfig(**config.to_dict())
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(theirs)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("size", ["125m", "350m", "1.3b"])
def test_published_sizes_are_those_of_transformers(size: str) -> None:
    config = PUBLISHED[size].config
    assert config.parameter_shapes() == transformers_parameters(config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_those_of_transformers(variant: str) -> None:
    config = VARIANTS[variant]
    assert config.parameter_shapes() == transformers_parameters(config)
    assert set(make_state(config)) == set(config.parameter_shapes())


# The sizes by which the models are known, in billions (OPT paper, Table 1).
@pytest.mark.parametrize(
    ("size", "billions"),
    [
        ("125m", 0.125), ("350m", 0.331), ("1.3b", 1.316), ("2.7b", 2.652), ("6.7b", 6.658),
        ("13b", 12.853), ("30b", 29.975), ("66b", 65.720), ("175b", 174.604),
    ],
)  # fmt: skip
def test_parameter_counts(size: str, billions: float) -> None:
    assert PUBLISHED[size].config.parameter_count() == pytest.approx(billions * 1e9, rel=3e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_sums_over_the_shapes(variant: str) -> None:
    config = VARIANTS[variant]
    total = sum(int(np.prod(shape)) for shape in config.parameter_shapes().values())
    assert config.parameter_count() == total
    assert config.weight_bytes("f32") == 4 * total
    assert config.weight_bytes("int8") == total
    per_token = 2 * config.num_hidden_layers * config.hidden_size
    assert config.kv_bytes_per_token("f16") == 2 * per_token


def test_flops_of_the_125m() -> None:
    config = PUBLISHED["125m"].config
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50272 * 768
    assert config.flops_per_token(0) == 2 * matrices
    assert config.flops_per_token(100) - config.flops_per_token(0) == 2 * 12 * 2 * 768 * 100
    small = PUBLISHED["350m"].config
    blocks = 24 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    assert small.flops_per_token(0) == 2 * (blocks + 50272 * 512 + 2 * 1024 * 512)


def test_learning_rates_and_batches_of_table_1() -> None:
    rates = [published.learning_rate for published in PUBLISHED.values()]
    assert rates == [6e-4, 3e-4, 2e-4, 1.6e-4, 1.2e-4, 1e-4, 1e-4, 0.8e-4, 1.2e-4]
    millions = [published.batch_tokens / 1e6 for published in PUBLISHED.values()]
    assert millions == [0.5, 0.5, 1, 1, 2, 4, 4, 2, 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tmp_path: Path) -> None:
    config = VARIANTS[variant]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert OPTConfig.from_file(path) == config


NONSENSE: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": 0},
    "a negative": {"num_hidden_layers": -1},
    "a huge": {"hidden_size": 10**12},
    "a billion layers": {"num_hidden_layers": 10**9},
    "heads": {"num_attention_heads": 5},
    "a text": {"ffn_dim": "64"},
    "a fraction": {"ffn_dim": 64.0},
    "a truth": {"ffn_dim": True},
    "no context": {"max_position_embeddings": 0},
    "activation": {"activation_function": "__import__"},
    "NaN": {"dropout": float("nan")},
    "dropout": {"dropout": 1.5},
    "infinite": {"init_std": float("inf")},
    "a number for a truth": {"enable_bias": 1},
    "start token": {"bos_token_id": 100},
    "pad token": {"pad_token_id": -1},
    "another model": {"model_type": "gpt2"},
    "another epsilon": {"layer_norm_eps": 1e-6},
    "scaled embeddings": {"scale_embeddings": True},
    "quantised": {"quantization_config": {"bits": 4}},
    "missing": {"vocab_size": None},
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused(case: str) -> None:
    OPTConfig.from_dict(BASE)
    changed = NONSENSE[case]
    with pytest.raises(ConfigError, match=next(iter(changed)).strip("_")):
        OPTConfig.from_dict({**BASE, **changed})


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"hiden_size.*did you mean 'hidden_size'"):
        OPTConfig.from_dict({**BASE, "hiden_size": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"vocab_size": 1, "vocab_size": 2}', "appears twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="cannot read"):
        OPTConfig.from_file(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        OPTConfig.from_file(path)


def test_a_description_of_each_variant() -> None:
    assert PUBLISHED["125m"].config.variant == "base"
    assert "post-norm" in PUBLISHED["350m"].config.variant
    assert "no biases" in VARIANTS["galactica"].variant
    assert "untied" in VARIANTS["untied"].variant


def test_a_config_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED["125m"].config.hidden_size = 3  # type: ignore[misc]
