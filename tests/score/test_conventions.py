"""One switch each reproduces what another tool says."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import pytest
from score_bench import Bench

from optlm.errors import ContextLengthError, RequestError
from optlm.score import CONVENTIONS, Convention, Scorer

torch = pytest.importorskip("torch")

TEXT = "the cat sat on the mat and then the other cats went to their home in the rain again"
LONG = " ".join([TEXT] * 8)
NATS = 1e-4


def request(kind: str, arguments: tuple[str, ...]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture
def harness(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    # Its cache mistakes the border of two requests with equal tokens (0.4.13): without it.
    return HFLM(
        pretrained=bench.peer, tokenizer=bench.peer_tokenizer, batch_size=2, logits_cache=False
    )


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_loglikelihood(bench: Bench, harness: Any) -> None:
    pairs = [
        ("the cat sat", " on the mat"),
        ("the cat ", "sat on the mat"),
        ("", "the cat sat"),
        ("</s>the cat", " sat"),
        ("the cat", "s went"),
        (LONG, " in the rain"),
    ]
    asked = [request("loglikelihood", pair) for pair in pairs]
    wanted = harness.loglikelihood(asked, disable_tqdm=True)
    got = Scorer(bench.llm, convention="lm-eval").conditional(pairs)
    for result, (logprob, greedy) in zip(got, wanted, strict=True):
        assert result.total == pytest.approx(logprob, abs=NATS * len(result.logprobs)), result
        assert result.is_greedy == greedy


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_rolling(bench: Bench, harness: Any) -> None:
    texts = [TEXT, LONG, "a", "</s>the"]
    asked = [request("loglikelihood_rolling", (text,)) for text in texts]
    wanted = harness.loglikelihood_rolling(asked, disable_tqdm=True)
    got = Scorer(bench.llm, convention="lm-eval").tokens(texts)
    for result, logprob in zip(got, wanted, strict=True):
        assert result.total == pytest.approx(logprob, abs=NATS * result.num_scored)


def sliding_perplexity(bench: Bench, ids: list[int], size: int, stride: int) -> float:
    """The loop of transformers' page "Perplexity of fixed-length models"."""
    nll_sum, num_tokens, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        labels = torch.tensor([ids[begin:end]])
        labels[:, : end - begin - (end - previous)] = -100
        with torch.no_grad():
            loss = bench.peer(torch.tensor([ids[begin:end]]), labels=labels).loss.item()
        counted = int((labels != -100).sum()) - 1
        nll_sum += loss * counted
        num_tokens += counted
        previous = end
        if end == len(ids):
            break
    return math.exp(nll_sum / num_tokens)


@pytest.mark.parametrize(("size", "stride"), [(64, 16), (64, 64), (40, 7)])
def test_transformers_sliding_window(bench: Bench, size: int, stride: int) -> None:
    ids = bench.peer_tokenizer(LONG)["input_ids"]
    wanted = sliding_perplexity(bench, ids, size, stride)
    scorer = Scorer(bench.llm, convention="transformers", window=size, stride=stride)
    assert scorer.tokens(LONG)[0].perplexity == pytest.approx(wanted, rel=1e-4)


def test_gptq_protocol(bench: Bench) -> None:
    """Loss of whole windows, as the evaluation loop of the GPTQ paper's code averages it."""
    size = 20
    ids = torch.tensor([bench.peer_tokenizer(LONG)["input_ids"]])
    windows = ids.shape[1] // size
    losses = []
    for index in range(windows):
        window = ids[:, index * size : (index + 1) * size]
        with torch.no_grad():
            logits = bench.peer(window).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[0], window[0, 1:])
        losses.append(loss.item() * size)
    wanted = math.exp(sum(losses) / (windows * size))
    result = Scorer(bench.llm, convention="gptq", window=size).tokens(LONG)[0]
    assert result.perplexity == pytest.approx(wanted, rel=1e-4)
    assert result.num_scored == windows * (size - 1)


def test_minicons_refuses_what_minicons_cannot_read(base: Bench) -> None:
    with pytest.raises(ContextLengthError, match="convention 'minicons' reads texts whole"):
        Scorer(base.llm, convention="minicons").tokens(LONG)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_is_told_is_complete_and_json(base: Bench, name: str) -> None:
    told = Scorer(base.llm, convention=name).convention.told()
    assert json.loads(json.dumps(told)) == told
    assert told["convention"] == name
    assert told["window"] == 64


def test_a_convention_of_ones_own(base: Bench) -> None:
    own = Convention(name="ours", plan="disjoint", window=10)
    result = Scorer(base.llm, convention=own).tokens(TEXT)[0]
    assert result.perplexity == pytest.approx(math.exp(-np.mean(result.scored)))
    with pytest.raises(RequestError, match="plan is 'x'; use one of overlap"):
        Convention(name="ours", plan="x")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="window is 1; it must be a whole number from 2"):
        Convention(name="ours", plan="disjoint", window=1)
