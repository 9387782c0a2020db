"""Chats, embeddings, scores and adapters in a batch: what the server answers, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_tools import RunJob, mixed, read_rows, request, write_rows
from test_batch_crashes import ALWAYS, Killed, failing

from lora_files import write_lora
from optlm import LLM, SamplingParams
from optlm.batch.engines import describe_engine, load_engine
from optlm.batch.inputs import find_input
from optlm.batch.job import BatchJob, BatchReport, Engine
from optlm.batch.settings import BatchSettings, row_seed
from optlm.errors import RequestError
from optlm.score import Scorer
from variants import VARIANTS

pytest.importorskip("pydantic")


HELLO = [{"role": "user", "content": "the cat"}]
PAIRS = {"context": "the cat", "continuations": [" on the mat", " the", " cat cat"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers(variant: str, llms: dict[str, LLM], run_job: RunJob, tmp_path: Path) -> None:
    rows = [
        request("chat/completions", messages=HELLO, max_tokens=4),
        request("embeddings", input=["the cat", "on the mat"], normalize=False),
        request("score", **PAIRS),
        request("completions", prompt="the cat", max_tokens=4),
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    report = run_job(source, tmp_path / "out.jsonl", variant=variant, sampling={}, seed=3)
    assert report.errors == 0
    chat, embedded, scored, text = [
        row["response"]["body"] for row in read_rows(tmp_path / "out.jsonl")
    ]
    llm = llms[variant]
    (alone,) = llm.generate(
        "User: the cat\nAssistant:",
        SamplingParams(max_tokens=4, seed=row_seed(3, 0), stop=["\nUser:"]),
    )
    assert chat["choices"][0]["message"]["content"] == alone.outputs[0].text
    assert (chat["object"], chat["id"], chat["created"]) == ("chat.completion", "chatcmpl-0", 0)
    for found, wanted in zip(embedded["data"], llm.embed(["the cat", "on the mat"]), strict=True):
        assert np.array_equal(np.float32(found["embedding"]), wanted.vector)
    wanted_scores = Scorer(llm).continuations(PAIRS["context"], PAIRS["continuations"])
    assert [entry["logprob"] for entry in scored["data"]] == [w.total for w in wanted_scores]
    for body in (chat, embedded, scored, text):
        assert set(body["usage"]) <= {"prompt_tokens", "completion_tokens", "total_tokens"}


def test_any_end_is_resumed_to_the_byte(run_job: RunJob, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", mixed(24))
    run_job(source, tmp_path / "whole.jsonl", sampling={})
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len({row["custom_id"] for row in read_rows(tmp_path / "whole.jsonl")}) == 24
    with failing(-1, Killed()) as count:
        run_job(source, tmp_path / "counted.jsonl", sampling={}, job=ALWAYS)
    for at in range(2, count[0], 3):
        out = tmp_path / f"{at}.jsonl"
        with failing(at, Killed()), pytest.raises(Killed):
            run_job(source, out, sampling={}, job=ALWAYS)
        run_job(source, out, sampling={})
        assert out.read_bytes() == whole, at


BAD: list[tuple[dict[str, Any], str | None, int]] = [
    (request("chat/completions", messages=[]), "messages", 400),
    (request("chat/completions", messages=HELLO, max_tokens=0), "max_tokens", 400),
    (request("chat/completions", messages=HELLO, max_tokens=1, stream=True), "stream", 400),
    (request("chat/completions", messages=[{"role": "user", "content": "the " * 99}]), None, 400),
    (request("embeddings", input=[]), "input", 400),
    (request("embeddings", input="the " * 99), "input", 400),
    (request("embeddings", input="the", dimensions=5), "dimensions", 400),
    (request("score", context="the", continuations=[]), "continuations", 400),
    (request("score", context="the", continuations=[""]), "continuations", 400),
    (request("score", context="the", continuations=[" a"], model="none"), "model", 404),
    (request("completions", prompt=["the"] * 1024, n=128, max_tokens=50), None, 400),
]


def test_bad_requests(run_job: RunJob, tmp_path: Path) -> None:
    rows = [row for row, _, _ in BAD] + [request("score", **PAIRS)]
    report = run_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", sampling={})
    *found, good = read_rows(tmp_path / "out.jsonl")
    assert good["response"]["status_code"] == 200
    assert report.errors == len(BAD)
    for row, (wanted, param, status) in zip(found, BAD, strict=True):
        assert row["response"]["status_code"] == status, wanted
        error = row["response"]["body"]["error"]
        assert error["message"]
        assert param is None or error["param"].startswith(param), (wanted, error)


def test_a_template(run_job: RunJob, llm: LLM, tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "in.jsonl",
        [request("chat/completions", messages=HELLO, max_tokens=3, temperature=0)],
    )
    settings = {
        "sampling": {},
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    run_job(source, tmp_path / "out.jsonl", **settings)
    (row,) = read_rows(tmp_path / "out.jsonl")
    (alone,) = llm.generate("the cat", SamplingParams(max_tokens=3, temperature=0))
    choice = row["response"]["body"]["choices"][0]
    assert choice["message"]["content"] == alone.outputs[0].text
    with pytest.raises(RequestError, match="chat_template was"):
        run_job(source, tmp_path / "out.jsonl", **settings | {"chat_template": "x"})
    plain = write_rows(tmp_path / "plain.jsonl", ["the"])
    with pytest.raises(RequestError, match="chat template is for requests"):
        run_job(plain, tmp_path / "plain.out", chat_template="x")


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters(variant: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    config, body = VARIANTS[variant], {"prompt": "the cat", "max_tokens": 6, "temperature": 0}
    for seed, name in enumerate(("one", "two")):
        write_lora(folder / name, config, seed)

    def run(rows: list[Any], out: str) -> BatchReport:
        job = BatchJob(
            source=find_input(write_rows(tmp_path / f"{out}.in.jsonl", rows)),
            out=tmp_path / out,
            settings=BatchSettings(model_name="tiny"),
            engine=Engine(
                load=lambda: load_engine(models[variant], folder, threads=1),
                described=describe_engine(models[variant], None, {}, folder),
            ),
        )
        return job.run()

    names = ["tiny", "one", "two", "three"]
    report = run(
        [request("completions", **body, model=name) for name in names]
        + [request("score", **PAIRS, model=name) for name in names],
        "requests.jsonl",
    )
    found = [row["response"]["body"] for row in read_rows(tmp_path / "requests.jsonl")]
    assert report.errors == 2
    assert found[3]["error"]["code"] == found[7]["error"]["code"] == "model_not_found"
    texts = [answer["choices"][0]["text"] for answer in found[:3]]
    assert [answer["model"] for answer in found[:3]] == names[:3]
    assert len({answer["data"][0]["logprob"] for answer in found[4:7]}) == 3
    values = {key: value for key, value in body.items() if key != "prompt"}
    run(
        [
            {"prompt": "the cat", "params": values | ({"adapter": name} if name else {})}
            for name in (None, "one", "two")
        ],
        "plain.jsonl",
    )
    assert [row["text"] for row in read_rows(tmp_path / "plain.jsonl")] == texts
    write_lora(folder / "late", config, 5)
    with pytest.raises(RequestError, match=r"engine\.adapters\.late was None"):
        run([request("completions", **body, model=name) for name in names], "requests.jsonl")
