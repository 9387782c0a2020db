"""The compiled forward pass: equal to PyTorch, and to itself bit by bit in any company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optlm.checkpoint import open_checkpoint
from optlm.config import OPTConfig
from optlm.errors import BackendError, CheckpointError
from variants import VARIANTS, make_state, write_checkpoint

pytest.importorskip("optlm._core", reason="the compiled core is not built")
torch = pytest.importorskip("torch")

from optlm.engine.native_runner import NativeRunner  # noqa: E402
from optlm.engine.runner import NOT_FINITE  # noqa: E402
from optlm.model import OPT  # noqa: E402

Float32 = NDArray[np.float32]
DTYPES = ["f32", "f16", "bf16", "int8"]
NUM_BLOCKS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {
        name: write_checkpoint(root / name, config, make_state(config))
        for name, config in VARIANTS.items()
    }


def runner(folder: Path, dtype: str = "f32", **options: object) -> NativeRunner:
    settings_ = {"num_blocks": NUM_BLOCKS, "max_batch_tokens": 64, "threads": 2, **options}
    return NativeRunner(open_checkpoint(folder), dtype=dtype, **settings_)


def ints(*values: object) -> NDArray[np.int32]:
    return np.concatenate([np.atleast_1d(np.asarray(v, np.int32)) for v in values])


def run_alone(native: NativeRunner, tokens: NDArray[np.int32], chunk: int = 64) -> Float32:
    """Logits (T, V) of one sequence, prefilled `chunk` tokens at a time."""
    table = np.arange(NUM_BLOCKS, dtype=np.int32)[None]
    parts = []
    for first in range(0, len(tokens), chunk):
        part = tokens[first : first + chunk]
        rows = np.arange(len(part), dtype=np.int32)
        logits = native.forward(part, rows + np.int32(first), ints(0, len(part)), table, rows)
        parts.append(logits.copy())
    return np.concatenate(parts)


def some_tokens(config: OPTConfig, count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_f32_equals_pytorch(folders: dict[str, Path], variant: str) -> None:
    config = VARIANTS[variant]
    tokens = some_tokens(config, 50)
    model = OPT(config)
    state = {name: torch.tensor(array) for name, array in make_state(config).items()}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        want = model.eval()(torch.tensor(tokens.astype(np.int64))[None]).logits[0].numpy()
    got = run_alone(runner(folders[variant]), tokens)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.003), ("bf16", 0.02), ("int8", 0.06)])
def test_smaller_formats_stay_close(
    folders: dict[str, Path], variant: str, dtype: str, tolerance: float
) -> None:
    tokens = some_tokens(VARIANTS[variant], 50)
    want = run_alone(runner(folders[variant]), tokens)
    got = run_alone(runner(folders[variant], dtype), tokens)
    assert 0 < np.abs(got - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_instruction_set(
    folders: dict[str, Path], variant: str, dtype: str
) -> None:
    tokens = some_tokens(VARIANTS[variant], 30)
    want = run_alone(runner(folders[variant], dtype, isa="reference", threads=1), tokens)
    for isa in ("avx2", "avx512"):
        try:
            native = runner(folders[variant], dtype, isa=isa, threads=3)
        except BackendError:
            continue
        assert run_alone(native, tokens).tobytes() == want.tobytes(), isa


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_zeros_change_no_bit(folders: dict[str, Path], variant: str, dtype: str) -> None:
    tokens = some_tokens(VARIANTS[variant], 50)
    native = runner(folders[variant], dtype)
    want = run_alone(native, tokens).tobytes()
    for chunk in (1, 7, 16):
        assert run_alone(native, tokens, chunk).tobytes() == want
    native.core.set_skip_zeros(False)
    assert run_alone(native, tokens).tobytes() == want


@settings(deadline=None, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_changes_no_bit(folders: dict[str, Path], dtype: str, data: st.DataObject) -> None:
    """Random sequences advance together by random chunks; each gets the logits it gets alone."""
    variant = data.draw(st.sampled_from(sorted(VARIANTS)))
    config = VARIANTS[variant]
    native = runner(folders[variant], dtype, threads=data.draw(st.integers(1, 3)))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(NUM_BLOCKS)
    texts = [some_tokens(config, n, seed) for seed, n in enumerate(lengths)]
    done = [0] * len(texts)
    got: list[list[Float32]] = [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        turn = [i for i, t in enumerate(texts) if done[i] < len(t)]
        sizes = [data.draw(st.integers(1, min(16, len(texts[i]) - done[i]))) for i in turn]
        tokens = ints(*(texts[i][done[i] : done[i] + n] for i, n in zip(turn, sizes, strict=True)))
        positions = ints(
            *(np.arange(done[i], done[i] + n) for i, n in zip(turn, sizes, strict=True))
        )
        tables = np.stack([order[i * 4 : i * 4 + 4] for i in turn]).astype(np.int32)
        starts = ints(0, np.cumsum(sizes))
        logits = native.forward(
            tokens, positions, starts, tables, np.arange(len(tokens), dtype=np.int32)
        )
        for row, i in enumerate(turn):
            got[i].append(logits[starts[row] : starts[row + 1]].copy())
            done[i] += sizes[row]
    for text, parts in zip(texts, got, strict=True):
        assert np.concatenate(parts).tobytes() == run_alone(native, text).tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_wanted_rows(folders: dict[str, Path], variant: str) -> None:
    tokens = some_tokens(VARIANTS[variant], 30)
    native = runner(folders[variant], "int8")
    every = run_alone(native, tokens)
    table = np.arange(NUM_BLOCKS, dtype=np.int32)[None]
    positions = np.arange(30, dtype=np.int32)
    for rows in ([], [29], [0, 3, 29]):
        got = native.forward(tokens, positions, ints(0, 30), table, np.array(rows, np.int32))
        assert got.tobytes() == every[rows].tobytes()
    logits, hidden = native.forward_hidden(tokens, positions, ints(0, 30), table, ints(5, 29))
    assert logits.tobytes() == every[[5, 29]].tobytes()
    assert hidden.shape == (30, VARIANTS[variant].embed_dim)


def test_copied_blocks_serve_as_the_originals(folders: dict[str, Path]) -> None:
    native = runner(folders["base"], "int8")
    tokens = some_tokens(VARIANTS["base"], 33)
    want = run_alone(native, tokens)[-1:]
    native.copy_blocks(ints(0, 1, 2), ints(9, 8, 7))
    table = ints(9, 8, 7)[None]
    got = native.forward(tokens[-1:], ints(32), ints(0, 1), table, ints(0))
    assert got.tobytes() == want.tobytes()


BAD_CALLS = {
    "token": {"tokens": ints(10**6)},
    "negative token": {"tokens": ints(-1)},
    "position": {"positions": ints(10**6)},
    "block": {"block_tables": np.array([[NUM_BLOCKS]], np.int32)},
    "negative block": {"block_tables": np.array([[-1]], np.int32)},
    "short table": {"positions": ints(20), "block_tables": np.array([[0]], np.int32)},
    "row": {"logit_rows": ints(1)},
    "starts": {"seq_starts": ints(0, 2)},
    "empty": {"tokens": ints([]), "positions": ints([]), "seq_starts": ints(0, 0)},
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arrays_are_refused(folders: dict[str, Path], case: str) -> None:
    native = runner(folders["base"])
    call = {
        "tokens": ints(5), "positions": ints(0), "seq_starts": ints(0, 1),
        "block_tables": np.array([[0]], np.int32), "logit_rows": ints(0),
    }  # fmt: skip
    assert native.forward(**call).shape == (1, VARIANTS["base"].vocab_size)
    with pytest.raises(ValueError, match=r"\w"):
        native.forward(**{**call, **BAD_CALLS[case]})


def test_non_finite_weights_are_named(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    state = make_state(config)
    names = ["model.decoder.layers.0.fc2.weight", "model.decoder.layers.1.fc1.bias"]
    for name in names:
        state[name].flat[3] = np.nan
    folder = write_checkpoint(tmp_path / "nan", config, state)
    with pytest.raises(CheckpointError) as caught:
        runner(folder, "int8")
    assert all(name in str(caught.value) for name in names)


def test_unknown_instruction_set(folders: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match="sse9"):
        runner(folders["base"], isa="sse9")


def test_long_context_and_odd_heads(tmp_path: Path) -> None:
    config = replace(
        VARIANTS["base"], hidden_size=60, num_attention_heads=3, ffn_dim=50,
        word_embed_proj_dim=60, max_position_embeddings=300,
    )  # fmt: skip
    folder = write_checkpoint(tmp_path / "odd", config, make_state(config))
    tokens = some_tokens(config, 300)
    model = OPT(config)
    model.load_state_dict({k: torch.tensor(v) for k, v in make_state(config).items()}, strict=False)
    with torch.no_grad():
        want = model.eval()(torch.tensor(tokens.astype(np.int64))[None]).logits[0].numpy()
    native = runner(folder, max_batch_tokens=300)
    got = run_alone(native, tokens, 300)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert run_alone(native, tokens, 1).tobytes() == got.tobytes()


WIDE = {
    "pre-norm": {},
    "post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 192},
    "gelu": {"enable_bias": False, "activation_function": "gelu"},
}


@pytest.mark.parametrize("shape", WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_that_own_heads_and_groups_change_no_bit(
    tmp_path: Path, shape: str, dtype: str
) -> None:
    """Heads of 64 in even shares need no barrier before attention; odd shares keep it."""
    wide = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "ffn_dim": 512,
        "word_embed_proj_dim": 256,
    }
    config = replace(VARIANTS["base"], **{**wide, **WIDE[shape]})
    folder = write_checkpoint(tmp_path / "wide", config, make_state(config))
    tokens = some_tokens(config, 21)
    want = run_alone(runner(folder, dtype, isa="reference", threads=1), tokens).tobytes()
    for threads in (1, 2, 3, 4):
        native = runner(folder, dtype, threads=threads)
        for chunk in (1, 2, 21):
            assert run_alone(native, tokens, chunk).tobytes() == want, (threads, chunk)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_token_is_that_of_the_logits(
    folders: dict[str, Path], variant: str, dtype: str
) -> None:
    config = VARIANTS[variant]
    tokens = some_tokens(config, 64)
    positions, table = np.zeros(64, np.int32), np.arange(NUM_BLOCKS, dtype=np.int32)[:, None]
    for isa in ("reference", "auto"):
        native = runner(folders[variant], dtype, threads=3, isa=isa)
        for count in (1, 7, NUM_BLOCKS):
            call = (tokens[:count], positions[:count], ints(range(count + 1)), table[:count])
            rows = ints(range(count))
            want = native.forward(*call, rows).argmax(axis=1)
            assert native.forward_best(*call, rows).tolist() == want.tolist()
            assert native.forward_best(*call, rows[-1:]).tolist() == want[-1:].tolist()


@pytest.mark.parametrize("isa", ["reference", "avx2", "avx512"])
def test_equal_and_infinite_logits(tmp_path: Path, isa: str) -> None:
    config = VARIANTS["base"]
    state = make_state(config)
    head = state["model.decoder.embed_tokens.weight"]
    head[:] = head[:1]  # every token is as likely as the others
    folders = [write_checkpoint(tmp_path / "equal", config, state)]
    state["model.decoder.final_layer_norm.bias"][:] = 3e38
    head[200] = 1e10
    folders.append(write_checkpoint(tmp_path / "infinite", config, state))
    for folder, want in zip(folders, (0, NOT_FINITE), strict=True):
        try:
            native = runner(folder, isa=isa)
        except BackendError:
            pytest.skip(f"no {isa} here")
        call = (ints(5), ints(0), ints(0, 1), np.zeros((1, 1), np.int32), ints(0))
        assert native.forward_best(*call).tolist() == [want]
