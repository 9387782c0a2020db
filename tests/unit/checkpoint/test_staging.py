"""Folders are written whole or not at all, even by a process that is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from optlm.checkpoint import diagnose, open_checkpoint, save_checkpoint
from optlm.checkpoint.staging import staged_folder
from optlm.errors import CheckpointError, ConfigError
from variants import VARIANTS, make_state, write_checkpoint

FILES = {"config.json": "new", "tokenizer.json": "new", "weights": "new"}
OLD = {"config.json": "old", "merges.txt": "old", "weights": "old", "notes": "old"}

# Writes FILES through a stage, and dies at the call of os.replace or os.rename with this number.
KILLED = """
import os, signal, sys
from pathlib import Path
from optlm.checkpoint.staging import staged_folder
left = int(sys.argv[2])
def dying(real):
    def call(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call
os.replace, os.rename = dying(os.replace), dying(os.rename)
with staged_folder(Path(sys.argv[1]), replaces=["merges.txt", "vocab.json"]) as stage:
    for name in ("config.json", "tokenizer.json", "weights"):
        (stage / name).write_text("new")
"""


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if not p.is_dir()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def killed_at(call: int, folder: Path) -> bool:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(call)], check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with staged_folder(folder) as stage:
        write(stage, FILES)
        assert not folder.exists()
    assert contents(folder) == FILES
    assert os.listdir(tmp_path / "a") == ["b"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_into_a_folder_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, OLD)
    with staged_folder(tmp_path, replaces=["merges.txt", "vocab.json"]) as stage:
        write(stage, FILES)
    assert contents(tmp_path) == {**FILES, "notes": "old"}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_killed_before_a_new_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert killed_at(0, folder)
    assert not folder.exists()
    assert len(os.listdir(tmp_path)) == 1  # the stage
    assert not killed_at(9, folder)
    assert os.listdir(tmp_path) == ["new"]  # and the next one has removed it


@pytest.mark.parametrize("call", [0, 1, 2])
def test_killed_between_two_moves(call: int, tmp_path: Path) -> None:
    write(tmp_path, OLD)
    assert killed_at(call, tmp_path)
    assert "config.json" not in contents(tmp_path)  # it does not load
    assert not killed_at(9, tmp_path)
    assert contents(tmp_path) == {**FILES, "notes": "old"}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, OLD)

    def fail() -> None:
        with staged_folder(tmp_path) as stage:
            write(stage, FILES)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device") as caught:
        fail()
    assert caught.value.filename == str(tmp_path)
    assert contents(tmp_path) == OLD
    assert sorted(os.listdir(tmp_path)) == sorted(OLD)


def test_the_stage_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    (held := tmp_path / ".new.part-held").mkdir()
    (tmp_path / ".new.part-dead").mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with staged_folder(tmp_path / "new") as stage:
        write(stage, FILES)
    os.close(lock)
    assert sorted(os.listdir(tmp_path)) == [".new.part-held", "new"]


def test_targets_that_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    config = VARIANTS["base"]
    for target in ("file", "dangling", "file/below"):
        with pytest.raises(CheckpointError, match="not-a-folder"):
            save_checkpoint(tmp_path / target, config, make_state(config))


def test_packed_weights_would_hide_the_new_ones(tmp_path: Path) -> None:
    (tmp_path / "weights.optlm").write_bytes(b"")
    config = VARIANTS["base"]
    with pytest.raises(CheckpointError, match="packed-beside-others"):
        save_checkpoint(tmp_path, config, make_state(config))


def test_no_tokenizer_of_two_models(tmp_path: Path) -> None:
    """Files that the new tokenizer does not have would be read together with it."""
    config = VARIANTS["base"]
    source = write_checkpoint(tmp_path / "source", config, make_state(config))
    target = write_checkpoint(tmp_path / "target", config, make_state(config))
    (target / "added_tokens.json").write_text('{"<new>": 299}')
    checkpoint = open_checkpoint(source)
    save_checkpoint(target, config, checkpoint.tensors, tokenizer_from=source)
    assert not (target / "added_tokens.json").exists()
    assert diagnose(target) == []


def test_a_tokenizer_that_is_no_file_is_not_left_out_in_silence(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    source = write_checkpoint(tmp_path / "source", config, make_state(config))
    tensors = open_checkpoint(source).tensors
    (source / "tokenizer.json").unlink()
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not-a-file"):
        save_checkpoint(tmp_path / "target", config, tensors, tokenizer_from=source)
    assert not (tmp_path / "target").exists()


def test_a_half_moved_folder_is_refused(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path / "m", config, make_state(config))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        open_checkpoint(folder)
