"""Pooled hidden vectors: against the reference model, on both backends, whatever else runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine_fakes import FakeRunner, hashed_logits, hidden_vector
from optlm import LLM, SamplingParams
from optlm.checkpoint import open_checkpoint
from optlm.engine.aio import AsyncLLM
from optlm.errors import ContextLengthError, EngineError, RequestError
from optlm.model import OPT
from variants import VARIANTS, make_state, write_checkpoint

TEXTS = [[2], [2, 9, 4], [2, *range(30, 70)], [5] * 64, [2, *range(30, 70), 7]]
Float32 = NDArray[np.float32]


def load(folder: Path, backend: str, **options: object) -> LLM:
    if backend == "native":
        pytest.importorskip("optlm._core", reason="the compiled core is not built")
    return LLM(folder, backend=backend, threads=1, **options)  # type: ignore[arg-type]


@torch.no_grad()
def reference(folder: Path, text: list[int]) -> Float32:
    """What the head multiplies, of every token (T, E)."""
    checkpoint = open_checkpoint(folder)
    model = OPT(checkpoint.config)
    model.load_state_dict({n: torch.from_numpy(t.numpy()) for n, t in checkpoint.tensors.items()})
    return model.eval().hidden(torch.tensor([text]))[0].numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_equal_to_the_reference_on_both_backends(tmp_path: Path, variant: str) -> None:
    config = VARIANTS[variant]
    folder = write_checkpoint(tmp_path, config, make_state(config))
    hidden = [reference(folder, text) for text in TEXTS]
    for backend in ("native", "torch"):
        llm = load(folder, backend, dtype="f32", max_batch_tokens=24)
        for _ in range(2):  # the second time with a prefix cache that holds all of it
            means = llm.embed(TEXTS)
            lasts = llm.embed(TEXTS, pooling="last")
            llm.check_integrity()
            for text, states, mean, last in zip(TEXTS, hidden, means, lasts, strict=True):
                assert mean.token_ids == text
                assert mean.vector.dtype == np.float32
                np.testing.assert_allclose(mean.vector, states.mean(axis=0), atol=2e-4)
                np.testing.assert_allclose(last.vector, states[-1], atol=2e-4)


@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_company_and_chunks_change_no_bit(tmp_path: Path, dtype: str) -> None:
    config = VARIANTS["350m"]
    folder = write_checkpoint(tmp_path, config, make_state(config))
    alone = [load(folder, "native", dtype=dtype).embed(t)[0].vector.tobytes() for t in TEXTS]
    llm = load(folder, "native", dtype=dtype, max_batch_tokens=11, num_blocks=7)
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True, logprobs=1)
    wanted = llm.generate([[2, 3]], params)[0].token_ids
    jobs = [llm.submit([2, 3], params) for _ in range(5)]
    embedded = [llm.submit_embed(text, "mean") for text in TEXTS]
    scored = llm.submit_score(TEXTS[2], "error", None)[0]
    while llm.has_work:
        llm.step()
        llm.check_integrity()
    assert llm._scheduler.num_preemptions > 0
    assert [job.embedding().vector.tobytes() for job in embedded] == alone
    assert [job.samples[0].token_ids for job in jobs] == [wanted] * 5
    assert (
        scored.prompt_scores == load(folder, "native", dtype=dtype).score(TEXTS[2])[0].logprobs[1:]
    )


def fake(**options: int) -> LLM:
    return LLM.from_runner(FakeRunner(hashed_logits(97), **options))


def test_asyncio_callers_get_the_same() -> None:
    async def main() -> None:
        async with AsyncLLM(fake()) as engine:
            params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
            text, first = await asyncio.gather(
                engine.generate([2, 5], params), engine.embed([2, 9, 8], pooling="last")
            )
            assert len(text.token_ids) == 5
            assert first.vector.tolist() == pytest.approx(hidden_vector([2, 9, 8]).tolist())
            with pytest.raises(RequestError, match="pooling is 'max'"):
                await engine.embed([2], pooling="max")  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ([], {}, "no tokens"),
        ("text", {}, "no tokenizer"),
        ([2], {"pooling": "max"}, "pooling is 'max'; it must be one of mean, last"),
        ([2], {"pooling": ["mean"]}, "pooling is"),
        ([2], {"adapter": "x"}, "no adapter 'x'"),
        ([97], {}, "vocabulary"),
    ],
)
def test_what_is_refused(text: object, options: dict[str, object], match: str) -> None:
    llm = fake()
    with pytest.raises(RequestError, match=match):
        llm.embed([[2, 3], text], **options)  # type: ignore[arg-type, list-item]
    assert not llm.has_work


def test_too_long_and_longest() -> None:
    llm = fake()
    assert llm.embed([2] * 64)[0].vector.shape == (6,)
    with pytest.raises(ContextLengthError, match=r"has 65 tokens; .* holds 64"):
        llm.embed([2] * 65)


def test_a_vector_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake()
    forward = llm._runner.forward_hidden

    def damaged(*args: object) -> object:
        logits, hidden = forward(*args)  # type: ignore[arg-type]
        hidden[0, 0] = np.nan
        return logits, hidden

    monkeypatch.setattr(llm._runner, "forward_hidden", damaged)
    with pytest.raises(EngineError, match="not finite"):
        llm.embed([2, 3])
    assert not llm.has_work
