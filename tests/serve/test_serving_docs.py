"""The examples of docs/serving.md run as they stand, against a server of their own."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from live_server import running
from optlm.engine.llm import LLM

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(llm: LLM) -> None:
    commands = [
        command for block in blocks("sh") for command in re.split(r"\n(?=curl )", block.strip())
    ]
    assert len(commands) >= 10
    with running(llm, name="mini-8m") as server:
        for command in commands:
            words = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
            done = subprocess.run([*words, "-f"], capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, command
            assert "/metrics" in command or "error" not in json.loads(done.stdout)


def test_python(llm: LLM) -> None:
    (program,) = blocks("python")
    said = io.StringIO()
    with running(llm, name="mini-8m") as server, contextlib.redirect_stdout(said):
        namespace: dict[str, object] = {}
        exec(program.replace("http://127.0.0.1:8000", server.url), namespace)
        namespace["client"].close()  # type: ignore[attr-defined]
    assert said.getvalue().strip()


def test_every_field_is_listed() -> None:
    from optlm.serve.requests import CompletionRequest

    missing = [name for name in CompletionRequest.model_fields if f"`{name}`" not in PAGE]
    assert not missing


def test_the_limits_are_those_of_the_code() -> None:
    from optlm.serve.connections import MAX_FIELDS, MAX_HEAD
    from optlm.serve.limits import Limits

    limits = Limits()
    for told in (
        f"body | {limits.body_bytes // 2**20} MiB, complete within {limits.body_seconds:g} s",
        f"{MAX_HEAD // 2**10} KiB, {MAX_FIELDS} fields, within {limits.header_seconds:g} s",
        f"tokens of one request | {limits.request_tokens:,} |",
        f"answer of one request | {limits.answer_bytes // 2**20} MiB |",
        f"tokens of all that run or wait | {limits.waiting_tokens:,} |",
        f"answers of all that run or wait | {limits.waiting_bytes // 2**20} MiB |",
        f"requests that run or wait | {limits.requests:,} |",
        f"connections | {limits.connections:,} |",
        f"a stream that nobody reads | {limits.read_seconds:g} s |",
    ):
        assert told in PAGE
