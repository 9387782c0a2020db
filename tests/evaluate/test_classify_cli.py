"""`optlm classify` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optlm.cli import run


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    path = tmp_path / "shots.jsonl"
    lines = [
        {"text": f"the {w} {i}", "label": ("good", "bad")[i % 2]} for i, w in enumerate("abcd")
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_texts_of_a_file(
    folders: dict[str, Path], tmp_path: Path, shots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\n\nthe rain\n", encoding="utf-8")
    common = ["--labels", "good,bad", "-m", str(folders["base"]), "--shots", str(shots)]
    assert run(["classify", str(texts), *common]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["the cat", "the rain"]
    more = ["--json", "--method", "calibrated", "--orders", "2", "--template", r"{text}\nkind:"]
    assert run(["classify", str(texts), *common, *more]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["shots"] for answer in answers] == [4, 4]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_a_report(
    folders: dict[str, Path], tmp_path: Path, shots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"text": "x", "label": "good"}\n{"text": "y", "label": "bad"}\n')
    common = ["classify", str(items), "--labels", "good,bad", "-m", str(folders["base"])]
    assert run([*common, "--shots", str(shots), "--report", "2"]) == 0
    assert "accuracy over orders" in capsys.readouterr().out
    assert run([*common, "--shots", str(shots), "--report", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["influence"]) == 2
    assert run([*common, "--report", "2"]) == 2
    assert "give --shots FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "a,b"], "give a FILE"),
        (["--text", "x", "--labels", "a,"], "label '' is empty"),
        (["--text", "x", "--labels", "a,a b"], "begins the label"),
        (["--text", "x", "--labels", "a,b", "--template", "t"], "one place for the text"),
        (["--text", "x", "--labels", "a,b", "--method", "m"], "use one of plain"),
        (["--text", "", "--labels", "a,b"], "text 0 is empty"),
        (["--text", "x " * 3000, "--labels", "a,b"], "a query is never cut"),
    ],
)
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["classify", *words]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_not_utf8(
    tmp_path: Path, shots: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9\n")
    for words in ([str(latin)], [str(shots), "--shots", str(latin)]):
        assert run(["classify", *words, "--labels", "good,bad"]) == 2
        assert "latin.txt is not UTF-8 (byte 3)" in capsys.readouterr().err
