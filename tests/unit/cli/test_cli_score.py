"""`optlm score`: what it prints, what it writes, and how it goes on after an end."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import pytest
from cli_run import Run

from optlm import LLM
from optlm.score import Scorer, document, word_scores
from variants import VARIANTS

TEXT = "the cat sat on the mat"
PAIRS = [("the cat sat", "the cat cat"), ("the mat", "mat the"), ("on the mat", "on mat the")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_score_is_the_engine_s(run: Run, models: dict[str, Path], variant: str) -> None:
    result = run("score", "--text", TEXT, "-m", models[variant], "--json", "--threads", 1)
    record = json.loads(result.out)
    scored = LLM(models[variant], threads=1).score(TEXT)[0]
    assert record["nll"] == pytest.approx(-scored.total, rel=1e-6)
    assert record["tokens"] == scored.num_scored == len(scored.token_ids) - 1
    assert record["bytes"] == len(TEXT)
    assert record["bits_per_byte"] == pytest.approx(scored.bits_per_byte)
    assert record["perplexity"] == pytest.approx(scored.perplexity)


def test_score_lists_tokens_and_totals(run: Run, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT + "\n", encoding="utf-8")
    plain = run("score", file, "-m", base).out.splitlines()
    listed, totals = plain[:-4], plain[-4]
    tokens = [json.loads(line.split(maxsplit=1)[1]) for line in listed]
    assert "".join(tokens) == TEXT
    total = sum(float(line.split()[0]) for line in listed)
    assert totals.startswith(f"log-probability {total:.2f}"[:-1])
    assert "bits per byte" in totals
    assert plain[-3].startswith("convention optlm: window 64, stride 32")
    piped = run("score", "-", "-m", base, "--no-tokens", stdin=TEXT.encode()).out
    assert piped.splitlines() == plain[-4:]


def test_score_by_line(run: Run, base: Path) -> None:
    result = run("score", "-", "--lines", "--json", "--tokens", "-m", base, stdin=b"the cat\n\nmat")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["text"] for record in records] == ["the cat", "", "mat"]
    empty = {"nll": 0.0, "tokens": 0, "bytes": 0, "bits_per_byte": None, "perplexity": None}
    assert empty.items() <= records[1].items()
    assert records[1]["token_logprobs"] == []
    for record in records:
        total = math.fsum(entry["logprob"] for entry in record["token_logprobs"])
        assert total == pytest.approx(-record["nll"])
    plain = run("score", "-", "--lines", "--no-tokens", "-m", base, stdin=b"the cat\nmat").out
    assert "all  2 texts: log-probability" in plain


def test_score_of_a_text_beyond_the_context(run: Run, base: Path) -> None:
    long_text = "the cat " * 100
    record = json.loads(run("score", "--text", long_text, "-m", base, "--json").out)
    ids = LLM(base).tokenizer.encode(long_text)  # type: ignore[union-attr]
    assert record["tokens"] == len(ids) - 1 > VARIANTS["base"].max_position_embeddings


@pytest.mark.parametrize("arguments", [(), ("file", "--text", "x")])
def test_score_needs_one_source(run: Run, arguments: tuple[str, ...]) -> None:
    result = run("score", *arguments)
    assert result.code == 2
    assert "give a FILE" in result.err


# ---- levels and conventions ----------------------------------------------------------------------


def test_words(run: Run, base: Path) -> None:
    result = run("score", "-t", TEXT, "--by", "word", "-m", base, "--json")
    words = json.loads(result.out)["word_logprobs"]
    scored = Scorer(LLM(base)).tokens(TEXT, words=True)[0]
    assert [w["logprob"] for w in words] == [w.logprob for w in word_scores(scored)]
    plain = run("score", "-t", TEXT, "--by", "word", "--no-correct-words", "-m", base).out
    assert "words: sums over their tokens, not corrected" in plain


@pytest.mark.parametrize("level", ["sentence", "byte", "document"])
def test_other_levels(run: Run, base: Path, level: str) -> None:
    record = json.loads(run("score", "-t", TEXT, "--by", level, "-m", base, "--json").out)
    listed = record.get(f"{level}_logprobs", [{"logprob": -record["nll"]}])
    assert math.fsum(entry["logprob"] for entry in listed) == pytest.approx(-record["nll"])


def test_the_convention_is_told(run: Run, base: Path) -> None:
    result = run("score", "-t", TEXT, "-m", base, "--json", "--convention", "gptq", "--window", 5)
    record = json.loads(result.out)
    assert record["convention"]["convention"] == "gptq"
    assert record["convention"]["window"] == 5
    scored = Scorer(LLM(base), convention="gptq", window=5).tokens(TEXT)
    assert record["perplexity"] == pytest.approx(document(scored).perplexity)


def test_after_a_context(run: Run, base: Path) -> None:
    result = run("score", "-t", " on the mat", "--context", "the cat sat", "-m", base, "--json")
    record = json.loads(result.out)
    scored = Scorer(LLM(base)).continuations("the cat sat", [" on the mat"])[0]
    assert record["nll"] == pytest.approx(-scored.total)
    assert record["greedy"] == scored.is_greedy


# ---- tables --------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    rows = [{"good": g, "bad": b, "kind": f"k{i % 2}"} for i, (g, b) in enumerate(PAIRS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_pairs(run: Run, base: Path, pairs: Path, tmp_path: Path) -> None:
    out = run("score", pairs, "--pairs", "--group", "kind", "-m", base, "--json").out
    lines = [json.loads(line) for line in out.splitlines()]
    records, groups = lines[:3], lines[3:]
    scored = Scorer(LLM(base)).pairs(PAIRS)
    assert [r["margin"] for r in records] == pytest.approx([pair.margin for pair in scored])
    right = [pair.is_right for pair in scored]
    assert groups[0]["accuracy"] == sum(right) / 3
    assert groups[0]["accuracy_low"] < groups[0]["accuracy"] + 1e-9 < groups[0]["accuracy_high"] + 1
    assert [g["group"] for g in groups] == ["all", "k0", "k1"]
    table = tmp_path / "pairs.tsv"
    for head in ("", "wrong\tright\n"):
        rows = "".join(f"{b}\t{g}\n" if head else f"{g}\t{b}\n" for g, b in PAIRS)
        table.write_text(head + rows, encoding="utf-8")
        named = ["--fields", "right,wrong"] if head else []
        plain = run("score", table, "--pairs", "-m", base, *named).out
        assert plain.startswith(f"all  {sum(right) / 3:.1%} right")
    packed = tmp_path / "packed.tsv.gz"
    packed.write_bytes(gzip.compress(table.read_bytes()))
    assert run("score", packed, "--pairs", "-m", base, "--fields", "right,wrong").out == plain


def test_endings(run: Run, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"context": "the cat", "endings": [" sat", " mat"], "gold": 0},
            {"context": "on the", "endings": [" mat", " rain"], "gold": 1}]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = run("score", file, "--endings", "-m", base, "--json", "--normalize", "bytes").out
    *records, summary = [json.loads(line) for line in out.splitlines()]
    for row, record in zip(rows, records, strict=True):
        ranking = Scorer(LLM(base)).rank(row["context"], row["endings"], normalize="bytes")
        assert record["scores"] == pytest.approx(ranking.scores)
        assert record["best"] == ranking.best
        assert record["right"] == (ranking.best == row["gold"])
    assert summary["accuracy"] == sum(record["right"] for record in records) / 2


def test_parquet(run: Run, base: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"text": [TEXT, "the rain"]}), file)
    out = run("score", file, "-m", base, "--json").out
    assert [json.loads(line)["text"] for line in out.splitlines()] == [TEXT, "the rain"]


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_of_results_is_gone_on_with(run: Run, base: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.jsonl"
    text.write_text("\n".join([TEXT, "", "the rain", "home again"]), encoding="utf-8")
    arguments = ["score", text, "--lines", "-m", base, "-o", out]
    whole = run(*arguments)
    assert whole.code == 0
    written = out.read_bytes()
    assert len(written.splitlines()) == 5
    for cut in (0, 20, len(written) // 2, len(written) - 3, len(written)):
        out.write_bytes(written[:cut])
        again = run(*arguments)
        assert again.code == 0, again.err
        assert out.read_bytes() == written
        assert again.out == whole.out
    assert "4 records are there; going on after them" in again.err


def test_results_of_another_run_are_not_mixed(run: Run, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run("score", "-t", TEXT, "-m", base, "-o", out).code == 0
    other = run("score", "-t", TEXT, "-m", base, "-o", out, "--convention", "gptq")
    assert other.code == 2
    assert "holds results of another run: " in other.err
    assert "remove this one" in other.err
    out.write_text("something else\n", encoding="utf-8")
    assert "is no result of optlm score" in run("score", "-t", TEXT, "-m", base, "-o", out).err


def test_csv(run: Run, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert run("score", "-t", TEXT, "-m", base, "-o", out, "--by", "word").code == 0
    comment, *rows = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(comment.removeprefix("# "))["convention"] == "optlm"
    assert [row["text"].strip() for row in csv.DictReader(rows)] == TEXT.split()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", ""], "--text is empty"),
        (["-t", "x", "--by", "words"], "did you mean 'word'"),
        (["-t", "x", "--by", "word", "--tokens"], "give one"),
        (["-t", "x", "--pairs"], "--pairs reads tables"),
        (["-t", "x", "--group", "kind"], "--fields and --group are of tables"),
        (["-t", "x", "-o", "out.xml"], "must end in .jsonl or .csv"),
        (["-t", "x", "--context", "y", "--by", "byte"], "--context lists tokens or nothing"),
        (["-t", "x", "--convention", "lmeval"], "did you mean 'lm-eval'"),
        (["-t", "x", "--stride", "64"], "stride is 64"),
        (["none.jsonl", "--pairs"], "none.jsonl"),
        (["none.txt"], "none.txt"),
    ],
)
def test_bad_options(run: Run, base: Path, arguments: list[str], message: str) -> None:
    result = run("score", *arguments, "-m", base)
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", b'{"good": "a"}\n', "--pairs", "a.jsonl:1: there is no field 'bad'"),
        ("a.jsonl", b'{"good": "a", "bad": 3}\n', "--pairs", "'bad' is no text but int"),
        ("a.jsonl", b'{"good": "a", "bad": ""}\n', "--pairs", "'bad' is empty"),
        ("a.jsonl", b"[1]\n", "--pairs", "it is no JSON object but list"),
        ("a.jsonl", b"{oops\n", "--pairs", "no JSON"),
        ("a.tsv", b"a\tb\tc\n", "--pairs", "3 columns, not 2"),
        ("a.tsv", b"a\t\xff\n", "--pairs", "not UTF-8"),
        ("a.txt", b"caf\xe9", "--lines", "a.txt is not UTF-8"),
        ("a.txt", b"", "--lines", "a.txt is empty"),
        ("a.jsonl", b'{"context": "a", "endings": "b"}\n', "--endings", "is no list of texts"),
        ("a.jsonl", b'{"context": "a", "endings": ["b"]}\n', "--endings",
         "a.jsonl:1: endings are ['b']; a ranking needs a list of at least two"),
        ("a.jsonl", b'{"context": "a", "endings": [" b", " b c"]}\n', "--endings",
         "is the beginning of ending 1"),
        ("a.jsonl", b'{"context": "a", "endings": [" b", " "]}\n', "--endings", "must be a text"),
    ],
)  # fmt: skip
def test_bad_files(
    run: Run, base: Path, tmp_path: Path, name: str, content: bytes, kind: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("score", tmp_path / name, kind, "-m", base)
    assert result.code in (1, 2)
    assert message in result.err
