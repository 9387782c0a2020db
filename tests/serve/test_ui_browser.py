"""The playground in a real browser, against a real server."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from live_server import Running, running
from optlm.engine.llm import LLM


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def page(server: Running, chromium: Any, said: list[str]) -> Any:
    tab = chromium.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    watch(tab, server.url, said)
    tab.goto(server.url)
    return tab


def watch(tab: Any, url: str, said: list[str]) -> None:
    """Keep what the page complains of, and every request that leaves the server."""
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda asked: said.extend([asked.url][: not asked.url.startswith(url)]))


def field(tab: Any, label: str, pane: int = 0) -> Any:
    return tab.get_by_label(label, exact=True).nth(pane)


def test_a_text_by_keyboard(page: Any, server: Running, said: list[str]) -> None:
    from playwright.sync_api import expect

    request = {"model": "mini", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=request | {"logprobs": 5}).json()
    told = answer["choices"][0]["logprobs"]
    field(page, "Tokens at most").fill("12")
    field(page, "Temperature").fill("0")
    page.locator("textarea").first.focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".quiet")).to_contain_text("12 tokens")
    expect(page.locator(".quiet")).to_contain_text("ended by length")
    assert page.locator(".token").all_text_contents() == told["tokens"]
    page.locator(".output").press("ArrowRight")
    page.locator(".output").press("ArrowRight")
    chosen = page.locator(".choices span").all_text_contents()
    assert chosen[0].replace("\u00b7", " ") == told["tokens"][1]
    assert len(chosen) == 3 * 5  # token, share and bar of the chosen one and four others
    assert said == []


def test_two_settings_side_by_side_and_the_request_elsewhere(page: Any, said: list[str]) -> None:
    from playwright.sync_api import expect

    page.get_by_role("button", name="Side by side").click()
    for pane, count in enumerate(("3", "5")):
        field(page, "Tokens at most", pane).fill(count)
    page.get_by_role("button", name=re.compile("Continue")).click()
    for pane, count in enumerate(("3", "5")):
        expect(page.locator(".quiet").nth(pane)).to_contain_text(f"{count} tokens")
    page.get_by_role("button", name="Export").click()
    assert '"max_tokens": 3' in page.locator("[data-export=curl]").inner_text()
    program = page.locator("[data-export=Python]").inner_text()
    compile(program, "exported", "exec")
    assert "max_tokens=3" in program
    assert said == []


def test_a_refusal_is_shown(page: Any) -> None:
    from playwright.sync_api import expect

    field(page, "Tokens at most").fill("-4")
    page.get_by_role("button", name=re.compile("Continue")).click()
    expect(page.get_by_role("alert")).to_contain_text("max_tokens")


def test_a_phone_in_the_dark_with_a_key(llm: LLM, chromium: Any, tmp_path: Any) -> None:
    from playwright.sync_api import expect

    keys = tmp_path / "keys"
    keys.write_text("user secret-key-of-a-test\n")
    with running(llm, api_keys=keys) as server:
        tab = chromium.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        said: list[str] = []
        watch(tab, server.url, said)
        tab.goto(server.url)
        expect(tab.locator(".v-alert")).to_contain_text("did not list its models")
        tab.get_by_label("API key", exact=True).last.fill("secret-key-of-a-test")
        tab.keyboard.press("Enter")
        expect(tab.locator(".v-alert")).to_have_count(0)
        field(tab, "Tokens at most").fill("4")
        tab.get_by_role("button", name=re.compile("Continue")).click()
        expect(tab.locator(".quiet")).to_contain_text("4 tokens")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.locator(".v-theme--dark").count() > 0
        assert [line for line in said if "401" not in line] == []
