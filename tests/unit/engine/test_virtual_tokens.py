"""Prefixes and prompts by name, beside low-rank adapters, in one batch, on both backends."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_engine_adapters import write_lora

from optlm import LLM, SamplingParams
from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.fingerprint import fingerprint
from optlm.config import OPTConfig
from optlm.engine.native_runner import NativeRunner
from optlm.errors import BackendError, ContextLengthError, RequestError
from optlm.score import Scorer
from variants import VARIANTS, make_state, write_checkpoint

pytest.importorskip("torch")
PROMPTS = [[2, 9, 4], [2, *range(30, 63)], [7]]
NAMES = [None, "low", "prefix", "prompt", "peft"]


def write_virtual(folder: Path, base: Path, kind: str, count: int, *, own: bool) -> Path:
    """An adapter as peft saves it; `own`: as optlm does, with the text at position 0."""
    checkpoint = open_checkpoint(base)
    config = checkpoint.config
    width = config.embed_dim
    if kind == "PREFIX_TUNING":
        width = 2 * config.num_hidden_layers * config.hidden_size
    numbers = np.random.default_rng(count).normal(0, 1.5, (count, width)).astype(np.float32)
    folder.mkdir(parents=True)
    weights = folder / "adapter_model.safetensors"
    save_file({"prompt_embeddings": numbers}, weights)
    settings = {"peft_type": kind, "num_virtual_tokens": count}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if own:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        found = fingerprint(config, checkpoint.tensors)
        sidecar = {"base": dict(found), "weights_sha256": digest}
        (folder / "optlm_adapter.json").write_text(json.dumps(sidecar))
    return folder


def write_all(root: Path, config: OPTConfig) -> Path:
    base = write_checkpoint(root / "base", config, make_state(config))
    write_lora(root / "low", config, 1)
    write_virtual(root / "prefix", base, "PREFIX_TUNING", 21, own=True)
    write_virtual(root / "prompt", base, "PROMPT_TUNING", 5, own=True)
    write_virtual(root / "peft", base, "PROMPT_TUNING", 16, own=False)
    return root


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


def load(root: Path, backend: str, **options: Any) -> LLM:
    llm = LLM(root / "base", backend=backend, **{"threads": 1, "dtype": "f32", **options})  # type: ignore[arg-type]
    for name in NAMES:
        if name is not None:
            llm.load_adapter(name, root / name)
    return llm


def params(adapter: str | None, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, adapter=adapter, **more)


def test_one_batch_of_all_kinds_is_equal_on_both_backends(root: Path) -> None:
    jobs = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    all_params = [params(name, logprobs="all", prompt_logprobs=0) for _, name in jobs]
    native, torch = load(root, "native", max_batch_tokens=11), load(root, "torch")
    results = [llm.generate([p for p, _ in jobs], all_params) for llm in (native, torch)]
    native.check_integrity()
    for a, b in zip(*results, strict=True):
        assert a.token_ids == b.token_ids
        for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
            np.testing.assert_allclose(x.top_logprobs, y.top_logprobs, atol=2e-3)
    texts = {tuple(output.token_ids) for output in results[0][5:10]}
    assert len(texts) >= 4  # each adapter does something
    for name in ("prefix", "prompt", "peft"):  # and as the one adapter of an engine
        alone = LLM(root / "base", dtype="f32", threads=1, adapter=root / name)
        assert isinstance(alone._runner, NativeRunner)
        got = alone.score(PROMPTS[1])[0].logprobs
        assert got == native.score(PROMPTS[1], adapter=name)[0].logprobs


def outputs(llm: LLM, jobs: list[tuple[list[int], str | None]]) -> list[bytes]:
    got = llm.generate([p for p, _ in jobs], [params(name, logprobs="all") for _, name in jobs])
    return [b"".join(x.top_logprobs.tobytes() for x in o.logprobs or []) for o in got]


@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_company_chunks_threads_and_cache_change_no_bit(root: Path, dtype: str) -> None:
    jobs = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    lone = load(root, "native", dtype=dtype, prefix_cache=False)
    alone = [outputs(lone, [job])[0] for job in jobs]
    llm = load(root, "native", dtype=dtype, max_batch_tokens=9, num_blocks=5, threads=2)
    for _ in range(2):  # the second time from the prefix cache, each adapter's own
        assert outputs(llm, jobs) == alone


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8"])
def test_instruction_sets_change_no_bit(tmp_path: Path, dtype: str) -> None:
    root = write_all(tmp_path, VARIANTS["350m"])
    jobs = [(prompt, name) for prompt in PROMPTS for name in NAMES]
    wanted: list[bytes] = []
    for isa in ("reference", "avx2", "avx512"):
        try:
            runner = NativeRunner(
                open_checkpoint(root / "base"), dtype=dtype, num_blocks=40, max_batch_tokens=32,
                threads=2, isa=isa,
            )  # fmt: skip
        except BackendError:
            continue
        llm = LLM.from_runner(runner)
        llm._adapters._base = open_checkpoint(root / "base")
        for name in NAMES[1:]:
            llm.load_adapter(str(name), root / str(name))
        wanted = wanted or outputs(llm, jobs)
        assert outputs(llm, jobs) == wanted


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_positions_and_the_context(root: Path, backend: str) -> None:
    """Own virtual tokens take no positions; those of peft shorten the context by their number."""
    llm = load(root, backend)
    for name, most in (("prefix", 64), ("prompt", 64), ("peft", 48)):
        assert llm.score([5] * most, adapter=name)[0].num_scored == most - 1
        assert len(llm.generate([5] * (most - 3), params(name))[0].token_ids) == 3
        with pytest.raises(ContextLengthError, match=str(most)):
            llm.score([5] * (most + 1), adapter=name)
        with pytest.raises(ContextLengthError, match=str(most)):
            llm.embed([5] * (most + 1), adapter=name)
        with pytest.raises(ContextLengthError, match=str(most)):
            llm.generate([5] * most, params(name))
    longer = llm.score([2, *range(30, 90)], adapter="peft", on_overflow="windows")[0]
    assert longer.num_scored == 60


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_name_given_anew_finds_nothing_of_the_old(root: Path, backend: str) -> None:
    llm = load(root, backend)
    wanted = {name: llm.score(PROMPTS[1], adapter=name)[0].logprobs for name in NAMES[1:]}
    texts = {name: llm.generate(PROMPTS[1], params(name))[0].token_ids for name in NAMES[1:]}
    for name in NAMES[1:]:
        llm.unload_adapter(str(name))
    for name in [*NAMES[1:], *NAMES[:0:-1]]:
        llm.load_adapter("a", root / str(name))
        for _ in range(2):
            assert llm.generate(PROMPTS[1], params("a"))[0].token_ids == texts[name]
        assert llm.score(PROMPTS[1], adapter="a")[0].logprobs == wanted[name]
        llm.unload_adapter("a")
    with pytest.raises(RequestError, match="no adapter"):
        llm.score(PROMPTS[1], adapter="a")


def test_searches_and_embeddings(root: Path) -> None:
    native, torch = load(root, "native"), load(root, "torch")
    for name in ("prefix", "peft"):
        for search in ({"beam_width": 3}, {"penalty_alpha": 0.4, "top_k": 4}):
            both = [llm.generate(PROMPTS[1], params(name, **search)) for llm in (native, torch)]
            assert both[0][0].token_ids == both[1][0].token_ids
        a, b = (llm.embed(PROMPTS[1], adapter=name)[0].vector for llm in (native, torch))
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "text_start", "runs", "match"),
    [
        ((3, 191), 0, False, "wrong width"),
        ((3, 47), 0, True, "wrong width"),
        ((0, 192), 0, False, "fewer than the context"),
        ((64, 192), 0, False, "fewer than the context"),
        ((3, 192), 2, False, "fewer than the context"),
    ],
)
def test_what_the_core_refuses(
    tmp_path: Path, shape: tuple[int, int], text_start: int, runs: bool, match: str
) -> None:
    config = VARIANTS["base"]
    base = open_checkpoint(write_checkpoint(tmp_path, config, make_state(config)))
    core = NativeRunner(base, dtype="f32", num_blocks=4, max_batch_tokens=8, threads=1).core
    adapter = core.add_adapter()
    with pytest.raises(ValueError, match=match):
        core.set_prefix(adapter, np.zeros(shape, np.float32), text_start, runs)
    with pytest.raises(ValueError, match="no such adapter"):
        core.set_prefix(adapter + 1, np.zeros((3, 192), np.float32), 0, False)


def test_scoring_trees_of_texts(root: Path) -> None:
    llm = load(root, "native", max_batch_tokens=9)
    for name in NAMES:
        scorer = Scorer(llm, adapter=name)
        assert scorer.convention.window == (48 if name == "peft" else 64)
        got = [scored.logprobs for scored in scorer.tokens(PROMPTS[:2])]
        assert got == [scored.logprobs for scored in llm.score(PROMPTS[:2], adapter=name)]
        assert scorer.tokens([[2, *range(30, 130)]])[0].num_scored == 100
