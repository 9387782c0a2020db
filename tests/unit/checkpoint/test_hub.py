"""Hub names through the real client, against a server on the loopback interface."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from checkpoint_layouts import LAYOUTS, as_torch
from hub_server import Files, Hub, serve
from optlm.checkpoint import diagnose, open_checkpoint
from optlm.errors import CheckpointError
from variants import VARIANTS, make_state, write_checkpoint

CONFIG = VARIANTS["base"]
NAME = "someone/tiny-opt"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def files_of(tmp_path: Path, layout: str = "safetensors", seed: int = 0) -> Files:
    folder = tmp_path / f"{layout}-{seed}"
    LAYOUTS[layout](folder, CONFIG, as_torch(make_state(CONFIG, seed), "f16"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_downloaded_and_opened(hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", CONFIG, make_state(CONFIG))
    files = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    hub.add(NAME, {**files, "pytorch_model.bin": b"x", "flax_model.msgpack": b"x"})
    checkpoint = open_checkpoint(NAME)
    for name, value in make_state(CONFIG).items():
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), value)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert diagnose(NAME) == []


@pytest.mark.parametrize("layout", ["torch_file", "sharded_torch", "sharded_safetensors"])
def test_other_layouts(layout: str, hub: Hub, tmp_path: Path) -> None:
    files = files_of(tmp_path, layout)
    hub.add(NAME, {**files, "pytorch_model-00007-of-00009.bin": b"from an older upload"})
    if layout != "sharded_torch":  # there it is an extra shard, which stays on the hub
        hub.add(NAME, files)
    checkpoint = open_checkpoint(NAME)
    assert set(hub.downloads()) == set(files)
    assert checkpoint.config == CONFIG


def test_revisions_differ(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, files_of(tmp_path, seed=0))
    hub.add(NAME, files_of(tmp_path, seed=1), revision="v2")
    name = "model.decoder.layers.0.fc1.weight"
    for seed, revision in ((0, None), (1, "v2")):
        found = open_checkpoint(NAME, revision=revision).tensors[name].raw()
        np.testing.assert_array_equal(found, make_state(CONFIG, seed)[name].astype(np.float16))
    with pytest.raises(CheckpointError, match="has no revision 'v3'"):
        open_checkpoint(NAME, revision="v3")


def test_cache_is_used_offline_and_when_the_hub_fails(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, files_of(tmp_path))
    folder = open_checkpoint(NAME).folder
    hub.requests.clear()
    assert open_checkpoint(NAME, offline=True).folder == folder
    assert hub.requests == []
    hub.status = 503
    assert open_checkpoint(NAME).folder == folder


def test_offline_without_cache(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=f"{NAME}: is not in the local cache"):
        open_checkpoint(NAME, offline=True)
    assert hub.requests == []


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be fetched and is not cached"):
        open_checkpoint(NAME)


def test_no_such_model(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="is not on the hub, or is private"):
        open_checkpoint(NAME)


def test_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, files_of(tmp_path))
    hub.gated.add(NAME)
    with pytest.raises(CheckpointError, match="is gated: accept its terms"):
        open_checkpoint(NAME)


def test_no_weights_on_the_hub(hub: Hub) -> None:
    hub.add(NAME, {"config.json": b"{}", "tf_model.h5": b"x"})
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors .* tf_model\.h5"):
        open_checkpoint(NAME)
    hub.add(NAME, {"adapter_model.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(NAME)


def test_an_index_that_names_files_elsewhere(hub: Hub, tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "../../../x.safetensors"}}'
    hub.add(NAME, {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="index-path"):
        open_checkpoint(NAME)
    index = b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    hub.add(NAME, {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="its index names files it lacks"):
        open_checkpoint(NAME)


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, True, True), (True, True, True), (False, True, False), (None, False, False)],
)
def test_progress_bars(
    progress: bool | None, terminal: bool, shown: bool, hub: Hub, tmp_path: Path
) -> None:
    """In a process of its own, whose standard error is a pseudo-terminal or a pipe."""
    hub.add(NAME, files_of(tmp_path))
    code = (
        "from optlm.checkpoint import open_checkpoint; "
        f"open_checkpoint({NAME!r}, progress={progress})"
    )
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": ":".join(sys.path),
    }
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:  # a new one has no columns
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=writer,
        timeout=60,
        check=True,
    )
    os.write(writer, b".")  # a read of nothing would wait
    talk = os.read(reader, 10_000).decode()
    os.close(reader)
    os.close(writer)
    assert done.stdout == b""
    assert ("model.safetensors" in talk) == shown


@pytest.mark.parametrize("name", ["opt-125m", "a/b/c", "./x/y", "../x", "a b/c", "-a/b", "/a/b"])
def test_other_texts_are_no_hub_names(name: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub name"):
        open_checkpoint(name)
    assert hub.requests == []


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG, make_state(CONFIG))
    with pytest.raises(CheckpointError, match="applies to hub models only"):
        open_checkpoint(tmp_path, revision="main")
