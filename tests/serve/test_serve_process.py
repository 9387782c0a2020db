"""`optlm serve` as a process: start, signals, keys, adapters that come and go."""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from lora_files import write_lora
from optlm.config import OPTConfig
from variants import VARIANTS, make_state, write_checkpoint

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}
GREEDY = {"prompt": [2, 9, 4], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


class Process:
    """A server process and what it says."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "optlm", "serve", "--port", "0", "--threads", "1"]
        self._child = subprocess.Popen(
            [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        begun = time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()
        until(lambda: "serving" in self.said or self._child.poll() is not None, 20)
        port = re.search(r":(\d+)/v1", self.said)
        assert port, self.said
        self.url = f"http://127.0.0.1:{port[1]}"
        until(self._is_ready, 20)
        self.seconds = time.monotonic() - begun

    @property
    def kib(self) -> int:
        """Memory that it holds."""
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def wait(self, seconds: float = 10) -> int:
        return self._child.wait(seconds)

    def close(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait(10)
        assert self._child.stderr is not None
        self._child.stderr.close()

    def _listen(self) -> None:
        assert self._child.stderr is not None
        with contextlib.suppress(ValueError):
            for line in self._child.stderr:
                self.said += line

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready").status_code == 200
        return False


@contextlib.contextmanager
def process(*arguments: object) -> Iterator[Process]:
    made = Process(*arguments)
    try:
        yield made
    finally:
        made.close()


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS["base"]
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "base", config, make_state(config))


def test_it_starts_drains_and_ends() -> None:
    with process() as server:
        assert server.seconds < 10  # benchmarks/startup.py measures it
        with httpx.Client(base_url=server.url, timeout=30) as client:
            models = client.get("/v1/models").json()["data"]
            assert [model["id"] for model in models] == ["mini-8m"]
            text = ""
            with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as got:
                for number, line in enumerate(got.iter_lines()):
                    if number == 0:
                        server.signal(signal.SIGTERM)
                    text += line
            assert text.endswith("data: [DONE]")  # what ran was let end
        assert server.wait() == 0
    assert "Traceback" not in server.said


def test_the_second_signal_does_not_wait() -> None:
    with process() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        body = {**LONG, "max_tokens": 1000, "n": 64, "stream": True}
        with (
            contextlib.suppress(httpx.TransportError),
            client.stream("POST", "/v1/completions", json=body) as got,
        ):
            lines = got.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            time.sleep(0.3)
            server.signal(signal.SIGTERM)
            server.wait(5)
            for _ in lines:
                pass
        assert server.wait(5) == 0


def test_bad_requests_take_no_memory() -> None:
    deep, word = b"[" * 10**5, b"word " * 10**4
    bodies = [
        b'{"prompt":' + deep,
        b'{"prompt":"a","n":1000000000}',
        b'{"prompt":["' + b'","'.join([b"a"] * 10**4) + b'"]}',
        b'{"prompt":"' + word + b'"}',
        b'{"prompt":"a","logprobs":50272}',
        b'{"prompt":"a","stop":["' + word + b'"]}',
        b'{"prompt":"a","x":"' + b"y" * 2**20 + b'"}',
        gzip.compress(b"0" * 2**22),
    ]
    with process() as server, httpx.Client(base_url=server.url, timeout=30) as client:

        def bad(count: int) -> None:
            for number in range(count):
                body = bodies[number % len(bodies)]
                headers = {"content-type": "application/json"}
                if body.startswith(b"\x1f"):
                    headers["content-encoding"] = "gzip"
                answer = client.post("/v1/completions", content=body, headers=headers)
                assert 400 <= answer.status_code < 500, answer.text

        bad(5 * len(bodies))  # threads, and what the allocator keeps for the next time
        before = server.kib
        bad(200)
        assert server.kib - before < 8 * 1024
        body = {"prompt": "a", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200


def test_a_full_disk_under_the_log_stops_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "optlm", "serve", "--port", str(port), "--threads", "1"]
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/ready").status_code == 200
        return False

    with open("/dev/full", "w") as full:
        child = subprocess.Popen(command, stdout=full, stderr=full)
    try:
        until(lambda: is_ready() or child.poll() is not None, 20)
        assert child.poll() is None, "it ended"
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as wire:
                wire.sendall(b"nonsense\r\n\r\n")  # uvicorn logs it
                assert wire.recv(2**12).startswith(b"HTTP/1.1 400")
        body = {"prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.wait(10)


def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(
        "# name key limits\n"
        "alice sk-alice-0123456789\n"
        "bob sk-bob-0123456789abc per_minute=2\n"
        "carol sk-carol-0123456789 concurrent=1\n"
    )
    with process("--api-keys", keys) as server:
        url = f"{server.url}/v1/completions"

        def ask(*values: bytes, **body: object) -> httpx.Response:
            headers = [(b"authorization", value) for value in values]
            return httpx.post(url, json={"prompt": "a", "max_tokens": 1} | body, headers=headers)

        for values in (
            (), (b"",), (b"Bearer",), (b"Bearer wrong",), (b"sk-alice-0123456789",),
            (b"Basic sk-alice-0123456789",), (b"Bearer \xff\xfe",), (b"Bearer " + b"x" * 2**14,),
            (b"Bearer sk-alice-0123456789", b"Bearer sk-alice-0123456789"),
            (b"Bearer sk-alice-012345678",), (b"Bearer sk-alice-0123456789 x",),
        ):  # fmt: skip
            answer = ask(*values)
            assert answer.status_code == 401, values
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert ask(b"Bearer sk-alice-0123456789").status_code == 200
        bob = b"bearer sk-bob-0123456789abc"
        assert [ask(bob).status_code for _ in range(3)] == [200, 200, 429]
        told = ask(bob)
        assert "'bob' made 2 requests in the last minute, its limit is 2" in told.text
        assert 1 <= int(told.headers["retry-after"]) <= 60
        for path in ("/v1/models", "/metrics", "/tokenizer_info", "/v1/models/mini-8m"):
            assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}).status_code == 401
        assert httpx.post(f"{server.url}/v1/adapters/reload").status_code == 401
        carol = {"authorization": "Bearer sk-carol-0123456789"}
        body = {**LONG, "max_tokens": 1000, "n": 32, "stream": True}
        with httpx.stream("POST", url, json=body, headers=carol) as got:
            lines = got.iter_lines()  # dropped, it would close the connection
            next(lines)
            busy = httpx.post(url, json={"prompt": "a"}, headers=carol)
            assert busy.status_code == 429
            assert "'carol' has 1 requests under way, its limit is 1" in busy.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("alice", "a line is: NAME KEY"),
        ("alice short", "16 to 256 characters"),
        ("alice sk-alice-0123456789 concurrent=x", "a line is"),
        ("a sk-alice-0123456789\na sk-other-0123456789", "a name twice"),
        ("a sk-alice-0123456789\nb sk-alice-0123456789", "a key twice"),
        ("\u00e9 sk-alice-0123456789", "other than ASCII"),
        ("# " + "x" * 2**20, "more than 1048576 bytes"),
    ],
)
def test_files_of_keys_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    from optlm.errors import RequestError
    from optlm.serve.keys import read_keys

    (tmp_path / "keys").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_keys(tmp_path / "keys")


def test_adapters_come_and_go(base: Path, tmp_path: Path) -> None:
    config: OPTConfig = VARIANTS["base"]
    folder = tmp_path / "adapters"
    write_lora(folder / "one", config, 1)
    write_lora(tmp_path / "outside", config, 3)
    (folder / "linked").symlink_to(tmp_path / "outside")
    write_lora(folder / "bad name!", config, 3)
    (folder / "empty").mkdir()
    write_lora(folder / "broken", config, 3)
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    write_lora(folder / "foreign", VARIANTS["mini"], 3)
    with process("--model", base, "--adapters", folder) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:

            def names() -> list[str]:
                return [model["id"] for model in client.get("/v1/models").json()["data"]]

            def text(model: str) -> str:
                answer = client.post("/v1/completions", json={**GREEDY, "model": model})
                assert answer.status_code == 200, answer.text
                assert answer.json()["model"] == model
                return str(answer.json()["choices"][0]["text"])

            assert names() == ["base", "one"]
            for refused in ("broken", "foreign", "bad name!"):
                assert f"adapter {refused!r} is left out" in server.said
            plain, one = text("base"), text("one")
            assert plain != one
            for name in ("linked", "broken", "../outside", str(tmp_path / "outside"), "ONE", ".."):
                answer = client.post("/v1/completions", json={**GREEDY, "model": name})
                assert answer.status_code == 404
                assert answer.json()["error"]["param"] == "model"

            write_lora(folder / "two", config, 2)
            server.signal(signal.SIGHUP)
            until(lambda: names() == ["base", "one", "two"])
            two = text("two")
            assert len({plain, one, two}) == 3

            # replaced while a request uses it: that one keeps what it began with
            body = {**GREEDY, "model": "one", "max_tokens": 55, "stream": True, "n": 8}
            with client.stream("POST", "/v1/completions", json=body) as got:
                lines = got.iter_lines()
                next(lines)
                shutil.rmtree(folder / "one")
                write_lora(folder / "one", config, 2)
                told = httpx.post(f"{server.url}/v1/adapters/reload").json()
                assert told["loaded"] == ["one"]
                assert set(told["refused"]) == {"broken", "foreign", "bad name!"}
                rest = list(lines)
            assert rest[-2] == "data: [DONE]"
            assert text("one") == two
            again = httpx.post(f"{server.url}/v1/adapters/reload").json()
            assert again["loaded"] == again["removed"] == []

            shutil.rmtree(folder / "two")
            told = httpx.post(f"{server.url}/v1/adapters/reload").json()
            assert told["removed"] == ["two"]
            assert (
                client.post("/v1/completions", json={**GREEDY, "model": "two"}).status_code == 404
            )
            assert text("base") == plain
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    def refusal(*arguments: object) -> str:
        command = [sys.executable, "-m", "optlm", "serve", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 2 or "already in use" in done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "must lie between 0 and 65535" in refusal("--port", 70000)
    assert "nowhere" in refusal("--adapters", tmp_path / "nowhere")
    assert "nowhere" in refusal("--api-keys", tmp_path / "nowhere")
    assert "s a directory" in refusal("--api-keys", tmp_path)
    (tmp_path / "template").write_text("{% if %}")
    assert "is no Jinja template" in refusal("--chat-template", tmp_path / "template")
