"""The command as a process: signals, pipes and terminals."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from variants import VARIANTS, make_state, write_checkpoint

COMMAND = [sys.executable, "-m", "optlm", "generate"]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can go on for a while."""
    config = dataclasses.replace(VARIANTS["mini"], max_position_embeddings=8192)
    return write_checkpoint(tmp_path_factory.mktemp("long") / "model", config, make_state(config))


def endless(model: Path) -> list[str]:
    options = ["--max-tokens", "8000", "--ignore-eos", "--seed", "1", "--threads", "1"]
    return [*COMMAND, "the cat", "-m", str(model), *options]


def read_terminal(terminal: int) -> bytes:
    """Everything until the last process on the other side is gone."""
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux: EIO at the end
            chunk = b""
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def test_interrupt_on_a_terminal(long_model: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(endless(long_model), stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    start = os.read(ours, 1000)
    while len(start) < 40:  # the prompt and some text
        start += os.read(ours, 1000)
    process.send_signal(signal.SIGINT)
    rest = read_terminal(ours)
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 130
    assert errors == b""
    assert start.startswith(b"the cat")
    assert (start + rest).endswith(b"\r\n")


def test_terminal_sees_no_control_characters(long_model: Path) -> None:
    ours, theirs = pty.openpty()
    options = ["-m", str(long_model), "--max-tokens", "200", "--ignore-eos", "--seed", "3"]
    process = subprocess.Popen([*COMMAND, "a\x1b[31m", *options], stdout=theirs)
    os.close(theirs)
    shown = read_terminal(ours)
    assert process.wait(timeout=60) == 0
    os.close(ours)
    assert shown.startswith(rb"a\x1b[31m")
    assert not set(shown) & set(range(0x20)) - {0x0A, 0x0D, 0x09}


def test_reader_that_leaves(long_model: Path) -> None:
    options = ["-m", str(long_model), "--stream", "--max-tokens", "8000", "--ignore-eos"]
    process = subprocess.Popen(
        [*COMMAND, "the cat", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert errors == b""


def test_closed_standard_input_is_an_empty_prompt(long_model: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "-", "-m", str(long_model), "--max-tokens", "3"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""


def test_closed_standard_output_is_told(long_model: Path) -> None:
    command = [sys.executable, "-m", "optlm", "info", str(long_model)]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "optlm: error: standard output is closed\n")


@pytest.mark.parametrize("command", [["generate", "-"], ["score", "-"]])
def test_closed_standard_input_is_told(command: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", sys.executable, "-m", "optlm", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr


def test_talk_that_nobody_hears_stays_out_of_the_data(long_model: Path) -> None:
    command = [*COMMAND, "a", "-m", str(long_model), "--max-tokens", "3", "--seed", "1"]
    texts = []
    for redirection in ("2>&1", "2>&-", "2>/dev/full"):
        flags = ["-v"] if redirection != "2>&1" else []
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *command, *flags],
            stdout=subprocess.PIPE,
            check=True,
        )
        texts.append(done.stdout)
    assert texts[0]
    assert set(texts) == {texts[0]}


def test_polite_end_keeps_the_text(long_model: Path) -> None:
    command = [*endless(long_model), "--stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.terminate()
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, b"")
    assert (first + rest).endswith(b"\n")


LEGACY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_arguments_are_utf8_in_any_locale(long_model: Path) -> None:
    options = ["--json", "-m", str(long_model), "--max-tokens", "1"]
    for extra in ({}, LEGACY):
        done = subprocess.run(
            [*COMMAND, "é 猫", *options],
            env={**os.environ, **extra},
            capture_output=True,
            check=True,
        )
        assert json.loads(done.stdout)["prompt"] == "é 猫"


def test_arguments_that_are_not_utf8(long_model: Path) -> None:
    for arguments in ([b"caf\xe9"], [b"x", b"--stop", b"\xff"]):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, check=False)
        assert done.returncode == 2
        assert b"is not UTF-8" in done.stderr


def test_output_that_knows_few_letters(long_model: Path) -> None:
    options = ["-m", str(long_model), "--max-tokens", "50", "--ignore-eos", "--seed", "1"]
    done = subprocess.run(
        [*COMMAND, "the", *options],
        env=dict(os.environ, PYTHONIOENCODING="ascii"),
        capture_output=True,
        check=True,
    )
    assert done.stdout.isascii()
    assert rb"\ufffd" in done.stdout


def test_module_and_command_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optlm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("optlm ")
