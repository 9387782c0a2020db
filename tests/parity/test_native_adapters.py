"""Low-rank adapters beside the core's weights: several in one batch, the same bits for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from optlm.checkpoint import open_checkpoint
from optlm.config import OPTConfig
from optlm.errors import BackendError
from variants import VARIANTS, State, make_state, write_checkpoint

pytest.importorskip("optlm._core", reason="the compiled core is not built")

from optlm.engine.native_runner import NativeRunner

Float32 = NDArray[np.float32]
DTYPES = ["f32", "f16", "bf16", "int8"]
BLOCKS = 24
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
Changes = dict[str, tuple[Float32, Float32]]  # module -> A (rank, inputs), B (outputs, rank)


def changes(config: OPTConfig, seed: int, rank: int, modules: tuple[str, ...]) -> Changes:
    random = np.random.default_rng(seed)
    shapes = config.parameter_shapes()
    result = {}
    for layer in range(config.num_hidden_layers):
        for name in modules:
            module = f"model.decoder.layers.{layer}.{name}"
            outputs, inputs = shapes[module + ".weight"]
            a = random.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32)
            b = random.normal(0, 0.3, (outputs, rank)).astype(np.float32)
            result[module] = (a, b)
    return result


def merged(state: State, change: Changes) -> State:
    result = dict(state)
    for module, (a, b) in change.items():
        result[module + ".weight"] = state[module + ".weight"] + b @ a
    return result


def runner(folder: Path, dtype: str = "f32", **options: object) -> NativeRunner:
    settings = {"num_blocks": BLOCKS, "max_batch_tokens": 64, "threads": 2, **options}
    return NativeRunner(open_checkpoint(folder), dtype=dtype, **settings)


def put(native: NativeRunner, change: Changes) -> int:
    adapter = native.core.add_adapter()
    for module, (a, b) in change.items():
        native.core.set_adapter(adapter, module, a, b)
    return adapter


def logits_of(
    native: NativeRunner, sequences: list[tuple[NDArray[np.int32], int]], *, rows: str = "all"
) -> list[Float32]:
    """Logits of sequences run in one call, each with its adapter (-1: none)."""
    tokens = np.concatenate([ids for ids, _ in sequences])
    starts = np.cumsum([0, *(len(ids) for ids, _ in sequences)]).astype(np.int32)
    positions = np.concatenate([np.arange(len(ids), dtype=np.int32) for ids, _ in sequences])
    tables = np.arange(BLOCKS, dtype=np.int32).reshape(-1, 4)[: len(sequences)]
    wanted = np.arange(len(tokens), dtype=np.int32) if rows == "all" else starts[1:] - 1
    out = np.empty((len(wanted), native.config.vocab_size), np.float32)
    ids = np.array([adapter for _, adapter in sequences], np.int32)
    native.core.forward(tokens, positions, starts, tables, wanted, out, None, None, ids)
    cuts = starts[1:-1] if rows == "all" else np.arange(1, len(sequences))
    return np.split(out, cuts)


def some_tokens(config: OPTConfig, count: int, seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(4, config.vocab_size, count).astype(np.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_the_merged_weights(tmp_path: Path, variant: str) -> None:
    config = VARIANTS[variant]
    state = make_state(config)
    change = changes(config, 1, 3, (*MODULES, "fc1", "fc2"))
    native = runner(write_checkpoint(tmp_path / "base", config, state))
    other = runner(write_checkpoint(tmp_path / "merged", config, merged(state, change)))
    tokens = some_tokens(config, 30, 0)
    adapter = put(native, change)
    plain, got = logits_of(native, [(tokens, -1), (tokens, adapter)])
    want = logits_of(other, [(tokens, -1)])[0]
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(plain - want).max() > 0.05 * np.abs(want).max()


WIDE = replace(
    VARIANTS["base"], hidden_size=256, num_attention_heads=4, ffn_dim=512, word_embed_proj_dim=256
)


@pytest.mark.parametrize("variant", [*VARIANTS, "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_company_instruction_sets_and_threads_change_no_bit(
    tmp_path: Path, variant: str, dtype: str
) -> None:
    config = VARIANTS.get(variant, WIDE)
    folder = write_checkpoint(tmp_path / "base", config, make_state(config))
    some = changes(config, 1, 3, ("self_attn.q_proj", "self_attn.v_proj"))
    every = changes(config, 2, 9, (*MODULES, "fc1", "fc2"))
    texts = [some_tokens(config, n, n) for n in (13, 1, 20, 7, 5)]
    alone: dict[int, bytes] = {}
    for isa, threads in (("reference", 1), ("avx2", 2), ("avx512", 3), ("auto", 4)):
        try:
            native = runner(folder, dtype, isa=isa, threads=threads)
        except BackendError:
            continue
        adapters = [-1, put(native, some), put(native, every)]
        batch = [(text, adapters[i % 3]) for i, text in enumerate(texts)]
        for rows in ("all", "last"):
            together = logits_of(native, batch, rows=rows)
            for index, pair in enumerate(batch):
                one = logits_of(native, [pair], rows=rows)[0].tobytes()
                assert together[index].tobytes() == one
                assert one == alone.setdefault((rows, index), one)


def test_rooms_are_used_again_and_unknown_ids_refused(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    native = runner(write_checkpoint(tmp_path / "base", config, make_state(config)))
    tokens = some_tokens(config, 9, 0)
    plain = logits_of(native, [(tokens, -1)])[0]
    first, second = (put(native, changes(config, seed, 2, ("fc1",))) for seed in (1, 2))
    of_second = logits_of(native, [(tokens, second)])[0]
    native.core.remove_adapter(first)
    with pytest.raises(ValueError, match="no such adapter"):
        logits_of(native, [(tokens, first)])
    with pytest.raises(ValueError, match="no such adapter"):
        native.core.remove_adapter(first)
    assert put(native, {}) == first
    assert logits_of(native, [(tokens, first)])[0].tobytes() == plain.tobytes()
    assert logits_of(native, [(tokens, second)])[0].tobytes() == of_second.tobytes()


@pytest.mark.parametrize(
    ("module", "rank", "match"),
    [
        ("model.decoder.layers.0.fc1", 0, "wrong shape"),
        ("model.decoder.layers.9.fc1", 2, "no matrix"),
        ("model.decoder.layers.0.final_layer_norm", 2, "no matrix"),
        ("model.decoder.embed_tokens", 2, "no matrix"),
        ("lm_head", 2, "no matrix"),
        ("", 2, "no matrix"),
        ("model.decoder.layers.", 2, "no matrix"),
        ("model.decoder.layers.0.fc2", 2, "wrong shape"),
    ],
)
def test_what_is_no_change_is_refused(tmp_path: Path, module: str, rank: int, match: str) -> None:
    config = VARIANTS["base"]
    native = runner(write_checkpoint(tmp_path / "base", config, make_state(config)))
    adapter = native.core.add_adapter()
    outputs, inputs = config.ffn_dim, config.hidden_size
    a, b = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
    with pytest.raises(ValueError, match=match):
        native.core.set_adapter(adapter, module, a, b)
