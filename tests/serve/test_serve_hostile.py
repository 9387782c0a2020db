"""Bad input byte by byte and in crowds: refused in OpenAI's shape, and nobody else notices."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from live_server import Running, running
from optlm.engine.llm import LLM
from optlm.serve.keys import Client
from optlm.serve.limits import Admission, Cost, Limits

JSON = {"content-type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: a\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
SMALL = b'{"prompt":"a","max_tokens":2}'
LARGE_HEAD = "more than 32768 bytes or 100 fields"


def sized(size: int, body: bytes = b"", more: bytes = b"") -> bytes:
    return POST + more + b"content-length: %d\r\n\r\n" % size + body


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def idle(llm: LLM) -> bool:
    stats = llm.stats()
    return not (stats.running or stats.waiting or stats.blocks_used)


@contextlib.contextmanager
def connection(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as found:
        yield found


def first_answer(wire: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and error of the first answer on a connection, which may stay open after it."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while b"\r\n\r\n" not in got and (chunk := wire.recv(2**16)):
            got += chunk
    head, _, body = got.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += wire.recv(2**16)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def answers(server: Running) -> None:
    """The server still does what it is for."""
    answer = httpx.post(f"{server.url}/v1/completions", content=SMALL, headers=JSON, timeout=30)
    assert answer.status_code == 200, answer.text


# ---- bytes --------------------------------------------------------------------------------------

BOMB = gzip.compress(b"0" * 2**24)


@dataclass(frozen=True)
class Sent:
    data: bytes
    status: int
    says: str


BYTES: dict[str, Sent] = {
    "a header of 64 KiB": Sent(GET + b"x: " + b"a" * 2**16 + b"\r\n\r\n", 400, LARGE_HEAD),
    "10000 headers": Sent(GET + b"h: 1\r\n" * 10_000 + b"\r\n", 400, LARGE_HEAD),
    "101 headers": Sent(GET + b"h: 1\r\n" * 100 + b"\r\n", 400, LARGE_HEAD),
    "gzip bomb": Sent(sized(len(BOMB), BOMB, b"content-encoding: gzip\r\n"), 415, "'gzip'"),
    "unknown encoding": Sent(sized(1, b"x", b"content-encoding: br, gzip\r\n"), 415, "br, gzip"),
    "gzip in transfer": Sent(
        POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 415, "'gzip, chunked'"
    ),
    "two content types": Sent(
        b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: text/plain\r\n"
        b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
        415,
        "'text/plain'",
    ),
    "a length of 40 MB": Sent(sized(40_000_000, b"{"), 413, "40000000 bytes; the limit is 8388608"),
    "a length of 2**63": Sent(sized(2**63, b"{"), 413, f"{2**63} bytes; the limit is 8388608"),
    "a length of 2**70": Sent(sized(2**70, b"{"), 400, "Invalid HTTP"),
    "a length with a sign": Sent(POST + b"content-length: +2\r\n\r\n{}", 400, "Invalid HTTP"),
    "a length too small": Sent(sized(5, SMALL), 400, "Invalid HTTP"),
    "a promise of 40 MB": Sent(
        sized(40_000_000, more=b"expect: 100-continue\r\n"), 413, "the limit is 8388608"
    ),
    "a chunk of minus one": Sent(CHUNKED + b"-1\r\n", 400, "Invalid HTTP"),
    "a chunk beyond numbers": Sent(CHUNKED + b"f" * 17 + b"\r\n", 400, "Invalid HTTP"),
    "trailers": Sent(CHUNKED + b"0\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", 400, LARGE_HEAD),
    "a folded header": Sent(GET + b" x\r\n\r\n", 400, "Invalid HTTP"),
    "NUL in a header": Sent(GET + b"x: a\x00b\r\n\r\n", 400, "Invalid HTTP"),
    "HTTP/2": Sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "Invalid HTTP"),
    "a version to come": Sent(b"GET / HTTP/9.9\r\nhost: a\r\n\r\n", 400, "Invalid HTTP"),
    "odd bytes in a name": Sent(b"GET /v1/models/%00%ff HTTP/1.1\r\n\r\n", 404, "no model"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_refused(server: Running, name: str) -> None:
    sent = BYTES[name]
    begun = time.monotonic()
    with connection(server) as wire:
        wire.sendall(sent.data)
        status, error = first_answer(wire)
        assert time.monotonic() - begun < 1
    assert (status, sent.says in error["message"]) == (sent.status, True), error
    answers(server)


@pytest.mark.parametrize(
    ("head", "byte", "what"),
    [(POST, b"a", "head"), (sized(1000), b" ", "body")],
    ids=["head", "body"],
)
def test_a_byte_now_and_then_buys_no_time(llm: LLM, head: bytes, byte: bytes, what: str) -> None:
    limits = Limits(header_seconds=0.3, body_seconds=0.3)
    with running(llm, limits=limits) as server, connection(server) as wire:
        wire.sendall(head)
        begun = time.monotonic()
        wire.settimeout(0.02)
        while time.monotonic() - begun < 1:
            with contextlib.suppress(TimeoutError):
                assert wire.recv(1, socket.MSG_PEEK), "closed without a word"
                break
            wire.sendall(byte)
        status, error = first_answer(wire)
        assert time.monotonic() - begun < 1
        assert (status, error["message"]) == (
            408, f"the {what} was not complete after 0.3 seconds"
        )  # fmt: skip
        answers(server)


@pytest.mark.parametrize(
    "sent",
    [
        sized(100, b"{"),
        *(
            sized(len(body), body)
            for body in (
                b'{"prompt":"a","max_tokens":900,"ignore_eos":true}',
                b'{"prompt":"a","max_tokens":900,"ignore_eos":true,"stream":true}',
            )
        ),
    ],
    ids=["half a body", "a whole one", "a stream"],
)
def test_who_closes_a_half_has_left(server: Running, llm: LLM, sent: bytes) -> None:
    with connection(server) as wire:
        wire.sendall(sent)
        if b"max_tokens" in sent:
            until(lambda: llm.stats().running > 0)
        wire.shutdown(socket.SHUT_WR)
        until(lambda: idle(llm), 1)
        wire.settimeout(1)
        while wire.recv(2**16):  # ends: the other half is closed too
            pass
    answers(server)


def test_no_answer_within_an_answer(server: Running, llm: LLM) -> None:
    body = b'{"prompt":"a","max_tokens":900,"ignore_eos":true,"stream":true}'
    with connection(server) as wire:
        wire.sendall(sized(len(body), body))
        got = wire.recv(2**16)
        wire.sendall(b"nonsense\r\n\r\n")
        while chunk := wire.recv(2**16):
            got += chunk
    assert got.count(b"HTTP/1.1 ") == 1
    until(lambda: idle(llm), 1)
    answers(server)


def test_who_leaves_while_a_long_prompt_is_read(server: Running, llm: LLM) -> None:
    body = json.dumps({"prompt": [[5 + i] + [9] * 900 for i in range(16)]}).encode()
    with connection(server) as wire:
        wire.sendall(sized(len(body), body))
        until(lambda: llm.stats().running > 0)
    until(lambda: idle(llm), 2)
    answers(server)


# ---- fields -------------------------------------------------------------------------------------

PLACES = {
    "/v1/completions": ("prompt", "stop", "logit_bias", "response_format"),
    "/v1/chat/completions": ("messages",),
    "/v1/score": ("context", "continuations"),
    "/v1/embeddings": ("input",),
    "/tokenize": ("prompt",),
    "/detokenize": ("tokens",),
}


@pytest.mark.parametrize("pair", ["[]", "{}"])
@pytest.mark.parametrize(("path", "field"), [(p, f) for p, fs in PLACES.items() for f in fs])
def test_nesting_of_any_depth(http: httpx.Client, path: str, field: str, pair: str) -> None:
    opening = pair[0] if pair == "[]" else '{"a":'
    for depth in (3, 200, 900, 960, 990, 1000, 10_000):
        body = f'{{"{field}":{opening * depth}1{pair[1] * depth}}}'
        begun = time.monotonic()
        answer = http.post(path, content=body, headers=JSON)
        assert time.monotonic() - begun < 1
        assert answer.status_code == 400, (depth, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.text) < 1000


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt":"a","stream":true,"stream_options":{"include_usage":true,"include_usage":false}}',
        '{"prompt":"a","logit_bias":{"1":1,"1":2}}',
        '{"prompt":"a","\\u0070rompt":"b"}',
    ],
    ids=["in an object", "in a map", "spelt in two ways"],
)
def test_names_given_twice_are_told(http: httpx.Client, body: str) -> None:
    answer = http.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "twice in one object" in answer.json()["error"]["message"]


VALUES: list[tuple[str, Any, str, str]] = [
    ("n", 129, "129", "128"),
    ("n", 0, "0", "1"),
    ("best_of", 10**9, "1000000000", "128"),
    ("max_tokens", -1, "-1", "0"),
    ("max_tokens", 10**9, "1000000000", "1048576"),
    ("temperature", 1e308, "1e+308", "2"),
    ("top_p", 1.0000001, "1.0000001", "1"),
    ("top_k", -2, "-2", "-1"),
    ("min_p", 1.1, "1.1", "1"),
    ("presence_penalty", 1e308, "1e+308", "2"),
    ("frequency_penalty", -1e308, "-1e+308", "-2"),
    ("repetition_penalty", 0, "0", "0.01"),
    ("logprobs", 50272, "50272", "100"),
    ("prompt_logprobs", -1, "-1", "0"),
    ("priority", 1001, "1001", "1000"),
    ("seed", 2**64, str(2**64), str(2**64)),
    ("stop", ["a"] * 17, "17", "16"),
    ("stop", ["x" * 1025], "1025", "1024"),
    ("logit_bias", {"1": 101}, "101", "100"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "1025", "1024"),
    ("logit_bias", {"8192": 1}, "8192", "8191"),
    ("prompt", ["a"] * 1025, "1025", "1024"),
    ("prompt", [8192], "8192", "8191"),
    ("prompt", [2] * 1024, "1024", "1024"),
    ("truncate_prompt_tokens", 0, "0", "1"),
]


@pytest.mark.parametrize(
    ("name", "value", "told", "limit"), VALUES, ids=[f"{n}={v!a:.20}" for n, v, _, _ in VALUES]
)
def test_field_value_and_limit_are_told(
    http: httpx.Client, name: str, value: Any, told: str, limit: str
) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", name: value})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    words = message.replace(";", " ").replace(",", " ").split()
    assert name in message
    assert told in words, message
    assert limit in words, message


# ---- clocks and crowds --------------------------------------------------------------------------


def test_a_clock_set_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    true_time = time.time
    for seconds in (-(10**8), 10**8, 0):
        monkeypatch.setattr(time, "time", lambda s=seconds: true_time() + s)
        answers(server)
    page = httpx.get(f"{server.url}/metrics").text
    sums = [line for line in page.splitlines() if "_seconds_sum" in line]
    assert sums
    assert all(0 <= float(line.split()[-1]) < 10**6 for line in sums)


def test_rates_do_not_go_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    admission, client = Admission(Limits()), Client(name="a", per_minute=1)
    with admission.admit(Cost(tokens=1), client):
        pass
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + 3600)
    with pytest.raises(Exception, match="its limit is 1"), admission.admit(Cost(tokens=1), client):
        pass


def test_a_long_one_ends_within_a_flood_of_tiny_ones(server: Running) -> None:
    over = threading.Event()
    tiny = {"prompt": "a", "max_tokens": 1}

    def flood() -> int:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            count = 0
            while not over.is_set():
                assert client.post("/v1/completions", json=tiny).status_code == 200
                count += 1
            return count

    long = {"prompt": [7] * 700, "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        floods = [pool.submit(flood) for _ in range(8)]
        try:
            answer = httpx.post(f"{server.url}/v1/completions", json=long, timeout=30)
        finally:
            over.set()
        assert sum(one.result() for one in floods) > 20
    assert answer.json()["usage"]["completion_tokens"] == 60


BY_PRIORITY: dict[str, Callable[[int], dict[str, Any]]] = {
    "/v1/completions": lambda i: {"prompt": [9 + i] * 200, "max_tokens": 2},
    "/v1/chat/completions": lambda i: {
        "messages": [{"role": "user", "content": f"{i} " * 100}],
        "max_tokens": 2,
    },
    "/v1/embeddings": lambda i: {"input": [9 + i] * 200},
    "/v1/score": lambda i: {"context": [9 + i] * 200, "continuations": [[6] * 9]},
}


@pytest.mark.parametrize("path", BY_PRIORITY)
def test_the_urgent_overtakes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token, and none before all have come: who is first in line ends first.

    But for the score that came first: it is under way from then on.
    """
    llm = LLM(threads=1, max_batch_tokens=1)
    step, everyone = llm.step, threading.Event()
    monkeypatch.setattr(llm, "step", lambda: step() if everyone.is_set() else time.sleep(0.001))
    ended: list[int] = []
    with running(llm) as server, ThreadPoolExecutor(4) as pool:

        def ask(priority: int, number: int) -> None:
            body = {**BY_PRIORITY[path](number), "priority": priority}
            assert httpx.post(server.url + path, json=body, timeout=30).status_code == 200
            ended.append(priority)

        try:
            asked = [pool.submit(ask, p, i) for i, p in enumerate((5, 6, 0, -5))]
            until(lambda: llm.stats().running + llm.stats().waiting >= len(asked))
        finally:
            everyone.set()
        for one in asked:
            one.result()
    free = ended[1:] if path == "/v1/score" else ended
    assert free == sorted(free)
    assert sorted(ended) == [-5, 0, 5, 6]
