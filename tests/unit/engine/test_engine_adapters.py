"""Adapters by name: several in one batch, each with the numbers it has alone, on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine_fakes import FakeRunner, hashed_logits
from lora_files import write_lora
from optlm import LLM, SamplingParams
from optlm.errors import BackendError, CheckpointError, RequestError
from variants import VARIANTS, make_state, write_checkpoint

pytest.importorskip("torch")
BACKENDS = ["native", "torch"]
PROMPTS = [[2, 9, 4], [2, 9, 4, 7, 8, 30, 31, 5, 6, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [7, 7]]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    config = VARIANTS[request.param]
    write_checkpoint(root / "base", config, make_state(config))
    for name, seed in (("one", 1), ("two", 2)):
        write_lora(root / name, config, seed)
    return root


def load(base: Path, backend: str, **options: Any) -> LLM:
    if backend == "native":
        pytest.importorskip("optlm._core", reason="the compiled core is not built")
    return LLM(base / "base", backend=backend, dtype="f32", threads=1, **options)  # type: ignore[arg-type]


def params(adapter: str | None, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, adapter=adapter, **more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_request_gets_what_the_merged_model_says(base: Path, backend: str) -> None:
    llm = load(base, backend, max_batch_tokens=11)
    for name in ("one", "two"):
        llm.load_adapter(name, base / name)
    names = [None, "one", "two"]
    jobs = [(prompt, name) for prompt in PROMPTS for name in names]
    for _ in range(2):  # the second time from the prefix cache, each adapter's own
        got = llm.generate([p for p, _ in jobs], [params(n, logprobs=0) for _, n in jobs])
        llm.check_integrity()
        for name in names:
            alone = load(base, backend, adapter=base / name if name else None)
            mine = [output for output, (_, n) in zip(got, jobs, strict=True) if n == name]
            for output, want in zip(
                mine, alone.generate(PROMPTS, params(None, logprobs=0)), strict=True
            ):
                assert output.token_ids == want.token_ids
                scores = [entry.logprob for entry in output.logprobs or []]
                wanted = [entry.logprob for entry in want.logprobs or []]
                assert scores == pytest.approx(wanted, abs=2e-4)
    assert len({tuple(output.token_ids) for output in got[3:6]}) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_and_searches(base: Path, backend: str) -> None:
    llm = load(base, backend)
    llm.load_adapter("one", base / "one")
    merged = load(base, backend, adapter=base / "one")
    text = PROMPTS[1]
    mine, plain = llm.score(text, adapter="one")[0], llm.score(text)[0]
    assert mine.total == pytest.approx(merged.score(text)[0].total, abs=1e-3)
    assert abs(mine.total - plain.total) > 0.1
    for search in ({"beam_width": 3}, {"penalty_alpha": 0.4, "top_k": 4}):
        got = llm.generate(text, params("one", **search))[0].token_ids
        assert got == merged.generate(text, params(None, **search))[0].token_ids


def test_company_changes_no_bit(base: Path) -> None:
    llm = load(base, "native", max_batch_tokens=9, prefix_cache=False)
    for name in ("one", "two"):
        llm.load_adapter(name, base / name)
    jobs = [(prompt, name) for prompt in PROMPTS for name in (None, "one", "two")]
    all_params = [params(name, logprobs="all") for _, name in jobs]
    together = llm.generate([prompt for prompt, _ in jobs], all_params)
    for (prompt, _), options, output in zip(jobs, all_params, together, strict=True):
        alone = llm.generate(prompt, options)[0]
        assert alone.token_ids == output.token_ids
        for a, b in zip(alone.logprobs or [], output.logprobs or [], strict=True):
            assert a.top_logprobs.tobytes() == b.top_logprobs.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_given_anew_finds_nothing_of_the_old(base: Path, backend: str) -> None:
    llm = load(base, backend)
    wanted = {name: load(base, backend, adapter=base / name) for name in ("one", "two")}
    for name in ("one", "two", "one"):
        llm.load_adapter("a", base / name)
        assert llm.adapters == ["a"]
        for _ in range(2):
            got = llm.generate(PROMPTS[1], params("a"))[0]
            assert got.token_ids == wanted[name].generate(PROMPTS[1], params(None))[0].token_ids
        assert got.num_cached_tokens == 16
        llm.unload_adapter("a")
    assert llm.adapters == []
    with pytest.raises(RequestError, match="no adapter 'a'"):
        llm.generate([2], params("a"))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("refused")
    config = VARIANTS["base"]
    write_checkpoint(folder / "base", config, make_state(config))
    llm = LLM(folder / "base", threads=1)
    llm.load_adapter("one", write_lora(folder / "one", config, 1))
    return llm


def test_an_adapter_in_use_stays(llm: LLM) -> None:
    for more in ({}, {"beam_width": 2}):
        job = llm.submit([2, 5], params("one", **more))
        with pytest.raises(RequestError, match="in use"):
            llm.unload_adapter("one")
        llm.abort(job)
    assert llm.adapters == ["one"]


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 65, 5, None, "é"])
def test_names_are_no_paths(llm: LLM, name: Any) -> None:
    with pytest.raises(RequestError, match="adapter is"):
        llm.load_adapter(name, "anywhere")
    if name is not None:
        with pytest.raises(RequestError, match="adapter is"):
            params(name)


def test_unknown_and_taken_names(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'one'"):
        llm.generate([2], params("onee"))
    with pytest.raises(RequestError, match="no adapter 'x'"):
        llm.score([2, 3], adapter="x")
    with pytest.raises(RequestError, match="loaded already"):
        llm.load_adapter("one", tmp_path)
    with pytest.raises(RequestError, match="no adapter 'x'"):
        llm.unload_adapter("x")
    with pytest.raises(CheckpointError):
        llm.load_adapter("two", tmp_path)
    fake = LLM.from_runner(FakeRunner(hashed_logits(97)))
    with pytest.raises(RequestError, match="as it is stored"):
        fake.load_adapter("one", tmp_path)


def test_what_only_merging_can_run(llm: LLM, tmp_path: Path) -> None:
    config = VARIANTS["base"]
    head = write_lora(tmp_path / "head", config, 1, ("fc1", "embed_positions"))
    with pytest.raises(CheckpointError, match="embed_positions"):
        llm.load_adapter("head", head)
    dora = write_lora(tmp_path / "dora", config, 1, ("fc1",), use_dora=True)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        key = f"base_model.model.model.decoder.layers.{layer}.fc1.lora_magnitude_vector.weight"
        tensors[key] = np.ones(config.ffn_dim, np.float32)
    from safetensors.numpy import load_file

    file = dora / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)
    with pytest.raises(BackendError, match="DoRA"):
        llm.load_adapter("dora", dora)
    assert llm.adapters == ["one"]
