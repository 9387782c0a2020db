"""The self-contained page: what it carries, how it is closed off, and how it behaves."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subjects import TEXT as WORDS
from subjects import subject, tiny, tokens

from optlm.config import OPTConfig
from optlm.errors import ContextLengthError, RequestError
from optlm.interpret import attention_maps, open_subject, token_probabilities
from optlm.interpret.page import inspect_page
from optlm.interpret.page.attention import pack_attention, unpack_row
from optlm.interpret.subject import Subject
from optlm.model import OPT
from variants import VARIANTS

TEXT = "Once upon a time </script>{{data}} é漢\n there was a cat"


@pytest.fixture(scope="module")
def bundled() -> Subject:
    return open_subject()


def element(page: str, name: str) -> str:
    found = re.search(rf'<script type="[^"]+" id="{name}">(.*?)</script>', page, re.S)
    assert found is not None
    return found[1]


def carried(page: str) -> tuple[dict[str, Any], bytes]:
    described = json.loads(element(page, "described"))
    return described, gzip.decompress(base64.b64decode(element(page, "data")))


def array(described: dict[str, Any], data: bytes, name: str) -> np.ndarray[Any, Any]:
    place = described["arrays"][name]
    count = int(np.prod(place["shape"]))
    return np.frombuffer(data, place["type"], count, place["at"]).reshape(place["shape"])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_packs(name: str) -> None:
    model, ids = tiny(name), tokens(name, 20)
    config = model.config
    packed = pack_attention(model, ids)
    maps = attention_maps(model, ids).maps
    assert packed.whole
    for layer in range(config.num_hidden_layers):
        for head in range(config.num_attention_heads):
            rows = np.stack([unpack_row(packed, layer, head, t) for t in range(len(ids))])
            np.testing.assert_allclose(rows, maps[layer, head], atol=0.0041)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_page(name: str) -> None:
    described, data = carried(inspect_page(subject(name), WORDS).html)
    ids = subject(name).tokens(WORDS)
    assert described["ids"] == ids
    found = token_probabilities(tiny(name), ids, top=8)
    np.testing.assert_array_equal(array(described, data, "token.logprobs"), found.logprobs)


def test_a_small_budget_keeps_the_strongest_keys(bundled: Subject) -> None:
    ids = bundled.tokens(TEXT * 8)
    packed = pack_attention(bundled.model, ids, budget=1)
    assert not packed.whole
    assert packed.keys.shape[-1] == 6
    whole = attention_maps(bundled.model, ids, layers=[3], heads=[1]).maps[0, 0]
    last = unpack_row(packed, 3, 1, len(ids) - 1)
    strongest = np.sort(whole[-1])[-6:]
    np.testing.assert_allclose(np.sort(last)[-6:], strongest, atol=0.0041)
    assert (last > 0).sum() <= 6


def test_pictures_hold_the_largest_value_of_each_field(bundled: Subject) -> None:
    ids = bundled.tokens(TEXT * 8)
    packed = pack_attention(bundled.model, ids)
    whole = attention_maps(bundled.model, ids, layers=[0], heads=[0]).maps[0, 0]
    assert packed.pictures.shape[2] == 64 < len(ids)
    assert packed.pictures[0, 0].max() == round(255 * float(np.sqrt(whole.max())))
    assert packed.pictures[0, 0][0, 1:].max() == 0  # above the diagonal


def test_the_page_carries_what_the_library_computes(bundled: Subject) -> None:
    described, data = carried(inspect_page(bundled, TEXT).html)
    ids = bundled.tokens(TEXT)
    assert described["ids"] == ids
    assert described["tokens"] == bundled.texts(ids)
    found = token_probabilities(bundled.model, ids, top=8)
    np.testing.assert_array_equal(array(described, data, "token.logprobs"), found.logprobs)
    np.testing.assert_array_equal(array(described, data, "token.ids"), found.top_ids)
    names = {int(key) for key in described["vocabulary"]}
    assert set(array(described, data, "lens.ids").ravel().tolist()) <= names


def test_only_the_page_s_own_script_and_style_may_run(bundled: Subject) -> None:
    page = inspect_page(bundled, TEXT).html
    policy = html.unescape(re.search(r'Policy" content="([^"]+)"', page)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1]  # type: ignore[index]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert not re.search(r"(?:src|href)=|https?://", page)


def test_text_cannot_leave_its_element(bundled: Subject) -> None:
    page = inspect_page(bundled, TEXT).html
    assert page.count("</script>") == 3
    assert carried(page)[0]["tokens"] == bundled.texts(bundled.tokens(TEXT))


def test_a_model_without_relu_has_no_sparsity(bundled: Subject) -> None:
    torch.manual_seed(0)
    config = OPTConfig.from_dict(
        {
            "vocab_size": bundled.model.config.vocab_size,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "ffn_dim": 32,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "activation_function": "gelu",
        }
    )
    subject = Subject(name="gelu", model=OPT(config).eval(), tokenizer=bundled.tokenizer)
    assert carried(inspect_page(subject, "a b").html)[0]["sparsity"] is None


def test_texts_that_cannot_be_shown(bundled: Subject) -> None:
    with pytest.raises(RequestError, match="empty"):
        inspect_page(bundled, "")
    with pytest.raises(ContextLengthError, match="1024"):
        inspect_page(bundled, "word " * 3000)


def test_notebooks_show_the_page_in_a_frame(bundled: Subject) -> None:
    page = inspect_page(bundled, "a b")
    frame = page._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page.html  # type: ignore[index]


def test_in_a_browser(bundled: Subject, tmp_path: Path, chromium: Any) -> None:
    from playwright.sync_api import expect

    file = inspect_page(bundled, TEXT).write(tmp_path / "page.html")
    said: list[str] = []
    page = chromium.new_page(viewport={"width": 390, "height": 800})  # a phone
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    title = page.locator("#head-title")
    expect(title).to_have_text("Layer 0, head 0")
    page.press("#model-view", "ArrowDown")
    page.press("#model-view", "ArrowRight")
    expect(title).to_have_text("Layer 1, head 1")
    page.press("#attention-text", "ArrowLeft")
    expect(page.locator("#head-readout")).to_contain_text("Token 7 looks at")
    page.press("#tab-attention", "ArrowRight")
    assert page.locator("#lens-table td").count() >= 3 * 9
    page.press("#tab-lens", "ArrowRight")
    page.press("#probability-text", "ArrowRight")
    assert "Token 2" in page.inner_text("#probability-readout")
    page.press("#tab-probabilities", "ArrowRight")
    assert page.locator("#bars .bar").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert said == []
