"""Figures of tokens: against the reference model in float64, over every variant."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from optlm import LLM
from optlm.errors import CheckpointError, EngineError, RequestError
from optlm.model import OPT
from optlm.uncertainty.measures import measure, measure_rows, tempered
from optlm.uncertainty.reading import read_rows
from variants import VARIANTS, make_state, write_checkpoint

TEXT = "Once upon a time the cat sat"


def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """(T, V) in float64."""
    model = OPT.from_checkpoint(folder).double()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_figures_are_those_of_their_definitions(
    engine: Callable[[str], LLM], folders: dict[str, Path], name: str, temperature: float
) -> None:
    llm = engine(name)
    ids = llm.tokenizer.encode(TEXT)  # type: ignore[union-attr]
    (ours,) = measure(llm, [ids], temperature=temperature)
    rows = reference_logits(folders[name], ids) / temperature
    assert len(ours) == len(ids) - 1
    for place, token in enumerate(ids[1:]):
        probs = torch.softmax(rows[place], 0).tolist()
        ranked = sorted(probs, reverse=True)
        size = len(probs)
        assert ours.token_ids[place] == token
        assert ours.logprob[place] == pytest.approx(math.log(probs[token]), abs=2e-4)
        entropy = -math.fsum(p * math.log(p) for p in probs if p > 0)
        assert ours.entropy[place] == pytest.approx(entropy, abs=2e-4)
        assert ours.margin[place] == pytest.approx(ranked[0] - ranked[1], abs=2e-4)
        certainty = math.fsum(math.log(1 / size) - math.log(p) for p in probs) / size
        assert ours.self_certainty[place] == pytest.approx(certainty, abs=1e-3)
        assert ours.rank[place] == 1 + sum(p > probs[token] for p in probs)
        assert probs[ours.top_id[place]] == ranked[0]
        assert ours.top_prob[place] == pytest.approx(ranked[0], abs=2e-4)
    assert ours.total == pytest.approx(sum(ours.logprob))
    assert ours.normalised == pytest.approx(ours.total / len(ours))


@pytest.mark.parametrize("name", VARIANTS)
def test_likelihoods_are_those_of_score(engine: Callable[[str], LLM], name: str) -> None:
    llm = engine(name)
    texts = [TEXT, "the mat", "home again in the rain and then the other cats"]
    for ours, scored in zip(measure(llm, texts), llm.score(texts), strict=True):
        assert ours.total == pytest.approx(scored.total, abs=1e-3)
        assert ours.logprob == pytest.approx(np.array(scored.logprobs[1:], float), abs=1e-4)


def test_long_texts_are_read_in_the_windows_of_score(base: LLM) -> None:
    ids = np.random.default_rng(0).integers(4, 300, 200).tolist()
    ids[0] = 2
    (ours,) = measure(base, [ids])
    (scored,) = base.score([ids], on_overflow="windows")
    assert ours.token_ids.tolist() == ids[1:]
    assert ours.logprob == pytest.approx(np.array(scored.logprobs[1:], float), abs=1e-4)


def test_texts_are_measured_alike_alone_and_together(base: LLM) -> None:
    texts = [[2, *range(5, 5 + length)] for length in range(1, 60)] * 2
    together = measure(base, texts)
    for ids, each in zip(texts[:5], together[:5], strict=True):
        (alone,) = measure(base, [ids])
        assert alone.entropy.tolist() == each.entropy.tolist()


def test_rows_leave_the_engine_as_they_come(base: LLM) -> None:
    """The memory of a text is that of one step's rows, and an unfinished reading leaves nothing."""
    reading = read_rows(base, [[2] * 60, [2] * 50])
    first = next(reading)
    assert first.logprobs.shape == (len(first.targets), 300)
    reading.close()
    assert not base.has_work
    base.check_integrity()


def test_the_last_tokens_alone(base: LLM) -> None:
    texts = [[2, 5, 6, 7], [2, 5, 6, 8, 9], np.random.default_rng(0).integers(4, 300, 150).tolist()]
    whole = measure(base, texts)
    for count in (1, 2, 3):
        some = measure(base, texts, last=[count] * 3)
        for each, all_of_it in zip(some, whole, strict=True):
            for name, values in vars(each).items():
                assert values.tolist() == vars(all_of_it)[name][-count:].tolist()
    (long,) = measure(base, texts[2:], last=[100])  # of more than one window
    assert long.entropy.tolist() == whole[2].entropy[-100:].tolist()
    for count in (0, 4):
        with pytest.raises(RequestError, match=f"the last {count} of 3 tokens"):
            measure(base, texts[:1], last=[count])


def test_a_certain_distribution_has_no_entropy() -> None:
    rows = np.log(np.full((1, 4), 1e-30, np.float32))
    rows[0, 2] = 0
    figures = measure_rows(rows, np.array([2]))
    assert figures.entropy[0] == pytest.approx(0, abs=1e-6)
    assert figures.margin[0] == pytest.approx(1)
    uniform = measure_rows(np.log(np.full((1, 4), 0.25, np.float32)), np.array([2]))
    assert uniform.entropy[0] == pytest.approx(math.log(4))
    assert uniform.self_certainty[0] == pytest.approx(0, abs=1e-6)
    assert uniform.margin[0] == 0


def test_temperature_one_changes_nothing() -> None:
    rows = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    assert tempered(rows, 1) is rows
    assert np.exp(tempered(rows, 2)).sum() == pytest.approx(1)


def test_texts_without_a_distribution_are_refused(base: LLM) -> None:
    with pytest.raises(RequestError, match="the text is empty"):
        measure(base, [""])
    with pytest.raises(RequestError, match="one token and nothing before it"):
        measure(base, [[7]])
    for temperature in (0, -1, math.nan, math.inf):
        with pytest.raises(RequestError, match=r"between 0\.01 and 100"):
            measure(base, [TEXT], temperature=temperature)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    state = make_state(config)
    state["model.decoder.layers.0.fc1.weight"][0, 0] = np.nan
    folder = write_checkpoint(tmp_path / "nan", config, state)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight"):
        LLM(folder)


def test_logits_that_are_no_numbers_stop_the_reading(base: LLM) -> None:
    class Broken:
        def __init__(self, runner: object) -> None:
            self._runner = runner

        def __getattr__(self, name: str) -> object:
            return getattr(self._runner, name)

        def forward(self, *arrays: object) -> object:
            logits = self._runner.forward(*arrays)  # type: ignore[attr-defined]
            logits[:] = np.nan
            return logits

    llm = LLM.from_runner(Broken(base._runner), base.tokenizer)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="not finite"), np.errstate(invalid="ignore"):
        measure(llm, [TEXT])
