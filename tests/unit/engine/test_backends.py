"""Every backend that is installed under `LLM`, over all variants, against the reference model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from optlm.checkpoint import open_checkpoint
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.engine.runner import Runner, RunnerOptions, make_runner
from optlm.errors import BackendError
from optlm.model import OPT
from variants import VARIANTS, make_state, write_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
HAS_CORE = importlib.util.find_spec("optlm._core") is not None
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not HAS_CORE, reason="no compiled core"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS[request.param]
    return write_checkpoint(tmp_path_factory.mktemp(request.param), config, make_state(config))


@pytest.fixture(params=["torch", NATIVE])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(folder: Path, backend: str, **options: object) -> LLM:
    return LLM(folder, backend=backend, threads=1, **options)  # type: ignore[arg-type]


def runner_of(folder: Path, backend: str) -> Runner:
    options = RunnerOptions(backend=backend, threads=1, num_blocks=4, max_batch_tokens=64)  # type: ignore[arg-type]
    return make_runner(open_checkpoint(folder), options)


def reference(folder: Path) -> OPT:
    checkpoint = open_checkpoint(folder)
    model = OPT(checkpoint.config)
    state = {name: torch.from_numpy(t.numpy()) for name, t in checkpoint.tensors.items()}
    model.load_state_dict(state)
    return model.eval()


def prompts(vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [[2, *random.integers(4, vocab_size, n).tolist()] for n in (0, 3, 15, 16, 14, 30)]


@torch.no_grad()
def naive_greedy(model: OPT, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_batch_equals_the_naive_loop(folder: Path, backend: str) -> None:
    """Chunked prompts, preemption and a cached prefix included."""
    model = reference(folder)
    llm = load(folder, backend, max_batch_tokens=16, num_blocks=8)
    texts = prompts(llm.config.vocab_size)
    wanted = [naive_greedy(model, prompt, 24) for prompt in texts]
    for _ in range(2):
        assert [o.token_ids for o in llm.generate(texts, GREEDY)] == wanted
    assert llm._scheduler.num_preemptions > 0
    llm.check_integrity()


def test_scores_equal_the_models(folder: Path, backend: str) -> None:
    model = reference(folder)
    llm = load(folder, backend, max_batch_tokens=16)
    texts = prompts(llm.config.vocab_size)
    for tokens, output in zip(texts, llm.score(texts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        wanted = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].tolist()
        assert output.logprobs[1:] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_text_goes_in_and_out(folder: Path, backend: str) -> None:
    llm = load(folder, backend)
    output = llm.generate("the cat sat", SamplingParams(max_tokens=8, seed=1))[0]
    assert output.prompt_token_ids[0] == 2
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(output.prompt_token_ids) == "the cat sat"
    assert output.text == "".join(
        piece.text for piece in llm.stream("the cat sat", SamplingParams(max_tokens=8, seed=1))
    )


def test_searches_run_on_every_variant(folder: Path, backend: str) -> None:
    llm = load(folder, backend, max_batch_tokens=16)
    prompt = prompts(llm.config.vocab_size)[2]
    greedy = llm.generate(prompt, GREEDY)[0]
    common = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    one = llm.generate(prompt, SamplingParams(beam_width=1, **common))[0]
    plain = llm.generate(prompt, SamplingParams(penalty_alpha=0, top_k=4, **common))[0]
    assert one.token_ids == plain.token_ids == greedy.token_ids
    beam = llm.generate(prompt, SamplingParams(beam_width=4, **common))[0]
    assert beam.outputs[0].cumulative_logprob >= one.outputs[0].cumulative_logprob - 1e-3


@torch.no_grad()
def test_forward_hidden_gives_what_the_head_reads(folder: Path, backend: str) -> None:
    runner = runner_of(folder, backend)
    tokens = np.arange(5, 25, dtype=np.int32)
    arguments = (
        tokens,
        np.arange(20, dtype=np.int32),
        np.array([0, 20], np.int32),
        np.array([[3, 1]], np.int32),
    )
    rows = np.array([4, 19], np.int32)
    logits, hidden = runner.forward_hidden(*arguments, rows)
    wanted = reference(folder)(torch.from_numpy(tokens[None]).long(), output_hidden_states=True)
    assert wanted.hidden_states is not None
    np.testing.assert_allclose(hidden, wanted.hidden_states[-1][0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logits, wanted.logits[0, rows], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(logits, runner.forward(*arguments, rows))
    none = runner.forward(*arguments, np.zeros(0, np.int32))
    assert none.shape == (0, runner.config.vocab_size)


def test_copied_blocks_serve_like_the_first(folder: Path, backend: str) -> None:
    runner = runner_of(folder, backend)
    int32 = np.int32
    tokens, positions = np.arange(5, 25, dtype=int32), np.arange(20, dtype=int32)
    last = np.array([19], int32)
    tables = np.array([[0, 1]], int32)
    wanted = runner.forward(tokens, positions, np.array([0, 20], int32), tables, last)
    runner.copy_blocks(np.array([0, 1], int32), np.array([3, 2], int32))
    got = runner.forward(
        tokens[19:], last, np.array([0, 1], int32), np.array([[3, 2]], int32), np.array([0], int32)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_CORE, reason="no compiled core")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_native_outputs_are_the_same_bit_for_bit_in_any_company(folder: Path, dtype: str) -> None:
    """Batched, in chunks, after preemption and from the prefix cache: equal to alone."""
    params = SamplingParams(seed=3, max_tokens=30, logprobs="all", ignore_eos=True)
    options = {"dtype": dtype, "num_blocks": 6, "max_batch_tokens": 7}
    crowded = load(folder, "native", **options)
    texts = prompts(crowded.config.vocab_size)
    alone = load(folder, "native", dtype=dtype, prefix_cache=False)
    for _ in range(2):
        for prompt, output in zip(texts, crowded.generate(texts, params), strict=True):
            wanted = alone.generate(prompt, params)[0]
            assert output.token_ids == wanted.token_ids
            assert output.logprobs is not None
            assert wanted.logprobs is not None
            for one, other in zip(output.logprobs, wanted.logprobs, strict=True):
                assert one.top_logprobs.tobytes() == other.top_logprobs.tobytes()
    assert crowded._scheduler.num_preemptions > 0


def test_a_cache_beyond_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("optlm.engine.native_runner")

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(native, "_new_model", full)
    config = VARIANTS["base"]
    write_checkpoint(tmp_path, config, make_state(config))
    with pytest.raises(BackendError, match="not enough memory for the f32 weights and 99 blocks"):
        LLM(tmp_path, backend="native", num_blocks=99)
