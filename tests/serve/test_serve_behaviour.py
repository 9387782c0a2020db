"""What clients do: they leave, dawdle, lie, come in crowds; nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from live_server import Running, running
from optlm.engine.llm import LLM
from optlm.serve.limits import Limits

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "n": 2}


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def idle(llm: LLM) -> bool:
    stats = llm.stats()
    return not (stats.running or stats.waiting or stats.blocks_used)


def metrics(server: Running) -> str:
    with httpx.Client(base_url=server.url, headers={"connection": "close"}) as client:
        return client.get("/metrics").text


def raw_request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


@contextlib.contextmanager
def connection(server: Running):  # type: ignore[no-untyped-def]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as found:
        yield found


# ---- clients that leave -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_aborted(server: Running, llm: LLM, stream: bool) -> None:
    with connection(server) as wire:
        wire.sendall(raw_request({**LONG, "stream": stream}))
        until(lambda: llm.stats().running > 0)
    until(lambda: idle(llm), 2)


def test_hundreds_leave_at_random(server: Running, llm: LLM) -> None:
    chance = random.Random(1)

    async def one(client: httpx.AsyncClient, wait: float, stream: bool) -> None:
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(
                client.post("/v1/completions", json={**LONG, "stream": stream}), wait
            )

    async def main() -> None:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30) as client:
            waits = [chance.uniform(0.01, 0.6) for _ in range(200)]
            await asyncio.gather(*(one(client, w, chance.random() < 0.5) for w in waits))

    asyncio.run(main())
    until(lambda: idle(llm), 5)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_client_that_reads_nothing_is_given_up(llm: LLM) -> None:
    # small buffers on both sides, so that the server's writes come to a standstill at once
    with running(llm, limits=Limits(read_seconds=0.3)) as server:
        with socket.socket() as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            wire.connect(("127.0.0.1", server.port))
            wire.sendall(raw_request({**LONG, "n": 4, "logprobs": 100, "stream": True}))
            until(lambda: llm.stats().running > 0)
            until(lambda: idle(llm), 20)
            until(lambda: 'optlm:requests_admitted{model_name="mini"} 0.0' in metrics(server))
            until(lambda: not server.server.connections)
        assert httpx.get(f"{server.url}/health").status_code == 200


# ---- bytes that are no request ------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 2**16 + b"\r\n\r\n",
        b"GET /" + b"a" * 2**17 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(10_000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nauthorization: Bearer " + b"a" * 2**20 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda value: repr(value[:40]),
)
def test_what_is_no_request_is_refused_at_once(server: Running, request_bytes: bytes) -> None:
    begun = time.monotonic()
    with connection(server) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(request_bytes)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := wire.recv(2**16):
                answer += chunk
    assert time.monotonic() - begun < 1
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:100]
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "chunks without end"],
)
def test_who_dawdles_is_let_go(llm: LLM, sent: bytes) -> None:
    limits = Limits(header_seconds=0.2, body_seconds=0.2)
    with running(llm, limits=limits) as server, connection(server) as wire:
        wire.sendall(sent)
        begun = time.monotonic()
        answer = b""
        while chunk := wire.recv(2**16):
            answer += chunk
        assert time.monotonic() - begun < 1.5
        assert not answer or answer.startswith(b"HTTP/1.1 408")


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    with connection(server) as wire:
        first = raw_request({"prompt": "a", "max_tokens": 1})
        bad = raw_request({"prompt": [], "max_tokens": 1})
        last = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        wire.sendall(first + bad + last)
        answer = b""
        while chunk := wire.recv(2**16):
            answer += chunk
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400", b"200"]


# ---- many at once -------------------------------------------------------------------------------


def test_the_same_request_gives_one_text_under_any_load(server: Running) -> None:
    same = {"prompt": "The old man", "max_tokens": 16, "temperature": 1, "seed": 7}
    chance = random.Random(3)
    texts: list[str] = []

    async def main() -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60) as client:

            async def ask() -> None:
                answer = await client.post("/v1/completions", json=same)
                texts.append(answer.json()["choices"][0]["text"])

            async def noise() -> None:
                words = " ".join(chance.choice(["cat", "dog", "sun"]) for _ in range(40))
                body = {
                    "prompt": words[: chance.randrange(1, 140)],
                    "max_tokens": chance.randrange(1, 24),
                    "n": chance.randrange(1, 3),
                }
                assert (await client.post("/v1/completions", json=body)).status_code == 200

            await asyncio.gather(*(ask() if i % 3 else noise() for i in range(300)))

    asyncio.run(main())
    assert len(texts) == 200
    assert len(set(texts)) == 1


def test_short_ones_do_not_wait_for_a_long_one(server: Running) -> None:
    long = {"prompt": [5] * 900, "max_tokens": 100, "n": 8, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
        began = time.monotonic()
        slow = pool.submit(httpx.post, f"{server.url}/v1/completions", json=long, timeout=60)
        time.sleep(0.02)
        for _ in range(3):
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        short = time.monotonic() - began
        assert slow.result().status_code == 200
        assert short < time.monotonic() - began


def test_large_requests_hold_up_nobody(server: Running) -> None:
    text = "word " * 1000
    bodies = (
        {"prompt": [text] * 1000, "max_tokens": 1},  # 5 MB to tokenize, then refused
        {"prompt": [5] * 900, "max_tokens": 0, "echo": True, "logprobs": 100, "n": 4},
    )
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=server.url, timeout=60) as client:
        for body in bodies:
            slow = [
                pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
                for _ in range(2)
            ]
            longest = 0.0
            while not all(one.done() for one in slow):
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                longest = max(longest, time.monotonic() - begun)
            assert longest < 1


def test_no_more_than_the_limits_let_in(llm: LLM) -> None:
    limits = Limits(request_tokens=2000, waiting_tokens=2500, requests=3)
    with running(llm, limits=limits) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/completions", json={**LONG, "n": 3})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "request_too_large"
        assert "2705" in error["message"]  # 5 + 3 x 900
        assert "2000" in error["message"]
        with connection(server) as wire:
            wire.sendall(raw_request({**LONG, "stream": True}))
            until(lambda: llm.stats().running > 0)
            busy = client.post("/v1/completions", json={**LONG, "n": 1})
            assert busy.status_code == 429
            assert busy.headers["retry-after"] == "1"
            assert "1805 tokens are under way" in busy.json()["error"]["message"]
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        until(lambda: idle(llm))
        assert client.post("/v1/completions", json={**LONG, "n": 1, "max_tokens": 50}).is_success


# ---- an engine that fails -----------------------------------------------------------------------


def test_a_damaged_row_fails_its_request_only(
    llm: LLM, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = llm._runner.forward

    def damaged(tokens: Any, *rest: Any) -> Any:
        logits = forward(tokens, *rest)
        return np.full_like(logits, np.nan) if 4242 in tokens.tolist() else logits

    monkeypatch.setattr(llm._runner, "forward", damaged)
    bad = {"prompt": [2, 4242], "max_tokens": 3, "temperature": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=bad)
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/completions", json={**bad, "prompt": "a"}).is_success
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_dead_engine_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(threads=1)
    step, dead = llm.step, threading.Event()

    def dying() -> None:
        if dead.is_set():
            raise MemoryError("no room")
        step()

    monkeypatch.setattr(llm, "step", dying)
    with running(llm, checks=False) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        with ThreadPoolExecutor(4) as pool:
            waiting = [
                pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=30)
                for _ in range(4)
            ]
            until(lambda: llm.stats().running > 0)
            dead.set()
            assert {answer.result().status_code for answer in waiting} == {500}
        health = client.get("/health")
        assert health.status_code == 503
        assert "no room" in health.json()["error"]["message"]
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 500


def test_metrics_have_vllms_names(server: Running) -> None:
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2})
    page = httpx.get(f"{server.url}/metrics").text
    for name in (
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:num_preemptions_total{",
        "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_count{",
        'vllm:request_success_total{finished_reason="length"}',
    ):
        assert name in page
