"""Other people's clients: lm-evaluation-harness, LangChain, and a fuzzer of the OpenAPI schema."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from live_server import Running
from optlm import bundled_model
from optlm.engine.llm import LLM

QUESTIONS = [
    ("The cat sat on the", [" mat.", " moon.", " idea of the sea."], 0),
    ("Once upon a", [" time", " table", " dog there was"], 0),
    ("She was very", [" happy", " of"], 0),
    ("He wanted to play with his", [" toys.", " under.", " caf\u00e9 \U0001f600."], 0),
]


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gets_the_very_numbers_of_score(
    server: Running, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    rows = [{"context": c, "endings": e, "gold": g} for c, e, g in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "endings.yaml").write_text(
        f"""
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: endings
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    model = LocalCompletionsAPI(
        model="mini",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(bundled_model()),
        num_concurrent=1,
        max_retries=1,
    )
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["endings"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(found["samples"]["endings"], key=lambda sample: sample["doc_id"])
    for sample, (context, endings, _) in zip(samples, QUESTIONS, strict=True):
        for ending, answer in zip(endings, sample["filtered_resps"], strict=True):
            before, after = model._encode_pair(context, ending)
            (scored,) = llm.score([before + after])
            wanted = sum(scored.logprobs[len(before) :])  # type: ignore[arg-type]
            assert float(answer[0]) == wanted
            assert str(answer[1]) in ("True", "False")
    assert found["results"]["endings"]["acc,none"] == 1


def test_langchain(server: Running) -> None:
    package = pytest.importorskip("langchain_openai")
    model = package.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="mini", temperature=0, max_tokens=6
    )
    text = model.invoke("Once upon a time")
    assert text
    assert "".join(model.stream("Once upon a time")) == text
    chat = package.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="mini", temperature=0, max_tokens=6
    )
    assert chat.invoke("Hello").content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_request_of_the_schema_fails_the_server(server: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: set[int] = set()

    for operation in schema.get_all_operations():
        operation = operation.ok()

        @hypothesis.settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def call(case) -> None:  # type: ignore[no-untyped-def]
            answer = case.call(timeout=30)
            seen.add(answer.status_code)
            assert answer.status_code < 500, (case.body, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        call()
    assert {200, 400} <= seen
    assert httpx.get(f"{server.url}/health").status_code == 200
