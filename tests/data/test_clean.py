"""`optlm data clean`: what goes, what is told about it, and that nothing is left half done."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from test_rules import GOOD

from optlm.cli import run
from optlm.data.clean import CleanConfig, clean
from optlm.data.inputs import find_inputs
from optlm.data.overlap import HeldOut
from optlm.data.records import read_records
from optlm.data.report import CorpusError, ReadReport
from optlm.data.rules import Document, choose_rules
from optlm.errors import ConfigError


def numbered(number: int) -> str:
    """Prose of 50 words that shares no five in a row with other numbers."""
    return " ".join(f"{word} and{number}x{i} the" for i, word in enumerate(GOOD.split()[:30]))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    texts = [numbered(i) for i in range(10)]
    texts += [texts[3], "too short", texts[4] + " and more", "12 " * 60, texts[4]]
    records = [{"text": text, "source": f"s{i}"} for i, text in enumerate(texts)]
    return write(tmp_path / "raw.jsonl", records)


def kept(path: Path) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(find_inputs([str(path)]), ReadReport())]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_what_stays_and_what_is_told(tmp_path: Path, raw: Path, ending: str) -> None:
    out = tmp_path / f"out{ending}"
    before = set(tmp_path.iterdir())
    config = CleanConfig(rules=choose_rules(["gopher"]))
    report = clean(find_inputs([str(raw)]), out, config)
    assert [record["source"] for record in kept(out)] == [f"s{i}" for i in range(10)]
    dropped = {rule["name"]: rule["dropped"] for rule in report["rules"] if rule["dropped"]}
    assert dropped == {
        "gopher-words-min": 1,
        "gopher-word-length-min": 1,
        "exact-duplicates": 2,
        "near-duplicates": 1,
    }
    assert (report["read"], report["kept"]) == (15, 10)
    near = report["rules"][-1]["examples"][0]
    assert (near["place"], near["of_place"]) == ("raw.jsonl:13", "raw.jsonl:5")
    assert near["text"].startswith(numbered(4)[:100])
    assert near["value"] > 0.8
    beside = Path(f"{out}.report.json")
    assert json.loads(beside.read_text()) == report
    assert set(tmp_path.iterdir()) == before | {out, beside}
    again = tmp_path / f"again{ending}"
    assert clean(find_inputs([str(raw)]), again, config)["sha256"] == report["sha256"]


def test_duplicates_may_stay(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out.jsonl"
    clean(find_inputs([str(raw)]), out, CleanConfig(exact=False, near=None))
    assert kept(out) == kept(raw)
    clean(find_inputs([str(raw)]), out, CleanConfig(near=None))
    assert len(kept(out)) == 13


def test_what_resembles_the_reference_goes(tmp_path: Path, raw: Path) -> None:
    """The reference wins, and is not written itself."""
    records = [{"text": "unrelated"}, {"text": numbered(7) + " end"}]
    reference = write(tmp_path / "ref.jsonl", records)
    out = tmp_path / "out.jsonl"
    report = clean(
        find_inputs([str(raw)]), out, CleanConfig(), reference=find_inputs([str(reference)])
    )
    assert "s7" not in [record["source"] for record in kept(out)]
    assert [record["source"] for record in kept(out)][:7] == [f"s{i}" for i in range(7)]
    (example, *_) = report["rules"][-1]["examples"]
    assert (example["place"], example["of_place"]) == ("raw.jsonl:8", "ref.jsonl:2")


def test_prompts_are_judged_with_their_responses(tmp_path: Path) -> None:
    pairs = [{"prompt": numbered(i % 3), "response": "yes", "id": i} for i in range(6)]
    raw = write(tmp_path / "pairs.jsonl", pairs)
    clean(find_inputs([str(raw)]), tmp_path / "out.jsonl", CleanConfig())
    assert kept(tmp_path / "out.jsonl") == pairs[:3]
    with pytest.raises(ConfigError, match=r"pairs\.jsonl:1 is a prompt with its response"):
        clean(find_inputs([str(raw)]), tmp_path / "o.jsonl", CleanConfig(c4_lines=True))


def test_c4_lines_change_texts(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw.jsonl", [{"text": f"Menu\n{GOOD}\nFooter", "source": "s"}])
    report = clean(
        find_inputs([str(raw)]),
        tmp_path / "out.jsonl",
        CleanConfig(rules=choose_rules(["c4"]), c4_lines=True),
    )
    assert kept(tmp_path / "out.jsonl") == [{"text": GOOD, "source": "s"}]
    assert report["lines_dropped"] == {"no terminal punctuation": 2}


# ---- evaluation files --------------------------------------------------------------------------


def test_overlap_with_evaluation_files(tmp_path: Path) -> None:
    quoted = " ".join(f"q{i}" for i in range(30))
    short = "one of only eight words in a row"
    evaluation = write(
        tmp_path / "eval.jsonl",
        [
            {"question": quoted, "choices": ["yes", "no"]},
            {"deep": [{"er": short}]},
            {"question": "never seen " * 10},
            {"question": "too short"},
        ],
    )
    texts = [
        numbered(0) + " " + quoted[:60].title() + "! " + numbered(1),  # 13 words and some
        numbered(2) + " " + " ".join(quoted.split()[:12]),  # one word less than looked for
        f"{numbered(3)}. {short.upper()}",
        numbered(4),
    ]
    raw = write(tmp_path / "raw.jsonl", [{"text": text} for text in texts])
    files, held_out = find_inputs([str(raw)]), find_inputs([str(evaluation)])
    report = clean(files, tmp_path / "out.jsonl", CleanConfig(), held_out=held_out)
    assert [record["text"] for record in kept(tmp_path / "out.jsonl")] == [texts[1], texts[3]]
    (told,) = report["held_out"]
    assert (told["records"], told["checked"], told["overlapping"], told["documents"]) == (
        4,
        3,
        2,
        2,
    )
    assert told["examples"] == ["record 1 in raw.jsonl:1", "record 2 in raw.jsonl:3"]
    clean(files, tmp_path / "out.jsonl", CleanConfig(overlap=10), held_out=held_out)
    assert len(kept(tmp_path / "out.jsonl")) == 4


def test_overlap_counts_are_the_plain_ones(tmp_path: Path) -> None:
    words = [f"w{i % 40}" for i in range(90)]
    held = write(tmp_path / "eval.jsonl", [{"text": " ".join(words[10:60])}])
    text = " ".join([*words[:50], *words[20:70]])
    counted = HeldOut(find_inputs([str(held)])).count(Document(text).words, "here")
    list_of = text.split()
    grams = {tuple(words[i : i + 13]) for i in range(10, 48)}
    assert counted == sum(tuple(list_of[i : i + 13]) in grams for i in range(len(list_of) - 12))


@pytest.mark.parametrize(
    ("content", "message"), [('{"q": "too short"}', "nothing to look for"), ("{oops", "broken")]
)
def test_useless_evaluation_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "eval.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=message):
        HeldOut(find_inputs([str(tmp_path / "eval.jsonl")]))


# ---- what goes wrong ---------------------------------------------------------------------------


def test_nothing_half_written_is_left(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    told = 0

    def interrupt(count: int) -> None:
        nonlocal told
        told += 1
        if told == 2:  # in the second pass
            raise KeyboardInterrupt

    files = find_inputs([str(raw)])
    with pytest.raises(KeyboardInterrupt):
        clean(files, tmp_path / "out.jsonl", CleanConfig(), progress=interrupt)
    assert set(tmp_path.iterdir()) == before

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorpusError, match=r"cannot write .*out\.jsonl.*No space left"):
        clean(files, tmp_path / "out.jsonl", CleanConfig())
    assert set(tmp_path.iterdir()) == before


def test_an_input_that_changes_between_the_passes(tmp_path: Path, raw: Path) -> None:
    files = find_inputs([str(raw)])
    with pytest.raises(CorpusError, match="changed while it was read"):
        clean(files, tmp_path / "o.jsonl", CleanConfig(), progress=lambda n: raw.write_text("{}"))
    assert not (tmp_path / "o.jsonl").exists()


def test_when_nothing_stays_the_reasons_are_told(tmp_path: Path) -> None:
    raw = write(tmp_path / "raw.jsonl", [{"text": "short"}] * 3)
    with pytest.raises(CorpusError, match=r"nothing stays of 3 documents \(gopher-words-min 3"):
        clean(
            find_inputs([str(raw)]),
            tmp_path / "o.jsonl",
            CleanConfig(rules=choose_rules(["gopher"])),
        )
    assert set(tmp_path.iterdir()) == {raw}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--out", "{}/raw.jsonl"], 2, "is an input"),
        (["--out", "{}/x.csv"], 2, "must end in .jsonl"),
        (["--out", "{}/absent/x.jsonl"], 1, "cannot write"),
        (["--out", "{}/x.jsonl", "--near", "2"], 2, "must lie above 0"),
        (["--out", "{}/x.jsonl", "--limit", "gopher-symbols"], 2, "is not RULE=NUMBER"),
        (["--out", "{}/x.jsonl", "--rules", "gofer"], 2, "did you mean 'gopher'"),
        (["--out", "{}/x.jsonl", "--overlap", "-1"], 2, "use 0 or more"),
        (["--out", "{}/x.jsonl", "--memory", "0"], 2, "needs at least"),
        (["--out", "{}/x.jsonl", "--max-broken", "-1"], 2, "use 0 or more"),
        (["--out", "{}/x.jsonl", "--held-out", "{}/none.jsonl"], 1, "no such file"),
        (["--out", "{}/x.jsonl", "--split", "page"], 2, "split is 'page'"),
    ],
)
def test_bad_options(
    raw: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    before = set(raw.parent.iterdir())
    options = [option.format(raw.parent) for option in options]
    assert run(["data", "clean", str(raw), *options]) == code
    assert message in capsys.readouterr().err
    assert set(raw.parent.iterdir()) == before


def test_the_command_and_its_report(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = raw.with_name("out.jsonl")
    arguments = ["data", "clean", str(raw), "--out", str(out), "--limit", "gopher-words-min=1"]
    assert run([*arguments, "--without", "gopher-word-length-min,gopher-alphabetic"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("10 of 15 documents kept")
    assert re.search(r"^near-duplicates +similarity below 0.8 +1$", text, re.MULTILINE)
    assert "like raw.jsonl:5: The and4x0 the" in text
    assert run([*arguments, "--json", "--rules", "gopher,c4", "--no-near"]) == 1  # nothing stays
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 10
