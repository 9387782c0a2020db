"""Every kernel table against the reference, bit by bit, on random and extreme shapes and values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

_core = pytest.importorskip("optlm._core", reason="the compiled core is not built")
kernels = _core.kernels

Float32 = NDArray[np.float32]


def _available() -> list[str]:
    names = []
    for isa in ("avx2", "avx512"):
        try:
            names.append(_core.instruction_set(isa))
        except ValueError:
            continue
    return names


ISAS = _available()
DTYPES = ["f32", "f16", "bf16", "int8"]


def numbers(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(scale)


def product(
    isa: str,
    weights: Float32,
    x: Float32,
    bias: Float32,
    *,
    dtype: str = "f32",
    by_input: bool = False,
    epilogue: str = "store",
    skip_zeros: bool = True,
    parts: int = 1,
) -> Float32:
    out = np.ones((len(x), len(weights)), np.float32)  # "add" adds to these
    kernels.matmul(
        isa, weights, x, bias, dtype=dtype, by_input=by_input, epilogue=epilogue,
        skip_zeros=skip_zeros, parts=parts, out=out,
    )  # fmt: skip
    return out


def equal_bits(a: Float32, b: Float32) -> bool:
    return a.tobytes() == b.tobytes()


# Rows and columns around the panel (64), the group (128) and the vector (16); tokens around the
# tile (6) and the block (48).
SHAPES = [
    (1, 1, 1), (64, 64, 1), (63, 65, 2), (130, 127, 3), (65, 192, 5), (16, 300, 6), (200, 64, 7),
    (64, 128, 13), (64, 129, 17), (64, 257, 19), (70, 70, 48), (65, 66, 49), (128, 64, 97),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize(("rows", "cols", "tokens"), SHAPES)
def test_matmul_equals_the_reference(
    isa: str, dtype: str, by_input: bool, rows: int, cols: int, tokens: int
) -> None:
    weights, x, bias = numbers((rows, cols)), numbers((tokens, cols), 1), numbers((rows,), 2)
    if by_input:
        x = np.maximum(x, 0)  # what a ReLU leaves
    want = product("reference", weights, x, bias, dtype=dtype, by_input=by_input)
    assert equal_bits(product(isa, weights, x, bias, dtype=dtype, by_input=by_input), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_input", [False, True])
def test_reference_is_the_product(dtype: str, by_input: bool) -> None:
    weights, x, bias = numbers((90, 200)), numbers((4, 200), 1), numbers((90,), 2)
    got = product("reference", weights, x, bias, dtype=dtype, by_input=by_input)
    want = x.astype(np.float64) @ weights.astype(np.float64).T + bias
    tolerance = {"f32": 1e-6, "f16": 4e-4, "bf16": 4e-3, "int8": 1.5e-2}[dtype]
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_skipping_zeros_changes_no_bit(isa: str, dtype: str) -> None:
    weights, bias = numbers((130, 320)), numbers((130,), 2)
    for density in (0.0, 0.02, 0.1, 0.5, 1.0):
        for tokens in (1, 2, 8, 50):
            rng = np.random.default_rng(3)
            x = numbers((tokens, 320), 1) * (rng.random((tokens, 320)) < density)
            x = x.astype(np.float32)
            runs = [
                product(isa, weights, x, bias, dtype=dtype, by_input=True, skip_zeros=skip)
                for skip in (True, False)
            ]
            assert equal_bits(*runs), (density, tokens)


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_input", [False, True])
def test_a_token_does_not_see_its_batch(isa: str, dtype: str, by_input: bool) -> None:
    weights, x, bias = numbers((140, 130)), numbers((53, 130), 1), numbers((140,), 2)
    together = product(isa, weights, x, bias, dtype=dtype, by_input=by_input)
    for parts in (2, 3):
        split = product(isa, weights, x, bias, dtype=dtype, by_input=by_input, parts=parts)
        assert equal_bits(split, together)
    alone = [
        product(isa, weights, x[t : t + 1], bias, dtype=dtype, by_input=by_input) for t in range(53)
    ]
    assert equal_bits(np.concatenate(alone), together)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("epilogue", ["store", "add", "relu", "gelu", "gelu_new"])
def test_epilogues(isa: str, epilogue: str) -> None:
    weights, x, bias = numbers((70, 64)), numbers((3, 64), 1), numbers((70,), 2)
    plain = product("reference", weights, x, bias)
    got = product(isa, weights, x, bias, epilogue=epilogue)
    assert equal_bits(got, product("reference", weights, x, bias, epilogue=epilogue))
    if epilogue == "add":
        assert np.allclose(got, plain + 1)
    elif epilogue == "relu":
        assert equal_bits(got, np.where(plain > 0, plain, np.float32(0)))
    elif epilogue != "store":
        torch = pytest.importorskip("torch")
        approximate = "none" if epilogue == "gelu" else "tanh"
        want = torch.nn.functional.gelu(torch.tensor(plain), approximate=approximate).numpy()
        assert np.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("isa", ["reference", *ISAS])
def test_int8_survives_outlier_features(isa: str) -> None:
    """One input of 100 times the rest costs only its own group of 128 its precision."""
    weights, x = numbers((64, 512)), numbers((8, 512), 1)
    x[:, 300] *= 100
    bias = np.zeros(64, np.float32)
    want = product(isa, weights, x, bias)
    grouped = np.abs(product(isa, weights, x, bias, dtype="int8") - want).mean()
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    whole_row = (np.round(x / scale) * scale).astype(np.float32)
    single = np.abs(product(isa, weights, whole_row, bias) - want).mean()
    assert grouped < 0.6 * single


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_stay_finite(isa: str, dtype: str) -> None:
    weights = np.array([[3e38, -3e38] * 32, [1e-45, 1e-40] * 32, [0.0] * 64], np.float32)
    x = np.array([[1e-3] * 64, [1e-45] * 64, [0.0] * 64], np.float32)
    got = product(isa, weights, x, np.zeros(3, np.float32), dtype=dtype)
    assert np.isfinite(got).all()
    assert equal_bits(got, product("reference", weights, x, np.zeros(3, np.float32), dtype=dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ["reference", *ISAS])
def test_non_finite_weights_are_refused(isa: str, value: float) -> None:
    for at in (0, 63, 64, 129):
        weights = numbers((3, 130))
        weights[1, at] = value
        assert kernels.max_abs(isa, weights[1]) == np.inf
        with pytest.raises(ValueError, match="not finite"):
            product(isa, weights, numbers((1, 130)), np.zeros(3, np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 100, 768])
def test_layer_norm(isa: str, width: int) -> None:
    x, weight, bias = numbers((width,), 0, 3.0) + 5, numbers((width,), 1), numbers((width,), 2)
    results = {}
    for name in ("reference", isa):
        results[name] = np.empty(width, np.float32)
        kernels.layer_norm(name, x, weight, bias, results[name])
    assert equal_bits(results[isa], results["reference"])
    exact = x.astype(np.float64)
    want = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5) * weight + bias
    assert np.allclose(results[isa], want, atol=1e-5)


def attend(
    isa: str, qkv: Float32, *, kv_dtype: str = "f32", chunk: int = 10**6, virtual_tokens: int = 0
) -> Float32:
    tokens, dim = qkv.shape[0], qkv.shape[1] // 3
    count = -(-tokens // 16)
    blocks = np.random.default_rng(5).permutation(count + 3)[:count].astype(np.int32)
    out = np.empty((tokens, dim), np.float32)
    kernels.attention(
        isa, qkv, blocks, num_blocks=count + 3, kv_dtype=kv_dtype, chunk=chunk,
        virtual_tokens=virtual_tokens, out=out,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("dim", [1, 4, 16, 20, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 83])
def test_attention_equals_the_reference(isa: str, kv_dtype: str, dim: int, tokens: int) -> None:
    qkv = numbers((tokens, 3 * dim), scale=2.0)
    want = attend("reference", qkv, kv_dtype=kv_dtype)
    for chunk in (tokens, 1, 7):
        assert equal_bits(attend(isa, qkv, kv_dtype=kv_dtype, chunk=chunk), want)


def test_attention_is_attention() -> None:
    qkv = numbers((40, 96))
    q, k, v = np.split(qkv.astype(np.float64), 3, axis=1)
    scores = np.where(np.tri(40, dtype=bool), 0.5 * q @ k.T, -np.inf)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    want = p / p.sum(axis=1, keepdims=True) @ v
    assert np.abs(attend("reference", qkv) - want).max() < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("dim", [4, 20, 64])
@pytest.mark.parametrize("virtual", [1, 15, 16, 21])
def test_attention_behind_virtual_tokens(isa: str, kv_dtype: str, dim: int, virtual: int) -> None:
    """Equal to attention over all rows, in whole blocks bit by bit."""
    qkv = numbers((virtual + 38, 3 * dim), scale=2.0)
    options = {"kv_dtype": kv_dtype, "virtual_tokens": virtual}
    want = attend("reference", qkv, **options)[virtual:]
    for chunk in (38, 1, 7):
        assert equal_bits(attend(isa, qkv, chunk=chunk, **options)[virtual:], want)
    joined = attend("reference", qkv, kv_dtype=kv_dtype)[virtual:]
    assert np.abs(want - joined).max() < 1e-5
    assert equal_bits(want, joined) or virtual % 16


@pytest.mark.parametrize("isa", ISAS)
def test_attention_with_huge_scores(isa: str) -> None:
    qkv = numbers((50, 48), scale=1e4)
    got = attend(isa, qkv, kv_dtype="f16")
    assert np.isfinite(got).all()
    assert equal_bits(got, attend("reference", qkv, kv_dtype="f16"))


@pytest.mark.parametrize("isa", ["reference", *ISAS])
def test_half_and_bfloat16_are_read_exactly(isa: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    for dtype, want in (
        ("f16", bits.view(np.float16).astype(np.float32)),
        ("bf16", (bits.astype(np.uint32) << 16).view(np.float32)),
    ):
        got = np.empty(2**16, np.float32)
        kernels.to_float(isa, bits, dtype, got)
        assert np.array_equal(got, want, equal_nan=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="neon"):
        _core.instruction_set("neon")
    with pytest.raises(ValueError, match="f64"):
        product("reference", numbers((1, 1)), numbers((1, 1)), numbers((1,)), dtype="f64")


@pytest.mark.parametrize("isa", ["reference", *ISAS])
@pytest.mark.parametrize("name", ["gelu", "gelu_new"])
def test_gelu_over_its_range(isa: str, name: str) -> None:
    """Close everywhere, and small where it should be: nothing cancels on the negative side."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, 1e4, 0.0]]).astype(np.float32)
    one, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    got = product(isa, one, x[:, None], zero, epilogue=name)[:, 0]
    exact = x.astype(np.float64)
    if name == "gelu":
        want = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in exact])
    else:
        inner = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
        want = exact * 0.5 * (1 + np.tanh(inner))
    assert np.abs(got - want).max() < 1e-6
    assert np.abs(got[x < -7]).max() < 1e-10
    assert equal_bits(got, product("reference", one, x[:, None], zero, epilogue=name)[:, 0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [2**16, 2**16 + 128])
def test_more_inputs_than_a_list_can_name(isa: str, cols: int) -> None:
    """A wider feed-forward layer than any OPT's has inputs beyond 16 bits."""
    weights, x, bias = numbers((3, cols)), np.zeros((1, cols), np.float32), np.zeros(3, np.float32)
    x[0, [5, cols - 1]] = 1.0, -2.0
    want = product("reference", weights, x, bias, dtype="int8", by_input=True)
    assert equal_bits(product(isa, weights, x, bias, dtype="int8", by_input=True), want)
