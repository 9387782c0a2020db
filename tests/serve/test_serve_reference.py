"""`/docs` and the schema it is written from: complete, offline, and with examples that work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from live_server import Running
from optlm.serve.requests import ChatRequest, CompletionRequest
from optlm.serve.schema import EXAMPLES


def test_every_route_and_field_is_on_the_page(http: httpx.Client) -> None:
    page = http.get("/docs")
    schema = http.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()}</code> {path}</h2>" in page.text
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    for name in (*fields, "messages[].role", "stream_options.include_usage"):
        assert f"<code>{name}</code>" in page.text
    assert "whole number at least 1, at most 128" in page.text


def test_the_page_needs_nothing_else(http: httpx.Client) -> None:
    page = http.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy  # so none may run
    assert "unsafe" not in policy
    assert "<script" not in page.text
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', page.text)) == {"data:,", "openapi.json"}


@pytest.mark.parametrize("width", [1000, 390])
def test_in_a_browser(chromium: Any, server: Running, tmp_path: Path, width: int) -> None:
    tab = chromium.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("request", lambda asked: said.append(asked.url.removeprefix(server.url)))
    tab.goto(f"{server.url}/docs")
    assert tab.evaluate("getComputedStyle(document.querySelector('pre')).overflowX") == "auto"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.get_by_role("link", name="POST /v1/score").click()
    assert tab.url.endswith("#score")
    tab.screenshot(path=str(tmp_path / "docs.png"))
    assert set(said) <= {"/docs", "data:,"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_schema_work(http: httpx.Client, name: str) -> None:
    schema = http.get("/openapi.json").json()
    (path,) = (
        path
        for path, methods in schema["paths"].items()
        if methods.get("post", {}).get("operationId") == name
    )
    assert http.post(path, json=EXAMPLES[name]).status_code == 200
