"""Damaged files end in our own errors, within a memory cap; whatever loads is well formed."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_layouts import LAYOUTS, as_torch
from optlm.checkpoint import diagnose, open_checkpoint
from optlm.checkpoint.safetensors import read_safetensors
from optlm.checkpoint.torchzip import read_torch
from optlm.checkpoint.unpickle import load
from optlm.errors import CheckpointError, ConfigError
from variants import VARIANTS, make_state

CONFIG = VARIANTS["foreign"]
FILES = {
    "safetensors": "model.safetensors",
    "torch_file": "pytorch_model.bin",
    "metaseq_single": "restored.pt",
    "metaseq_flat_shards": "checkpoint_last-model_part-0-shard0.pt",
    "sharded_safetensors": "model.safetensors.index.json",
}
EXPECTED = (CheckpointError, ConfigError)


@functools.cache
def sound(root: Path, layout: str) -> tuple[Path, bytes]:
    folder = root / layout
    LAYOUTS[layout](folder, CONFIG, as_torch(make_state(CONFIG), "f16"))
    path = folder / FILES[layout]
    return path, path.read_bytes()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome(path: Path, raw: bytes) -> bool:
    """True if the damaged file still loads, and then every tensor can be read."""
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path.parent)
    except EXPECTED:
        return False
    for name, shape in CONFIG.parameter_shapes().items():
        assert checkpoint.tensors[name].raw().shape == shape
    return True


@pytest.mark.parametrize("layout", FILES)
def test_truncation_at_every_64th(layout: str, root: Path) -> None:
    path, raw = sound(root, layout)
    for part in range(64):
        assert not outcome(path, raw[: len(raw) * part // 64]), part
        assert any(fault.severity == "error" for fault in diagnose(path.parent))
    assert outcome(path, raw)


@pytest.mark.parametrize("layout", FILES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_random_damage(layout: str, root: Path, data: st.DataObject) -> None:
    path, raw = sound(root, layout)
    broken = bytearray(raw)
    # The structure is at the ends: headers first, a zip file's directory last.
    near_start = st.integers(0, min(len(raw), 4000) - 1)
    near_end = st.integers(max(0, len(raw) - 4000), len(raw) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(near_start | near_end | st.integers(0, len(raw) - 1))
        broken[at] = data.draw(st.integers(0, 255))
    outcome(path, bytes(broken))
    diagnose(path.parent)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_random_pickles(raw: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        load(b"\x80\x02" + raw)


OPCODES = b"()]}NtaesubqhRQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x9402" + b"."
PIECES = st.sampled_from(
    [
        *(bytes([code]) for code in OPCODES),
        b"K\x01",
        b"X\x01\x00\x00\x00a",
        b"q\x00",
        b"h\x00",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch._tensor\n_rebuild_from_type_v2\n",
        b"ccollections\nOrderedDict\n",
        b"cargparse\nNamespace\n",
        b"X\x07\x00\x00\x00storage",
    ]
)


@settings(deadline=None, max_examples=250)
@given(st.lists(PIECES, max_size=40))
def test_random_programs_of_allowed_opcodes(pieces: list[bytes]) -> None:
    with contextlib.suppress(CheckpointError):
        load(b"\x80\x02" + b"".join(pieces) + b".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.just("F32") | JSON,
        "shape": st.just([1]) | JSON,
        "data_offsets": st.just([0, 4]) | JSON,
    }
)


@settings(deadline=None, max_examples=80)
@given(
    header=st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRY | JSON, max_size=3)
)
def test_random_headers(header: dict[str, object], root: Path) -> None:
    text = json.dumps(header).encode()
    path = root / "header.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    try:
        tensors = read_safetensors(path)
    except CheckpointError:
        return
    assert all(isinstance(tensor.raw().nbytes, int) for tensor in tensors.values())


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(st.sampled_from(sorted(CONFIG.to_dict())) | st.text(max_size=4), JSON))
def test_random_configs(root: Path, changes: dict[str, object]) -> None:
    folder = root / "config"
    if not folder.exists():
        LAYOUTS["safetensors"](folder, CONFIG, as_torch(make_state(CONFIG), "f16"))
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_dict(), **changes}))
    try:
        open_checkpoint(folder)
        loaded = True
    except EXPECTED:
        loaded = False
    grave = [fault for fault in diagnose(folder) if fault.severity == "error"]
    assert loaded == (not grave)


CAPPED = """
import resource, sys
from pathlib import Path
import numpy, json, mmap
import optlm.checkpoint.load, optlm.checkpoint.doctor, optlm.checkpoint.hub
from optlm.errors import OptlmError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
from optlm.checkpoint import diagnose, open_checkpoint
try:
    open_checkpoint(Path(sys.argv[1]))
except OptlmError as error:
    print(type(error).__name__, str(error)[:200])
else:
    raise SystemExit("it loaded")
assert diagnose(Path(sys.argv[1]))
"""


def _claims_a_huge_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)  # sparse: 32 GB that are not there


def _claims_a_huge_tensor(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    text = json.dumps({"a": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def _claims_a_huge_model(folder: Path) -> None:
    values = {**CONFIG.to_dict(), "hidden_size": 2**20, "num_hidden_layers": 4096}
    (folder / "config.json").write_text(json.dumps(values))


def _repeats_a_small_storage(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    state = as_torch(make_state(CONFIG), "f32")
    name = "model.decoder.layers.0.fc1.weight"
    state[name] = torch.ones(1).expand(2**20, 2**20)
    torch.save(state, folder / "pytorch_model.bin")


def _feeds_a_long_config(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**36)


@pytest.mark.parametrize(
    "change",
    [
        _claims_a_huge_header,
        _claims_a_huge_tensor,
        _claims_a_huge_model,
        _repeats_a_small_storage,
        _feeds_a_long_config,
    ],
)
def test_hostile_sizes_stay_under_a_memory_cap(change: object, tmp_path: Path) -> None:
    """256 MB above an idle process are enough to refuse files that claim terabytes."""
    LAYOUTS["safetensors"](tmp_path, CONFIG, as_torch(make_state(CONFIG), "f16"))
    assert callable(change)
    change(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Error" in done.stdout


def test_readers_refuse_each_others_files(root: Path) -> None:
    path, raw = sound(root, "safetensors")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a zip"):
        read_torch(path)
    path, raw = sound(root, "torch_file")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is this a safetensors file"):
        read_safetensors(path)
