"""The recipes of all sizes, and what settings that leave things out come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optlm.config import PUBLISHED
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.loop.optim import learning_rate
from optlm.train.pretrain.recipe import PretrainConfig, recipe, recipe_names

DATA = {"parts": [{"name": "x", "file": "x.jsonl", "weight": 1}], "validation": {}}


def settings(name: str, **values: Any) -> PretrainConfig:
    return PretrainConfig.from_dict({"model": name, "data": DATA} | values)


# Parameters as published; "350m" without the embedding's unused rows is 331 million.
COUNTS = {
    "125m": 125_239_296, "350m": 331_196_416, "1.3b": 1_315_758_080, "2.7b": 2_651_596_800,
    "6.7b": 6_658_473_984, "13b": 12_853_473_280, "30b": 29_974_540_288, "66b": 65_718_000_000,
    "175b": 174_600_000_000, "mini-2m": 1_973_376, "mini-8m": 8_677_888, "mini-30m": 29_945_856,
    "tiny": 132_992,
}  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_its_model(name: str) -> None:
    config = settings(name)
    with torch.device("meta"):
        model = OPT(config.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == config.model.parameter_count()
    assert count == pytest.approx(COUNTS[name], rel=1e-3)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes_follow_the_paper(name: str) -> None:
    """arXiv 2205.01068, section 2.2 and Table 1."""
    config, size = settings(name), PUBLISHED[name]
    optim, model = config.loop.optim, config.model
    assert (optim.method, optim.beta1, optim.beta2) == ("adamw", 0.9, 0.95)
    assert (optim.weight_decay, optim.clip_norm) == (0.1, 1.0)
    assert (model.dropout, model.init_std, model.activation_function) == (0.1, 0.006, "relu")
    assert optim.learning_rate == size.learning_rate
    assert config.batch_tokens == pytest.approx(size.batch_tokens, rel=1e-3)
    assert config.loop.steps * config.batch_tokens == pytest.approx(300e9, rel=1e-3)
    warm = optim.warmup_steps
    assert (
        warm == 2000
        if name == "175b"
        else warm * config.batch_tokens == pytest.approx(375e6, rel=1e-2)
    )
    top = learning_rate(optim, warm - 1, config.loop.steps)
    assert top == pytest.approx(size.learning_rate)
    last = learning_rate(optim, config.loop.steps - 1, config.loop.steps)
    assert last == pytest.approx(0.1 * size.learning_rate)
    assert config.precision == "f16"
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim")
    assert all(getattr(model, field) == getattr(size.config, field) for field in fields)
    assert model.do_layer_norm_before == size.config.do_layer_norm_before


def test_the_mini_family_shares_tokenizer_and_data_order() -> None:
    family = [recipe(name) for name in recipe_names() if name.startswith("mini-")]
    assert len(family) == 3
    for other in family[1:]:
        for key in ("data", "batch_tokens", "sequence_lengths", "seed"):
            assert other[key] == family[0][key]
        assert other["loop"]["steps"] == family[0]["loop"]["steps"]


def test_keys_beside_the_size_win() -> None:
    config = settings(
        "125m",
        loop={"steps": 100, "optim": {"learning_rate": 0.001}},
        sequence_lengths={"512": 1},
        batch_tokens=4096,
        micro_batch_tokens=2048,
    )
    assert config.loop.steps == 100
    assert (config.loop.optim.learning_rate, config.loop.optim.weight_decay) == (0.001, 0.1)
    assert config.sequence_lengths == {512: 1.0}
    assert config.model == settings("125m").model


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'mini-8b'; did you mean 'mini-8m'.*125m, 350m"):
        settings("mini-8b")


def test_what_is_left_out_is_the_papers(recipe: dict[str, Any]) -> None:
    del recipe["loop"]["optim"]["warmup_steps"]
    short = PretrainConfig.from_dict(recipe)
    assert short.model.init_std == 0.006
    assert short.loop.optim.warmup_steps == 1  # a tenth of 12 steps
    recipe["loop"]["steps"] = 10**6
    assert PretrainConfig.from_dict(recipe).loop.optim.warmup_steps == 2000
    large = recipe | {"batch_tokens": 500_000 // 32 * 32, "micro_batch_tokens": 32}
    assert PretrainConfig.from_dict(large).loop.optim.warmup_steps == 750  # 375 million tokens


@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(recipe: dict[str, Any], value: Any) -> None:
    with pytest.raises(ConfigError, match="compile in the configuration must be bool"):
        PretrainConfig.from_dict(recipe | {"compile": value})
