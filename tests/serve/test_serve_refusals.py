"""Everything a client can get wrong: a 4xx in OpenAI's shape at once, and the server lives."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

V, CONTEXT = 8192, 1024  # of the bundled model
HUGE = 10**9
JSON = {"content-type": "application/json"}
MIB = 2**20

FIELDS: list[tuple[str, Any]] = [
    *(("n", value) for value in (0, -1, 1.5, "1", True, HUGE, 2**63)),
    *(("best_of", value) for value in (0, -1, "2", True, HUGE)),
    *(("max_tokens", value) for value in (-1, HUGE, 1.5, "1", True, 0)),
    *(("temperature", value) for value in (1e308, 1e-320, -0.1, "0.7", True, [1])),
    *(("top_p", value) for value in (0, 1.0000001, -1, "1", True)),
    *(("min_p", value) for value in (-0.1, 1.1, "0")),
    *(("top_k", value) for value in (-2, 1.5, "1", True, 2**40)),
    *(("presence_penalty", value) for value in (1e308, -1e308, "0", True)),
    *(("frequency_penalty", value) for value in (1e308, -1e308, "0", True)),
    *(("repetition_penalty", value) for value in (0, -1, 1e308, "1")),
    *(("logprobs", value) for value in (-1, 50272, True, "1", 1.5)),
    *(("prompt_logprobs", value) for value in (-1, 50272, True)),
    *(("echo", value) for value in ("yes", 1, [])),
    *(("stop", value) for value in ([""], "", ["a"] * 17, "x" * MIB, ["a"] * 10**5, 1, [1], {})),
    *(("stop_token_ids", value) for value in ([-1], [V], [True], ["1"], [1] * 2000, 1)),
    *(("logit_bias", {key: 1}) for key in ("-1", str(V), "1e3", "\u0663", "", "1" * 5000)),
    *(("logit_bias", value) for value in ({"1": "x"}, {"1": 101}, {"1": True}, [1], 1)),
    ("logit_bias", {str(i): 0 for i in range(10**5)}),
    *(("min_tokens", value) for value in (-1, HUGE, "1", 17)),
    *(("truncate_prompt_tokens", value) for value in (0, -1, "1", HUGE)),
    *(("prompt", value) for value in ([], [[]], ["a", 1], [1, "a"], [[1], "a"], [["a"]], None)),
    *(("prompt", [value]) for value in (-1, V, 2**64, True, 1.5, None, {})),
    *(("prompt", value) for value in (1, True, {}, [2] * CONTEXT, ["a"] * 10**5, "\ud800")),
    *(("seed", value) for value in (2**64, -(2**63) - 1, "1", 1.5, True)),
    *(("suffix", value) for value in ("b", "")),
    *(("user", value) for value in ("x" * MIB, 1)),
    *(("model", value) for value in ("../../etc", "", "/etc/passwd", "other", 1, "x" * MIB)),
    *(("stream", value) for value in ("yes", 1)),
    *(("stream_options", value) for value in ({}, {"include_usage": True}, 1)),
    *(("priority", value) for value in (10**6, "1", 1.5)),
    *(("unknown", value) for value in (None, 1)),
    ("ignore_eos", "yes"),
    *(("utf8", value) for value in ("yes", 1, [])),
    ("guided_regex", "(a+)+$"),
    ("response_format", {"type": "json_schema"}),
    ("chat_template_kwargs", {"tokenize": True}),
    ("prompt_embeds", "AAAA"),
    ("max_token", 3),
]


def check(answer: httpx.Response, begun: float) -> dict[str, Any]:
    assert time.monotonic() - begun < 1
    assert 400 <= answer.status_code < 500, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=[f"{n}={v!a:.30}" for n, v in FIELDS])
def test_a_bad_field_is_named(http: httpx.Client, name: str, value: object) -> None:
    body = json.dumps({"model": "mini", "prompt": "a", name: value}).encode()
    begun = time.monotonic()
    answer = http.post("/v1/completions", content=body, headers=JSON)
    error = check(answer, begun)
    assert error["param"] is not None
    assert error["param"].split(".")[0] == name
    assert name in error["message"] or name in ("model", "prompt")
    assert http.get("/health").status_code == 200


FINE: list[dict[str, Any]] = [
    {"max_tokens": None, "logprobs": None, "stop": None, "n": None, "seed": None},
    {"max_tokens": 0, "echo": True},
    {"max_tokens": 0, "echo": True, "logprobs": 0},
    {"temperature": -0.0},
    {"temperature": 0, "top_k": -1},
    {"top_k": V + 1},
    {"top_k": 0},
    {"logprobs": 6},
    {"stop": []},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": "\ufffd"},
    {"stop": "\U0001f600"},
    {"logit_bias": {str(i): -100 for i in range(1000)}},
    {"prompt": ""},
    {"prompt": "</s>"},
    {"prompt": [2]},
    {"prompt": [1]},
    {"prompt": [2] * (CONTEXT - 1)},
    {"prompt": [2] * CONTEXT, "max_tokens": 0, "echo": True},
    {"prompt": "\u202e\u200b\u05d0\u200f x"},
    {"prompt": "a\x00b\ufeff"},
    {"prompt": "word " * 3000, "truncate_prompt_tokens": 50},
    {"seed": 2**64 - 1},
    {"seed": -1},
    {"user": "me"},
    {"priority": -3},
]


@pytest.mark.parametrize("fields", FINE, ids=lambda fields: f"{fields!a:.50}")
def test_odd_but_fine(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "mini", "prompt": "a", "max_tokens": 2, **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text


TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"prompt": [2] * CONTEXT, "n": 2}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), TOGETHER, ids=str)
def test_fields_that_do_not_go_together(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    begun = time.monotonic()
    answer = http.post("/v1/completions", json={"model": "mini", "prompt": "a", **fields})
    assert check(answer, begun)["param"] == param


BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "an array": b"[]",
    "a text": b'"a"',
    "nested": b"[" * 10**6,
    "nested in a field": b'{"prompt":' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "doubled names": b'{"prompt":"a","prompt":"b"}',
    "no UTF-8": b'{"prompt":"\xff"}',
    "UTF-16": '{"prompt":"a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt":"a"}',
    "a lone surrogate": b'{"prompt":"\\ud800"}',
    "NaN": b'{"prompt":"a","temperature":NaN}',
    "Infinity": b'{"prompt":"a","temperature":-Infinity}',
    "a number beyond doubles": b'{"prompt":"a","temperature":1e999}',
    "many digits": b'{"prompt":"a","seed":' + b"9" * 10**5 + b"}",
    "a NUL": b'{"prompt":"a"}\x00',
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/score"])
def test_bodies_that_are_none(http: httpx.Client, path: str, name: str) -> None:
    begun = time.monotonic()
    check(http.post(path, content=BODIES[name], headers=JSON), begun)
    assert http.get("/health").status_code == 200


def test_a_body_too_large_is_not_read(http: httpx.Client) -> None:
    begun = time.monotonic()
    body = json.dumps({"prompt": "x" * 33 * MIB}).encode()
    assert check(http.post("/v1/completions", content=body, headers=JSON), begun)["code"] == (
        "body_too_large"
    )
    text = json.dumps({"prompt": "x" * 7 * MIB}).encode()
    begun = time.monotonic()
    error = check(http.post("/v1/completions", content=text, headers=JSON), begun)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {},
        {**JSON, "content-encoding": "gzip"},
    ],
)
def test_other_content_is_refused(http: httpx.Client, headers: dict[str, str]) -> None:
    begun = time.monotonic()
    answer = http.post("/v1/completions", content=b"{}", headers=headers)
    check(answer, begun)
    assert answer.status_code == 415


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "TRACE", "PATCH", "GET"])
def test_other_methods_are_refused(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/v1/completions")
    assert answer.status_code == 405
    if method != "HEAD":
        check(answer, time.monotonic())


def test_other_paths_are_refused(http: httpx.Client) -> None:
    for path in (
        "/v1/nothing",
        "/../../etc/passwd",
        "/v1/models/..%2f..%2fetc",
        "/v1/completions/",
    ):
        answer = http.get(path)
        assert answer.status_code in (404, 405)
        check(answer, time.monotonic())


CHAT = [{"role": "user", "content": "a"}]
OTHERS: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "root", "content": "a"}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages"),
    ("/v1/chat/completions", {"messages": CHAT, "chat_template": "x"}, "chat_template"),
    ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
    ("/v1/chat/completions", {"messages": CHAT, "tools": []}, "tools"),
    ("/v1/score", {"context": "a"}, "continuations"),
    ("/v1/score", {"context": "a", "continuations": []}, "continuations"),
    ("/v1/score", {"context": "a", "continuations": ["b", ""]}, "continuations"),
    ("/v1/score", {"context": "a", "continuations": [1]}, "continuations"),
    ("/v1/score", {"context": [], "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": [-1], "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": [V], "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": [1, "a"], "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": [True], "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": 1, "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": [2] * 2000, "continuations": ["b"]}, "continuations"),
    ("/v1/score", {"context": "word " * 10**6, "continuations": ["b"]}, "context"),
    ("/v1/score", {"context": [2], "continuations": [[]]}, "continuations"),
    ("/v1/score", {"context": [2], "continuations": [""]}, "continuations"),
    ("/v1/score", {"context": [2], "continuations": [[V]]}, "continuations"),
    ("/v1/score", {"context": [2], "continuations": [[1.5]]}, "continuations"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ("/tokenize", {"prompt": 1}, "prompt"),
    ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [True]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), OTHERS, ids=str)
def test_the_other_routes_name_their_fields_too(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None
) -> None:
    begun = time.monotonic()
    found = check(http.post(path, json=body), begun)["param"]
    assert (found or "").split(".")[0] == (param or "")
