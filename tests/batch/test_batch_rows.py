"""What becomes of rows, good and bad, in every format of input."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from batch_tools import RunJob, read_rows, write_rows

from optlm import LLM, SamplingParams
from optlm.batch import inputs
from optlm.batch.settings import row_seed
from optlm.data.report import CorpusError
from optlm.errors import ConfigError, RequestError
from variants import VARIANTS

PROMPTS = ["the cat", "on the mat", "", "Once upon", "home in the rain"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_have_the_texts_of_generate(
    variant: str, llms: dict[str, LLM], run_job: RunJob, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", PROMPTS)
    report = run_job(source, tmp_path / "out.jsonl", variant=variant, seed=3)
    params = [SamplingParams(max_tokens=5, seed=row_seed(3, row)) for row in range(len(PROMPTS))]
    wanted = llms[variant].generate(PROMPTS, params)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == [output.text for output in wanted]
    assert [row["finish_reason"] for row in rows] == [o.finish_reason for o in wanted]
    assert [row["seed"] for row in rows] == [o.seed for o in wanted]
    assert [row["row"] for row in rows] == list(range(len(PROMPTS)))
    assert (report.rows, report.errors) == (len(PROMPTS), 0)
    assert report.completion_tokens == sum(len(o.token_ids) for o in wanted)


def test_many_rows_keep_their_order(llm: LLM, run_job: RunJob, tmp_path: Path) -> None:
    """More rows than the engine holds, of very different lengths."""
    rows = [
        {"prompt": f"the cat {row}", "params": {"max_tokens": 1 + row * 7 % 40}}
        for row in range(900)
    ]
    run_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == list(range(900))
    assert found[500]["seed"] == row_seed(0, 500)
    again = llm.generate(
        "the cat 500", SamplingParams(max_tokens=1 + 3500 % 40, seed=row_seed(0, 500))
    )
    assert found[500]["text"] == again[0].text


def test_forms_of_plain_rows(llm: LLM, run_job: RunJob, tmp_path: Path) -> None:
    rows: list[Any] = [
        "the cat",
        [2, 5, 6],
        {"text": "the cat", "id": 7, "other": 1},
        {"text": [2, 5], "params": {"temperature": 0, "max_tokens": 2, "logprobs": 2}},
        {"text": "the", "params": {"n": 2, "seed": 5, "logit_bias": {"7": 100}}},
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    run_job(source, tmp_path / "out.jsonl", prompt_field="text", keep=("id",))
    found = read_rows(tmp_path / "out.jsonl")
    assert found[2]["input"] == {"id": 7}
    assert "input" not in found[0]
    assert [len(token["top"]) for token in found[3]["tokens"]] == [2, 2]
    assert "seed" not in found[3]
    assert found[4]["seed"] == 5
    biased = llm.tokenizer.decode([7] * 5)  # type: ignore[union-attr]
    assert [output["text"] for output in found[4]["outputs"]] == [biased, biased]
    assert found[4]["usage"]["completion_tokens"] == 10


BAD_ROWS = [
    (b"not json", "invalid_json"),
    (b'{"prompt": "a"', "invalid_json"),
    (b'{"prompt": NaN}', "invalid_json"),
    (b'{"prompt": ' + b"1" * 5000 + b"}", "invalid_json"),
    (b"[" * 100_000, "invalid_json"),
    (b'"\xff\xfe"', "invalid_utf8"),
    (b'{"promt": "a"}', "missing_prompt"),
    (b'{"prompt": null}', "invalid_request"),
    (b'{"prompt": {"a": 1}}', "invalid_request"),
    (b'{"prompt": [1, "a"]}', "invalid_request"),
    (b'{"prompt": [1, 100000]}', "invalid_request"),
    (b'{"prompt": [-1]}', "invalid_request"),
    (b'{"prompt": [true]}', "invalid_request"),
    (b'{"prompt": []}', "invalid_request"),
    (b'{"prompt": "\\ud800"}', "invalid_request"),
    (b'{"prompt": "a", "params": 3}', "invalid_request"),
    (b'{"prompt": "a", "params": {"tempreture": 1}}', "invalid_request"),
    (b'{"prompt": "a", "params": {"temperature": -1}}', "invalid_request"),
    (b'{"prompt": "a", "params": {"logit_bias": {"x": 1}}}', "invalid_request"),
    (b'{"prompt": "a", "params": {"adapter": "../x"}}', "invalid_request"),
    (b"17", "invalid_request"),
    (b"null", "invalid_request"),
    (json.dumps(" the" * 500).encode(), "context_length_exceeded"),
    (b'"' + b"x" * 5000 + b'"', "line_too_long"),
]


def test_bad_rows_are_errors_of_their_own(
    run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "LINE_LIMIT", 200_000)
    bad = [content for content, code in BAD_ROWS if code != "line_too_long"]
    bad.append(b'"' + b"x" * 200_001 + b'"')
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join(line for content in bad for line in (b'"the"', content, b"")))
    report = run_job(source, tmp_path / "out.jsonl")
    found = read_rows(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == list(range(2 * len(bad)))
    assert all("text" in row for row in found[::2])
    assert [row["error"]["code"] for row in found[1::2]] == [code for _, code in BAD_ROWS]
    assert all(row["error"]["message"] for row in found[1::2])
    assert (report.rows, report.errors) == (2 * len(bad), len(bad))


def test_long_prompts_by_policy(run_job: RunJob, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ["the cat " * 100])
    run_job(source, tmp_path / "a.jsonl")
    sampling = {"max_tokens": 5, "on_overflow": "truncate_left"}
    run_job(source, tmp_path / "b.jsonl", sampling=sampling)
    assert read_rows(tmp_path / "a.jsonl")[0]["error"]["code"] == "context_length_exceeded"
    (cut,) = read_rows(tmp_path / "b.jsonl")
    assert cut["num_truncated_tokens"] > 0
    assert cut["usage"] == {"prompt_tokens": 59, "completion_tokens": 5, "total_tokens": 64}


def test_kept_fields_may_be_anything(run_job: RunJob, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "x": {"y": ["\ud800", "é"]}}, {"prompt": None, "x": 2}]
    run_job(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", keep=("x",))
    assert [row["input"]["x"] for row in read_rows(tmp_path / "out.jsonl")] == [
        {"y": ["\ud800", "é"]},
        2,
    ]


def test_empty_files(run_job: RunJob, tmp_path: Path) -> None:
    for name, content in (("none", b""), ("blank", b"\n  \n\r\n"), ("bom", b"\xef\xbb\xbf")):
        source = tmp_path / f"{name}.jsonl"
        source.write_bytes(content)
        report = run_job(source, tmp_path / f"{name}.out")
        assert (report.rows, report.errors) == (0, 0)
        assert (tmp_path / f"{name}.out").read_bytes() == b""


def test_byte_order_mark_carriage_returns_and_no_last_newline(
    run_job: RunJob, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf"the"\r\n\r\n"cat"')
    (tmp_path / "b.jsonl").write_bytes(b'"the"\n"cat"\n')
    for name in ("a", "b"):
        run_job(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out")
    assert (tmp_path / "a.out").read_bytes() == (tmp_path / "b.out").read_bytes()
    assert len(read_rows(tmp_path / "a.out")) == 2


def test_compressed_input_gives_the_same_bytes(run_job: RunJob, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    source = write_rows(tmp_path / "in.jsonl", PROMPTS)
    content = source.read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(content))
    outputs = set()
    for name in ("in.jsonl", "in.jsonl.gz", "in.jsonl.zst"):
        run_job(tmp_path / name, tmp_path / f"{name}.out")
        outputs.add((tmp_path / f"{name}.out").read_bytes())
    assert len(outputs) == 1


def test_parquet_gives_the_same_bytes(run_job: RunJob, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "id": list(range(200)),
        "prompt": [None if row == 7 else f"the cat {row}" for row in range(200)],
        "score": [math.nan if row == 9 else 0.5 for row in range(200)],
        "unread": [b"\xff"] * 200,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    rows = [
        {"id": row, "score": 0.5} | ({"prompt": f"the cat {row}"} if row != 7 else {})
        for row in range(200)
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    keep = ("id", "score")
    run_job(tmp_path / "in.parquet", tmp_path / "a.out", keep=keep)
    run_job(source, tmp_path / "b.out", keep=keep)
    ours, theirs = read_rows(tmp_path / "a.out"), read_rows(tmp_path / "b.out")
    assert ours[9]["error"]["code"] == "invalid_value"
    assert ours[:9] + ours[10:] == theirs[:9] + theirs[10:]
    assert ours[7]["error"]["code"] == "missing_prompt"
    with pytest.raises(RequestError, match="no column 'text'; it has id, prompt"):
        run_job(tmp_path / "in.parquet", tmp_path / "c.out", prompt_field="text")


def test_damaged_input_is_told_before_any_work(run_job: RunJob, tmp_path: Path) -> None:
    whole = gzip.compress(b'"the"\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "wide.jsonl").write_bytes('"the"'.encode("utf-16"))
    for name in ("cut.jsonl.gz", "wide.jsonl"):
        with pytest.raises(CorpusError):
            run_job(tmp_path / name, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_inputs_that_are_none(run_job: RunJob, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the")
    (tmp_path / "in.doc").write_text("the")
    for name, error, told in (
        ("in.txt", RequestError, "is text"),
        ("in.doc", ConfigError, "ending"),
        ("gone.jsonl", FileNotFoundError, "gone"),
        (".", RequestError, "no regular file"),
    ):
        with pytest.raises(error, match=told):
            run_job(tmp_path / name, tmp_path / "out.jsonl")


def test_settings_that_make_no_sense(run_job: RunJob, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ["the"])
    for settings, told in (
        ({"row_format": "plane"}, "did you mean 'plain'"),
        ({"prompt_field": ""}, "empty"),
        ({"sampling": {"max_tokens": -1}}, "max_tokens"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(RequestError, match=told):
            run_job(source, tmp_path / "out.jsonl", **settings)
