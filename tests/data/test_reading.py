"""What text is read from: every format and compression, and everything that can be wrong."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from optlm.data.inputs import find_inputs
from optlm.data.lines import read_lines
from optlm.data.records import read_records
from optlm.data.report import CorpusError, ReadReport
from optlm.errors import ConfigError
from optlm.tokenizer import MAX_TEXT

COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
DOCUMENTS = [{"text": "one é", "source": "a"}, {"text": "two\nlines", "source": "b"}]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(COMPRESSIONS.get(path.suffix, bytes)(content))
    return path


def texts(*paths: Path, report: ReadReport | None = None, **options: Any) -> list[str]:
    report = report or ReadReport()
    files = find_inputs([str(path) for path in paths])
    return [record.text for record in read_records(files, report, **options)]


def reasons(path: Path, **options: Any) -> tuple[list[str], list[str]]:
    report = ReadReport()
    return texts(path, report=report, **options), report.examples


# ---- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format", ["jsonl", "txt", "parquet"])
def test_every_format_in_every_compression(tmp_path: Path, format: str, compression: str) -> None:
    plain = tmp_path / f"plain.{format}"
    if format == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DOCUMENTS), plain)
    elif format == "jsonl":
        plain.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    else:
        plain.write_text("one é\n\ntwo\nlines\n")
    file = write(tmp_path / f"x.{format}{compression}", plain.read_bytes())
    told: list[int] = []
    read = texts(file, split="paragraph", progress=told.append)
    assert read == ["one é", "two\nlines"]
    assert sum(told) == file.stat().st_size or format == "parquet"


def test_other_fields_are_kept(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": 3, "share": 0.5, "tags": ["x"], "license": None}]
    file = tmp_path / "x.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table.set_column(4, "license", pyarrow.array(["MIT"])), file)
    (record,) = read_records(find_inputs([str(file)]), ReadReport())
    assert record.fields == {"text": "a", "n": 3, "share": 0.5, "license": "MIT"}
    assert record.place == "x.parquet, row 1"


def test_prompts_and_responses(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "response": "r"}, {"prompt": "p"}, {"prompt": "p", "response": 1}]
    file = write(tmp_path / "x.jsonl", b"\n".join(json.dumps(line).encode() for line in lines))
    read, why = reasons(file)
    assert read == ["p\nr"]
    assert why == ["x.jsonl:2: it has no 'text'", "x.jsonl:3: its 'response' is no string but int"]
    assert reasons(file, pairs=False)[0] == []


def test_what_a_document_of_a_text_file_is(tmp_path: Path) -> None:
    file = write(tmp_path / "x.txt", b"\xef\xbb\xbfa\r\nb\r\n\r\n \r\nc\r\n")
    assert texts(file) == ["a\nb\n\n \nc"]
    assert texts(file, split="paragraph") == ["a\nb", "c"]
    assert texts(file, split="line") == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="split is 'page'"):
        texts(file, split="page")


@pytest.mark.parametrize("between", ["\n\n", "\n"])
def test_long_text_files_are_cut_after_a_line(tmp_path: Path, between: str) -> None:
    lines = [f"line {number} " + "x" * 1000 for number in range(3000)]
    read = texts(write(tmp_path / "x.txt", between.join(lines).encode()))
    assert len(read) > 1
    assert max(map(len, read)) < 2**21 + 2000
    assert "\n".join(read).replace("\n\n", "\n").split("\n") == lines


# ---- names -------------------------------------------------------------------------------------


def test_folders_patterns_and_repeats(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.zst", "deep/c.txt", "notes.pdf", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"x")

    def found(*names: str) -> list[str]:
        return [
            str(f.path.relative_to(tmp_path)) for f in find_inputs(f"{tmp_path}/{n}" for n in names)
        ]

    assert found(".") == ["a.jsonl.zst", "b.jsonl", "deep/c.txt"]
    assert found("*.jsonl*", "b.jsonl") == ["a.jsonl.zst", "b.jsonl"]
    assert found("**/*.txt") == ["deep/c.txt"]
    assert found("b.jsonl", ".")[0] == "b.jsonl"


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "notes.pdf", b"x")
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("absent.jsonl", "*.jsonl", "empty", "pipe.txt"):
        with pytest.raises(CorpusError, match=name.replace("*", r"\*")):
            find_inputs([f"{tmp_path}/{name}"])
    with pytest.raises(ConfigError, match=r"ending '.pdf' tells no format"):
        find_inputs([f"{tmp_path}/notes.pdf"])
    assert find_inputs([f"{tmp_path}/notes.pdf"], format="text")[0].format == "text"
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        find_inputs([str(tmp_path)], format="parket")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    (file,) = find_inputs([str(write(tmp_path / "x.txt", b"one"))])
    file.check_unchanged()
    write(file.path, b"other")
    with pytest.raises(CorpusError, match=r"x\.txt changed"):
        file.check_unchanged()


# ---- what can be wrong -------------------------------------------------------------------------

BROKEN_LINES = {
    "no-json": (b'{"text": ', "no JSON"),
    "surrogate": (b'{"text": "\\ud800"}', "surrogates not allowed"),
    "raw-nul": (b'{"text": "a\0b"}', "no JSON: Invalid control character"),
    "utf-8": (b'{"text": "\xff"}', "not UTF-8"),
    "utf-8-surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "nested": (b"[" * 100_000, "no JSON"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "no JSON"),
    "no-object": (b"[1]", "no JSON object"),
    "no-text": (b'{"txt": "a"}', "no 'text'"),
    "number": (b'{"text": 5}', "no string but int"),
    "null": (b'{"text": null}', "no string but NoneType"),
    "empty": (b'{"text": ""}', "empty"),
    "long-text": (json.dumps({"text": "x" * (MAX_TEXT + 1)}).encode(), "8,388,609 characters"),
}


@pytest.mark.parametrize("fault", BROKEN_LINES)
@pytest.mark.parametrize("last", [False, True])
def test_a_broken_line_is_shown_and_the_rest_is_read(
    tmp_path: Path, fault: str, last: bool
) -> None:
    line, why = BROKEN_LINES[fault]
    good = [b'{"text": "good"}'] * 2
    lines = [*good, line] if last else [good[0], line, good[1]]
    read, told = reasons(write(tmp_path / "x.jsonl", b"\r\n".join(lines)))
    assert read == ["good", "good"]
    assert len(told) == 1
    assert told[0].startswith(f"x.jsonl:{3 if last else 2}: ")
    assert why in told[0]
    assert len(told[0]) < 250


def test_escaped_nul_and_byte_order_mark_are_fine(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a\\u0000b"}')
    assert reasons(file) == (["a\0b"], [])


def test_text_lines_that_are_broken(tmp_path: Path) -> None:
    read, why = reasons(write(tmp_path / "x.txt", b"good\nnul\0\n\xff\nlast"))
    assert read == ["good\nlast"]
    assert [reason.split(": ")[0] for reason in why] == ["x.txt:2", "x.txt:3"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    file = write(tmp_path / "x.txt", "\ufeffsome text\n".encode(encoding))
    with pytest.raises(CorpusError, match=r"x\.txt is UTF-16; convert it"):
        texts(file)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_enormous_line_is_not_held(tmp_path: Path, compression: str) -> None:
    """100 MB in one line; the peak is far below that."""
    import tracemalloc

    file = tmp_path / f"x.jsonl{compression}"
    long = b'{"text": "' + b"y" * 100_000_000 + b'"}'
    write(file, b'{"text": "a"}\n' + long + b'\n{"text": "b"}')
    tracemalloc.start()
    try:
        read, why = reasons(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == ["a", "b"]
    assert why == [
        "x.jsonl" + compression + ":2: the line has 100,000,012 bytes; the limit is 67,108,864"
    ]
    assert peak < 110_000_000  # the 67 MB that a line may have, and some blocks


def test_lines_at_the_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "x.txt", b"12345\n123456\n\n1234\n123456")
    assert list(read_lines(file, "", limit=5)) == [b"12345", 6, b"", b"1234", 6]
    assert list(read_lines(write(tmp_path / "y.txt", b""), "")) == []


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "flipped"])
def test_damaged_compression_is_an_error(tmp_path: Path, compression: str, damage: str) -> None:
    content = b"".join(
        b'{"text": "%d %s"}\n' % (i, os.urandom(8).hex().encode()) for i in range(5000)
    )
    file = write(tmp_path / f"x.jsonl{compression}", content)
    raw = bytearray(file.read_bytes())
    if damage == "cut":
        del raw[-40:]
    elif damage == "garbage":
        raw[:] = b"this is no archive"
    else:
        raw[len(raw) // 2] ^= 0xFF
    file.write_bytes(raw)
    with pytest.raises(CorpusError, match=rf"cannot read .*x\.jsonl\{compression}"):
        texts(file)


def test_two_zstd_frames_are_one_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(zstandard.compress(b'{"text": "a"}\n{"te') + zstandard.compress(b'xt": "b"}'))
    assert texts(file) == ["a", "b"]


@pytest.mark.parametrize("damage", ["cut", "no-text", "null"])
def test_parquet_faults(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "x.parquet"
    rows = [{"text": "a"}, {"text": None}] if damage == "null" else [{"body": "a"}] * 1000
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(CorpusError, match=r"cannot read .*x\.parquet"):
            texts(file)
        return
    read, why = reasons(file)
    assert read == (["a"] if damage == "null" else [])
    assert why[0] == (
        "x.parquet, row 2: its 'text' is no string but NoneType"
        if damage == "null"
        else "x.parquet, row 1: it has no 'text'"
    )


def test_too_many_broken_lines_stop_the_reading(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", b'{"text": "a"}\noops\nagain\n{"text": "b"}')
    assert texts(file, report=ReadReport(max_broken=2)) == ["a", "b"]
    with pytest.raises(
        CorpusError, match=r"more than 1 broken lines \(x\.jsonl:2: no JSON.*jsonl:3"
    ):
        texts(file, report=ReadReport(max_broken=1))
    with pytest.raises(CorpusError, match="more than 0"):
        texts(file, report=ReadReport(max_broken=0))
