"""Streamed head statistics against dense ones, and what they find in heads made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from subjects import tiny, tokens

from optlm.errors import RequestError
from optlm.interpret import attention_maps, head_statistics, repeated_tokens
from optlm.interpret import statistics as module
from optlm.interpret.statistics import SCORES
from optlm.model import OPT
from variants import VARIANTS

every_variant = pytest.mark.parametrize("name", VARIANTS)


def dense_statistics(model: OPT, texts: list[list[int]]) -> dict[str, np.ndarray]:
    """The slow twin: loops over whole maps, from the definitions."""
    sums = {name: 0.0 for name in SCORES}
    counts = dict.fromkeys(SCORES, 0)
    for text in texts:
        maps = attention_maps(model, text).maps.astype(np.float64)  # (L, H, T, T)
        for t in range(1, len(text)):
            row = maps[:, :, t, : t + 1]
            entropy = -(row * np.log(np.maximum(row, 1e-300))).sum(-1)
            distance = (row * (t - np.arange(t + 1))).sum(-1)
            same = [s for s in range(t) if text[s] == text[t]]
            after = [s + 1 for s in same if s + 1 < t]
            values = {
                "entropy": entropy, "distance": distance, "spread": entropy / np.log(t + 1),
                "reach": distance / t, "previous": row[..., t - 1], "start": row[..., 0],
                "itself": row[..., t], "duplicate": row[..., same].sum(-1),
                "induction": row[..., after].sum(-1),
            }  # fmt: skip
            for name, value in values.items():
                sums[name] = sums[name] + value
                counts[name] += {"duplicate": bool(same), "induction": bool(after)}.get(name, True)
    return {name: sums[name] / counts[name] for name in SCORES}


@every_variant
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_equal_whole_matrices(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    texts = [tokens(name, 40, seed=1), [2, 9, 9, 8, 9, 9, 9, 8, 7], repeated_tokens(VARIANTS[name])]
    found = head_statistics(tiny(name), texts)
    for key, wanted in dense_statistics(tiny(name), texts).items():
        np.testing.assert_allclose(found.scores[key], wanted, rtol=1e-4, atol=1e-6, err_msg=key)
    assert found.tokens == sum(len(text) - 1 for text in texts)


def test_heads_made_by_hand_are_recognised() -> None:
    """Queries and keys that point at positions give a previous-token and a start head."""
    config = dataclasses.replace(VARIANTS["no_final_norm"], hidden_size=64, num_attention_heads=2)
    model = OPT(config).eval()
    decoder = model.decoder
    with torch.no_grad():
        decoder.embed_tokens.weight.zero_()
        decoder.embed_positions.weight.zero_()
        decoder.embed_positions.weight[2:66, :] = torch.eye(64)
        attention = decoder.layers[0].self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.bias.zero_()
            linear.weight.zero_()
        shift = torch.zeros(64, 64)
        shift[torch.arange(31), torch.arange(1, 32)] = 200.0  # query at t is the key at t - 1
        attention.q_proj.weight[:32] = shift[:32]
        attention.k_proj.weight[:32] = torch.eye(64)[:32]
        attention.q_proj.bias[32:] = 200.0
        attention.k_proj.weight[32:, 0] = 1.0
    found = head_statistics(model, [list(range(4, 30))])
    assert found.scores["previous"][0, 0] > 0.99
    assert found.scores["start"][0, 1] > 0.99
    assert found.scores["distance"][0, 0] == pytest.approx(1, abs=0.02)
    assert found.scores["entropy"][0].max() < 0.05


@every_variant
def test_repeated_tokens(name: str) -> None:
    config = VARIANTS[name]
    ids = repeated_tokens(config, seed=3)
    half = len(ids) // 2
    assert ids[0] == config.bos_token_id
    assert ids[1 : half + 1] == ids[half + 1 :]
    assert len(set(ids[1 : half + 1])) == half == 31
    assert ids != repeated_tokens(config, seed=4)
    stats = head_statistics(tiny(name), [ids])
    assert stats.repeats == half
    assert stats.followed == half


def test_no_repeats_have_no_score() -> None:
    found = head_statistics(tiny("base"), [[2, 4, 5, 6]])
    assert found.repeats == found.followed == 0
    assert np.isnan(found.scores["induction"]).all()


def test_no_room_to_repeat() -> None:
    with pytest.raises(RequestError, match="a context of 4"):
        repeated_tokens(dataclasses.replace(VARIANTS["base"], max_position_embeddings=4))


@pytest.mark.parametrize("texts", [[], [[2]], [[2, 5], []]])
def test_texts_that_say_nothing(texts: list[list[int]]) -> None:
    with pytest.raises(RequestError, match="at least two tokens"):
        head_statistics(tiny("base"), texts)
