"""Attention maps against the reference's own probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import CheckpointError, RequestError
from optlm.interpret import attention_maps, run_with_cache, visit_attention
from optlm.model import OPT
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_maps_are_the_probabilities_of_the_forward_pass(name: str) -> None:
    ids = tokens(name, 23)
    wanted = run_with_cache(tiny(name), ids, "self_attn.hook_probs").stack("self_attn.hook_probs")
    found = attention_maps(tiny(name), ids)
    np.testing.assert_allclose(found.maps, wanted, atol=1e-6)
    assert np.triu(found.maps, 1).max() == 0
    np.testing.assert_allclose(found.maps.sum(-1), 1, atol=1e-5)


@every_variant
def test_chosen_layers_and_heads_in_the_order_asked_for(name: str) -> None:
    ids = tokens(name)
    whole = attention_maps(tiny(name), ids)
    some = attention_maps(tiny(name), ids, layers=[1, 0], heads=[1])
    np.testing.assert_allclose(some.maps[:, 0], whole.maps[[1, 0], 1], atol=1e-6)
    assert some.map_of(0, 1).shape == (11, 11)
    np.testing.assert_allclose(some.map_of(0, 1), whole.map_of(0, 1), atol=1e-6)


def test_layers_come_one_at_a_time() -> None:
    seen: list[int] = []
    visit_attention(tiny("mini"), tokens("mini"), lambda layer, maps: seen.append(layer))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("wrong", [{"layers": [2]}, {"heads": [0, 3]}, {"layers": [-1]}])
def test_no_such_layer_or_head(wrong: dict[str, list[int]]) -> None:
    with pytest.raises(RequestError, match=r"no (layer|head) -?\d; the model has"):
        attention_maps(tiny("base"), tokens("base"), **wrong)


def test_nan_weights() -> None:
    model = OPT(VARIANTS["base"]).eval()
    with torch.no_grad():
        model.decoder.layers[0].self_attn.q_proj.weight[:] = torch.nan
    with pytest.raises(CheckpointError, match="q_proj"):
        attention_maps(model, tokens("base"))
