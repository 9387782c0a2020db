"""Logit lens and token probabilities against the plain forward pass and a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import CheckpointError, RequestError
from optlm.interpret import logit_lens, token_probabilities
from optlm.model import OPT
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)


def logprobs_of(logits: torch.Tensor) -> np.ndarray:
    return logits.double().log_softmax(-1).numpy()


@every_variant
def test_the_last_row_is_the_model_itself(name: str) -> None:
    ids = tokens(name)
    with torch.no_grad():
        wanted = logprobs_of(tiny(name)(torch.tensor([ids])).logits[0])
    lens = logit_lens(tiny(name), ids, top=7)
    best = np.argsort(-wanted, axis=-1)[:, :7]
    assert np.array_equal(lens.top_ids[-1], best)
    np.testing.assert_allclose(
        lens.top_logprobs[-1], np.take_along_axis(wanted, best, 1), atol=1e-5
    )
    assert np.abs(lens.kl_to_final[-1]).max() < 1e-6
    assert lens.targets.tolist() == [*ids[1:], wanted[-1].argmax()]


@every_variant
def test_rows_equal_a_model_that_ends_there(name: str) -> None:
    """Row i + 1 is what a checkpoint cut after layer i says: its final norm and project_out act."""
    model, ids = tiny(name), tokens(name)
    lens = logit_lens(model, ids)
    for i in range(model.config.num_hidden_layers):
        cut = OPT(model.config).eval()
        cut.load_state_dict(model.state_dict())
        cut.decoder.layers = cut.decoder.layers[: i + 1]
        with torch.no_grad():
            wanted = logprobs_of(cut(torch.tensor([ids])).logits[0])
        rows = np.arange(len(ids))
        chosen = wanted[rows, lens.targets]
        np.testing.assert_allclose(lens.target_logprobs[i + 1], chosen, atol=1e-5)
        assert np.array_equal(lens.target_ranks[i + 1], (wanted > chosen[:, None]).sum(-1))
        np.testing.assert_allclose(
            lens.entropy[i + 1], -(np.exp(wanted) * wanted).sum(-1), atol=1e-5
        )
    assert len(lens.entropy) == model.config.num_hidden_layers + 1


@every_variant
def test_token_probabilities(name: str) -> None:
    ids = tokens(name)
    found = token_probabilities(tiny(name), ids, top=3)
    lens = logit_lens(tiny(name), ids, top=3)
    assert np.array_equal(found.logprobs, lens.target_logprobs[-1, :-1])
    assert np.array_equal(found.ranks, lens.target_ranks[-1, :-1])
    assert np.array_equal(found.top_ids, lens.top_ids[-1, :-1])
    assert len(found.logprobs) == len(found.tokens) - 1


def test_whole_vocabulary_sums_to_one() -> None:
    found = token_probabilities(tiny("base"), tokens("base"), top=300)
    np.testing.assert_allclose(np.exp(found.top_logprobs).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("top", [0, -1, 301])
def test_top_out_of_range(top: int) -> None:
    for function in (logit_lens, token_probabilities):
        with pytest.raises(RequestError, match=f"top is {top}; it must be from 1 to 300"):
            function(tiny("base"), tokens("base"), top=top)


def test_one_token_predicts_nothing() -> None:
    with pytest.raises(RequestError, match="give at least two"):
        token_probabilities(tiny("base"), [2])
    assert logit_lens(tiny("base"), [2]).entropy.shape == (3, 1)


@every_variant
def test_nan_weights(name: str) -> None:
    model = OPT(VARIANTS[name]).eval()
    with torch.no_grad():
        model.decoder.layers[0].fc1.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight"):
        logit_lens(model, tokens(name))
