"""Malformed pickles of allowed opcodes: each misuse has its own words, none goes on."""

from __future__ import annotations

import pytest

from optlm.checkpoint.pickleobjects import Global, Opaque, StorageRef, TensorRef
from optlm.checkpoint.unpickle import load
from optlm.errors import CheckpointError

STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
TENSOR = b"(" + STORAGE + b"K\x00K\x02K\x02\x86K\x02K\x01\x86\x89Nt"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\n"
TEXT = b"X\x01\x00\x00\x00a"

MALFORMED = {
    b"": "cut off",
    b"\x80\x06": "protocol 6",
    b".": "wrong height",
    b"NN.": "wrong height",
    b"(N.": "wrong height",
    b"0": "empty stack",
    b"a": "empty stack",
    b"2": "empty stack",
    b"t": "lacks a mark",
    b"h\x05": "never stored",
    b"X\x04\x00\x00\x00\xff\xff\xff\xff": "not UTF-8",
    b"cos": "name without an end",
    b"NN\x93": "name is not text",
    b"NNb": "sets the state",
    b"N)R": "not a function",
    REBUILD + b"NR": "not a function",
    b"N)\x81": "not a class",
    b"NNa": "not a list",
    b"]NNs": "not a dictionary",
    b"}(Nu": "key without a value",
    b"}]Ns": "neither text nor small number",
    b"})Ns": "neither text nor small number",
    b"}G\x00\x00\x00\x00\x00\x00\x00\x00Ns": "neither text nor small number",
    b"NQ": "unknown form",
    b"(NNNNNtQ": "not a tensor storage",
    STORAGE.replace(b"FloatStorage", b"Size") + b".": "not a tensor storage",
    STORAGE.replace(b"K\x04t", b"Nt"): "without a key or length",
    STORAGE.replace(b"K\x04t", b"J\xff\xff\xff\xfft"): "without a key or length",
    REBUILD + b")R": "too few arguments",
    REBUILD + TENSOR.replace(STORAGE, b"N") + b"R": "without a storage",
    REBUILD + TENSOR.replace(b"K\x00K\x02", b"J\xff\xff\xff\xffK\x02") + b"R": "without a storage",
    REBUILD + TENSOR.replace(b"K\x02K\x02\x86", b"K\x02\x85", 1) + b"R": "shape or strides",
    REBUILD + TENSOR.replace(b"K\x02K\x02\x86", b"K\x02N\x86", 1) + b"R": "shape or strides",
    REBUILD + TENSOR.replace(b"K\x02K\x02\x86", b"K\x02\x88\x86", 1) + b"R": "shape or strides",
    PARAMETER + b")R": "parameter of something",
    PARAMETER + b"N\x85R": "parameter of something",
    FROM_TYPE + b")R": "unknown way",
    FROM_TYPE + b"(" + PARAMETER + b"NNtR": "unknown way",
    FROM_TYPE + b"(" + REBUILD + b"NNtR": "too few arguments",
    b"ccollections\nOrderedDict\nN\x85R": "OrderedDict arguments",
}


@pytest.mark.parametrize("code", MALFORMED)
def test_misuse_is_named(code: bytes) -> None:
    with pytest.raises(CheckpointError, match=MALFORMED[code]):
        load(code)


def test_a_tensor_is_only_described() -> None:
    tensor = load(b"\x80\x02" + REBUILD + TENSOR + b"R.")
    assert isinstance(tensor, TensorRef)
    assert tensor.storage == StorageRef(dtype="F32", key="0", length=4)
    assert (tensor.offset, tensor.shape, tensor.strides) == (0, (2, 2), (2, 1))
    wrapped = load(FROM_TYPE + b"(" + REBUILD + b"ctorch\nTensor\n" + TENSOR + b"}tR.")
    assert isinstance(wrapped, TensorRef)
    assert wrapped.shape == (2, 2)


def test_settings_become_inert_data() -> None:
    found = load(b"cargparse\nNamespace\n)\x81}" + TEXT + b"K\x05sb.")
    assert isinstance(found, Opaque)
    assert found.type == Global(name="argparse.Namespace")
    assert found.state == {"a": 5}
    counter = load(b"ccollections\nCounter\n)R" + TEXT + b"K\x05s.")
    assert isinstance(counter, Opaque)
    assert counter.items == {"a": 5}
    members = load(b"\x80\x04\x8f(K\x01K\x02\x90.")
    assert isinstance(members, Opaque)
    assert members.values == [1, 2]
    frozen = load(b"\x80\x04(K\x01K\x02\x91.")
    assert isinstance(frozen, Opaque)
    assert frozen.values == [1, 2]
