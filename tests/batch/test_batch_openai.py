"""Rows in OpenAI's batch format: responses are the server's, errors are in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from batch_tools import RunJob, read_rows, write_rows

from optlm import LLM, SamplingParams
from optlm.batch.settings import row_seed
from optlm.errors import RequestError
from variants import VARIANTS

pytest.importorskip("pydantic")


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


@pytest.mark.parametrize("variant", VARIANTS)
def test_responses(variant: str, llms: dict[str, LLM], run_job: RunJob, tmp_path: Path) -> None:
    rows = [
        request("a", prompt="the cat", max_tokens=4, model="tiny"),
        request("b", prompt=["the", "on the mat"], max_tokens=3, n=2, seed=7),
        request("c", prompt=[2, 5, 6], max_tokens=2, temperature=0, logprobs=2, echo=True),
        request("a", prompt="the cat", max_tokens=4, model="tiny"),
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    settings = {"sampling": {}, "model_name": "tiny", "seed": 2}
    report = run_job(source, tmp_path / "out.jsonl", variant=variant, **settings)
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in found] == ["a", "b", "c", "a"]
    assert [row["id"] for row in found] == [f"batch_req_{row}" for row in range(4)]
    assert all(row["error"] is None for row in found)
    assert {row["response"]["status_code"] for row in found} == {200}
    bodies = [row["response"]["body"] for row in found]
    (alone,) = llms[variant].generate("the cat", SamplingParams(max_tokens=4, seed=row_seed(2, 0)))
    assert bodies[0]["choices"][0]["text"] == alone.text
    assert bodies[0]["usage"] == {
        "prompt_tokens": len(alone.prompt_token_ids),
        "completion_tokens": len(alone.token_ids),
        "total_tokens": len(alone.prompt_token_ids) + len(alone.token_ids),
    }
    assert [choice["index"] for choice in bodies[1]["choices"]] == [0, 1, 2, 3]
    assert len(bodies[2]["choices"][0]["logprobs"]["token_logprobs"]) == 5
    assert bodies[0]["created"] == 0
    assert report.errors == 0
    assert report.completion_tokens == sum(body["usage"]["completion_tokens"] for body in bodies)


def test_a_response_is_the_same_to_the_byte_again(run_job: RunJob, tmp_path: Path) -> None:
    """Although the second run finds its prompts in the cache."""
    source = write_rows(tmp_path / "in.jsonl", [request("a", prompt="the cat " * 8)] * 3)
    for name in ("one", "two"):
        run_job(source, tmp_path / name, sampling={})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


BAD: list[tuple[Any, str, int | None]] = [  # a row, its error's code, the status of its response
    ("text", "invalid_request", None),
    ({**request("a", prompt="x"), "extra": 1}, "unknown_field", None),
    ({**request("a", prompt="x"), "custom_id": 5}, "invalid_request", None),
    ({**request("a", prompt="x"), "method": "GET"}, "invalid_method", None),
    ({**request("a", prompt="x"), "url": "/v1/completion"}, "invalid_url", None),
    ({**request("a", prompt="x"), "url": "/v1/images"}, "invalid_url", None),
    ({**request("a", prompt="x"), "body": "x"}, "invalid_request", None),
    (request("a", prompt="x", stream=True), "invalid_value", 400),
    (request("a", prompt="x", model="gpt-9"), "model_not_found", 404),
    (request("a", prompt="x", nonsense=1), "unknown_field", 400),
    (request("a", prompt="x", n=10**9), "", 400),
    (request("a", prompt=[10**6]), "", 400),
    (request("a", prompt="the " * 500), "context_length_exceeded", 400),
    (request("a"), "", 400),
]


def test_bad_requests(run_job: RunJob, tmp_path: Path) -> None:
    rows = [request("good", prompt="the", max_tokens=1)] + [row for row, _, _ in BAD]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with source.open("ab") as file:
        file.write(b"{broken\n")
    report = run_job(source, tmp_path / "out.jsonl", sampling={})
    good, *found, broken = read_rows(tmp_path / "out.jsonl")
    assert good["response"]["status_code"] == 200
    assert broken["error"]["code"] == "invalid_json"
    assert report.errors == len(BAD) + 1
    for row, (wanted, code, status) in zip(found, BAD, strict=True):
        error = row["error"] or row["response"]["body"]["error"]
        assert error["message"], wanted
        assert not code or error["code"] == code, wanted
        assert status == (row["response"] and row["response"]["status_code"]), wanted
    assert found[7]["custom_id"] == "a"


def test_settings_of_plain_rows_are_refused(run_job: RunJob, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [request("a", prompt="the")])
    for settings, told in (
        ({"sampling": {"max_tokens": 3}}, "sampling is for plain rows"),
        ({"sampling": {}, "keep": ("a",)}, "keep is for plain rows"),
        ({"sampling": {}, "prompt_field": "text"}, "prompt field is for plain rows"),
    ):
        with pytest.raises(RequestError, match=told):
            run_job(source, tmp_path / "out.jsonl", **settings)


def test_requests_read_as_plain_rows_have_no_prompt(run_job: RunJob, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [request("a", prompt="the")])
    run_job(source, tmp_path / "out.jsonl", row_format="plain")
    assert read_rows(tmp_path / "out.jsonl")[0]["error"]["code"] == "missing_prompt"
    assert json.loads((tmp_path / "out.jsonl.journal").read_text().split(" ", 2)[2].split("\n")[0])
