"""The vocabulary of hook points: one table in the code, the same in the docs and in the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import ConfigError, RequestError
from optlm.interpret.points import POINTS, check_head, check_layer, hook_names, select
from optlm.model import HookPoint, hooked
from variants import VARIANTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "interpretability.md"
every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_the_table_is_what_the_model_has_in_the_order_in_which_it_computes(name: str) -> None:
    model = tiny(name)
    names = hook_names(model.config)
    modules = {key for key, m in model.decoder.named_modules() if isinstance(m, HookPoint)}
    assert set(names) == modules
    reached: list[str] = []
    with torch.no_grad(), hooked(model, {n: lambda _, n=n: reached.append(n) for n in names}):
        model(torch.tensor([tokens(name)]))
    assert tuple(reached) == names


@every_variant
def test_shapes_are_those_of_the_table(name: str) -> None:
    model, config = tiny(name), VARIANTS[name]
    sizes = {
        "B": 1, "T": 11, "S": 11, "D": config.hidden_size, "H": config.num_attention_heads,
        "K": config.head_dim, "F": config.ffn_dim, "E": config.embed_dim,
    }  # fmt: skip
    for point in POINTS:
        wanted = tuple(sizes[letter] for letter in re.findall(r"\w", point.shape))
        seen: list[tuple[int, ...]] = []
        place = f"layers.1.{point.name}" if point.of_layer else point.name
        with torch.no_grad(), hooked(model, {place: lambda v, s=seen: s.append(tuple(v.shape))}):
            model(torch.tensor([tokens(name)]))
        assert seen == [wanted], place


def test_the_page_has_the_same_table() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.*?) \| (\(.*?\)) \| `(.*?)` \|$", PAGE.read_text(), re.M
    )
    assert rows == [(p.name, p.value, p.shape, p.transformer_lens) for p in POINTS]


def test_patterns() -> None:
    config = VARIANTS["base"]
    assert select("hook_final", config) == ("hook_final",)
    assert select("hook_resid_mid", config) == (
        "layers.0.hook_resid_mid",
        "layers.1.hook_resid_mid",
    )
    assert select(["layers.1.self_attn.hook_?", "hook_embed"], config) == (
        "hook_embed",
        *(f"layers.1.self_attn.hook_{letter}" for letter in "qkv"),
    )
    assert select("*", config) == hook_names(config)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hook_resid_past", "no hook point 'hook_resid_past'; did you mean 'hook_resid_post'"),
        ("layers.0.hook_atn_out", r"did you mean 'layers\.0\.hook_attn_out'"),
        (
            "layers.2.hook_attn_out",
            r"no hook point 'layers\.2\.hook_attn_out'; the model has layers 0 to 1",
        ),
        ("nonsense", "no hook point 'nonsense'$"),
        ("blocks.*", r"no hook point 'blocks\.\*'"),
    ],
)
def test_unknown_names(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(pattern, VARIANTS["base"])


@pytest.mark.parametrize("index", [-1, 3, 1.0, True, "0"])
def test_layers_and_heads_that_are_none(index: int) -> None:
    config = VARIANTS["base"]
    with pytest.raises(RequestError, match="the model has heads 0 to 2"):
        check_head(index, config)
    with pytest.raises(RequestError, match="the model has layers 0 to 1"):
        check_layer(index, config)
    assert check_head(2, config) == 2
