"""What a user sees of tokens: table, colours, JSON, and the page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optlm.cli import uncertainty_select, uncertainty_tokens
from optlm.uncertainty.asking import token_figures
from optlm.uncertainty.measures import measure_rows
from optlm.uncertainty.showing import COLOURED_BY, coloured
from variants import VARIANTS

TEXT = "Once upon a time\nthe cat </script><b>sat"
Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", VARIANTS)
def test_json_names_every_token(command: Command, folders: dict[str, Path], name: str) -> None:
    code, out, err = command("uncertainty", "tokens", "-t", TEXT, "--json", "-m", folders[name])
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert "".join(row["token"] for row in record["by_token"]) == TEXT
    assert record["tokens"] == len(record["by_token"])
    total = sum(row["logprob"] for row in record["by_token"])
    assert record["log_likelihood"] == pytest.approx(total)


def test_the_commands_offer_what_there_is() -> None:
    assert set(uncertainty_tokens._BY) == set(COLOURED_BY)
    rows = np.log(np.full((1, 4), 0.25, np.float32))
    assert set(uncertainty_select._BY) == set(token_figures(measure_rows(rows, np.array([1]))))


def test_lines_table_and_colours(command: Command, folders: dict[str, Path]) -> None:
    base = ("-m", folders["base"])
    code, out, _ = command(
        "uncertainty", "tokens", "-", "--lines", *base, stdin=b"the cat\n\nsat\n"
    )
    assert code == 0
    assert out.count("log-likelihood") == 2
    assert "\x1b" not in out
    code, out, _ = command("uncertainty", "tokens", "-t", TEXT, "--colour", "always", *base)
    assert code == 0
    assert "\x1b[30;48;5;" in out


def test_colours_follow_doubt_and_keep_the_text() -> None:
    shown = coloured(["sure", " un", "sure\n"], np.array([0.0, 0.5, 1.0]))
    assert shown.startswith("sure\x1b[30;48;5;222m un\x1b[0m\x1b[30;48;5;202msure")
    assert re.sub("\x1b\\[[0-9;]*m|\u23ce", "", shown) == "sure unsure\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-t", ""], "the text is empty"),
        ([], "give a FILE"),
        (["no-such-file"], "no-such-file: No such file"),
        (["-t", "x", "--html", "/no-such-folder/at/all.html"], "cannot be written"),
    ],
)
def test_bad_input_is_told(
    command: Command, folders: dict[str, Path], words: list[str], told: str
) -> None:
    if told == "cannot be written":
        blocker = folders["base"] / "config.json"
        words = [*words[:-1], str(blocker / "page.html")]
        told = "is not a folder"
    code, out, err = command("uncertainty", "tokens", *words, "-m", folders["base"])
    assert (code, out) == (2, "")
    assert told in err


def test_page_in_a_browser(
    command: Command, folders: dict[str, Path], chromium: Any, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    code, _, _ = command("uncertainty", "tokens", "-t", TEXT, "-m", folders["base"], "--html", page)
    assert code == 0
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)\s*=|@import|url\(|https?:", text)
    tab = chromium.new_page(offline=True, color_scheme="dark")
    faults: list[str] = []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: faults.extend([request.url][: request.url != page.as_uri()]))
    tab.goto(page.as_uri())
    assert tab.locator(".text").inner_text().replace("\u23ce", "") == TEXT
    assert tab.locator(".text b").count() == 0  # markup in a text is text
    tab.keyboard.press("Tab")  # to the choice of colours
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    focused = tab.evaluate("document.activeElement.textContent")
    assert focused == tab.locator(".text span").nth(2).text_content()
    assert json.dumps(focused) in tab.locator("#detail").inner_text()
    before = tab.locator(".text span").nth(3).get_attribute("style")
    tab.select_option("#by", "margin")
    assert tab.locator("#scale").inner_text().startswith(COLOURED_BY["margin"])
    assert tab.locator(".text span").nth(3).get_attribute("style") != before
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    assert not faults
    tab.close()
