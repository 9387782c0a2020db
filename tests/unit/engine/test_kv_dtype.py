"""The format of keys and values in the cache: what it rounds, what it must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_virtual_tokens import NAMES, PROMPTS, load, params, write_all

from optlm import LLM, SamplingParams
from optlm.errors import BackendError, RequestError
from variants import VARIANTS, make_state, write_checkpoint

pytest.importorskip("optlm._core")
TEXTS = [[2, *range(5, 45)], [2, *range(5, 38), 60, 61], [7, 8, 9]]


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS[request.param]
    return write_checkpoint(tmp_path_factory.mktemp(request.param), config, make_state(config))


def engine(folder: Path, kv_dtype: str, **options: Any) -> LLM:
    return LLM(folder, kv_dtype=kv_dtype, **{"dtype": "f32", "threads": 1, **options})  # type: ignore[arg-type]


def logprobs(llm: LLM) -> np.ndarray[Any, Any]:
    return np.concatenate([np.array(s.logprobs[1:]) for s in llm.score(TEXTS)])


@pytest.mark.parametrize(("kv_dtype", "most"), [("f16", 5e-4), ("int8", 0.02)])
def test_rounding_is_small_and_there(folder: Path, kv_dtype: str, most: float) -> None:
    exact, rounded = logprobs(engine(folder, "f32")), logprobs(engine(folder, kv_dtype))
    assert 0 < np.abs(exact - rounded).max() < most * np.abs(exact).max()


def test_int8_is_the_same_in_any_company(folder: Path) -> None:
    """Alone, in a batch, in chunks, from the prefix cache, on two threads: bit by bit."""
    wanted = [engine(folder, "int8").score(text)[0].logprobs for text in TEXTS]
    for options in ({}, {"max_batch_tokens": 16}, {"threads": 2}):
        llm = engine(folder, "int8", **options)
        for _ in range(2):
            assert [scored.logprobs for scored in llm.score(TEXTS)] == wanted


def test_beams_copy_blocks_with_their_scales(folder: Path) -> None:
    beams = SamplingParams(temperature=0, beam_width=3, n=3, max_tokens=20, ignore_eos=True)
    llm = engine(folder, "int8")
    found = llm.generate([TEXTS[0]], beams)[0].outputs
    again = llm.score([[*TEXTS[0], *output.token_ids] for output in found])
    for output, scored in zip(found, again, strict=True):
        total = sum(x for x in scored.logprobs[len(TEXTS[0]) :] if x is not None)
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_adapters_have_int8_too(tmp_path: Path) -> None:
    root = write_all(tmp_path, VARIANTS["base"])
    rounded = load(root, "native", kv_dtype="int8")
    exact = load(root, "native")
    for name in NAMES:
        a, b = (llm.score(PROMPTS[1], adapter=name)[0].logprobs for llm in (exact, rounded))
        difference = np.abs(np.array(a[1:]) - np.array(b[1:])).max()
        assert 0 < difference < 0.1
    together = rounded.generate([PROMPTS[1]] * len(NAMES), [params(name) for name in NAMES])
    alone = [rounded.generate(PROMPTS[1], params(name))[0] for name in NAMES]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]


def test_the_same_memory_holds_nearly_twice_as_much(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    write_checkpoint(tmp_path, config, make_state(config))
    blocks = {
        kv: engine(tmp_path, kv, kv_cache_bytes=2**20).stats().blocks_total
        for kv in ("f32", "f16", "int8")
    }
    assert blocks["f16"] == 2 * blocks["f32"]
    scales = 4 / (config.hidden_size // config.num_attention_heads)  # to each byte of a head
    assert blocks["int8"] == pytest.approx(2 * blocks["f16"] / (1 + scales), rel=0.01)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    write_checkpoint(tmp_path, config, make_state(config))
    with pytest.raises(RequestError, match="kv_dtype is 'bf16'; it must be one of auto, f32, f16"):
        engine(tmp_path, "bf16")
    pytest.importorskip("torch")
    with pytest.raises(BackendError, match="torch backend keeps keys and values in the format"):
        engine(tmp_path, "int8", backend="torch")
