"""Files written by torch.save: read without torch, equal to what torch reads, never executed."""

from __future__ import annotations

import pickle
import pickletools
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_faults import edit_zip
from optlm.checkpoint.torchzip import read_torch
from optlm.checkpoint.unpickle import MAX_PICKLE_BYTES, load
from optlm.errors import CheckpointError, UnsafeFileError


def roundtrip(path: Path, state: object) -> None:
    """`read_torch` gives what torch.load gives."""
    torch.save(state, path)
    expected = torch.load(path, weights_only=False)
    found = read_torch(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(found[name].numpy(), tensor.detach().float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_views(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.randn(6, 10).to(dtype)
    cube = torch.randn(2, 3, 4).to(dtype)
    state = {
        "plain": base,
        "shared": base,
        "rows": base[2:5],
        "column": base[:, 3],
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "permuted": cube.permute(2, 0, 1),
        "scalar": base[1, 1],
        "empty": base[:0],
    }
    roundtrip(tmp_path / "x.bin", state)


def test_shared_storage_is_one_mapped_range(tmp_path: Path) -> None:
    base = torch.randn(64, 8)
    torch.save({"a": base, "b": base[8:16]}, tmp_path / "x.bin")
    found = read_torch(tmp_path / "x.bin")
    assert np.shares_memory(found["a"].raw(), found["b"].raw())


def test_state_dict_with_metadata_and_parameters(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    roundtrip(tmp_path / "a.bin", module.state_dict())
    roundtrip(tmp_path / "b.bin", module.state_dict(keep_vars=True))
    marked = torch.nn.Parameter(torch.ones(3))
    marked.note = "kept by torch, of no use here"  # type: ignore[attr-defined]
    roundtrip(tmp_path / "c.bin", OrderedDict(a=marked))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(protocol: int, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin", pickle_protocol=protocol)
    assert read_torch(tmp_path / "x.bin")["a"].shape == (3,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_harmless_values_come_back(protocol: int) -> None:
    value = {
        "list": [1, -2, 70_000, 2**40, -(2**70), 0.5, True, False, None],
        "texts": ("", "ä\u20ac\U0001f600", b"bytes", "x" * 300, b"y" * 300),
        "nested": {"a": {1: [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}},
    }
    if protocol < 3:
        value["texts"] = ("", "ä\u20ac\U0001f600", "x" * 300)
    assert load(pickle.dumps(value, protocol=protocol)) == value


DANGEROUS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "open"),
    ("__builtin__", "eval"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
    ("importlib", "import_module"),
    ("torch", "load"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.jit", "load"),
    ("webbrowser", "open"),
    ("pickle", "loads"),
    ("collections", "OrderedDict.fromkeys"),
    ("metaseq_evil", "x"),
    ("omegaconfx", "x"),
]


@pytest.mark.parametrize(("module", "name"), DANGEROUS)
def test_dangerous_globals_are_refused_by_name(module: str, name: str) -> None:
    for code in (
        f"\x80\x02c{module}\n{name}\n.".encode(),
        b"\x80\x04" + _short(module) + _short(name) + b"\x93.",
        f"\x80\x02c{module}\n{name}\n)R.".encode("latin-1"),
    ):
        data = code if code[:1] == b"\x80" else b"\x80" + code[2:]
        with pytest.raises(UnsafeFileError, match=name.split(".")[0]):
            load(data)


def _short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def test_opcodes_outside_the_list_are_refused() -> None:
    for code in pickletools.opcodes:
        byte = code.code.encode("latin-1")
        if code.name in {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "STRING", "UNICODE"}:
            with pytest.raises(UnsafeFileError, match=f"0x{byte[0]:02x}"):
                load(b"\x80\x02" + byte + b"a\nb\n\x00\x00\x00.")


def test_inert_objects_are_never_made_and_never_weights(tmp_path: Path) -> None:
    argparse_namespace = b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00aK\x01sb"
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    edit_zip(
        tmp_path / "x.bin",
        {"data.pkl": b"\x80\x02}X\x01\x00\x00\x00w" + argparse_namespace + b"s."},
    )
    with pytest.raises(CheckpointError, match="Opaque"):
        read_torch(tmp_path / "x.bin")


BOMBS = {
    "shared-tuple-as-key": b"\x80\x02)" + b"2\x86" * 5000 + b"}" + b"N" + b"s.",
    "hashed-shared-tuple": b"\x80\x02})" + b"2\x86" * 5000 + b"Ns.",
    "deep-nesting": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "long-text": b"\x80\x02X\xff\xff\xff\xff.",
    "vast-bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b".",
    "negative-stack": b"\x80\x02" + b"0" * 10 + b".",
    "marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "colliding-keys": b"\x80\x02}"
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"Ns" for k in range(9, 99))
    + b".",
    "too-long": b"\x80\x02" + b"N0" * (MAX_PICKLE_BYTES // 2) + b"N.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_quickly(name: str) -> None:
    started = time.process_time()
    if name == "deep-nesting":
        load(BOMBS[name])
    else:
        with pytest.raises(CheckpointError):
            load(BOMBS[name])
    assert time.process_time() - started < 30  # seconds; a bomb takes hours


def test_storage_claims_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    huge = (2**40).to_bytes(6, "little")
    number = b"\x8a\x06" + huge
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number
        + b"tQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + number
        + b"\x85K\x01\x85\x89NtR"
    )
    edit_zip(tmp_path / "x.bin", {"data.pkl": b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."})
    with pytest.raises(CheckpointError, match="the file holds 4 bytes"):
        read_torch(tmp_path / "x.bin")
