"""Chats, templates and browsers."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from live_server import running
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import RequestError
from optlm.serve.chat import read_template

CHAT = [
    {"role": "system", "content": "A friendly talk."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Tell me a story."},
]
PLAIN = "A friendly talk.\n\nUser: Hello\nAssistant: Hi.\nUser: Tell me a story.\nAssistant:"


def test_a_chat_is_written_out_plainly(client: openai.OpenAI, llm: LLM) -> None:
    (wanted,) = llm.generate(
        [PLAIN], SamplingParams(temperature=0, max_tokens=20, stop="\nUser:", logprobs=2)
    )
    options = {"model": "mini", "messages": CHAT, "temperature": 0, "max_tokens": 20}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert choice.message.content == wanted.text
    assert choice.finish_reason == wanted.finish_reason
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    logprobs = choice.logprobs.content
    assert [entry.logprob for entry in logprobs] == [entry.logprob for entry in wanted.logprobs]
    assert [len(entry.top_logprobs) for entry in logprobs] == [2] * len(logprobs)

    text, reasons, usage = "", [], None
    for event in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage or usage
        for piece in event.choices:
            text += piece.delta.content or ""
            reasons += [piece.finish_reason] if piece.finish_reason else []
    assert text == wanted.text
    assert reasons == [wanted.finish_reason]
    assert usage.completion_tokens == answer.usage.completion_tokens


def test_a_template_of_the_operator(llm: LLM, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ nothing.here }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
    )
    (wanted,) = llm.generate(
        ["[user] {{ 7*7 }}\n[bot]"], SamplingParams(temperature=0, max_tokens=5)
    )
    with running(llm, chat_template=template) as server, httpx.Client(base_url=server.url) as http:

        def ask(role: str, content: str) -> httpx.Response:
            body = {"messages": [{"role": role, "content": content}]}
            body |= {"temperature": 0, "max_tokens": 5}
            return http.post("/v1/chat/completions", json=body)

        answer = ask("user", "{{ 7*7 }}")  # what messages say is no template
        assert answer.json()["choices"][0]["message"]["content"] == wanted.text
        failed = ask("system", "a")
        assert failed.status_code == 400
        assert failed.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "text", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}"]
)
def test_templates_are_boxed_in(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        read_template(tmp_path / "t")([])


def test_no_template(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="is no Jinja template"):
        read_template(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"a" * 2**17)
    with pytest.raises(RequestError, match="more than 65536 bytes"):
        read_template(tmp_path / "t")


def test_browsers_of_other_pages_get_nothing_unless_allowed(http: httpx.Client, llm: LLM) -> None:
    asked = {"origin": "https://else.where", "access-control-request-method": "POST"}
    answer = http.options("/v1/completions", headers=asked)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=asked).headers
    with running(llm, origins=("https://mine",)) as server:
        allowed = {**asked, "origin": "https://mine"}
        answer = httpx.options(f"{server.url}/v1/completions", headers=allowed)
        assert answer.headers["access-control-allow-origin"] == "https://mine"
        answer = httpx.options(f"{server.url}/v1/completions", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
