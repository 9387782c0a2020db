"""Ensembles, MC dropout, distances and choosing texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from optlm import LLM
from optlm.errors import ContextLengthError, RequestError
from optlm.model import OPT
from optlm.uncertainty.active import select
from optlm.uncertainty.distance import fit_distance
from optlm.uncertainty.dropout import disagree_by_dropout
from optlm.uncertainty.ensemble import Member, combine, disagree
from variants import VARIANTS, make_state, write_checkpoint

RANDOM = np.random.default_rng(8)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_ensemble_is_the_mean_of_its_members(
    engine: Callable[[str], LLM], tmp_path: Path, name: str
) -> None:
    config = VARIANTS[name]
    folder = write_checkpoint(tmp_path / "other", config, make_state(config, seed=9))
    first, second = engine(name), LLM(folder, dtype="f32", threads=1)
    ids = [2, *RANDOM.integers(4, 260, 150).tolist()]  # longer than the context, and than a piece
    (found,) = disagree([Member(llm=first), Member(llm=second)], [ids])
    assert found.token_ids.tolist() == ids[1:]
    probs = []
    for folder_of in (first, second):
        scored = folder_of.score([ids], on_overflow="windows")[0]
        probs.append(np.exp(np.array(scored.logprobs[1:], float)))
    assert np.exp(found.logprob) == pytest.approx(np.mean(probs, axis=0), rel=1e-3)
    assert found.mutual_information == pytest.approx(
        np.maximum(found.entropy - found.expected_entropy, 0)
    )
    assert found.mutual_information.max() > 0.01
    (alike,) = disagree([Member(llm=first), Member(llm=first)], [ids])
    assert alike.mutual_information.max() < 1e-9


def test_members_that_are_sure_of_different_tokens_disagree() -> None:
    sure = np.log(np.array([[0.998, 0.001, 0.001]], np.float32))
    other = sure[:, ::-1]
    apart = combine([sure, other], np.array([0]))
    assert apart.mutual_information[0] == pytest.approx(np.log(2), abs=0.02)
    flat = np.log(np.full((1, 3), 1 / 3, np.float32))
    assert combine([flat, flat], np.array([0])).mutual_information[0] == pytest.approx(0, abs=1e-9)


def test_other_vocabularies_are_refused(engine: Callable[[str], LLM], tmp_path: Path) -> None:
    base = engine("base")
    with pytest.raises(RequestError, match="vocabulary of 512 tokens, the first one of 300"):
        disagree([Member(llm=base), Member(llm=engine("mini"))], ["the cat"])
    with pytest.raises(RequestError, match="at least 2 members, not 1"):
        disagree([Member(llm=base)], ["the cat"])
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path / "swapped", config, make_state(config))
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace('"a":', '"@":', 1).replace('"b":', '"a":', 1).replace('"@":', '"b":', 1)
    )
    with pytest.raises(RequestError, match="member 2 has another tokenizer: token"):
        disagree([Member(llm=base), Member(llm=LLM(folder))], ["the cat"])
    with pytest.raises(RequestError, match="the text is empty"):
        disagree([Member(llm=base), Member(llm=base)], [""])


def write_lora(folder: Path, name: str) -> Path:
    """A LoRA of rank 2 on the queries, as peft saves it."""
    folder.mkdir()
    tensors = {}
    for key, shape in VARIANTS[name].parameter_shapes().items():
        if key.endswith("q_proj.weight"):
            place = f"base_model.model.{key.removesuffix('.weight')}"
            for part, size in (("lora_A", (2, shape[1])), ("lora_B", (shape[0], 2))):
                tensors[f"{place}.{part}.weight"] = RANDOM.normal(size=size).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_of_one_engine_are_members(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    llm = LLM(folders[name], dtype="f32", threads=1)
    llm.load_adapter("one", write_lora(tmp_path / "one", name))
    ids = [2, *RANDOM.integers(4, 260, 30).tolist()]
    (found,) = disagree([Member(llm=llm), Member(llm=llm, adapter="one")], [ids])
    probs = [
        np.exp(np.array(llm.score([ids], adapter=adapter)[0].logprobs[1:], float))
        for adapter in (None, "one")
    ]
    assert np.exp(found.logprob) == pytest.approx(np.mean(probs, axis=0), rel=1e-3)
    assert found.mutual_information.max() > 1e-3
    assert not llm.has_work


def test_a_command_takes_adapters_as_members(
    command: Callable[..., tuple[int, str, str]], folders: dict[str, Path], tmp_path: Path
) -> None:
    items = tmp_path / "items.jsonl"
    pair = ("the cat", "cat the")
    rows = [{"good": a, "bad": b} for a, b in (pair, pair[::-1])] * 3
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = write_lora(tmp_path / "one", "base")
    evaluate = ("uncertainty", "evaluate", items, "-m", folders["base"])
    code, out, err = command(*evaluate, "--ensemble-adapter", adapter)
    assert code == 0, err
    assert "ensemble" in out
    code, _, err = command(*evaluate, "--ensemble-adapter", tmp_path)
    assert code == 2, err
    assert "adapter_config.json" in err


# ---- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_passes_with_dropout_differ_and_repeat(folders: dict[str, Path], name: str) -> None:
    model = OPT.from_checkpoint(folders[name])
    ids = [2, *RANDOM.integers(4, 260, 20).tolist()]
    before = model(torch.tensor([ids])).logits
    state = torch.get_rng_state()
    (first,) = disagree_by_dropout(model, [ids], passes=4, rate=0.2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(torch.tensor([ids])).logits, before)
    (again,) = disagree_by_dropout(model, [ids], passes=4, rate=0.2, seed=3)
    (other,) = disagree_by_dropout(model, [ids], passes=4, rate=0.2, seed=4)
    assert first.mutual_information.tolist() == again.mutual_information.tolist()
    assert first.mutual_information.tolist() != other.mutual_information.tolist()
    assert first.mutual_information.max() > 1e-3
    (slight,) = disagree_by_dropout(model, [ids], passes=4, rate=1e-6, seed=3)
    assert slight.mutual_information.max() < 1e-6
    plain = torch.log_softmax(before[0, :-1], -1)[range(20), ids[1:]]
    assert slight.logprob == pytest.approx(plain.detach().numpy(), abs=1e-3)


def test_passes_that_cannot_disagree_are_refused(folders: dict[str, Path]) -> None:
    model = OPT.from_checkpoint(folders["base"])
    with pytest.raises(RequestError, match="1 passes cannot disagree"):
        disagree_by_dropout(model, [[2, 5]], passes=1, rate=0.1)
    for rate in (0, 1, float("nan")):
        with pytest.raises(RequestError, match="all passes would be alike"):
            disagree_by_dropout(model, [[2, 5]], rate=rate)
    with pytest.raises(RequestError, match="one token and nothing before it"):
        disagree_by_dropout(model, [[2]], rate=0.1)
    with pytest.raises(ContextLengthError, match="65 tokens"):
        disagree_by_dropout(model, [[2] * 65], rate=0.1)


# ---- distance ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(10, 30), (500, 8)])
def test_the_covariance_is_that_of_ledoit_and_wolf(count: int, width: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    states = RANDOM.normal(size=(count, width)) * np.linspace(1, 4, width) + 3
    ours = fit_distance(states)
    theirs = covariance.LedoitWolf().fit(states)
    assert ours.shrinkage == pytest.approx(theirs.shrinkage_)
    others = RANDOM.normal(size=(5, width)) * 5
    assert ours.of(others) == pytest.approx(theirs.mahalanobis(others), rel=1e-6)


def test_far_texts_are_far() -> None:
    ours = fit_distance(RANDOM.normal(size=(400, 6)))
    assert 5 < ours.of(RANDOM.normal(size=(1000, 6))).mean() < 7  # about the width
    assert ours.of(np.full((1, 6), 9.0))[0] > 400


def test_states_without_a_spread_are_refused() -> None:
    with pytest.raises(RequestError, match="1 texts have no spread"):
        fit_distance(np.ones((1, 3)))
    with pytest.raises(RequestError, match="the same hidden state"):
        fit_distance(np.ones((4, 3)))
    with pytest.raises(RequestError, match="NaN or infinity"):
        fit_distance(np.full((4, 3), np.nan))
    with pytest.raises(RequestError, match=r"must be \(texts, 3\)"):
        fit_distance(RANDOM.normal(size=(9, 3))).of(np.ones((2, 4)))


# ---- choosing texts ------------------------------------------------------------------------------


def test_choices_are_uncertain_and_differ() -> None:
    uncertainty = np.array([9.0, 8.9, 8.8, 5.0, 4.9, 0.1])
    states = np.array([[0, 0], [0, 0.1], [0.1, 0], [3, 3], [5, 5], [90, 90]])
    assert select(uncertainty, states, 3, breadth=1) == [0, 1, 2]
    assert select(uncertainty, states, 2, breadth=5 / 2) == [
        0,
        4,
    ]  # the certain one is no candidate
    assert select(uncertainty, states, 3, breadth=5 / 3) == [0, 4, 3]
    assert sorted(select(uncertainty, states, 6)) == [0, 1, 2, 3, 4, 5]
    assert select(np.ones(3), np.ones((3, 2)), 3) == [0, 1, 2]


def test_impossible_choices_are_refused() -> None:
    states = np.ones((3, 2))
    with pytest.raises(RequestError, match="4 of 3 texts"):
        select(np.ones(3), states, 4)
    with pytest.raises(RequestError, match="0 of 3 texts"):
        select(np.ones(3), states, 0)
    with pytest.raises(RequestError, match="give 2 finite vectors"):
        select(np.ones(2), states, 1)
    with pytest.raises(RequestError, match="number 1 is nan"):
        select([1, np.nan, 1], states, 1)
    with pytest.raises(RequestError, match="breadth is 0"):
        select(np.ones(3), states, 1, breadth=0.5 - 0.5)
