"""Active units, counted again from the cache."""

from __future__ import annotations

import numpy as np
import pytest
from subjects import tiny, tokens

from optlm.errors import RequestError
from optlm.interpret import neuron_activity, run_with_cache, sparsity_profile
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_profile_and_activity(name: str) -> None:
    model = tiny(name)
    texts = [tokens(name, 9, seed=1), tokens(name, 5, seed=2)]
    units = np.concatenate(
        [run_with_cache(model, text, "hook_ffn_act").stack("hook_ffn_act") for text in texts],
        axis=1,
    )  # (L, T, F)
    activity = neuron_activity(model, texts)
    assert activity.tokens == 14
    np.testing.assert_allclose(activity.mean, units.mean(1), atol=1e-5)
    np.testing.assert_allclose(activity.peak, units.max(1), atol=1e-5)
    np.testing.assert_allclose(activity.positive, (units > 0).mean(1), atol=1e-6)
    if model.config.activation_function != "relu":
        with pytest.raises(RequestError, match=r"gelu has no exact zeros.*neuron_activity"):
            sparsity_profile(model, texts)
        return
    profile = sparsity_profile(model, texts)
    active = units != 0
    np.testing.assert_allclose(profile.active_share, active.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(profile.unit_share, active.mean(1), atol=1e-6)
    np.testing.assert_allclose(profile.by_token, active.mean(2), atol=1e-6)
    assert profile.never.tolist() == (~active.any(1)).sum(-1).tolist()
    assert profile.always.tolist() == active.all(1).sum(-1).tolist()
    assert profile.least_share.max() <= profile.most_share.min() + 1
    assert profile.mean_share == pytest.approx(active.mean(), abs=1e-6)


def test_no_texts() -> None:
    for function in (neuron_activity, sparsity_profile):
        with pytest.raises(RequestError, match="no texts"):
            function(tiny("base"), [])
        with pytest.raises(RequestError, match="no tokens"):
            function(tiny("base"), [[]])
